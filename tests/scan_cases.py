"""Inputs, comparisons and fixtures shared by the tests of the selective scan."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from nnunetv2_smallseg.ops import dispatch, selective_scan, selective_scan_reference

NAMES = ("u", "delta", "A", "B", "C", "D", "delta_bias")
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}
HAS_NUMBA = importlib.util.find_spec("numba") is not None
CPU_BACKENDS = [
    "reference",
    "torch",
    pytest.param("cpu", marks=pytest.mark.skipif(not HAS_NUMBA, reason="numba is not installed")),
]

every_backend = pytest.mark.parametrize("backend", CPU_BACKENDS)


@pytest.fixture(autouse=True)
def quiet_dispatch(monkeypatch):
    """Each test starts without a requested back end and without warnings given."""
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(dispatch, "_warned_device_types", set())


@pytest.fixture
def use_backend(monkeypatch):
    return lambda name: monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, name)


def make_inputs(batch=2, dim=6, groups=2, states=3, length=70, dtype=torch.float64, requires_grad=True, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tensors = {
        "u": draw(batch, dim, length),
        "delta": draw(batch, dim, length),
        "A": -torch.exp(draw(dim, states)),
        "B": draw(batch, groups, states, length),
        "C": draw(batch, groups, states, length),
        "D": draw(dim),
        "delta_bias": draw(dim) - 1,
    }
    return {name: x.to(dtype).requires_grad_(requires_grad) for name, x in tensors.items()}


def relative_error(value, target):
    """Largest difference relative to the largest target; absolute where the target is zero."""
    value, target = value.detach().double(), target.detach().double()
    return ((value - target).abs().max() / (target.abs().max() or 1.0)).item()


def gradients_of(function, tensors, cotangent=None, **options):
    out = function(**tensors, **options)
    cotangent = (
        torch.cos(torch.arange(out.numel(), dtype=torch.float64)).view(out.shape) if cotangent is None else cotangent
    )
    wanted = [x for x in tensors.values() if x.requires_grad]
    return out, torch.autograd.grad(out, wanted, cotangent.to(out.dtype))


def assert_agrees(tensors, tolerance=1e-9, **options):
    """selective_scan equals the differentiated reference loop, output and all gradients."""
    out, gradients = gradients_of(selective_scan, tensors, **options)
    expected_out, expected = gradients_of(selective_scan_reference, tensors, **options)
    assert out.dtype == tensors["u"].dtype
    assert relative_error(out, expected_out) < tolerance
    for gradient, target in zip(gradients, expected, strict=True):
        assert gradient.shape == target.shape
        assert gradient.dtype == target.dtype
        assert relative_error(gradient, target) < tolerance
