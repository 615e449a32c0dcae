"""SS2D, the four-direction selective scan of a map, as one operator.

``nnunetv2_smallseg::ss2d`` and ``nnunetv2_smallseg::ss2d_backward`` are registered through ``torch.library`` and cover
everything between a VSS block's convolution and its norm: reading the map in four directions, the projections, the
scans and their sum. The fused back ends do this without writing the four sequences out.

For the backward pass the inputs are saved and one tensor of states. Its layout belongs to the back end that made it:
(B, chunks, N, 4D), the states at the start of every chunk of ``CHUNK_STEPS`` steps, unless the back end brings its own.
So the back end must be the same in the forward and the backward pass of one step, and the one that was chosen when a
training step was compiled must be there when it runs. Without gradients nothing is kept, and an exported network uses
whatever the machine it runs on has.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nnunetv2_smallseg.ops.arguments import compute_dtype
from nnunetv2_smallseg.ops.dispatch import (
    choose_backend,
    kept_state_shape,
    run_ss2d_backward,
    run_ss2d_forward,
)
from nnunetv2_smallseg.ops.ss2d_arguments import SS2DGradients, SS2DInputs, canonical_ss2d_inputs

__all__ = ["ss2d"]


def ss2d(
    x: Tensor,
    x_proj_weight: Tensor,
    dt_projs_weight: Tensor,
    dt_projs_bias: Tensor,
    A_logs: Tensor,
    Ds: Tensor,
) -> Tensor:
    """2D selective scan of VMamba (Liu et al. 2024, arXiv 2401.10166), with the parameters of its SS2D.

    The map is read as four sequences: rows, columns, and both backwards. For each direction k, with x[t] the channels
    of its pixel t::

        low_rank, B, C = split(x_proj_weight[k] @ x[t])
        dt = softplus(dt_projs_weight[k] @ low_rank + dt_projs_bias[k])
        out = selective scan of x with dt, A = -exp(A_logs), B, C and D = Ds

    and the four outputs are summed, pixel by pixel. It is computed in float32, or float64 if an input is float64, also
    inside autocast. It can be differentiated once with respect to every tensor.

    Args:
        x: The map, channel-last, (B, H, W, D).
        x_proj_weight: (4, R + 2N, D), R rows for the step sizes, N for B and N for C.
        dt_projs_weight: (4, D, R).
        dt_projs_bias: (4, D).
        A_logs: Logarithms of the decay rates, (4D, N), direction-major.
        Ds: Weights of the skip connection, (4D,), direction-major.

    Returns:
        (B, H, W, D) in the type of ``x``.

    Raises:
        ValueError: If a shape, type or device does not fit.
        SmallSegError: If ``SMALLSEG_SCAN_BACKEND`` asks for a back end that cannot run this scan.
    """
    inputs = canonical_ss2d_inputs(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds)
    keep_states = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    out, _ = _forward(*inputs, keep_states)
    return out


@torch.library.custom_op(
    "nnunetv2_smallseg::ss2d",
    mutates_args=(),
    schema="(Tensor x, Tensor x_proj_weight, Tensor dt_projs_weight, Tensor dt_projs_bias, Tensor A_logs, Tensor Ds, "
    "bool keep_states) -> (Tensor, Tensor)",
)
def _forward(
    x: Tensor,
    x_proj_weight: Tensor,
    dt_projs_weight: Tensor,
    dt_projs_bias: Tensor,
    A_logs: Tensor,
    Ds: Tensor,
    keep_states: bool,
) -> tuple[Tensor, Tensor]:
    """Output and kept states; the states are an empty tensor unless ``keep_states``."""
    inputs = SS2DInputs(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds)
    if x.shape[0] == 0:
        return _forward_shapes(*inputs, keep_states)
    return run_ss2d_forward(choose_backend(inputs), inputs, keep_states)


@_forward.register_fake
def _forward_shapes(
    x: Tensor,
    x_proj_weight: Tensor,
    dt_projs_weight: Tensor,
    dt_projs_bias: Tensor,
    A_logs: Tensor,
    Ds: Tensor,
    keep_states: bool,
) -> tuple[Tensor, Tensor]:
    inputs = SS2DInputs(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds)
    shape = kept_state_shape(inputs) if keep_states else (0,)
    return x.new_empty(x.shape), x.new_empty(shape, dtype=compute_dtype(*inputs))


@torch.library.custom_op(
    "nnunetv2_smallseg::ss2d_backward",
    mutates_args=(),
    schema="(Tensor gradient, Tensor x, Tensor x_proj_weight, Tensor dt_projs_weight, Tensor dt_projs_bias, "
    "Tensor A_logs, Tensor Ds, Tensor states) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    gradient: Tensor,
    x: Tensor,
    x_proj_weight: Tensor,
    dt_projs_weight: Tensor,
    dt_projs_bias: Tensor,
    A_logs: Tensor,
    Ds: Tensor,
    states: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients of the six tensors."""
    inputs = SS2DInputs(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds)
    if x.shape[0] == 0:
        return tuple(tensor.zero_() for tensor in _backward_shapes(gradient, *inputs, states))
    return tuple(run_ss2d_backward(choose_backend(inputs), inputs, states, gradient))


@_backward.register_fake
def _backward_shapes(
    gradient: Tensor,
    x: Tensor,
    x_proj_weight: Tensor,
    dt_projs_weight: Tensor,
    dt_projs_bias: Tensor,
    A_logs: Tensor,
    Ds: Tensor,
    states: Tensor,
) -> tuple[Tensor, ...]:
    tensors = (x, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds)
    return tuple(tensor.new_empty(tensor.shape) for tensor in tensors)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Saves the inputs and the kept states."""
    *tensors, ctx.keep_states = inputs
    states = output[1]
    ctx.mark_non_differentiable(states)
    ctx.save_for_backward(*tensors, states)


def _differentiate(ctx: Any, gradient: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of the forward operator's arguments; None where none is needed."""
    *tensors, states = ctx.saved_tensors
    if not ctx.keep_states:
        # Traced without gradients and differentiated all the same, as an exported network may be.
        _, states = _forward(*tensors, True)
    gradients = SS2DGradients(*_backward(gradient, *tensors, states))
    needed = ctx.needs_input_grad[: len(gradients)]
    return (*(x if need else None for x, need in zip(gradients, needed, strict=True)), None)


_forward.register_autograd(_differentiate, setup_context=_save_for_backward)
