"""The selective scan in compiled kernels on the CPU: the back end of the optional extra ``[cpu]`` (numba).

The kernels release the interpreter lock and run on the threads of ``cpu_threads``, as many as PyTorch uses.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nnunetv2_smallseg.ops import cpu_compilation, cpu_threads
from nnunetv2_smallseg.ops.arguments import ScanGradients, ScanInputs, state_shape
from nnunetv2_smallseg.ops.cpu_compilation import Kernels, KernelStore

__all__ = ["KERNELS", "backward", "forward", "unavailable", "unsupported"]


def unavailable() -> str | None:
    """None, or why numba cannot be used here."""
    return cpu_compilation.unavailable()


def unsupported(inputs: ScanInputs) -> str | None:
    """None, or why the kernels cannot serve these tensors."""
    if inputs.u.device.type != "cpu":
        return f"the tensors are on {inputs.u.device}, and the kernels need them on the CPU"
    return None


def forward(inputs: ScanInputs, keep_states: bool) -> tuple[Tensor, Tensor]:
    """Output (batch, dim, L) and the states at the chunk boundaries, ``state_shape`` (no chunks unless kept)."""
    return _forward(KERNELS.kernels(inputs.u.dtype), inputs, keep_states)


def backward(inputs: ScanInputs, states: Tensor, gradient: Tensor) -> ScanGradients:
    """Gradients from the gradient (batch, dim, L) of the output and the states kept by ``forward``."""
    return _backward(KERNELS.kernels(inputs.u.dtype), inputs, states, gradient)


def _forward(kernels: Kernels, inputs: ScanInputs, keep_states: bool) -> tuple[Tensor, Tensor]:
    batch, chunks, num_states, dim = state_shape(inputs)
    out = torch.empty_like(inputs.u)
    states = out.new_empty(batch, chunks if keep_states else 0, num_states, dim)
    arrays = (*_arrays(inputs), out.numpy(), states.numpy())
    tasks = _blocks(inputs, kernels.block)
    cpu_threads.run(lambda row, first, count, _: kernels.forward(*arrays, row, first, count), tasks)
    return out, states


def _backward(kernels: Kernels, inputs: ScanInputs, states: Tensor, gradient: Tensor) -> ScanGradients:
    batch, dim, _ = inputs.u.shape
    parts = len(_parts(inputs, kernels.block))
    # Sums over the batch and over the blocks of a group are left for the end: no two threads write to one place.
    gradients = [
        torch.empty(shape, dtype=inputs.u.dtype)
        for shape in (
            inputs.u.shape,
            inputs.u.shape,
            (batch, *inputs.A.shape),
            (parts, *inputs.B.shape),
            (parts, *inputs.C.shape),
            (batch, dim),
            (batch, dim),
        )
    ]
    arrays = (*_arrays(inputs), gradient.numpy(), states.numpy(), tuple(x.numpy() for x in gradients))
    cpu_threads.run(lambda *block: kernels.backward(*arrays, *block), _blocks(inputs, kernels.block))
    u, delta, *summed = gradients
    A, B, C, D, bias = (x[0] if len(x) == 1 else x.sum(0) for x in summed)
    no_D, no_bias = inputs.D is None, inputs.delta_bias is None
    return ScanGradients(u, delta, A, B, C, None if no_D else D, None if no_bias else bias)


def _arrays(inputs: ScanInputs) -> tuple[Any, ...]:
    """The inputs as arrays, sharing memory; an empty array stands for None."""
    missing = inputs.u.new_empty(0)
    return (*((missing if x is None else x.detach()).numpy() for x in inputs[:-1]), inputs.delta_softplus)


def _parts(inputs: ScanInputs, block: int) -> list[tuple[int, int]]:
    """(first channel, number of channels) of the equal parts that a group is cut into."""
    width = inputs.u.shape[1] // inputs.B.shape[1]
    count = -(-width // -(-width // block))
    return [(first, min(count, width - first)) for first in range(0, width, count)]


def _blocks(inputs: ScanInputs, block: int) -> list[tuple[int, int, int, int]]:
    """(batch element, first channel, number of channels, part of its group) of all blocks."""
    batch, dim, _ = inputs.u.shape
    groups = inputs.B.shape[1]
    return [
        (row, group * (dim // groups) + first, count, part)
        for row in range(batch)
        for group in range(groups)
        for part, (first, count) in enumerate(_parts(inputs, block))
    ]


def _warm_up(kernels: Kernels, dtype: torch.dtype) -> None:
    """A scan of one step."""
    inputs = ScanInputs(*(torch.zeros(shape, dtype=dtype) for shape in _ONE_STEP), None, None, False)
    out, states = _forward(kernels, inputs, True)
    _backward(kernels, inputs, states, out)


_ONE_STEP = ((1, 1, 1), (1, 1, 1), (1, 1), (1, 1, 1, 1), (1, 1, 1, 1))

KERNELS = KernelStore(
    "nnunetv2_smallseg.ops.cpu_kernels",
    ("nnunetv2_smallseg.ops.arguments", "nnunetv2_smallseg.ops.cpu_kernels"),
    _warm_up,
)
"""The kernels of this module."""
