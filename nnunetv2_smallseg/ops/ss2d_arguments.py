"""What every back end of SS2D shares: its inputs, its gradients, and the checks at the door."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nnunetv2_smallseg.ops.arguments import num_chunks

__all__ = ["NUM_DIRECTIONS", "SS2DGradients", "SS2DInputs", "canonical_ss2d_inputs", "ss2d_state_shape"]

NUM_DIRECTIONS = 4
"""Rows, columns, rows backwards, columns backwards, in this order everywhere."""


class SS2DInputs(NamedTuple):
    """Checked inputs of one SS2D.

    Shapes: ``x`` (B, H, W, D); ``x_proj_weight`` (4, R + 2N, D), whose rows give step sizes of rank R, N input weights
    and N output weights; ``dt_projs_weight`` (4, D, R); ``dt_projs_bias`` (4, D); ``A_logs`` (4D, N) and ``Ds`` (4D),
    direction-major.
    """

    x: Tensor
    x_proj_weight: Tensor
    dt_projs_weight: Tensor
    dt_projs_bias: Tensor
    A_logs: Tensor
    Ds: Tensor

    @property
    def rank(self) -> int:
        """R, the rank of the step sizes."""
        return self.dt_projs_weight.shape[2]

    @property
    def num_states(self) -> int:
        """N, the states of a channel."""
        return self.A_logs.shape[1]

    def to(self, dtype: torch.dtype) -> SS2DInputs:
        """The same inputs, contiguous, with every tensor in ``dtype``."""
        return SS2DInputs(*(tensor.to(dtype).contiguous() for tensor in self))


class SS2DGradients(NamedTuple):
    """Gradients, shaped like the fields of ``SS2DInputs``."""

    x: Tensor
    x_proj_weight: Tensor
    dt_projs_weight: Tensor
    dt_projs_bias: Tensor
    A_logs: Tensor
    Ds: Tensor


def ss2d_state_shape(inputs: SS2DInputs) -> tuple[int, ...]:
    """Shape (B, chunks, N, 4D) of the kept states, unless a back end has a layout of its own.

    Entry j is the state before step ``CHUNK_STEPS * j`` of each direction, counted as that direction runs.
    """
    batch, height, width, channels = inputs.x.shape
    return batch, num_chunks(height * width), inputs.num_states, NUM_DIRECTIONS * channels


def canonical_ss2d_inputs(
    x: Tensor,
    x_proj_weight: Tensor,
    dt_projs_weight: Tensor,
    dt_projs_bias: Tensor,
    A_logs: Tensor,
    Ds: Tensor,
) -> SS2DInputs:
    """Checks the arguments of ``ss2d``.

    Raises:
        ValueError: If a shape, a type or a device does not fit.
    """
    inputs = SS2DInputs(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds)
    for name in SS2DInputs._fields:
        tensor = getattr(inputs, name)
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            received = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{name} is {received}; allowed: a real floating-point tensor. Convert it with .float().")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} and x on {x.device}; move all tensors to one device.")
    if x.ndim != 4 or 0 in x.shape[1:]:
        raise ValueError(f"x has shape {tuple(x.shape)}; allowed: (B, H, W, D) with H, W and D of at least 1.")
    channels = x.shape[3]
    if A_logs.ndim != 2 or A_logs.shape[0] != NUM_DIRECTIONS * channels or A_logs.shape[1] == 0:
        raise ValueError(
            f"A_logs has shape {tuple(A_logs.shape)}; allowed: (4D, N) = ({NUM_DIRECTIONS * channels}, N) with N of "
            "at least 1."
        )
    rank = dt_projs_weight.shape[-1] if dt_projs_weight.ndim == 3 else 0
    if rank == 0 or dt_projs_weight.shape[:2] != (NUM_DIRECTIONS, channels):
        raise ValueError(
            f"dt_projs_weight has shape {tuple(dt_projs_weight.shape)}; allowed: (4, D, R) = "
            f"({NUM_DIRECTIONS}, {channels}, R) with R of at least 1."
        )
    expected = {
        "x_proj_weight": ("(4, R + 2N, D)", (NUM_DIRECTIONS, rank + 2 * A_logs.shape[1], channels)),
        "dt_projs_bias": ("(4, D)", (NUM_DIRECTIONS, channels)),
        "Ds": ("(4D,)", (NUM_DIRECTIONS * channels,)),
    }
    for name, (axes, shape) in expected.items():
        received = tuple(getattr(inputs, name).shape)
        if received != shape:
            raise ValueError(f"{name} has shape {received}; allowed: {axes} = {shape}.")
    return inputs
