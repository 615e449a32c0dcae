"""SS2D in compiled kernels on the CPU, fused: the back end of the optional extra ``[cpu]`` (numba).

One matrix product projects all pixels for all directions; the kernels do the rest on the channel-last map. The backward
pass projects again instead of keeping the projections.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nnunetv2_smallseg.ops import cpu_compilation, cpu_threads
from nnunetv2_smallseg.ops.cpu_compilation import Kernels, KernelStore
from nnunetv2_smallseg.ops.ss2d_arguments import NUM_DIRECTIONS, SS2DGradients, SS2DInputs, ss2d_state_shape
from nnunetv2_smallseg.ops.tracing import has_no_data

__all__ = ["KERNELS", "ss2d_backward", "ss2d_forward", "unavailable", "unsupported"]


def unavailable() -> str | None:
    """None, or why numba cannot be used here."""
    return cpu_compilation.unavailable()


def unsupported(inputs: SS2DInputs) -> str | None:
    """None, or why the kernels cannot serve these tensors."""
    if inputs.x.device.type != "cpu":
        return f"the tensors are on {inputs.x.device}, and the kernels need them on the CPU"
    return None


def ss2d_forward(inputs: SS2DInputs, keep_states: bool) -> tuple[Tensor, Tensor]:
    """Output (B, H, W, D) and the states at the chunk boundaries, ``ss2d_state_shape`` (no chunks unless kept)."""
    return _forward(_kernels(inputs.x), inputs, keep_states)


def ss2d_backward(inputs: SS2DInputs, states: Tensor, gradient: Tensor) -> SS2DGradients:
    """Gradients from the gradient (B, H, W, D) of the output and the states kept by ``ss2d_forward``."""
    return _backward(_kernels(inputs.x), inputs, states, gradient)


def _kernels(x: Tensor) -> Kernels:
    """The kernels for the type of a tensor; where it has no data, nothing is compiled."""
    if has_no_data(x):
        from nnunetv2_smallseg.ops.cpu_kernels import BLOCK

        return Kernels(_do_nothing, _do_nothing, BLOCK)
    return KERNELS.kernels(x.dtype)


def _do_nothing(*_: Any) -> None:
    """Stands for a kernel."""


def _run(
    kernel: Callable[..., None], arguments: Sequence[Any], sizes: tuple[int, int], tasks: Sequence[tuple[int, ...]]
) -> None:
    """Runs a kernel on tensors, and sequences of them, for every task; not where they have no data."""
    if not has_no_data(arguments[0]):
        arrays = [tuple(t.numpy() for t in x) if isinstance(x, list) else x.detach().numpy() for x in arguments]
        cpu_threads.run(lambda *task: kernel(*arrays, *sizes, *task), tasks)


def _forward(kernels: Kernels, inputs: SS2DInputs, keep_states: bool) -> tuple[Tensor, Tensor]:
    batch, height, width, channels = inputs.x.shape
    blocks = math.ceil(channels / kernels.block)
    groups, _ = _division(batch, blocks, blocks)
    out = inputs.x.new_empty(groups, batch, height * width, channels)
    _, chunks, num_states, columns = ss2d_state_shape(inputs)
    states = out.new_empty(batch, chunks if keep_states else 0, num_states, columns)
    arguments = (*_tensors(inputs, _projected(inputs)), out, states)
    firsts = range(0, channels, kernels.block)
    tasks = [
        (row, group, first, min(kernels.block, channels - first))
        for row, group, first in itertools.product(range(batch), range(groups), firsts)
    ]
    _run(kernels.forward, arguments, (height, width), tasks)
    return _summed(out).view_as(inputs.x), states


def _backward(kernels: Kernels, inputs: SS2DInputs, states: Tensor, gradient: Tensor) -> SS2DGradients:
    batch, height, width, channels = inputs.x.shape
    rank, num_states = inputs.rank, inputs.num_states
    projections = inputs.x_proj_weight.shape[1]
    # Each part holds sums over its blocks for every projection: together they may be half of the four sequences.
    most_parts = max(1, channels // (2 * projections))
    groups, parts = _division(batch, math.ceil(channels / kernels.block), most_parts)
    projected = _projected(inputs)
    # Sums over batch, groups and parts are left for the end: no two threads write to one place.
    gradients = [
        inputs.x.new_empty(shape)
        for shape in (
            (groups, batch, height * width, channels),
            (parts, *projected.shape),
            (batch, NUM_DIRECTIONS, rank, channels),
            (batch, NUM_DIRECTIONS, num_states, channels),
            (batch, NUM_DIRECTIONS, channels),
            (batch, NUM_DIRECTIONS, channels),
        )
    ]
    pixels_gradient = gradient.view(batch, height * width, channels)
    arguments = (*_tensors(inputs, projected), pixels_gradient, states, gradients)
    tasks = list(itertools.product(range(batch), range(groups), range(parts)))
    _run(kernels.backward, arguments, (height, width), tasks)
    x, projected_gradient, step_weight, A, bias, skip = (_summed(x) for x in gradients)
    # (B * L, D) and (B * L, 4 * (R + 2N))
    pixels, projected_gradient = inputs.x.view(-1, channels), projected_gradient.view(-1, NUM_DIRECTIONS * projections)
    weight = inputs.x_proj_weight.view(-1, channels)
    return SS2DGradients(
        x.view(-1, channels).addmm_(projected_gradient, weight).view_as(inputs.x),
        (projected_gradient.t() @ pixels).view_as(inputs.x_proj_weight),
        step_weight.transpose(1, 2),
        bias,
        -inputs.A_logs.exp() * A.transpose(1, 2).reshape_as(inputs.A_logs),
        skip.flatten(),
    )


def _projected(inputs: SS2DInputs) -> Tensor:
    """Projections of all pixels for all directions, (B, L, 4, R + 2N)."""
    batch, height, width, channels = inputs.x.shape
    weight = inputs.x_proj_weight.view(-1, channels)
    return (inputs.x.view(-1, channels) @ weight.t()).view(batch, height * width, NUM_DIRECTIONS, -1)


def _tensors(inputs: SS2DInputs, projected: Tensor) -> tuple[Tensor, ...]:
    """What both kernels read, with channels last."""
    batch, height, width, channels = inputs.x.shape
    rates = inputs.A_logs.exp().mul_(-math.log2(math.e)).view(NUM_DIRECTIONS, channels, -1).transpose(1, 2)
    return (
        inputs.x.view(batch, height * width, channels),
        projected,
        inputs.dt_projs_weight.transpose(1, 2).contiguous(),
        inputs.dt_projs_bias,
        rates.contiguous(),
        inputs.Ds.view(NUM_DIRECTIONS, channels),
    )


def _summed(partial: Tensor) -> Tensor:
    """The sum over the first axis."""
    return partial[0] if len(partial) == 1 else partial.sum(0)


def _division(batch: int, blocks: int, most_parts: int) -> tuple[int, int]:
    """Numbers of groups of directions and of parts of the channel blocks that keep all threads busy.

    Every further group or part takes memory, so the smallest product within a tenth of the shortest time is taken.
    """
    threads = torch.get_num_threads()

    def time(division: tuple[int, int]) -> float:
        groups, parts = division
        return math.ceil(blocks / parts) * math.ceil(batch * groups * parts / threads) / groups

    divisions = sorted(itertools.product((1, 2), range(1, min(blocks, most_parts) + 1)), key=math.prod)
    enough = 1.1 * min(map(time, divisions))
    return next(division for division in divisions if time(division) <= enough)


def _warm_up(kernels: Kernels, dtype: torch.dtype) -> None:
    """One pixel."""
    shapes = ((1, 1, 1, 1), (4, 3, 1), (4, 1, 1), (4, 1), (4, 1), (4,))
    inputs = SS2DInputs(*(torch.zeros(shape, dtype=dtype) for shape in shapes))
    out, states = _forward(kernels, inputs, True)
    _backward(kernels, inputs, states, out)


_KERNEL_MODULE = "nnunetv2_smallseg.ops.cpu_ss2d_kernels"

KERNELS = KernelStore(
    _KERNEL_MODULE,
    ("nnunetv2_smallseg.ops.arguments", "nnunetv2_smallseg.ops.cpu_kernels", _KERNEL_MODULE),
    _warm_up,
)
"""The kernels of this module."""
