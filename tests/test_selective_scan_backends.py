"""Which back end runs a selective scan, what wrong arguments raise, and what mamba-ssm's extension is handed."""

from __future__ import annotations

import logging
import math
import threading
import types

import pytest
import scan_cases
import torch
from scan_cases import (
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
from nnunetv2_smallseg.errors import SmallSegError
from nnunetv2_smallseg.ops import backend_mamba_ssm, dispatch, selective_scan, selective_scan_reference
from nnunetv2_smallseg.ops.arguments import ScanInputs

quiet_dispatch = scan_cases.quiet_dispatch
use_backend = scan_cases.use_backend


# The choice of a back end


def test_automatic_choice_on_the_cpu():
    assert ops.chosen_backend_name("cpu") == ("cpu" if HAS_NUMBA else "torch")
    assert ops.chosen_backend_name("cpu", torch.float64) == ops.chosen_backend_name("cpu")


def test_availability_lists_every_back_end():
    availability = ops.backend_availability()
    assert list(availability) == list(ops.BACKENDS)
    assert availability["reference"] is None
    assert availability["torch"] is None
    assert "selective_scan_cuda" in availability["mamba_ssm"] or availability["mamba_ssm"] is None


def without_numba(monkeypatch):
    monkeypatch.setattr("nnunetv2_smallseg.ops.backend_cpu.unavailable", lambda: "numba is not installed")


def test_slow_choice_is_logged_once(monkeypatch, caplog):
    without_numba(monkeypatch)
    with caplog.at_level(logging.WARNING):
        assert ops.chosen_backend_name("cpu") == "torch"
        assert caplog.records == []
        for _ in range(3):
            selective_scan(**make_inputs(requires_grad=False))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "'torch'" in record.getMessage()
    assert "pip install 'nnunetv2-smallseg[cpu]'" in record.getMessage()


def test_chosen_by_name_is_not_logged(monkeypatch, caplog, use_backend):
    without_numba(monkeypatch)
    use_backend("torch")
    selective_scan(**make_inputs(requires_grad=False))
    assert caplog.records == []


def test_named_back_end_runs(monkeypatch, use_backend):
    for name in ("reference", "torch"):
        called = []
        module = dispatch.BACKENDS[name].load()
        forward = module.forward
        monkeypatch.setattr(module, "forward", lambda *x, f=forward, c=called: c.append(1) or f(*x))
        use_backend(name.upper())
        selective_scan(**make_inputs(requires_grad=False))
        assert called == [1]
        assert ops.chosen_backend_name("cpu") == name


def test_named_back_end_that_is_missing(monkeypatch, use_backend):
    without_numba(monkeypatch)
    use_backend("cpu")
    for attempt in (lambda: selective_scan(**make_inputs()), lambda: ops.chosen_backend_name("cpu")):
        with pytest.raises(SmallSegError, match=r"numba is not installed.*pip install 'nnunetv2-smallseg\[cpu\]'"):
            attempt()


def test_named_back_end_that_does_not_exist(use_backend):
    use_backend("cuda")
    with pytest.raises(SmallSegError, match="'cuda'; allowed: auto, triton, mamba_ssm, cpu, torch, reference"):
        selective_scan(**make_inputs())


@every_backend
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_self_check(backend, dtype):
    assert ops.self_check(backend, "cpu", dtype) < (1e-5 if dtype == torch.float32 else 1e-12)


def test_self_check_sees_a_wrong_gradient(monkeypatch):
    module = dispatch.BACKENDS["torch"].load()
    backward = module.backward
    monkeypatch.setattr(module, "backward", lambda *x: (g := backward(*x))._replace(A=g.A * 1.01))
    assert ops.self_check("torch") == pytest.approx(0.01, rel=1e-3)
    monkeypatch.setattr(module, "backward", lambda *x: (g := backward(*x))._replace(B=g.B * torch.nan))
    assert math.isnan(ops.self_check("torch"))


def test_self_check_of_an_unknown_back_end():
    with pytest.raises(SmallSegError, match="'fast' is no back end"):
        ops.self_check("fast")


# Wrong arguments


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"u": torch.zeros(6, 70)}, r"u has shape \(6, 70\); allowed: \(batch, dim, L\)"),
        ({"u": torch.zeros(2, 6, 0)}, r"u has shape \(2, 6, 0\)"),
        ({"delta": torch.zeros(2, 6, 71)}, r"delta has shape \(2, 6, 71\); allowed: that of u, \(2, 6, 70\)"),
        ({"A": torch.zeros(5, 3)}, r"A has shape \(5, 3\); allowed: \(dim, N\) = \(6, N\)"),
        ({"A": torch.zeros(6, 3, dtype=torch.complex64)}, "A is torch.complex64; allowed: a real floating-point"),
        ({"u": torch.zeros(2, 6, 70, dtype=torch.long)}, "u is torch.int64"),
        ({"B": torch.zeros(2, 4, 3, 70)}, r"B has shape \(2, 4, 3, 70\); .*G a divisor of dim = 6"),
        ({"C": torch.zeros(2, 3, 71)}, r"C has shape \(2, 3, 71\); allowed: \(batch, N, L\) = \(2, 3, 70\)"),
        ({"C": torch.zeros(2, 3, 3, 70)}, "B has 2 groups and C has 3; allowed: the same number"),
        ({"D": torch.zeros(7)}, r"D has shape \(7,\); allowed: \(dim,\) = \(6,\), or None"),
        ({"delta_bias": torch.zeros(1, 6)}, r"delta_bias has shape \(1, 6\)"),
        ({"delta_bias": 3.0}, "delta_bias is float"),
        ({"A": torch.zeros(6, 3, device="meta")}, "A is on meta and u on cpu; move all tensors to one device"),
    ],
)
def test_wrong_arguments(changes, message):
    for scan in (selective_scan, selective_scan_reference):
        with pytest.raises(ValueError, match=message):
            scan(**{**make_inputs(requires_grad=False), **changes})


# mamba-ssm, whose extension needs a GPU: what is handed to it, with an extension that computes on the CPU


def fake_extension(calls):
    """A module with the extension's two functions, its argument checks and its kept pairs for chunks of 2048 steps."""

    def check(u, delta, A, B, C, D, delta_bias):
        assert u.dtype == delta.dtype == B.dtype == C.dtype != torch.float64
        assert A.dtype == torch.float32
        assert all(x is None or x.dtype == torch.float32 for x in (D, delta_bias))
        assert all(x is None or x.is_contiguous() for x in (u, delta, A, B, C, D, delta_bias))
        assert B.ndim == C.ndim == 4

    def scan(u, delta, A, B, C, D, delta_bias, delta_softplus):
        u, delta, B, C = (x.float() for x in (u, delta, B, C))
        return selective_scan_reference(u, delta, A, B, C, D, delta_bias, delta_softplus, return_last_state=True)

    def fwd(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
        assert z is None
        check(u, delta, A, B, C, D, delta_bias)
        calls.append("fwd")
        ends = [*range(2048, u.shape[2], 2048), u.shape[2]]
        pairs = torch.full((*u.shape[:2], len(ends), 2 * A.shape[1]), 7.0)
        for j, end in enumerate(ends):
            u_start, delta_start, B_start, C_start = (x[..., :end] for x in (u, delta, B, C))
            _, state = scan(u_start, delta_start, A, B_start, C_start, D, delta_bias, delta_softplus)
            pairs[:, :, j, 1::2] = state
        return scan(u, delta, A, B, C, D, delta_bias, delta_softplus)[0].to(u.dtype), pairs

    def bwd(u, delta, A, B, C, D, z, delta_bias, dout, x, out, dz, delta_softplus, recompute_out_z):
        assert (z, out, dz, recompute_out_z) == (None, None, None, False)
        check(u, delta, A, B, C, D, delta_bias)
        assert dout.dtype == u.dtype
        assert dout.is_contiguous()
        expected = fwd(u, delta, A, B, C, D, None, delta_bias, delta_softplus)[1]
        assert x.shape == expected.shape
        assert x.dtype == torch.float32
        assert x.is_contiguous()
        assert x.isfinite().all()
        torch.testing.assert_close(x[:, :, :-1, 1::2], expected[:, :, :-1, 1::2])
        calls.append("bwd")
        given = (u, delta, A, B, C, D, delta_bias)
        with torch.inference_mode(False), torch.enable_grad():
            leaves = {
                n: g.detach().clone().requires_grad_() for n, g in zip(NAMES, given, strict=True) if g is not None
            }
        gradients = dict(zip(leaves, gradients_in_new_thread(leaves, dout, delta_softplus), strict=True))
        return [gradients.get(name) for name in NAMES]

    return types.SimpleNamespace(fwd=fwd, bwd=bwd)


def gradients_in_new_thread(leaves, cotangent, delta_softplus):
    """Autograd is switched off inside an operator, but not in another thread."""
    result = []

    def work():
        result.extend(gradients_of(selective_scan_reference, leaves, cotangent, delta_softplus=delta_softplus)[1])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return result


@pytest.fixture
def fake_mamba(monkeypatch, use_backend):
    calls = []
    monkeypatch.setattr(backend_mamba_ssm, "_extension", lambda: fake_extension(calls))
    monkeypatch.setattr(backend_mamba_ssm, "unsupported", lambda inputs: None)
    use_backend("mamba_ssm")
    return calls


@pytest.mark.parametrize("length", [1, 70, 2048, 4200])
def test_mamba_ssm_gets_and_gives_the_right_tensors(fake_mamba, length):
    tensors = make_inputs(batch=1, dim=4, groups=2, states=2, length=length, dtype=torch.float32)
    tensors["u"] = tensors["u"].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    assert_agrees(tensors, tolerance=1e-5, delta_softplus=True)
    assert fake_mamba[0] == "fwd"
    assert fake_mamba[-1] == "bwd"


def test_mamba_ssm_without_optional_inputs(fake_mamba):
    tensors = make_inputs(dtype=torch.float32)
    del tensors["D"], tensors["delta_bias"]
    assert_agrees(tensors, tolerance=1e-5, delta_softplus=True)


def test_mamba_ssm_reads_half_precision_and_never_a_mixture(fake_mamba):
    tensors = make_inputs(dtype=torch.bfloat16, requires_grad=False)
    expected = selective_scan_reference(**tensors, delta_softplus=True)
    assert relative_error(selective_scan(**tensors, delta_softplus=True), expected) < 0.01
    tensors["B"] = tensors["B"].float()
    out = selective_scan(**tensors, delta_softplus=True)
    assert out.dtype == torch.bfloat16


def test_mamba_ssm_refuses_what_the_kernel_cannot_do(monkeypatch, use_backend):
    monkeypatch.setattr(backend_mamba_ssm, "_extension", lambda: fake_extension([]))
    use_backend("mamba_ssm")
    with pytest.raises(SmallSegError, match="cannot run this scan: the tensors are on cpu"):
        selective_scan(**make_inputs())
    for dtype, states, reason in (
        (torch.float32, 257, "at most 256"),
        (torch.float64, 16, "float64"),
        (torch.float16, 256, None),
    ):
        fake = types.SimpleNamespace(device=torch.device("cuda"), dtype=dtype, shape=(8, states))
        answer = backend_mamba_ssm.unsupported(ScanInputs(*[fake] * 7, True))
        assert answer is None if reason is None else reason in answer


def test_states_of_mamba_ssm_cannot_feed_another_backend(fake_mamba, use_backend):
    """The states that its kernel does not need are NaN: switching in between fails visibly."""
    tensors = make_inputs(dtype=torch.float32)
    out = selective_scan(**tensors, delta_softplus=True)
    use_backend("torch")
    assert torch.autograd.grad(out.sum(), tensors["A"])[0].isnan().any()
