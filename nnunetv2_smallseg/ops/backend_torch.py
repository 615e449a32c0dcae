"""The selective scan in chunks of time, in plain PyTorch: the back end that is always there.

Time is cut into chunks of ``CHUNK_STEPS`` steps. All chunks are stepped through together, so the Python loop has as
many turns as a chunk has steps, and each operation works on thousands of state values. Three passes:

1. every chunk from a zero state, which gives what the chunk adds to a state that passes through it;
2. the carry from chunk to chunk; a chunk multiplies a state by exp(A * sum of its dt), one factor per chunk;
3. every chunk again from its true initial state, which gives the output.

The backward pass does the same in reverse time for the gradient of the state. Nothing is divided by cumulative products
or taken as a difference of cumulative sums: such forms save a pass, but give NaN once exp(A * sum of dt) underflows.

Layout: rows are (batch, group) pairs; R rows, J chunks, T steps, N states, W channels of a group. Channels come last,
so one state per channel (N = 1) is as well laid out as sixteen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from nnunetv2_smallseg.ops.arguments import (
    CHUNK_STEPS,
    SOFTPLUS_THRESHOLD,
    ScanGradients,
    ScanInputs,
    num_chunks,
    state_shape,
)

__all__ = ["backward", "forward", "unavailable", "unsupported"]

_CPU_ELEMENTS = 200_000
"""State values per operation on a CPU: few enough for the cache, enough to hide the cost of a call (measured)."""

_OTHER_ELEMENTS = 1 << 20
"""The same on other devices, where a launch costs more and caches matter less: an estimate, not measured."""


def unavailable() -> str | None:
    """None: plain PyTorch is always there."""
    return None


def unsupported(inputs: ScanInputs) -> str | None:
    """None: every device and type PyTorch serves."""
    return None


def forward(inputs: ScanInputs, keep_states: bool) -> tuple[Tensor, Tensor]:
    """Output (batch, dim, L) and the states at the chunk boundaries, ``state_shape`` (no chunks unless kept)."""
    layout = _Layout.of(inputs)
    u_rows = layout.rows_of(inputs.u)
    B_rows, C_rows = inputs.B.flatten(0, 1), inputs.C.flatten(0, 1)
    out = torch.empty_like(inputs.u)
    batch, chunks, num_states, dim = state_shape(inputs)
    states = out.new_empty(batch, chunks if keep_states else 0, num_states, dim)
    for block in layout.blocks():
        dt = layout.step_sizes(layout.biased_delta(inputs, block), inputs.delta_softplus)
        drive = layout.to_steps(u_rows, block).mul_(dt)
        B, C = layout.to_steps(B_rows, block.all_states), layout.to_steps(C_rows, block.all_states)
        A = layout.rates(inputs.A, block)
        state = _initial_states(A, dt, drive, B)
        if keep_states:
            layout.put_states(states, state, block)
        decay = torch.empty_like(state)
        for t in range(layout.steps):
            _decay(A, dt[:, :, t], decay)
            _add_outer(state.mul_(decay), B[:, :, t], drive[:, :, t])
            # The drive of this step has been used: its place takes the output.
            drive[:, :, t] = _sum_states(C[:, :, t], state)
        layout.from_steps(drive, layout.rows_of(out), block)
    if inputs.D is not None:
        out.addcmul_(inputs.D[:, None], inputs.u)
    return out, states


def backward(inputs: ScanInputs, states: Tensor, gradient: Tensor) -> ScanGradients:
    """Gradients from the gradient (batch, dim, L) of the output and the states kept by ``forward``."""
    layout = _Layout.of(inputs)
    gradient_rows, u_rows = layout.rows_of(gradient), layout.rows_of(inputs.u)
    B_rows, C_rows = inputs.B.flatten(0, 1), inputs.C.flatten(0, 1)
    u_gradient, delta_gradient = torch.empty_like(inputs.u), torch.empty_like(inputs.u)
    A_gradient, B_gradient, C_gradient = (torch.zeros_like(x) for x in (inputs.A, inputs.B, inputs.C))
    memory = None
    for block in layout.blocks():
        biased_delta = layout.biased_delta(inputs, block)
        dt = layout.step_sizes(biased_delta, inputs.delta_softplus)
        u, out_gradient = layout.to_steps(u_rows, block), layout.to_steps(gradient_rows, block)
        B, C = layout.to_steps(B_rows, block.all_states), layout.to_steps(C_rows, block.all_states)
        A = layout.rates(inputs.A, block)
        start = layout.get_states(states, block)
        if memory is None:
            # The first block is the largest. Memory given back between blocks would have to be mapped in again.
            memory = start.new_empty(2 * layout.steps + 1, start.numel())
        trajectory, decays = memory[:, : start.numel()].view(-1, *start.shape).split([layout.steps + 1, layout.steps])
        trajectory[0] = start
        u_block, dt_block, A_block, B_block, C_block = _backward_block(A, u, dt, B, C, out_gradient, trajectory, decays)
        layout.from_steps(u_block, layout.rows_of(u_gradient), block)
        if inputs.delta_softplus:
            dt_block.mul_(torch.sigmoid(biased_delta).masked_fill_(biased_delta > SOFTPLUS_THRESHOLD, 1.0))
        layout.from_steps(dt_block, layout.rows_of(delta_gradient), block)
        layout.add_rates(A_gradient, A_block, block)
        layout.add_from_steps(B_block, B_gradient.flatten(0, 1), block)
        layout.add_from_steps(C_block, C_gradient.flatten(0, 1), block)
    bias_gradient = None if inputs.delta_bias is None else delta_gradient.sum((0, 2))
    D_gradient = None
    if inputs.D is not None:
        u_gradient.addcmul_(inputs.D[:, None], gradient)
        D_gradient = sum(torch.linalg.vecdot(x, g) for x, g in zip(inputs.u, gradient, strict=True))
    return ScanGradients(u_gradient, delta_gradient, A_gradient, B_gradient, C_gradient, D_gradient, bias_gradient)


def _backward_block(
    A: Tensor,
    u: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    out_gradient: Tensor,
    trajectory: Tensor,
    decays: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, dt, A, B and C of one block.

    Args:
        A: (R, 1, N, W).
        u: (R, J, T, W), as ``dt`` and ``out_gradient``.
        dt: Step sizes.
        B: (R, J, T, N), as ``C``.
        C: Output weights.
        out_gradient: Gradient of the output.
        trajectory: (T + 1, R, J, N, W), holds the state at the start of each chunk and takes those after each step.
            Time comes first: each step writes and reads one contiguous piece.
        decays: (T, R, J, N, W), takes the decays.
    Returns:
        Gradients shaped like the inputs; that of A has the chunks summed, (R, N, W).
    """
    steps = dt.shape[2]
    drive = dt * u
    for t in range(steps):
        _decay(A, dt[:, :, t], decays[t])
        torch.mul(trajectory[t], decays[t], out=trajectory[t + 1])
        _add_outer(trajectory[t + 1], B[:, :, t], drive[:, :, t])

    state_gradient = _final_gradients(A, dt, C, out_gradient, decays)
    u_gradient, dt_gradient = torch.empty_like(u), torch.empty_like(u)
    A_gradient = torch.zeros_like(state_gradient)
    B_gradient, C_gradient = torch.empty_like(B), torch.empty_like(C)
    scratch = torch.empty_like(state_gradient)
    for t in reversed(range(steps)):
        _add_outer(state_gradient, C[:, :, t], out_gradient[:, :, t])
        torch.mul(trajectory[t + 1], out_gradient[:, :, t, None], out=scratch)
        torch.sum(scratch, -1, out=C_gradient[:, :, t])
        torch.mul(state_gradient, drive[:, :, t, None], out=scratch)
        torch.sum(scratch, -1, out=B_gradient[:, :, t])
        u_gradient[:, :, t] = _sum_states(B[:, :, t], state_gradient)
        state_gradient.mul_(decays[t])
        through_decay = torch.mul(trajectory[t], state_gradient, out=scratch)
        A_gradient.addcmul_(through_decay, dt[:, :, t, None])
        torch.sum(through_decay.mul_(A), -2, out=dt_gradient[:, :, t])
    # So far u_gradient holds the gradient of the drive dt * u.
    dt_gradient.addcmul_(u_gradient, u)
    u_gradient.mul_(dt)
    return u_gradient, dt_gradient, A_gradient.sum(1), B_gradient, C_gradient


def _initial_states(A: Tensor, dt: Tensor, drive: Tensor, B: Tensor) -> Tensor:
    """State before the first step of each chunk, (R, J, N, W): passes 1 and 2."""
    rows, chunks, steps, width = dt.shape
    start = dt.new_zeros(rows, chunks, A.shape[2], width)
    if chunks == 1:
        return start
    # What the last chunk adds is never needed.
    added = torch.zeros_like(start[:, 1:])
    decay = torch.empty_like(added)
    for t in range(steps):
        _decay(A, dt[:, :-1, t], decay)
        _add_outer(added.mul_(decay), B[:, :-1, t], drive[:, :-1, t])
    _decay(A, dt[:, :-1].sum(2), decay)
    for j in range(1, chunks):
        torch.addcmul(added[:, j - 1], decay[:, j - 1], start[:, j - 1], out=start[:, j])
    return start


def _final_gradients(A: Tensor, dt: Tensor, C: Tensor, out_gradient: Tensor, decays: Tensor) -> Tensor:
    """Gradient of the state after the last step of each chunk, (R, J, N, W), from all later chunks."""
    rows, chunks, steps, width = dt.shape
    final = dt.new_zeros(rows, chunks, A.shape[2], width)
    if chunks == 1:
        return final
    # What the first chunk hands to the state before it is never needed.
    added = torch.zeros_like(final[:, 1:])
    for t in reversed(range(steps)):
        _add_outer(added, C[:, 1:, t], out_gradient[:, 1:, t])
        added.mul_(decays[t, :, 1:])
    decay = _decay(A, dt[:, 1:].sum(2), torch.empty_like(added))
    for j in reversed(range(chunks - 1)):
        torch.addcmul(added[:, j], decay[:, j], final[:, j + 1], out=final[:, j])
    return final


def _decay(A: Tensor, dt: Tensor, out: Tensor) -> Tensor:
    """exp(dt * A) into ``out`` (R, J, N, W) from A (R, 1, N, W) and dt (R, J, W)."""
    return torch.mul(dt[:, :, None], A, out=out).exp_()


def _add_outer(target: Tensor, per_state: Tensor, per_channel: Tensor) -> None:
    """Adds the outer product of (R, J, N) and (R, J, W) to ``target`` (R, J, N, W)."""
    target.addcmul_(per_channel[:, :, None], per_state[..., None])


def _sum_states(weights: Tensor, state: Tensor) -> Tensor:
    """Sum over n of weights (R, J, N) times state (R, J, N, W); (R, J, W)."""
    if state.shape[2] == 1:
        # A batched product of 1 x 1 matrices costs ten times this.
        return state[:, :, 0] * weights
    product = torch.bmm(weights.flatten(0, 1)[:, None], state.flatten(0, 1))
    return product.view(*state.shape[:2], state.shape[3])


@dataclass(frozen=True)
class _Block:
    """Rows and channels (or states) worked on together."""

    rows: range
    channels: slice

    @property
    def all_states(self) -> _Block:
        """The same rows of B or C, whose second axis is the states."""
        return _Block(self.rows, slice(None))


@dataclass(frozen=True)
class _Layout:
    """How a scan is cut: (batch, group) rows, chunks of time, blocks of rows or of channels."""

    batch: int
    groups: int
    width: int
    num_states: int
    length: int
    chunks: int
    steps: int
    elements: int

    @classmethod
    def of(cls, inputs: ScanInputs) -> _Layout:
        """The layout for these inputs."""
        batch, dim, length = inputs.u.shape
        groups, num_states = inputs.B.shape[1:3]
        elements = _CPU_ELEMENTS if inputs.u.device.type == "cpu" else _OTHER_ELEMENTS
        steps = min(length, CHUNK_STEPS)
        return cls(batch, groups, dim // groups, num_states, length, num_chunks(length), steps, elements)

    def blocks(self) -> Iterator[_Block]:
        """Blocks of about ``elements`` state values: several rows, or a part of the channels of one row."""
        per_channel = self.chunks * self.num_states
        rows_at_once = max(1, self.elements // (per_channel * self.width))
        channels_at_once = min(self.width, max(1, self.elements // per_channel))
        parts = -(-self.width // channels_at_once)
        channels_at_once = -(-self.width // parts)
        total = self.batch * self.groups
        for row in range(0, total, rows_at_once):
            rows = range(row, min(row + rows_at_once, total))
            for channel in range(0, self.width, channels_at_once):
                yield _Block(rows, slice(channel, min(channel + channels_at_once, self.width)))

    def rows_of(self, x: Tensor) -> Tensor:
        """(batch, dim, L) seen as (rows, width, L)."""
        return x.view(self.batch * self.groups, self.width, self.length)

    def to_steps(self, rows: Tensor, block: _Block) -> Tensor:
        """Copies a block of (rows, channels, L) to (R, J, T, W); steps past the end are zero.

        The copy goes row by row: torch transposes 2-D tensors six to eight times faster than it permutes 3-D ones.
        """
        part = rows[block.rows.start : block.rows.stop, block.channels]
        padded = self.chunks * self.steps
        steps = part.new_empty(len(part), padded, part.shape[1])
        steps[:, self.length :] = 0
        for source, target in zip(part, steps, strict=True):
            target[: self.length].copy_(source.t())
        return steps.view(len(part), self.chunks, self.steps, part.shape[1])

    def from_steps(self, steps: Tensor, rows: Tensor, block: _Block) -> None:
        """Copies (R, J, T, W) back to its block of (rows, channels, L)."""
        for source, target in zip(steps.flatten(1, 2), self._targets(rows, block), strict=True):
            target.copy_(source[: self.length].t())

    def add_from_steps(self, steps: Tensor, rows: Tensor, block: _Block) -> None:
        """Adds (R, J, T, N) to its rows of (rows, N, L): channel blocks of one row share B and C."""
        for source, target in zip(steps.flatten(1, 2), self._targets(rows, block.all_states), strict=True):
            target.add_(source[: self.length].t())

    def biased_delta(self, inputs: ScanInputs, block: _Block) -> Tensor:
        """``delta`` of a block with its bias, (R, J, T, W); a block at a time, while it is in the cache."""
        delta = self.to_steps(self.rows_of(inputs.delta), block)
        if inputs.delta_bias is not None:
            bias = inputs.delta_bias.view(self.groups, self.width)[self._groups(block), block.channels]
            delta += bias[:, None, None]
        return delta

    def step_sizes(self, biased_delta: Tensor, delta_softplus: bool) -> Tensor:
        """Step sizes of a block from ``biased_delta``; zero past the end, where the state stays as it is."""
        threshold = SOFTPLUS_THRESHOLD
        dt = functional.softplus(biased_delta, threshold=threshold) if delta_softplus else biased_delta.clone()
        dt.flatten(1, 2)[:, self.length :] = 0
        return dt

    def rates(self, A: Tensor, block: _Block) -> Tensor:
        """A of the block as (R, 1, N, W)."""
        per_group = A.view(self.groups, self.width, self.num_states)
        return per_group[self._groups(block), block.channels].transpose(1, 2).contiguous()[:, None]

    def add_rates(self, A_gradient: Tensor, gradient: Tensor, block: _Block) -> None:
        """Adds the gradient (R, N, W) of a block to that of A, (dim, N)."""
        per_group = A_gradient.view(self.groups, self.width, self.num_states)
        for row, source in zip(block.rows, gradient, strict=True):
            per_group[row % self.groups, block.channels].add_(source.t())

    def put_states(self, states: Tensor, block_states: Tensor, block: _Block) -> None:
        """Copies (R, J, N, W) to its place in the kept states (batch, J, N, dim)."""
        for target, source in zip(self._state_rows(states, block), block_states, strict=True):
            target.copy_(source)

    def get_states(self, states: Tensor, block: _Block) -> Tensor:
        """The kept states of a block, (R, J, N, W)."""
        return torch.stack(list(self._state_rows(states, block)))

    def _groups(self, block: _Block) -> list[int]:
        return [row % self.groups for row in block.rows]

    def _targets(self, rows: Tensor, block: _Block) -> Tensor:
        return rows[block.rows.start : block.rows.stop, block.channels]

    def _state_rows(self, states: Tensor, block: _Block) -> Iterator[Tensor]:
        per_group = states.unflatten(3, (self.groups, self.width))
        for row in block.rows:
            yield per_group[row // self.groups, :, :, row % self.groups, block.channels]
