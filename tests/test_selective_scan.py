"""The selective scan: every back end against stored references, and the operator against everything PyTorch does."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import scan_cases
import torch
from scan_cases import (
    CPU_BACKENDS,
    HAS_NUMBA,
    NAMES,
    TOLERANCES,
    assert_agrees,
    every_backend,
    gradients_of,
    make_inputs,
    relative_error,
)

from nnunetv2_smallseg import ops
from nnunetv2_smallseg.ops import dispatch, selective_scan, selective_scan_reference
from nnunetv2_smallseg.ops.arguments import CHUNK_STEPS, canonical_inputs

ROOT = Path(__file__).resolve().parent.parent
CASES = (
    "basic",
    "large_delta",
    "long",
    "noD_nobias",
    "nosoftplus",
    "nosoftplus_plain",
    "one_state",
    "one_step",
)

quiet_dispatch = scan_cases.quiet_dispatch
use_backend = scan_cases.use_backend


# Values and gradients


@every_backend
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_stored_reference(shared, use_backend, backend, dtype, case):
    use_backend(backend)
    stored = np.load(shared / "reference" / "swin_umamba" / f"ref_selective_scan_{case}.npz")
    tensors = {name: torch.tensor(stored[name]).to(dtype).requires_grad_() for name in NAMES if name in stored}
    softplus = bool(stored["delta_softplus"])
    out, gradients = gradients_of(selective_scan, tensors, torch.tensor(stored["dout"]), delta_softplus=softplus)
    assert relative_error(out, torch.tensor(stored["out"])) < TOLERANCES[dtype]
    for name, gradient in zip(tensors, gradients, strict=True):
        assert relative_error(gradient, torch.tensor(stored[f"d{name}"])) < TOLERANCES[dtype], name


@pytest.mark.parametrize("case", CASES)
def test_last_state_and_gradients_of_the_plain_loop(shared, case):
    stored = np.load(shared / "reference" / "swin_umamba" / f"ref_selective_scan_{case}.npz")
    tensors = {name: torch.tensor(stored[name]).requires_grad_() for name in NAMES if name in stored}
    softplus = bool(stored["delta_softplus"])
    out, last_state = selective_scan_reference(**tensors, delta_softplus=softplus, return_last_state=True)
    gradients = torch.autograd.grad(out, list(tensors.values()), torch.tensor(stored["dout"]))
    assert relative_error(out, torch.tensor(stored["out"])) < 1e-9
    assert relative_error(last_state, torch.tensor(stored["last_state"])) < 1e-9
    for name, gradient in zip(tensors, gradients, strict=True):
        assert relative_error(gradient, torch.tensor(stored[f"d{name}"])) < 1e-9, name


@every_backend
@pytest.mark.parametrize(
    "shape",
    [
        {"batch": 1, "dim": 1, "groups": 1, "states": 1, "length": 1},
        {"batch": 1, "dim": 4, "groups": 4, "states": 2, "length": CHUNK_STEPS},
        {"batch": 3, "dim": 140, "groups": 2, "states": 1, "length": CHUNK_STEPS + 1},
        {"batch": 1, "dim": 130, "groups": 1, "states": 5, "length": 3 * CHUNK_STEPS - 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("softplus", [True, False])
def test_shapes(use_backend, backend, shape, softplus):
    use_backend(backend)
    tensors = make_inputs(**shape)
    if not softplus:
        tensors["delta"] = (tensors["delta"].detach().abs() * 0.2).requires_grad_()
        tensors["delta_bias"] = None
        tensors = {name: x for name, x in tensors.items() if x is not None}
    assert_agrees(tensors, delta_softplus=softplus)


def test_torch_backend_in_small_blocks(use_backend, monkeypatch):
    """Blocks of several rows with a smaller last one, and blocks that are a part of one row's channels."""
    use_backend("torch")
    tensors = make_inputs(batch=3, dim=20, groups=2, states=3, length=130)
    for elements in (1, 3 * 3 * 4, 3 * 3 * 10 * 4):
        monkeypatch.setattr("nnunetv2_smallseg.ops.backend_torch._CPU_ELEMENTS", elements)
        assert_agrees(tensors, delta_softplus=True)


@every_backend
def test_extreme_step_sizes_stay_finite(use_backend, backend):
    """Decays that underflow within one chunk: where cumulative products and log-space forms give NaN."""
    use_backend(backend)
    tensors = make_inputs(length=150, dtype=torch.float32)
    tensors["delta"] = (tensors["delta"].detach() * 40).requires_grad_()
    assert_agrees(tensors, tolerance=1e-4, delta_softplus=True)


@every_backend
def test_nan_is_not_hidden(use_backend, backend):
    use_backend(backend)
    for name in ("u", "delta", "A"):
        tensors = make_inputs(dtype=torch.float32, requires_grad=False)
        tensors[name].view(-1)[0] = torch.nan
        out = selective_scan(**tensors, delta_softplus=True)
        assert out[0, 0].isnan().all()
        assert out[1, 3:].isfinite().all()


@every_backend
def test_shapes_of_B_and_C(use_backend, backend):
    use_backend(backend)
    tensors = make_inputs(groups=1)
    without_groups = {**tensors, "B": tensors["B"][:, 0], "C": tensors["C"][:, 0]}
    assert_agrees(without_groups, delta_softplus=True)
    constant = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    assert_agrees({**tensors, "B": constant}, delta_softplus=True)
    assert_agrees({**make_inputs(groups=2), "C": constant}, delta_softplus=True)
    assert_agrees({**tensors, "B": constant, "C": constant.detach().clone().requires_grad_()}, delta_softplus=True)


@every_backend
def test_non_contiguous_inputs_and_gradient(use_backend, backend):
    use_backend(backend)
    tensors = make_inputs(length=80)
    twisted = {
        name: x.detach().transpose(-1, -2).contiguous().transpose(-1, -2).requires_grad_() if x.ndim > 1 else x
        for name, x in tensors.items()
    }
    twisted["u"] = torch.randn(2, 6, 160, dtype=torch.float64)[:, :, ::2].requires_grad_()
    assert not twisted["u"].is_contiguous()
    assert not twisted["B"].is_contiguous()
    assert_agrees(twisted, delta_softplus=True)
    out = selective_scan(**twisted, delta_softplus=True)
    summed = torch.autograd.grad(out.sum(), twisted["u"], retain_graph=True)[0]
    whole = torch.autograd.grad(out, twisted["u"], torch.ones_like(out))[0]
    assert torch.equal(summed, whole)


@every_backend
def test_empty_batch(use_backend, backend):
    use_backend(backend)
    tensors = make_inputs(batch=0)
    out, gradients = gradients_of(selective_scan, tensors, delta_softplus=True)
    assert out.shape == (0, 6, 70)
    assert all((x == 0).all() for x in gradients)


@every_backend
@pytest.mark.parametrize("wanted", [("u",), ("A", "delta_bias"), ("B",), ("D",)], ids=str)
def test_only_some_gradients(use_backend, backend, wanted):
    use_backend(backend)
    tensors = {name: x.detach().requires_grad_(name in wanted) for name, x in make_inputs().items()}
    assert_agrees(tensors, delta_softplus=True)


@every_backend
def test_used_twice_in_one_graph(use_backend, backend):
    use_backend(backend)

    def twice(scan):
        tensors = make_inputs()
        first = scan(**tensors, delta_softplus=True)
        second = scan(**{**tensors, "u": first}, delta_softplus=True)
        return torch.autograd.grad((first * second).sum(), list(tensors.values()))

    for gradient, target in zip(twice(selective_scan), twice(selective_scan_reference), strict=True):
        assert relative_error(gradient, target) < 1e-9


@every_backend
def test_gradcheck(use_backend, backend):
    use_backend(backend)
    tensors = make_inputs(batch=1, dim=2, groups=1, states=2, length=5)
    assert torch.autograd.gradcheck(lambda *x: selective_scan(*x, delta_softplus=True), list(tensors.values()))


def test_reference_can_be_differentiated_twice():
    tensors = make_inputs(batch=1, dim=2, groups=1, states=1, length=3)
    assert torch.autograd.gradgradcheck(
        lambda *x: selective_scan_reference(*x, delta_softplus=True), list(tensors.values())
    )


# Types


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_inputs_are_computed_in_float32(use_backend, backend, dtype):
    use_backend(backend)
    half = make_inputs(length=100, dtype=dtype)
    for name in ("A", "D", "delta_bias"):
        half[name] = half[name].detach().float().requires_grad_()
    single = {name: x.detach().float().requires_grad_() for name, x in half.items()}
    cotangent = torch.randn(2, 6, 100).to(dtype)
    expected_out, expected = gradients_of(selective_scan_reference, single, cotangent.float(), delta_softplus=True)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out, gradients = gradients_of(selective_scan, half, cotangent, delta_softplus=True)
        assert out.dtype == dtype
        assert relative_error(out, expected_out) < torch.finfo(dtype).eps
        for (name, x), gradient, target in zip(half.items(), gradients, expected, strict=True):
            assert gradient.dtype == x.dtype
            # Rounded once, at the end: parameters in float32 keep its accuracy.
            bound = torch.finfo(dtype).eps if x.dtype == dtype else 1e-5
            assert relative_error(gradient, target) < bound, name


def test_one_float64_input_makes_it_float64():
    tensors = make_inputs(dtype=torch.float32, requires_grad=False)
    tensors["A"] = tensors["A"].double()
    out = selective_scan(**tensors, delta_softplus=True)
    exact = selective_scan_reference(**{name: x.double() for name, x in tensors.items()}, delta_softplus=True)
    assert out.dtype == torch.float32
    assert torch.equal(out, exact.float())


# What PyTorch does with the operator


@pytest.mark.parametrize("backend", [b for b in CPU_BACKENDS if b != "reference"])
@pytest.mark.parametrize("keep_states", [True, False])
def test_opcheck(use_backend, backend, keep_states):
    use_backend(backend)
    operator = torch.ops.nnunetv2_smallseg.selective_scan.default
    tensors = make_inputs(dim=4, states=2, dtype=torch.float32)
    torch.library.opcheck(operator, (*tensors.values(), True, keep_states))
    without = {**tensors, "D": None, "delta_bias": None}
    torch.library.opcheck(operator, (*without.values(), False, keep_states))


def test_opcheck_backward():
    tensors = make_inputs(dim=4, states=2, requires_grad=False)
    _, states = torch.ops.nnunetv2_smallseg.selective_scan(*tensors.values(), True, True)
    arguments = (torch.ones_like(tensors["u"]), *tensors.values(), True, states)
    torch.library.opcheck(torch.ops.nnunetv2_smallseg.selective_scan_backward.default, arguments)


def test_no_states_are_kept_without_gradients():
    tensors = make_inputs(requires_grad=False)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        selective_scan(**tensors)
    assert saved == []
    out, states = torch.ops.nnunetv2_smallseg.selective_scan(*tensors.values(), True, False)
    assert out.shape == tensors["u"].shape
    assert states.shape == (2, 0, 3, 6)


def test_kept_states_are_the_states_at_the_chunk_starts():
    tensors = make_inputs(length=2 * CHUNK_STEPS + 5, requires_grad=False)
    expected = torch.zeros(2, 3, 3, 6, dtype=torch.float64)
    for j in (1, 2):
        steps = j * CHUNK_STEPS
        short = {name: x[..., :steps] if name in ("u", "delta", "B", "C") else x for name, x in tensors.items()}
        _, last = selective_scan_reference(**short, delta_softplus=True, return_last_state=True)
        expected[:, j] = last.transpose(1, 2)
    for name in [p.values[0] if hasattr(p, "values") else p for p in CPU_BACKENDS]:
        if dispatch.BACKENDS[name].unavailable() is None:
            inputs = canonical_inputs(*tensors.values(), True)
            _, states = dispatch.run_forward(dispatch.BACKENDS[name], inputs, keep_states=True)
            assert relative_error(states, expected) < 1e-12, name


def test_differentiable_when_traced_without_gradients():
    tensors = make_inputs()
    out, _ = torch.ops.nnunetv2_smallseg.selective_scan(*tensors.values(), True, False)
    gradients = torch.autograd.grad(out.sum(), list(tensors.values()))
    expected = torch.autograd.grad(selective_scan(**tensors, delta_softplus=True).sum(), list(tensors.values()))
    assert all(torch.equal(x, y) for x, y in zip(gradients, expected, strict=True))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_node(dynamic):
    torch._dynamo.reset()
    graphs = []

    def count_and_run(module, _):
        graphs.append(module)
        return module

    def scan(*tensors):
        return selective_scan(*tensors, delta_softplus=True) * 2

    tensors = make_inputs()
    compiled = torch.compile(scan, fullgraph=True, dynamic=dynamic, backend=count_and_run)
    compiled(*tensors.values())
    operator = torch.ops.nnunetv2_smallseg.selective_scan.default
    calls = [
        node for node in graphs[0].graph.nodes if node.op == "call_function" and "selective_scan" in str(node.target)
    ]
    assert len(graphs) == 1
    assert [node.target for node in calls] in ([operator], [torch.ops.nnunetv2_smallseg.selective_scan])

    compiled = torch.compile(scan, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for length in (70, 75) if dynamic else (70,):
        tensors = make_inputs(length=length)
        values = list(tensors.values())
        out, eager = compiled(*values), scan(*values)
        assert torch.equal(out, eager)
        expected = torch.autograd.grad(eager.sum(), values)
        assert all(torch.equal(x, y) for x, y in zip(torch.autograd.grad(out.sum(), values), expected, strict=True))


class ScanModule(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.log_A = torch.nn.Parameter(torch.zeros(6, 3, dtype=torch.float64))

    def forward(self, u, delta, B, C):
        return selective_scan(u, delta, -torch.exp(self.log_A), B, C, delta_softplus=True)


def test_exports_to_one_node():
    tensors = make_inputs(requires_grad=False)
    arguments = tuple(tensors[name] for name in ("u", "delta", "B", "C"))
    module = ScanModule()
    exported = torch.export.export(module, arguments)
    targets = [node.target for node in exported.graph.nodes if node.op == "call_function"]
    assert targets.count(torch.ops.nnunetv2_smallseg.selective_scan.default) == 1
    assert torch.equal(exported.module()(*arguments), module(*arguments))


def test_meta_tensors():
    tensors = {name: x.detach().to("meta").requires_grad_() for name, x in make_inputs().items()}
    out = selective_scan(**tensors, delta_softplus=True)
    assert (out.device.type, out.shape) == ("meta", (2, 6, 70))
    out.sum().backward()
    assert all(x.grad.shape == x.shape for x in tensors.values())


# Threads and processes


@pytest.mark.parametrize("backend", [b for b in CPU_BACKENDS if b != "reference"])
def test_many_threads_at_once(use_backend, backend):
    use_backend(backend)
    expected = [gradients_of(selective_scan, make_inputs(dim=140, seed=seed), delta_softplus=True) for seed in range(4)]
    failures = []

    def work(seed):
        for _ in range(3):
            out, gradients = gradients_of(selective_scan, make_inputs(dim=140, seed=seed), delta_softplus=True)
            pairs = zip((out, *gradients), (expected[seed][0], *expected[seed][1]), strict=True)
            if not all(relative_error(x, y) < 1e-12 for x, y in pairs):
                failures.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert failures == []


FORK_SCRIPT = """
import os, sys, torch
from nnunetv2_smallseg.ops import selective_scan
torch.set_num_threads(2)
torch.manual_seed(0)
shapes = [(2, 140, 70), (2, 140, 70), (140, 3), (2, 3, 70), (2, 3, 70)]
x = [torch.randn(*shape) for shape in shapes]
x[2] = -x[2].exp()
x = [t.requires_grad_() for t in x]
def run():
    out = selective_scan(*x, delta_softplus=True)
    return [out, *torch.autograd.grad(out.sum(), x)]
expected = run() if sys.argv[1] == "used" else None
children = []
for _ in range(2):
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # as nnU-Net's data loaders do: PyTorch itself hangs with more
        result = run()
        good = expected is None or all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(result, expected))
        os._exit(0 if good else 1)
    children.append(child)
sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.skipif(not HAS_NUMBA, reason="numba is not installed")
@pytest.mark.parametrize("parent", ["used", "unused"])
def test_forked_children(parent):
    """Children forked before and after the parent has used its threads."""
    run_python(FORK_SCRIPT, parent)


def run_python(script, *arguments, **environment):
    """Runs a script in a new process and returns what it printed; fails the test if it fails or hangs."""
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    settings = {**os.environ, "PYTHONPATH": paths, **environment}
    settings.setdefault(dispatch.ENVIRONMENT_VARIABLE, "auto")
    command = [sys.executable, "-c", script, *arguments]
    result = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_is_light():
    script = "import sys, nnunetv2_smallseg.ops; print(sorted({'numba', 'nnunetv2', 'llvmlite'} & set(sys.modules)))"
    assert run_python(script).strip() == "[]"


@pytest.mark.skipif(not HAS_NUMBA, reason="numba is not installed")
def test_cache_folder_that_cannot_be_written(tmp_path, monkeypatch, caplog):
    """A file where the folder should be: nobody can write there, not even root."""
    import numba

    from nnunetv2_smallseg.ops import backend_cpu

    obstacle = tmp_path / "obstacle"
    obstacle.write_text("")
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(obstacle))
    monkeypatch.setattr(backend_cpu.KERNELS, "compiled", {})
    assert backend_cpu.KERNELS.folder(torch.float32) is None
    with caplog.at_level(logging.INFO):
        assert ops.self_check("cpu") < 1e-5
    assert "compiled for this process only" in caplog.text


@pytest.mark.skipif(not HAS_NUMBA, reason="numba is not installed")
def test_compiled_code_is_kept_and_may_be_damaged(tmp_path, monkeypatch, caplog):
    import numba

    from nnunetv2_smallseg.ops import backend_cpu

    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    folder = backend_cpu.KERNELS.folder(torch.float32)
    assert folder.is_relative_to(tmp_path)
    assert folder != backend_cpu.KERNELS.folder(torch.float64)
    kernels = backend_cpu.KERNELS.compile(torch.float32)
    assert sum(kernels.forward.stats.cache_misses.values()) == 1
    assert str(tmp_path) == numba.config.CACHE_DIR
    files = sorted(folder.rglob("*.nbc"))
    assert len(files) == 2

    kernels = backend_cpu.KERNELS.compile(torch.float32)
    assert sum(kernels.forward.stats.cache_hits.values()) == 1
    assert sum(kernels.backward.stats.cache_hits.values()) == 1
    assert caplog.text == ""

    for file in files:
        file.write_bytes(b"damaged")
    monkeypatch.setattr(backend_cpu.KERNELS, "compiled", {})
    assert ops.self_check("cpu") < 1e-5
    assert "cannot be kept in" in caplog.text


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("backend", ["torch", "mamba_ssm"])
def test_on_cuda(backend):
    if dispatch.BACKENDS[backend].unavailable() is not None:
        pytest.skip(f"{backend} is not available")
    assert ops.self_check(backend, "cuda") < 1e-4
