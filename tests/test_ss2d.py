"""SS2D: every back end against the plain loop, the operator against everything PyTorch does, processes and memory."""

from __future__ import annotations

import logging
import os

import pytest
import scan_cases
import test_selective_scan_backends
import torch
from scan_cases import CPU_BACKENDS, HAS_NUMBA, TOLERANCES, every_backend, gradients_of, relative_error
from test_selective_scan import run_python

from nnunetv2_smallseg import ops
from nnunetv2_smallseg.errors import SmallSegError
from nnunetv2_smallseg.ops import dispatch, ss2d, ss2d_reference
from nnunetv2_smallseg.ops.arguments import CHUNK_STEPS, canonical_inputs

quiet_dispatch = scan_cases.quiet_dispatch
use_backend = scan_cases.use_backend
fake_mamba = test_selective_scan_backends.fake_mamba

SHAPES = (
    {"batch": 2, "height": 9, "width": 13, "channels": 70, "rank": 3, "states": 3},
    {"batch": 1, "height": 16, "width": 8, "channels": 8, "rank": 4, "states": 16},
    {"batch": 1, "height": 7, "width": 11, "channels": 130, "rank": 5, "states": 1},
    {"batch": 2, "height": 1, "width": 67, "channels": 5, "rank": 1, "states": 3},
    {"batch": 1, "height": 66, "width": 1, "channels": 5, "rank": 1, "states": 1},
    {"batch": 1, "height": 1, "width": 1, "channels": 1, "rank": 1, "states": 1},
)


def make_map(
    batch=2, height=9, width=11, channels=6, rank=2, states=3, dtype=torch.float64, requires_grad=True, seed=0
):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tensors = {
        "x": draw(batch, height, width, channels),
        "x_proj_weight": draw(4, rank + 2 * states, channels) * channels**-0.5,
        "dt_projs_weight": draw(4, channels, rank) * rank**-0.5,
        "dt_projs_bias": draw(4, channels) - 1,
        "A_logs": 0.5 * draw(4 * channels, states),
        "Ds": draw(4 * channels),
    }
    return {name: x.to(dtype).requires_grad_(requires_grad) for name, x in tensors.items()}


def assert_agrees(tensors, tolerance=1e-9):
    """ss2d equals the differentiated reference, output and all gradients."""
    out, gradients = gradients_of(ss2d, tensors)
    expected_out, expected = gradients_of(ss2d_reference, tensors)
    assert out.dtype == tensors["x"].dtype
    assert out.is_contiguous()
    assert relative_error(out, expected_out) < tolerance
    wanted = [name for name, x in tensors.items() if x.requires_grad]
    for name, gradient, target in zip(wanted, gradients, expected, strict=True):
        assert gradient.shape == target.shape
        assert gradient.dtype == target.dtype
        assert relative_error(gradient, target) < tolerance, name


# Values and gradients


@every_backend
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_the_reference(use_backend, backend, dtype, shape):
    use_backend(backend)
    assert_agrees(make_map(**shape, dtype=dtype), TOLERANCES[dtype])


@every_backend
def test_directions_are_rows_columns_and_both_backwards(use_backend, backend):
    """Direction by direction, a brighter pixel changes itself and the pixels visited after it, and no others."""
    use_backend(backend)
    rows, columns = torch.arange(12).view(3, 4), torch.arange(12).view(4, 3).T
    for direction, visited in enumerate((rows, columns, 11 - rows, 11 - columns)):
        tensors = make_map(batch=1, height=3, width=4, channels=1, rank=1, states=1, requires_grad=False)
        tensors["x"].fill_(0.1)
        tensors["Ds"].zero_()
        # Without B and C, a direction gives nothing.
        tensors["x_proj_weight"] = torch.zeros(4, 3, 1, dtype=torch.float64)
        tensors["x_proj_weight"][direction] = 1.0
        before = ss2d(**tensors)
        tensors["x"][0, 1, 2] = 1.0
        changed = (ss2d(**tensors) - before)[0, :, :, 0].abs() > 1e-12
        assert torch.equal(changed, visited >= visited[1, 2])


@pytest.mark.skipif(not HAS_NUMBA, reason="numba is not installed")
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("channels", [40, 200])
def test_division_of_the_work(use_backend, threads, channels):
    """Rows and columns apart, and channel blocks in parts, give what one task gives."""
    use_backend("cpu")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_agrees(make_map(batch=1, height=10, width=9, channels=channels, rank=2, states=1))
    finally:
        torch.set_num_threads(before)


@every_backend
def test_large_steps_stay_finite_and_nan_is_not_hidden(use_backend, backend):
    use_backend(backend)
    tensors = make_map(dtype=torch.float32)
    tensors["dt_projs_bias"] = (tensors["dt_projs_bias"].detach() + 60).requires_grad_()
    assert_agrees(tensors, 1e-4)
    bad = make_map(dtype=torch.float32, requires_grad=False)
    bad["x"][0, 0, 0, 0] = torch.nan
    out = ss2d(**bad)
    assert out[0].isnan().all()
    assert out[1].isfinite().all()


@every_backend
def test_non_contiguous_inputs_and_gradient(use_backend, backend):
    use_backend(backend)
    tensors = make_map()
    twisted = {
        name: x.detach().transpose(-1, -2).contiguous().transpose(-1, -2).requires_grad_() if x.ndim > 1 else x
        for name, x in tensors.items()
    }
    # Channel-first, and every second channel of a wider map.
    for x in (torch.randn(2, 6, 9, 11).double().permute(0, 2, 3, 1), torch.randn(2, 9, 11, 12).double()[..., ::2]):
        assert_agrees({**twisted, "x": x.requires_grad_()})
    out = ss2d(**tensors)
    summed = torch.autograd.grad(out.sum(), tensors["x"], retain_graph=True)[0]
    assert torch.equal(summed, torch.autograd.grad(out, tensors["x"], torch.ones_like(out))[0])


@every_backend
def test_empty_batch(use_backend, backend):
    use_backend(backend)
    out, gradients = gradients_of(ss2d, make_map(batch=0))
    assert out.shape == (0, 9, 11, 6)
    assert all((x == 0).all() for x in gradients)


@every_backend
@pytest.mark.parametrize("wanted", [("x",), ("A_logs", "dt_projs_bias"), ("x_proj_weight",)], ids=str)
def test_only_some_gradients(use_backend, backend, wanted):
    use_backend(backend)
    assert_agrees({name: x.detach().requires_grad_(name in wanted) for name, x in make_map().items()})


@every_backend
def test_used_twice_in_one_graph(use_backend, backend):
    use_backend(backend)

    def twice(function):
        tensors = make_map()
        first = function(**tensors)
        second = function(**{**tensors, "x": first})
        return torch.autograd.grad((first * second).sum(), list(tensors.values()))

    for gradient, target in zip(twice(ss2d), twice(ss2d_reference), strict=True):
        assert relative_error(gradient, target) < 1e-9


@every_backend
def test_gradcheck(use_backend, backend):
    use_backend(backend)
    tensors = make_map(batch=1, height=2, width=3, channels=2, rank=1, states=2)
    assert torch.autograd.gradcheck(lambda *x: ss2d(*x), list(tensors.values()))


# Types


@every_backend
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_map_is_computed_in_float32(use_backend, backend, autocast):
    use_backend(backend)
    half = make_map(dtype=torch.float32)
    half["x"] = half["x"].detach().bfloat16().requires_grad_()
    single = {name: x.detach().float().requires_grad_() for name, x in half.items()}
    expected_out, expected = gradients_of(ss2d_reference, single)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out, gradients = gradients_of(ss2d, half)
    assert out.dtype == torch.bfloat16
    assert relative_error(out, expected_out) < 2e-2
    for (name, x), gradient, target in zip(half.items(), gradients, expected, strict=True):
        assert gradient.dtype == x.dtype
        assert relative_error(gradient, target) < 2e-2, name


def test_autocast_changes_nothing_in_float32():
    tensors = make_map(dtype=torch.float32, requires_grad=False)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ss2d(**tensors), out := ss2d(**tensors))
    assert torch.equal(out, ss2d(**tensors))


def test_one_float64_input_makes_it_float64():
    tensors = make_map(dtype=torch.float32, requires_grad=False)
    tensors["A_logs"] = tensors["A_logs"].double()
    exact = ss2d_reference(**{name: x.double() for name, x in tensors.items()})
    out = ss2d(**tensors)
    assert out.dtype == torch.float32
    assert relative_error(out, exact) < 1e-7


# What PyTorch does with the operator


@pytest.mark.parametrize("backend", [b for b in CPU_BACKENDS if b != "reference"])
@pytest.mark.parametrize("keep_states", [True, False])
def test_opcheck(use_backend, backend, keep_states):
    use_backend(backend)
    tensors = make_map(height=4, width=3, channels=4, dtype=torch.float32)
    torch.library.opcheck(torch.ops.nnunetv2_smallseg.ss2d.default, (*tensors.values(), keep_states))


def test_opcheck_backward():
    tensors = make_map(channels=4, requires_grad=False)
    _, states = torch.ops.nnunetv2_smallseg.ss2d(*tensors.values(), True)
    arguments = (torch.ones_like(tensors["x"]), *tensors.values(), states)
    torch.library.opcheck(torch.ops.nnunetv2_smallseg.ss2d_backward.default, arguments)


@every_backend
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles(use_backend, backend, dynamic):
    use_backend(backend)
    torch._dynamo.reset()

    def function(*tensors):
        return ss2d(*tensors) * 2

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for width in (11, 12) if dynamic else (11,):
        values = list(make_map(width=width).values())
        out, eager = compiled(*values), function(*values)
        assert torch.equal(out, eager)
        expected = torch.autograd.grad(eager.sum(), values)
        assert all(torch.equal(x, y) for x, y in zip(torch.autograd.grad(out.sum(), values), expected, strict=True))


class SS2DModule(torch.nn.Module):
    def __init__(self, tensors):
        super().__init__()
        self.weights = torch.nn.ParameterList(list(tensors.values())[1:])

    def forward(self, x):
        return ss2d(x, *self.weights)


def test_exports_to_one_node():
    tensors = make_map(requires_grad=False)
    module = SS2DModule(tensors)
    exported = torch.export.export(module, (tensors["x"],))
    targets = [node.target for node in exported.graph.nodes if node.op == "call_function"]
    assert targets.count(torch.ops.nnunetv2_smallseg.ss2d.default) == 1
    assert torch.equal(exported.module()(tensors["x"]), module(tensors["x"]))


def test_meta_tensors():
    tensors = {name: x.detach().to("meta").requires_grad_() for name, x in make_map().items()}
    out = ss2d(**tensors)
    assert (out.device.type, out.shape) == ("meta", (2, 9, 11, 6))
    out.sum().backward()
    assert all(x.grad.shape == x.shape for x in tensors.values())


def test_differentiable_when_traced_without_gradients():
    tensors = make_map()
    out, states = torch.ops.nnunetv2_smallseg.ss2d(*tensors.values(), False)
    assert states.shape == (0,)
    gradients = torch.autograd.grad(out.sum(), list(tensors.values()))
    expected = torch.autograd.grad(ss2d(**tensors).sum(), list(tensors.values()))
    assert all(torch.equal(x, y) for x, y in zip(gradients, expected, strict=True))


# Memory


@pytest.mark.skipif(not HAS_NUMBA, reason="numba is not installed")
def test_the_fused_back_end_never_holds_four_sequences(use_backend):
    use_backend("cpu")
    tensors = make_map(batch=1, height=24, width=24, channels=192, rank=6, states=16, dtype=torch.float32)
    ss2d(**tensors)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    saved = {}
    try:
        with (
            torch.autograd.graph.saved_tensors_hooks(lambda x: saved.setdefault(x.data_ptr(), x), lambda x: x),
            torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler,
        ):
            torch.autograd.grad(ss2d(**tensors).sum(), list(tensors.values()))
    finally:
        torch.set_num_threads(before)
    size_of_map = tensors["x"].nbytes
    largest = max(event.cpu_memory_usage for event in profiler.events() if event.name == "aten::empty")
    # Rows and columns apart, when one image has to keep two threads busy.
    assert size_of_map <= largest <= 2 * size_of_map
    states = 4 * 24 * 24 // CHUNK_STEPS * 16 * 192 * 4
    weights = sum(x.nbytes for name, x in tensors.items() if name != "x")
    assert sum(x.nbytes for x in saved.values()) == size_of_map + states + weights


def test_nothing_is_kept_without_gradients():
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        ss2d(**make_map(requires_grad=False))
    assert saved == []


# Choice of the back end


def test_chosen_back_end():
    assert ops.chosen_backend_name("cpu", operator="ss2d") == ("cpu" if HAS_NUMBA else "torch")
    assert "triton" in ops.backend_availability()


def test_slow_choice_is_logged_once(monkeypatch, caplog):
    monkeypatch.setattr("nnunetv2_smallseg.ops.backend_cpu.unavailable", lambda: "numba is not installed")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            ss2d(**make_map(requires_grad=False))
    (record,) = caplog.records
    assert "pip install 'nnunetv2-smallseg[cpu]'" in record.getMessage()


def test_back_end_that_cannot_be_imported(monkeypatch, use_backend):
    monkeypatch.setitem(
        dispatch.BACKENDS, "triton", dispatch.Backend("triton", None, "", ("cuda",), "get it", ss2d_module="no.such")
    )
    assert "cannot be imported" in ops.backend_availability()["triton"]
    use_backend("triton")
    with pytest.raises(SmallSegError, match=r"not available.*To get it: get it"):
        ss2d(**make_map())


def test_back_end_without_a_scan_of_sequences():
    inputs = canonical_inputs(*scan_cases.make_inputs().values(), True)
    assert dispatch.BACKENDS["triton"].unsupported(inputs) == "it has SS2D only and no scan of sequences"


def test_self_check_sees_a_wrong_gradient(monkeypatch):
    backward = dispatch.run_ss2d_backward
    monkeypatch.setattr(
        dispatch, "run_ss2d_backward", lambda *x: (g := backward(*x))._replace(x_proj_weight=g.x_proj_weight * 1.01)
    )
    assert ops.self_check("torch") == pytest.approx(0.01, rel=1e-3)


def test_composed_of_the_scan_of_mamba_ssm(fake_mamba):
    assert_agrees(make_map(dtype=torch.float32), 1e-5)
    assert (fake_mamba[0], fake_mamba[-1]) == ("fwd", "bwd")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(9, 11, 6)}, r"x has shape \(9, 11, 6\); allowed: \(B, H, W, D\)"),
        ({"x": torch.zeros(2, 0, 11, 6)}, r"x has shape \(2, 0, 11, 6\)"),
        ({"x": torch.zeros(2, 9, 11, 6, dtype=torch.long)}, "x is torch.int64"),
        ({"A_logs": torch.zeros(6, 3)}, r"A_logs has shape \(6, 3\); allowed: \(4D, N\) = \(24, N\)"),
        ({"dt_projs_weight": torch.zeros(4, 2, 6)}, r"dt_projs_weight has shape .* = \(4, 6, R\)"),
        ({"x_proj_weight": torch.zeros(4, 7, 6)}, r"x_proj_weight has shape \(4, 7, 6\); allowed: .* = \(4, 8, 6\)"),
        ({"dt_projs_bias": torch.zeros(24)}, r"dt_projs_bias has shape \(24,\); allowed: \(4, D\) = \(4, 6\)"),
        ({"Ds": torch.zeros(4, 6)}, r"Ds has shape \(4, 6\); allowed: \(4D,\) = \(24,\)"),
        ({"Ds": 1.0}, "Ds is float"),
        ({"Ds": torch.zeros(24, device="meta")}, "Ds is on meta and x on cpu; move all tensors to one device"),
    ],
)
def test_wrong_arguments(changes, message):
    for function in (ss2d, ss2d_reference):
        with pytest.raises(ValueError, match=message):
            function(**{**make_map(requires_grad=False), **changes})


# Processes

FORK_SCRIPT = """
import os, signal, sys, torch
from nnunetv2_smallseg.ops import ss2d
torch.set_num_threads(2)
torch.manual_seed(0)
shapes = [(2, 4, 5, 70), (4, 4, 70), (4, 70, 2), (4, 70), (280, 1), (280,)]
x = [torch.randn(*shape).requires_grad_() for shape in shapes]
def run():
    out = ss2d(*x)
    return [out, *torch.autograd.grad(out.sum(), x)]
expected = run()
for _ in range(25):
    children = []
    for _ in range(8):
        child = os.fork()
        if child == 0:
            signal.alarm(60)  # a hang ends the child
            torch.set_num_threads(1)  # as nnU-Net's data loaders do: PyTorch itself hangs with more
            with torch.no_grad():
                out = ss2d(*x)
            os._exit(0 if torch.allclose(out, expected[0], rtol=1e-5, atol=1e-5) else 1)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if any(codes):
        sys.exit(f"exit codes {codes}")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.skipif(not HAS_NUMBA, reason="numba is not installed")
def test_two_hundred_forked_workers():
    """Children forked while the parent has used its threads start their own and never wait for the parent's."""
    run_python(FORK_SCRIPT)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("backend", ["triton", "torch", "mamba_ssm"])
def test_on_cuda(use_backend, backend):
    if dispatch.BACKENDS[backend].unavailable() is not None:
        pytest.skip(f"{backend} is not available")
    assert ops.self_check(backend, "cuda") < 1e-4
