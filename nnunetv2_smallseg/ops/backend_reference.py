"""The selective scan step by step in plain PyTorch: slow, short, and what every other back end must agree with.

The recurrence is that of Gu & Dao 2023 (arXiv 2312.00752, section 3): zero-order hold for A, Euler for B. For channel d
of group g, state n and step t, starting from h = 0::

    h[n] = exp(dt[t] * A[d, n]) * h[n] + dt[t] * B[g, n, t] * u[t]        out[t] = sum_n C[g, n, t] * h[n] + D[d] * u[t]
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nnunetv2_smallseg.ops.arguments import (
    CHUNK_STEPS,
    ScanGradients,
    ScanInputs,
    canonical_inputs,
    compute_dtype,
    state_shape,
    step_size_gradient,
    step_sizes,
)

__all__ = ["backward", "forward", "selective_scan_reference", "unavailable", "unsupported"]


def unavailable() -> str | None:
    """None: plain PyTorch is always there."""
    return None


def unsupported(inputs: ScanInputs) -> str | None:
    """None: every device and type PyTorch serves."""
    return None


def selective_scan_reference(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Selective scan as a loop over time, differentiated by autograd.

    Arguments as in ``selective_scan``. It never goes through the registered operator, so it can be differentiated
    twice and traced step by step.

    Returns:
        The output (batch, dim, L) in u's type; with ``return_last_state`` also the state after the last step,
        (batch, dim, N), in the type of the computation.
    """
    dtype = compute_dtype(u, delta, A, B, C, D, delta_bias)
    with torch.autocast(u.device.type, enabled=False):
        inputs = canonical_inputs(u, delta, A, B, C, D, delta_bias, delta_softplus).to(dtype)
        out, _, last_state = _scan(inputs)
    out = out.to(u.dtype)
    return (out, last_state.flatten(1, 2)) if return_last_state else out


def forward(inputs: ScanInputs, keep_states: bool) -> tuple[Tensor, Tensor]:
    """Output (batch, dim, L) and the states at the chunk boundaries, ``state_shape`` (no chunks unless kept)."""
    out, boundaries, _ = _scan(inputs)
    if not keep_states:
        batch, _, states, dim = state_shape(inputs)
        return out, out.new_empty(batch, 0, states, dim)
    # (chunks, batch, groups, width, N) -> (batch, chunks, N, dim)
    return out, torch.stack(boundaries).flatten(2, 3).permute(1, 0, 3, 2).contiguous()


def backward(inputs: ScanInputs, states: Tensor, gradient: Tensor) -> ScanGradients:
    """Gradients written out step by step, from the gradient (batch, dim, L) of the output.

    The states of one chunk are computed again from the state kept at its start, so memory does not grow with L.
    """
    A, u, dt, B, C = _split(inputs)
    groups = inputs.B.shape[1]
    gradients = gradient.unflatten(1, (groups, -1)).unbind(-1)
    length = len(u)
    state_gradient = torch.zeros_like(dt[0][..., None] * A)
    A_gradient = torch.zeros_like(A)
    u_gradients, dt_gradients, B_gradients, C_gradients = ([u[0]] * length for _ in range(4))
    for start in reversed(range(0, length, CHUNK_STEPS)):
        stop = min(start + CHUNK_STEPS, length)
        # (batch, N, dim) -> (batch, groups, width, N)
        trajectory = [states[:, start // CHUNK_STEPS].transpose(1, 2).unflatten(1, (groups, -1))]
        for t in range(start, stop):
            trajectory.append(_step(trajectory[-1], A, u[t], dt[t], B[t]))
        for t in reversed(range(start, stop)):
            state_gradient = state_gradient + gradients[t][..., None] * C[t][:, :, None]
            C_gradients[t] = (gradients[t][..., None] * trajectory[t - start + 1]).sum(2)
            B_gradients[t] = (state_gradient * (dt[t] * u[t])[..., None]).sum(2)
            drive = (state_gradient * B[t][:, :, None]).sum(-1)
            decay = torch.exp(dt[t][..., None] * A)
            through_decay = state_gradient * decay * trajectory[t - start]
            u_gradients[t] = dt[t] * drive
            dt_gradients[t] = u[t] * drive + (through_decay * A).sum(-1)
            A_gradient = A_gradient + (through_decay * dt[t][..., None]).sum(0)
            state_gradient = state_gradient * decay
    delta_gradient, bias_gradient = step_size_gradient(inputs, torch.stack(dt_gradients, -1).flatten(1, 2))
    u_gradient = torch.stack(u_gradients, -1).flatten(1, 2)
    D_gradient = None
    if inputs.D is not None:
        u_gradient = u_gradient + inputs.D[:, None] * gradient
        D_gradient = (inputs.u * gradient).sum(dim=(0, 2))
    return ScanGradients(
        u_gradient,
        delta_gradient,
        A_gradient.flatten(0, 1),
        torch.stack(B_gradients, -1),
        torch.stack(C_gradients, -1),
        D_gradient,
        bias_gradient,
    )


def _split(inputs: ScanInputs) -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
    """A (groups, width, N), and per step u and dt (batch, groups, width) and B and C (batch, groups, N).

    ``unbind`` splits once: indexing ``u[..., t]`` in the loop makes autograd allocate a full-size gradient per step.
    """
    groups = inputs.B.shape[1]
    u = inputs.u.unflatten(1, (groups, -1)).unbind(-1)
    dt = step_sizes(inputs).unflatten(1, (groups, -1)).unbind(-1)
    return inputs.A.unflatten(0, (groups, -1)), u, dt, inputs.B.unbind(-1), inputs.C.unbind(-1)


def _step(state: Tensor, A: Tensor, u: Tensor, dt: Tensor, B: Tensor) -> Tensor:
    """The state (batch, groups, width, N) one step later."""
    return torch.exp(dt[..., None] * A) * state + (dt * u)[..., None] * B[:, :, None]


def _scan(inputs: ScanInputs) -> tuple[Tensor, list[Tensor], Tensor]:
    """Output (batch, dim, L), states at the chunk starts and last state, each (batch, groups, width, N)."""
    A, u, dt, B, C = _split(inputs)
    state = u[0].new_zeros(*u[0].shape, A.shape[-1])
    outputs, boundaries = [], []
    for t in range(len(u)):
        if t % CHUNK_STEPS == 0:
            boundaries.append(state)
        state = _step(state, A, u[t], dt[t], B[t])
        outputs.append((state * C[t][:, :, None]).sum(-1))
    out = torch.stack(outputs, -1).flatten(1, 2)
    if inputs.D is not None:
        out = out + inputs.D[:, None] * inputs.u
    return out, boundaries, state
