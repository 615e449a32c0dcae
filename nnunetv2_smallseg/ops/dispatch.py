"""The one place that decides which back end runs a selective scan.

``SMALLSEG_SCAN_BACKEND`` names a back end or ``auto`` (the default). A named back end that is missing or cannot serve
the tensors is an error; an automatic choice of a slow one is logged once.
"""

from __future__ import annotations

import importlib
import logging
import os
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from nnunetv2_smallseg.errors import SmallSegError
from nnunetv2_smallseg.ops.arguments import ScanGradients, ScanInputs, canonical_inputs, compute_dtype
from nnunetv2_smallseg.ops.backend_reference import selective_scan_reference

__all__ = [
    "BACKENDS",
    "ENVIRONMENT_VARIABLE",
    "Backend",
    "backend_availability",
    "choose_backend",
    "chosen_backend_name",
    "requested_backend",
    "run_backward",
    "run_forward",
    "self_check",
]

ENVIRONMENT_VARIABLE = "SMALLSEG_SCAN_BACKEND"

_logger = logging.getLogger(__name__)
_warned_device_types: set[str] = set()


@dataclass(frozen=True)
class Backend:
    """A back end: its name, the module that implements it, and what to tell a user about it.

    The module has ``unavailable()`` and ``unsupported(inputs)`` (None, or the reason why not), ``forward(inputs,
    keep_states)`` and ``backward(inputs, states, gradient)``.

    Attributes:
        name: Value of ``SMALLSEG_SCAN_BACKEND`` that asks for it.
        module: Dotted name of the module.
        summary: What it is, in one line.
        device_types: Device types it is the fast choice for; empty for a fall-back.
        install: How to get it.
        accepts_half: Whether it reads float16 and bfloat16 itself; for the others inputs are converted first.
    """

    name: str
    module: str
    summary: str
    device_types: tuple[str, ...] = ()
    install: str = ""
    accepts_half: bool = False

    def load(self) -> ModuleType:
        """The module of the back end."""
        return importlib.import_module(self.module)

    def unavailable(self) -> str | None:
        """None, or why this installation does not have it."""
        return self.load().unavailable()

    def unsupported(self, inputs: ScanInputs) -> str | None:
        """None, or why it cannot serve these tensors."""
        return self.load().unsupported(inputs)

    def forward(self, inputs: ScanInputs, keep_states: bool) -> tuple[Tensor, Tensor]:
        """Output and kept states; see ``arguments.state_shape``."""
        return self.load().forward(inputs, keep_states)

    def backward(self, inputs: ScanInputs, states: Tensor, gradient: Tensor) -> ScanGradients:
        """Gradients of all inputs."""
        return self.load().backward(inputs, states, gradient)


BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend(
            "mamba_ssm",
            "nnunetv2_smallseg.ops.backend_mamba_ssm",
            "the CUDA kernel of mamba-ssm",
            device_types=("cuda",),
            install="build mamba-ssm with its CUDA extension (needs the CUDA toolkit; see docs/scans.md)",
            accepts_half=True,
        ),
        Backend(
            "cpu",
            "nnunetv2_smallseg.ops.backend_cpu",
            "compiled kernels for the CPU (numba)",
            device_types=("cpu",),
            install="pip install 'nnunetv2-smallseg[cpu]'",
        ),
        Backend("torch", "nnunetv2_smallseg.ops.backend_torch", "chunks of time in plain PyTorch"),
        Backend("reference", "nnunetv2_smallseg.ops.backend_reference", "step by step in plain PyTorch, for checking"),
    )
}
"""All back ends; the automatic choice is the first fast one that serves the tensors, else ``torch``."""

_FALL_BACK = BACKENDS["torch"]


def requested_backend() -> str:
    """The value of ``SMALLSEG_SCAN_BACKEND``, ``auto`` if unset.

    Raises:
        SmallSegError: If it names no back end.
    """
    name = os.environ.get(ENVIRONMENT_VARIABLE, "").strip().lower() or "auto"
    if name != "auto" and name not in BACKENDS:
        raise SmallSegError(
            f"{ENVIRONMENT_VARIABLE} is {name!r}; allowed: {', '.join(('auto', *BACKENDS))}. Change or unset it."
        )
    return name


def choose_backend(inputs: ScanInputs) -> Backend:
    """The back end that runs this scan; the first time a slow one is chosen automatically, a warning says so.

    Raises:
        SmallSegError: If ``SMALLSEG_SCAN_BACKEND`` names one that does not exist, is not installed, or cannot serve
            these tensors.
    """
    name = requested_backend()
    if name != "auto":
        return _checked(BACKENDS[name], inputs)
    backend, reasons = _automatic(inputs)
    if backend is _FALL_BACK:
        _warn_once(inputs.u.device.type, reasons)
    return backend


def _checked(backend: Backend, inputs: ScanInputs) -> Backend:
    """The back end that was asked for by name, if it can run this scan."""
    reason = backend.unavailable()
    if reason is not None:
        raise SmallSegError(
            f"{ENVIRONMENT_VARIABLE}={backend.name}, but this back end is not available: {reason}. "
            f"To get it: {backend.install}. Or unset the variable."
        )
    reason = backend.unsupported(inputs)
    if reason is not None:
        raise SmallSegError(
            f"{ENVIRONMENT_VARIABLE}={backend.name}, but this back end cannot run this scan: {reason}. "
            "Unset the variable to let the package choose."
        )
    return backend


def _automatic(inputs: ScanInputs) -> tuple[Backend, dict[Backend, str]]:
    """The first fast back end that serves these tensors, else the fall-back with why the fast ones do not."""
    reasons = {}
    for backend in BACKENDS.values():
        if inputs.u.device.type in backend.device_types:
            reason = backend.unavailable() or backend.unsupported(inputs)
            if reason is None:
                return backend, {}
            reasons[backend] = reason
    return _FALL_BACK, reasons


def _warn_once(device_type: str, reasons: dict[Backend, str]) -> None:
    """Logs, the first time for a device type, that the slow back end runs, and how to get a fast one."""
    if device_type in _warned_device_types:
        return
    _warned_device_types.add(device_type)
    remedy = "; ".join(f"{backend.name}: {reason}. To get it: {backend.install}" for backend, reason in reasons.items())
    _logger.warning(
        "Selective scans on %s run with the slow back end %r (%s). Faster: %s",
        device_type,
        _FALL_BACK.name,
        _FALL_BACK.summary,
        remedy or "there is no faster one for this device.",
    )


def backend_availability() -> dict[str, str | None]:
    """Every back end by name, with None if this installation has it or else the reason why not."""
    return {name: backend.unavailable() for name, backend in BACKENDS.items()}


def chosen_backend_name(device: torch.device | str, dtype: torch.dtype = torch.float32) -> str:
    """Name of the back end that a scan on this device would run with; never warns.

    Raises:
        SmallSegError: As ``choose_backend``.
    """
    inputs = _example_inputs(torch.device(device), dtype)
    name = requested_backend()
    return (_automatic(inputs)[0] if name == "auto" else _checked(BACKENDS[name], inputs)).name


def run_forward(backend: Backend, inputs: ScanInputs, keep_states: bool) -> tuple[Tensor, Tensor]:
    """Runs a back end: output (batch, dim, L) in u's type and the kept states in the type of the computation."""
    with torch.no_grad(), torch.autocast(inputs.u.device.type, enabled=False):
        out, states = backend.forward(_prepared(backend, inputs), keep_states)
        return out.to(inputs.u.dtype).contiguous(), states.contiguous()


def run_backward(backend: Backend, inputs: ScanInputs, states: Tensor, gradient: Tensor) -> ScanGradients:
    """Runs a back end: gradients in the shapes and types of the inputs, None where the input is None."""
    with torch.no_grad(), torch.autocast(inputs.u.device.type, enabled=False):
        prepared = _prepared(backend, inputs)
        gradients = backend.backward(prepared, states, gradient.to(prepared.u.dtype).contiguous())
        tensors = zip(gradients, inputs, strict=False)
        return ScanGradients(*(None if x is None else g.to(x.dtype).contiguous() for g, x in tensors))


def _prepared(backend: Backend, inputs: ScanInputs) -> ScanInputs:
    """The inputs, contiguous, in the type the back end computes in or reads."""
    return inputs if backend.accepts_half else inputs.to(compute_dtype(*inputs[:-1]))


def self_check(name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> float:
    """Runs a back end on a small seeded scan and compares it with the reference in float64.

    Args:
        name: Name of an available back end.
        device: Where to run it.
        dtype: Type of the inputs.
    Returns:
        The largest difference of the output and of all gradients, each relative to the largest value of its tensor.
        About 1e-6 in float32 and 1e-15 in float64; NaN if a result holds NaN.
    Raises:
        SmallSegError: If the back end is missing or cannot run there.
    """
    if name not in BACKENDS:
        raise SmallSegError(f"{name!r} is no back end; allowed: {', '.join(BACKENDS)}.")
    inputs = _example_inputs(torch.device(device), dtype)
    backend = _checked(BACKENDS[name], inputs)
    out, states = run_forward(backend, inputs, keep_states=True)
    out_gradient = (
        torch.cos(torch.arange(out.numel(), device=out.device, dtype=torch.float64)).view(out.shape).to(dtype)
    )
    computed = (out, *run_backward(backend, inputs, states, out_gradient))
    with torch.enable_grad():
        leaves = [tensor.double().requires_grad_() for tensor in inputs[:-1]]
        expected_out = selective_scan_reference(*leaves, inputs.delta_softplus)
        expected = (expected_out, *torch.autograd.grad(expected_out, leaves, out_gradient.double()))
    errors = [
        (value.double() - target).abs().max() / target.abs().max()
        for value, target in zip(computed, expected, strict=True)
    ]
    # The largest of tensors is NaN if one of them is; that of Python numbers may not be.
    return torch.stack(errors).max().item()


def _example_inputs(device: torch.device, dtype: torch.dtype) -> ScanInputs:
    """A small seeded scan with every optional input and a length that ends inside a chunk."""
    generator = torch.Generator().manual_seed(20240207)
    batch, dim, groups, num_states, length = 2, 8, 2, 4, 150

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    u, delta = draw(batch, dim, length), draw(batch, dim, length)
    A = -torch.exp(0.5 * draw(dim, num_states))
    B, C = draw(batch, groups, num_states, length), draw(batch, groups, num_states, length)
    return canonical_inputs(u, delta, A, B, C, draw(dim), draw(dim) - 2, True)
