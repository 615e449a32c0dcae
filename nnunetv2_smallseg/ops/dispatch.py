"""The one place that decides which back end runs a selective scan or an SS2D.

``SMALLSEG_SCAN_BACKEND`` names a back end or ``auto`` (the default). A named back end that is missing or cannot serve
the tensors is an error; an automatic choice of a slow one is logged once.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import TypeVar

import torch
from torch import Tensor

from nnunetv2_smallseg.errors import SmallSegError
from nnunetv2_smallseg.ops import ss2d_composed
from nnunetv2_smallseg.ops.arguments import ScanGradients, ScanInputs, canonical_inputs, compute_dtype
from nnunetv2_smallseg.ops.backend_reference import selective_scan_reference
from nnunetv2_smallseg.ops.ss2d_arguments import (
    NUM_DIRECTIONS,
    SS2DGradients,
    SS2DInputs,
    canonical_ss2d_inputs,
    ss2d_state_shape,
)

__all__ = [
    "BACKENDS",
    "ENVIRONMENT_VARIABLE",
    "Backend",
    "backend_availability",
    "choose_backend",
    "chosen_backend_name",
    "kept_state_shape",
    "requested_backend",
    "run_backward",
    "run_forward",
    "run_ss2d_backward",
    "run_ss2d_forward",
    "self_check",
]

ENVIRONMENT_VARIABLE = "SMALLSEG_SCAN_BACKEND"

_Inputs = TypeVar("_Inputs", ScanInputs, SS2DInputs)

_logger = logging.getLogger(__name__)
_warned_device_types: set[str] = set()


@dataclass(frozen=True)
class Backend:
    """A back end: its name, the modules that implement it, and what to tell a user about it.

    The module of the scan has ``unavailable()`` and ``unsupported(inputs)`` (None, or the reason why not),
    ``forward(inputs, keep_states)`` and ``backward(inputs, states, gradient)``. That of a fused SS2D has the same for
    ``SS2DInputs``, with the names ``ss2d_forward`` and ``ss2d_backward``, and ``ss2d_state_shape(inputs)`` if its
    states are laid out in its own way.

    Attributes:
        name: Value of ``SMALLSEG_SCAN_BACKEND`` that asks for it.
        module: Dotted name of the module of the scan; None if it has SS2D only.
        summary: What it is, in one line.
        device_types: Device types it is the fast choice for; empty for a fall-back.
        install: How to get it.
        accepts_half: Whether it reads float16 and bfloat16 itself; for the others inputs are converted first.
        ss2d_module: Dotted name of the module of the fused SS2D; None if SS2D is composed of the scan.
    """

    name: str
    module: str | None
    summary: str
    device_types: tuple[str, ...] = ()
    install: str = ""
    accepts_half: bool = False
    ss2d_module: str | None = None

    def load(self) -> ModuleType:
        """The module of the scan, or of the fused SS2D where there is no scan."""
        return importlib.import_module(self.module or self.ss2d_module)

    def load_ss2d(self) -> ModuleType | None:
        """The module of the fused SS2D, if there is one."""
        return None if self.ss2d_module is None else importlib.import_module(self.ss2d_module)

    def unavailable(self) -> str | None:
        """None, or why this installation does not have it."""
        try:
            return self.load().unavailable()
        except ImportError as error:
            return f"it cannot be imported ({error})"

    def unsupported(self, inputs: ScanInputs | SS2DInputs) -> str | None:
        """None, or why it cannot serve these tensors."""
        if isinstance(inputs, SS2DInputs):
            fused = self.load_ss2d()
            if fused is not None:
                return fused.unsupported(inputs)
            x, weight, _, bias, A_logs, Ds = inputs
            # What back ends refuse is devices, types and numbers of states, and these are the ones of the scan.
            inputs = ScanInputs(x, x, A_logs, weight, weight, Ds, bias, True)
        elif self.module is None:
            return "it has SS2D only and no scan of sequences"
        return self.load().unsupported(inputs)

    def forward(self, inputs: ScanInputs, keep_states: bool) -> tuple[Tensor, Tensor]:
        """Output and kept states; see ``arguments.state_shape``."""
        return self.load().forward(inputs, keep_states)

    def backward(self, inputs: ScanInputs, states: Tensor, gradient: Tensor) -> ScanGradients:
        """Gradients of all inputs."""
        return self.load().backward(inputs, states, gradient)

    def ss2d_forward(self, inputs: SS2DInputs, keep_states: bool) -> tuple[Tensor, Tensor]:
        """Output and kept states of SS2D, fused or composed of the scan."""
        fused = self.load_ss2d()
        if fused is not None:
            return fused.ss2d_forward(inputs, keep_states)
        return ss2d_composed.forward(self.load().forward, inputs, keep_states)

    def ss2d_backward(self, inputs: SS2DInputs, states: Tensor, gradient: Tensor) -> SS2DGradients:
        """Gradients of all inputs of SS2D."""
        fused = self.load_ss2d()
        if fused is not None:
            return fused.ss2d_backward(inputs, states, gradient)
        return ss2d_composed.backward(self.load().backward, inputs, states, gradient)

    def ss2d_state_shape(self, inputs: SS2DInputs) -> tuple[int, ...]:
        """Shape of the kept states of SS2D."""
        return getattr(self.load_ss2d(), "ss2d_state_shape", ss2d_state_shape)(inputs)


BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend(
            "triton",
            None,
            "fused SS2D on the GPU (Triton)",
            device_types=("cuda",),
            install="Triton comes with PyTorch on Linux; at its first use it needs a C compiler (gcc or clang)",
            accepts_half=True,
            ss2d_module="nnunetv2_smallseg.ops.backend_triton",
        ),
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
            ss2d_module="nnunetv2_smallseg.ops.backend_cpu_ss2d",
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


def choose_backend(inputs: ScanInputs | SS2DInputs) -> Backend:
    """The back end that runs this scan or SS2D; the first time a slow one is chosen automatically, a warning says so.

    Raises:
        SmallSegError: If ``SMALLSEG_SCAN_BACKEND`` names one that does not exist, is not installed, or cannot serve
            these tensors.
    """
    name = requested_backend()
    if name != "auto":
        return _checked(BACKENDS[name], inputs)
    backend, reasons = _automatic(inputs)
    if backend is _FALL_BACK:
        _warn_once(_device_type(inputs), reasons)
    return backend


def _device_type(inputs: ScanInputs | SS2DInputs) -> str:
    """The type of the device the tensors are on."""
    return inputs[0].device.type


def _checked(backend: Backend, inputs: ScanInputs | SS2DInputs) -> Backend:
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


def _automatic(inputs: ScanInputs | SS2DInputs) -> tuple[Backend, dict[Backend, str]]:
    """The first fast back end that serves these tensors, else the fall-back with why the fast ones do not."""
    reasons = {}
    for backend in BACKENDS.values():
        if _device_type(inputs) in backend.device_types:
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


def chosen_backend_name(
    device: torch.device | str, dtype: torch.dtype = torch.float32, operator: str = "selective_scan"
) -> str:
    """Name of the back end that an operator, ``selective_scan`` or ``ss2d``, would run with on a device; never warns.

    Raises:
        SmallSegError: As ``choose_backend``.
    """
    return _quiet_choice(_EXAMPLES[operator](torch.device(device), dtype)).name


def _quiet_choice(inputs: ScanInputs | SS2DInputs) -> Backend:
    """``choose_backend`` without its warning."""
    name = requested_backend()
    return _automatic(inputs)[0] if name == "auto" else _checked(BACKENDS[name], inputs)


def kept_state_shape(inputs: SS2DInputs) -> tuple[int, ...]:
    """Shape of the states that SS2D keeps with the back end that would run it; for tracing, so it never warns."""
    if _device_type(inputs) == "meta":
        return ss2d_state_shape(inputs)
    return _quiet_choice(inputs).ss2d_state_shape(inputs)


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


def run_ss2d_forward(backend: Backend, inputs: SS2DInputs, keep_states: bool) -> tuple[Tensor, Tensor]:
    """Runs SS2D: output (B, H, W, D) in x's type and the kept states, empty unless kept."""
    with torch.no_grad(), torch.autocast(_device_type(inputs), enabled=False):
        prepared = _prepared(backend, inputs)
        out, states = backend.ss2d_forward(prepared, keep_states)
        states = states.contiguous() if keep_states else states.new_empty(0, dtype=compute_dtype(*inputs))
        return out.to(inputs.x.dtype).contiguous(), states


def run_ss2d_backward(backend: Backend, inputs: SS2DInputs, states: Tensor, gradient: Tensor) -> SS2DGradients:
    """Runs the backward pass of SS2D: gradients in the shapes and types of the inputs."""
    with torch.no_grad(), torch.autocast(_device_type(inputs), enabled=False):
        prepared = _prepared(backend, inputs)
        gradients = backend.ss2d_backward(prepared, states, gradient.to(prepared.x.dtype).contiguous())
        return SS2DGradients(*(g.to(x.dtype).contiguous() for g, x in zip(gradients, inputs, strict=True)))


def _prepared(backend: Backend, inputs: _Inputs) -> _Inputs:
    """The inputs in the type the back end computes in or reads; contiguous, if converted."""
    return inputs if backend.accepts_half else inputs.to(compute_dtype(*(x for x in inputs if isinstance(x, Tensor))))


def self_check(name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> float:
    """Runs a back end on a small seeded scan and a small SS2D and compares them with the reference in float64.

    Args:
        name: Name of an available back end.
        device: Where to run it.
        dtype: Type of the inputs.
    Returns:
        The largest difference of the outputs and of all gradients, each relative to the largest value of its tensor.
        About 1e-6 in float32 and 1e-15 in float64; NaN if a result holds NaN.
    Raises:
        SmallSegError: If the back end is missing or cannot run there.
    """
    if name not in BACKENDS:
        raise SmallSegError(f"{name!r} is no back end; allowed: {', '.join(BACKENDS)}.")
    backend = BACKENDS[name]
    examples = {operator: example(torch.device(device), dtype) for operator, example in _EXAMPLES.items()}
    errors = []
    if backend.module is not None:
        inputs = examples["selective_scan"]
        _checked(backend, inputs)
        out, states = run_forward(backend, inputs, keep_states=True)
        gradients = run_backward(backend, inputs, states, _example_gradient(out))
        errors += _differences((out, *gradients), selective_scan_reference, inputs)
    inputs = examples["ss2d"]
    _checked(backend, inputs)
    out, states = run_ss2d_forward(backend, inputs, keep_states=True)
    gradients = run_ss2d_backward(backend, inputs, states, _example_gradient(out))
    errors += _differences((out, *gradients), ss2d_composed.ss2d_reference, inputs)
    # The largest of tensors is NaN if one of them is; that of Python numbers may not be.
    return torch.stack(errors).max().item()


def _differences(
    computed: tuple[Tensor, ...], reference: Callable[..., Tensor], inputs: ScanInputs | SS2DInputs
) -> list[Tensor]:
    """Largest relative differences of an output and its gradients from those of the reference in float64."""
    with torch.enable_grad():
        arguments = [x.double().requires_grad_() if isinstance(x, Tensor) else x for x in inputs]
        leaves = [x for x in arguments if isinstance(x, Tensor)]
        out = reference(*arguments)
        expected = (out, *torch.autograd.grad(out, leaves, _example_gradient(computed[0]).double()))
    return [
        (value.double() - target).abs().max() / target.abs().max()
        for value, target in zip(computed, expected, strict=True)
    ]


def _example_gradient(out: Tensor) -> Tensor:
    """A gradient for an output."""
    return torch.cos(torch.arange(out.numel(), device=out.device, dtype=torch.float64)).view(out.shape).to(out.dtype)


def _example_scan(device: torch.device, dtype: torch.dtype) -> ScanInputs:
    """A small seeded scan with every optional input and a length that ends inside a chunk."""
    draw = _Draw(device, dtype)
    batch, dim, groups, num_states, length = 2, 8, 2, 4, 150
    u, delta = draw(batch, dim, length), draw(batch, dim, length)
    A = -torch.exp(0.5 * draw(dim, num_states))
    B, C = draw(batch, groups, num_states, length), draw(batch, groups, num_states, length)
    return canonical_inputs(u, delta, A, B, C, draw(dim), draw(dim) - 2, True)


def _example_ss2d(device: torch.device, dtype: torch.dtype) -> SS2DInputs:
    """A small seeded SS2D whose rows and columns end inside a chunk."""
    draw = _Draw(device, dtype)
    channels, rank, num_states = 8, 2, 4
    return canonical_ss2d_inputs(
        draw(2, 9, 11, channels),
        0.4 * draw(NUM_DIRECTIONS, rank + 2 * num_states, channels),
        draw(NUM_DIRECTIONS, channels, rank),
        draw(NUM_DIRECTIONS, channels) - 2,
        0.5 * draw(NUM_DIRECTIONS * channels, num_states),
        draw(NUM_DIRECTIONS * channels),
    )


class _Draw:
    """Draws seeded normal numbers."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.generator = torch.Generator().manual_seed(20240207)
        self.device, self.dtype = device, dtype

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64).to(self.device, self.dtype)


_EXAMPLES: dict[str, Callable[[torch.device, torch.dtype], ScanInputs | SS2DInputs]] = {
    "selective_scan": _example_scan,
    "ss2d": _example_ss2d,
}
