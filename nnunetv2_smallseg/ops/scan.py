"""The selective scan as one operator that PyTorch's compiler, exporter and fake tensors understand.

``nnunetv2_smallseg::selective_scan`` and ``nnunetv2_smallseg::selective_scan_backward`` are registered through
``torch.library``. The back end is chosen when the operator runs, not when it is traced, so an exported or compiled
network uses whatever the machine it runs on has.

For the backward pass the inputs are saved and the states at the start of every chunk of ``CHUNK_STEPS`` steps, in a
layout that no back end changes. They cost a quarter of the memory of ``u`` (N = 16, float32) and save the backward pass
a whole scan; states inside a chunk are computed again. Without gradients nothing is kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nnunetv2_smallseg.ops.arguments import (
    ScanGradients,
    ScanInputs,
    canonical_inputs,
    compute_dtype,
    state_shape,
)
from nnunetv2_smallseg.ops.dispatch import choose_backend, run_backward, run_forward

__all__ = ["selective_scan"]


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> Tensor:
    """Selective scan of Mamba (Gu & Dao 2023, arXiv 2312.00752), with the arguments of mamba-ssm's.

    With dt = delta + delta_bias, through softplus if asked for, and h = 0 before the first step::

        h[d, n] = exp(dt[d, t] * A[d, n]) * h[d, n] + dt[d, t] * B[g, n, t] * u[d, t]
        out[d, t] = sum_n C[g, n, t] * h[d, n] + D[d] * u[d, t]

    Channel d belongs to group g = d // (dim // G). The scan is computed in float32, or float64 if an input is float64,
    also inside autocast. It can be differentiated once with respect to every tensor.

    Args:
        u: Input, (batch, dim, L).
        delta: Step sizes before bias and softplus, (batch, dim, L).
        A: Decay rates, real, normally negative, (dim, N).
        B: Input weights, (batch, G, N, L), (batch, N, L) for one group, or (dim, N), constant over time. The last is
            expanded over batch and time: meant for small scans.
        C: Output weights, shaped like one of the choices for B, with the same G.
        D: Weight of the skip connection, (dim,), or None.
        delta_bias: Added to ``delta``, (dim,), or None.
        delta_softplus: Whether dt goes through softplus.

    Returns:
        (batch, dim, L) in the type of ``u``.

    Raises:
        ValueError: If a shape, type or device does not fit.
        SmallSegError: If ``SMALLSEG_SCAN_BACKEND`` asks for a back end that cannot run this scan.
    """
    inputs = canonical_inputs(u, delta, A, B, C, D, delta_bias, delta_softplus)
    tensors = (u, delta, A, B, C, D, delta_bias)
    keep_states = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    out, _ = _forward(*inputs, keep_states)
    return out


@torch.library.custom_op(
    "nnunetv2_smallseg::selective_scan",
    mutates_args=(),
    schema="(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? delta_bias, "
    "bool delta_softplus, bool keep_states) -> (Tensor, Tensor)",
)
def _forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    keep_states: bool,
) -> tuple[Tensor, Tensor]:
    """Output and kept states; the states have no chunks unless ``keep_states``."""
    inputs = ScanInputs(u, delta, A, B, C, D, delta_bias, delta_softplus)
    if u.shape[0] == 0:
        return _forward_shapes(*inputs, keep_states)
    return run_forward(choose_backend(inputs), inputs, keep_states)


@_forward.register_fake
def _forward_shapes(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    keep_states: bool,
) -> tuple[Tensor, Tensor]:
    inputs = ScanInputs(u, delta, A, B, C, D, delta_bias, delta_softplus)
    batch, chunks, num_states, dim = state_shape(inputs)
    states = u.new_empty(batch, chunks if keep_states else 0, num_states, dim, dtype=compute_dtype(*inputs[:-1]))
    return u.new_empty(u.shape), states


@torch.library.custom_op(
    "nnunetv2_smallseg::selective_scan_backward",
    mutates_args=(),
    schema="(Tensor gradient, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? delta_bias, "
    "bool delta_softplus, Tensor states) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    gradient: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    states: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients of the seven tensors; an empty tensor for D or delta_bias where it is None."""
    inputs = ScanInputs(u, delta, A, B, C, D, delta_bias, delta_softplus)
    if u.shape[0] == 0:
        return tuple(x.zero_() for x in _backward_shapes(gradient, *inputs, states))
    gradients = run_backward(choose_backend(inputs), inputs, states, gradient)
    return tuple(u.new_empty(0) if x is None else x for x in gradients)


@_backward.register_fake
def _backward_shapes(
    gradient: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    states: Tensor,
) -> tuple[Tensor, ...]:
    tensors = (u, delta, A, B, C, D, delta_bias)
    return tuple(u.new_empty(0) if x is None else x.new_empty(x.shape) for x in tensors)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Saves the inputs and the kept states."""
    *tensors, delta_softplus, _ = inputs
    states = output[1]
    ctx.mark_non_differentiable(states)
    ctx.save_for_backward(*tensors, states)
    ctx.delta_softplus = delta_softplus


def _differentiate(ctx: Any, gradient: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of the forward operator's arguments; None where none is needed."""
    *tensors, states = ctx.saved_tensors
    if states.shape[1] == 0:
        # Traced without gradients and differentiated all the same, as an exported network may be.
        _, states = _forward(*tensors, ctx.delta_softplus, True)
    gradients = ScanGradients(*_backward(gradient, *tensors, ctx.delta_softplus, states))
    needed = ctx.needs_input_grad[: len(gradients)]
    return (*(x if need else None for x, need in zip(gradients, needed, strict=True)), None, None)


_forward.register_autograd(_differentiate, setup_context=_save_for_backward)
