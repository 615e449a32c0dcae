"""What every back end of the selective scan shares: its inputs, its gradients, and the checks at the door."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

__all__ = [
    "CHUNK_STEPS",
    "ScanGradients",
    "ScanInputs",
    "canonical_inputs",
    "compute_dtype",
    "num_chunks",
    "state_shape",
    "step_size_gradient",
    "step_sizes",
]

CHUNK_STEPS = 64
"""Steps between two states kept for the backward pass; a quarter of the size of ``u`` for 16 states."""

SOFTPLUS_THRESHOLD = 20.0
"""Above this, softplus is the identity, as in ``torch.nn.functional.softplus``."""


class ScanInputs(NamedTuple):
    """Checked inputs of one scan.

    Shapes: ``u``, ``delta`` (batch, dim, L); ``A`` (dim, N); ``B``, ``C`` (batch, groups, N, L); ``D``,
    ``delta_bias`` (dim) or None. Consecutive channels share a group: channel d uses group d // (dim // groups).
    """

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    delta_bias: Tensor | None
    delta_softplus: bool

    def to(self, dtype: torch.dtype) -> ScanInputs:
        """The same inputs, contiguous, with every tensor in ``dtype``."""
        return ScanInputs(*(x.to(dtype).contiguous() if isinstance(x, Tensor) else x for x in self))


class ScanGradients(NamedTuple):
    """Gradients, shaped like the fields of ``ScanInputs``; None where the input is None."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    delta_bias: Tensor | None


def num_chunks(length: int) -> int:
    """Number of chunks of ``CHUNK_STEPS`` steps that cover ``length`` steps."""
    return (length + CHUNK_STEPS - 1) // CHUNK_STEPS


def state_shape(inputs: ScanInputs) -> tuple[int, int, int, int]:
    """Shape (batch, chunks, N, dim) of the kept states; entry j is the state before step ``CHUNK_STEPS * j``."""
    batch, dim, length = inputs.u.shape
    return batch, num_chunks(length), inputs.A.shape[1], dim


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The type a scan of these tensors is computed in: float64 if one of them is float64, else float32."""
    return torch.float64 if any(x is not None and x.dtype == torch.float64 for x in tensors) else torch.float32


def step_sizes(inputs: ScanInputs) -> Tensor:
    """dt, (batch, dim, L): ``delta`` with its bias added and, if asked for, softplus applied."""
    dt = inputs.delta if inputs.delta_bias is None else inputs.delta + inputs.delta_bias[:, None]
    return functional.softplus(dt, threshold=SOFTPLUS_THRESHOLD) if inputs.delta_softplus else dt


def step_size_gradient(inputs: ScanInputs, dt_gradient: Tensor) -> tuple[Tensor, Tensor | None]:
    """Gradients of ``delta`` and of ``delta_bias`` (None without bias) from the gradient of dt, (batch, dim, L)."""
    if inputs.delta_softplus:
        dt = inputs.delta if inputs.delta_bias is None else inputs.delta + inputs.delta_bias[:, None]
        slope = torch.sigmoid(dt).masked_fill_(dt > SOFTPLUS_THRESHOLD, 1.0)
        dt_gradient = dt_gradient * slope
    return dt_gradient, None if inputs.delta_bias is None else dt_gradient.sum(dim=(0, 2))


def canonical_inputs(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> ScanInputs:
    """Checks the arguments of ``selective_scan`` and gives B and C their four axes.

    Raises:
        ValueError: If a shape, a type or a device does not fit.
    """
    named = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "delta_bias": delta_bias}
    for name, tensor in named.items():
        if tensor is None and name in ("D", "delta_bias"):
            continue
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            received = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{name} is {received}; allowed: a real floating-point tensor. Convert it with .float().")
        if tensor.device != u.device:
            raise ValueError(f"{name} is on {tensor.device} and u on {u.device}; move all tensors to one device.")
    if u.ndim != 3 or 0 in u.shape[1:]:
        raise ValueError(f"u has shape {tuple(u.shape)}; allowed: (batch, dim, L) with dim and L of at least 1.")
    batch, dim, length = u.shape
    if delta.shape != u.shape:
        raise ValueError(f"delta has shape {tuple(delta.shape)}; allowed: that of u, {tuple(u.shape)}.")
    if A.ndim != 2 or A.shape[0] != dim or A.shape[1] == 0:
        raise ValueError(f"A has shape {tuple(A.shape)}; allowed: (dim, N) = ({dim}, N) with N of at least 1.")
    for name, vector in (("D", D), ("delta_bias", delta_bias)):
        if vector is not None and vector.shape != (dim,):
            raise ValueError(f"{name} has shape {tuple(vector.shape)}; allowed: (dim,) = ({dim},), or None.")
    B = _with_groups("B", B, batch, dim, A.shape[1], length)
    C = _with_groups("C", C, batch, dim, A.shape[1], length)
    if B.shape[1] != C.shape[1]:
        # A matrix that is constant over time has one group per channel; the other one is repeated to match.
        if dim not in (B.shape[1], C.shape[1]):
            raise ValueError(f"B has {B.shape[1]} groups and C has {C.shape[1]}; allowed: the same number.")
        B = B.repeat_interleave(dim // B.shape[1], dim=1)
        C = C.repeat_interleave(dim // C.shape[1], dim=1)
    return ScanInputs(u, delta, A, B, C, D, delta_bias, bool(delta_softplus))


def _with_groups(name: str, matrix: Tensor, batch: int, dim: int, states: int, length: int) -> Tensor:
    """B or C as (batch, groups, N, L); a matrix (dim, N), constant over time, gets one group per channel."""
    shape = tuple(matrix.shape)
    if matrix.ndim == 2 and shape == (dim, states):
        return matrix[None, :, :, None].expand(batch, dim, states, length)
    if matrix.ndim == 3 and shape == (batch, states, length):
        return matrix[:, None]
    fits = matrix.ndim == 4 and (shape[0], *shape[2:]) == (batch, states, length)
    if fits and shape[1] > 0 and dim % shape[1] == 0:
        return matrix
    raise ValueError(
        f"{name} has shape {shape}; allowed: (batch, N, L) = {(batch, states, length)}, (batch, G, N, L) with G a "
        f"divisor of dim = {dim}, or, constant over time, (dim, N) = {(dim, states)}."
    )
