"""The fused SS2D on CUDA: projections of the step sizes, four scans and their sum in kernels of our own (Triton).

Only the projection of the pixels to features is a matrix product outside the kernels. Nothing of the size of four
sequences is ever stored, and nothing is added atomically: sums have a fixed order, so no deterministic mode is needed.

With ``TRITON_INTERPRET=1`` set before Triton is imported, Triton's interpreter runs the kernels on CPU tensors, very
slowly; so they can be tested without a GPU.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import os
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from nnunetv2_smallseg.ops.arguments import CHUNK_STEPS
from nnunetv2_smallseg.ops.ss2d_arguments import NUM_DIRECTIONS, SS2DGradients, SS2DInputs
from nnunetv2_smallseg.ops.tracing import has_no_data

__all__ = ["ss2d_backward", "ss2d_forward", "ss2d_state_shape", "unavailable", "unsupported"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_MAXIMUM_STATES = 64
"""States of a channel are registers of a lane."""

_MAXIMUM_RANK = 128
"""Its weights are too."""

_MINIMUM_CAPABILITY = (8, 0)
"""Compute capability that Triton asks for."""

_LANES = 32

_TILE = 8
"""Steps whose states the backward pass holds in registers."""

_SLOTS = 16
"""Chunks carried at a time."""

_LONGEST_CHUNK = 256
"""Longest chunk where no states are kept: longer ones move fewer states but give fewer programs."""

_PROGRAMS = 4096
"""Programs that keep a large GPU busy: 30 warps on each of its 132 multiprocessors. An estimate, not measured."""

_LAUNCH = {"num_warps": 1, "enable_fp_fusion": True}
"""Launch options. Products and sums are fused: the default of Triton is about to change."""


@functools.cache
def unavailable() -> str | None:
    """None, or why the kernels cannot run here, and what to do about it."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (it comes with PyTorch for CUDA on Linux; elsewhere install it with pip)"
    try:
        interpreted = _interpreted()
    except ImportError as error:
        return f"Triton cannot be imported ({error}); install the version that your PyTorch asks for"
    if interpreted:
        return None
    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA; install a CUDA build of it"
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA GPU; check the driver with nvidia-smi"
    return _missing_for_launcher()


def _missing_for_launcher() -> str | None:
    """None, or what Triton lacks to compile its launcher, a small C program, at its first use."""
    if not os.environ.get("CC") and not any(shutil.which(name) for name in ("gcc", "clang")):
        return "Triton needs a C compiler at its first use and finds none; install gcc, or let CC name one"
    if not Path(sysconfig.get_paths()["include"], "Python.h").is_file():
        return "Triton needs Python's C headers at its first use; install python3-dev or python3-devel"
    return None


def unsupported(inputs: SS2DInputs) -> str | None:
    """None, or why the kernels cannot serve these tensors."""
    x = inputs.x
    if x.device.type != ("cpu" if _interpreted() else "cuda"):
        return f"the tensors are on {x.device}, and the kernels need them on CUDA"
    if x.device.type == "cuda" and torch.cuda.get_device_capability(x.device) < _MINIMUM_CAPABILITY:
        capability = ".".join(str(part) for part in torch.cuda.get_device_capability(x.device))
        return f"the GPU has compute capability {capability}, and Triton needs at least 8.0"
    for tensor in inputs:
        if tensor.dtype not in _DTYPES:
            return f"a tensor is {tensor.dtype}, and the kernels read float32, float16 and bfloat16"
    if inputs.num_states > _MAXIMUM_STATES:
        return f"N is {inputs.num_states}, and the kernels allow at most {_MAXIMUM_STATES}"
    if inputs.rank > _MAXIMUM_RANK:
        return f"the rank of the step sizes is {inputs.rank}, and the kernels allow at most {_MAXIMUM_RANK}"
    batch, height, width, channels = x.shape
    features = NUM_DIRECTIONS * inputs.x_proj_weight.shape[1]
    # Indices within an image are 32-bit; _magic_number must divide exactly; a grid has 65535 programs along an axis.
    error = _magic_number(height) * height - 2**31 if height > 1 else 0
    if height * width * max(channels, features, error) >= 2**31 or NUM_DIRECTIONS * batch > 65535:
        return f"x has shape {tuple(x.shape)}, too large for the kernels' 32-bit indices"
    return None


def ss2d_state_shape(inputs: SS2DInputs) -> tuple[int, ...]:
    """Shape (B, 4, chunks, N, D) of the kept states.

    Entry [b, k, j] is the state with which direction k enters the pixels ``CHUNK_STEPS * j`` and following of its row-
    or column-wise order, for the backward directions from their other end.
    """
    batch, height, width, channels = inputs.x.shape
    return batch, NUM_DIRECTIONS, math.ceil(height * width / CHUNK_STEPS), inputs.num_states, channels


def ss2d_forward(inputs: SS2DInputs, keep_states: bool) -> tuple[Tensor, Tensor]:
    """Output (B, H, W, D) in the type of x and the states, ``ss2d_state_shape``, of no use unless they are kept."""
    call = _Call(inputs, CHUNK_STEPS if keep_states else _chunk_without_states(inputs))
    with call.device():
        states = call.carried_states(call.x, adjoint=False)
        out = torch.empty_like(call.x)
        # The sums of the first three directions stay in float32.
        total = out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
        for columns in (0, 1):
            call.launch(
                "write_outputs",
                (call.chunks, call.blocks, call.batch),
                *(call.x, call.projected, call.rates, call.dt_weight, call.dt_bias, call.skip, states, total, out),
                *call.integers,
                COLUMNS=columns,
                **call.sizes,
                CHUNK=call.chunk,
                REGISTERS=call.registers,
            )
    return out, states


def ss2d_backward(inputs: SS2DInputs, states: Tensor, gradient: Tensor) -> SS2DGradients:
    """Gradients, of x in its type and of the parameters in float32, from the gradient (B, H, W, D) of the output.

    Args:
        inputs: The inputs of the forward pass.
        states: What ``ss2d_forward`` returned with ``keep_states``.
        gradient: Gradient of the output.
    """
    call = _Call(inputs, CHUNK_STEPS)
    gradient = gradient.contiguous()
    rank, num_states = inputs.rank, inputs.num_states
    # Programs that share a chunk share its channels, and each has a part of the sums over channels.
    parts = min(call.blocks, math.ceil(_PROGRAMS / 2 / (call.batch * call.chunks)))
    programs = call.batch * call.chunks * parts
    with call.device():
        adjoints = call.carried_states(gradient, adjoint=True)
        boundaries = call.empty(programs, call.chunk // _TILE, num_states, call.registers * _LANES)
        x_gradient = torch.zeros_like(call.x, dtype=torch.float32)
        projected = call.zeros(parts, *call.projected.shape)
        per_chunk = (call.batch, call.chunks, NUM_DIRECTIONS)
        rates = call.zeros(*per_chunk, num_states, call.channels)
        dt_weight = call.zeros(*per_chunk, rank, call.channels)
        dt_bias, skip = call.zeros(*per_chunk, call.channels), call.zeros(*per_chunk, call.channels)
        for columns in (0, 1):
            call.launch(
                "write_gradients",
                (call.chunks, parts, call.batch),
                *(call.x, gradient, call.projected, call.rates, call.dt_weight, call.dt_bias, call.skip, states),
                *(adjoints, boundaries, x_gradient, projected, rates, dt_weight, dt_bias, skip),
                *call.integers,
                COLUMNS=columns,
                **call.sizes,
                CHUNK=call.chunk,
                TILE=_TILE,
                REGISTERS=call.registers,
            )
        del adjoints, boundaries
        by_x, by_weight = _projection_gradients(call, projected[0] if parts == 1 else projected.sum(0))
        A = (call.rates * math.log(2)).transpose(1, 2)
        # dA / dA_log = A. Sums over batch and chunks: (4, N, D) -> (4, D, N).
        A_logs = rates.sum((0, 1)).transpose(1, 2) * A
        return SS2DGradients(
            x_gradient.add_(by_x).to(call.x.dtype),
            by_weight.view(inputs.x_proj_weight.shape),
            dt_weight.sum((0, 1)).transpose(1, 2),
            dt_bias.sum((0, 1)),
            A_logs.reshape(inputs.A_logs.shape),
            skip.sum((0, 1)).flatten(),
        )


def _projection_gradients(call: _Call, projected: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x (B, H, W, D) and of the projection (4 * features, D) from that of the projected pixels, float32.

    Half-precision products are of values scaled to at most one: sums over channels may exceed what float16 holds.
    """
    projected, x = projected.flatten(0, 1), call.x.view(-1, call.channels)
    if x.dtype == torch.float32:
        return (projected @ call.x_proj_weight).view(call.x.shape), projected.t() @ x
    scale = projected.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
    scaled = (projected / scale).to(x.dtype)
    by_x = (scaled @ call.x_proj_weight).view(call.x.shape) * scale
    # A sum over all pixels: in float16 it could overflow again.
    return by_x, (scaled.float().t() @ x.float()) * scale


def _magic_number(height: int) -> int:
    """The m with position // height = position * m // 2^31."""
    return -(-(2**31) // height)


def _power_of_two(number: int) -> int:
    """The smallest power of two that is not below ``number``."""
    return 1 << (number - 1).bit_length()


def _registers(inputs: SS2DInputs) -> int:
    """Channels of a lane: two share what is read for a pixel, if their states fit and no lane is left without."""
    channels = inputs.x.shape[3]
    fits = inputs.num_states <= 16 and inputs.rank <= 48
    return 2 if fits and (channels % (2 * _LANES) == 0 or channels > 8 * _LANES) else 1


def _chunk_without_states(inputs: SS2DInputs) -> int:
    """The longest chunk that gives enough programs."""
    batch, height, width, channels = inputs.x.shape
    columns_of_programs = batch * math.ceil(channels / (_LANES * _registers(inputs)))
    chunk = CHUNK_STEPS
    while chunk < _LONGEST_CHUNK and columns_of_programs * math.ceil(height * width / (2 * chunk)) >= _PROGRAMS:
        chunk *= 2
    return chunk


class _Call:
    """What the launches of one call share: the inputs as the kernels read them, and sizes.

    Args:
        inputs: Inputs of SS2D.
        chunk: Steps of a chunk.
    """

    def __init__(self, inputs: SS2DInputs, chunk: int) -> None:
        self.x = inputs.x.contiguous()
        self.batch, height, width, self.channels = self.x.shape
        length = height * width
        self.chunk, self.chunks = chunk, math.ceil(length / chunk)
        self.registers = _registers(inputs)
        self.blocks = math.ceil(self.channels / (_LANES * self.registers))
        with self.device():
            # (4, features, D) -> (4 * features, D); the product is in the type of x, as it is under autocast.
            self.x_proj_weight = inputs.x_proj_weight.flatten(0, 1).to(self.x.dtype)
            self.projected = functional.linear(self.x.view(self.batch, length, -1), self.x_proj_weight)
            self.dt_weight = inputs.dt_projs_weight.float().transpose(1, 2).contiguous()  # (4, R, D)
            self.dt_bias = inputs.dt_projs_bias.float().contiguous()
            self.skip = inputs.Ds.float().contiguous()
            decay = inputs.A_logs.float().exp().view(NUM_DIRECTIONS, self.channels, -1).transpose(1, 2)
            self.rates = (decay * -math.log2(math.e)).contiguous()  # (4, N, D)
        # A map of one row or column has one order of pixels.
        magic = _magic_number(height) if min(height, width) > 1 else 0
        stride = width if min(height, width) > 1 else 1
        self.integers = (stride, length - 1, magic, length, self.channels, self.chunks)
        self.sizes = {
            "RANK": inputs.rank,
            "RANKS": _power_of_two(inputs.rank),
            "NUM_STATES": inputs.num_states,
            "STATES": _power_of_two(inputs.num_states),
            "LANES": _LANES,
        }

    @contextlib.contextmanager
    def device(self) -> Iterator[None]:
        """Triton launches on the current device."""
        with torch.cuda.device(self.x.device) if self.x.is_cuda else contextlib.nullcontext():
            yield

    def empty(self, *shape: int) -> Tensor:
        """Uninitialised float32."""
        return self.x.new_empty(shape, dtype=torch.float32)

    def zeros(self, *shape: int) -> Tensor:
        """Zeros in float32."""
        return self.x.new_zeros(shape, dtype=torch.float32)

    def carried_states(self, source: Tensor, adjoint: bool) -> Tensor:
        """States that enter the chunks, or with ``adjoint`` their gradients, that leave them, (B, 4, chunks, N, D)."""
        num_states = self.sizes["NUM_STATES"]
        shape = (self.batch, NUM_DIRECTIONS, self.chunks, num_states, self.channels)
        if self.chunks == 1:
            return self.zeros(*shape)
        states, dt_sums = self.empty(*shape), self.empty(*shape[:3], self.channels)
        sequences = NUM_DIRECTIONS * self.batch
        self.launch(
            "summarize_chunks",
            (self.chunks - 1, self.blocks, sequences),
            *(source, self.projected, self.rates, self.dt_weight, self.dt_bias, states, dt_sums),
            *self.integers,
            ADJOINT=int(adjoint),
            **self.sizes,
            CHUNK=self.chunk,
            REGISTERS=self.registers,
        )
        self.launch(
            "carry_states",
            (math.ceil(num_states * self.channels / _LANES), sequences),
            *(self.rates, states, dt_sums, self.channels, self.chunks),
            ADJOINT=int(adjoint),
            NUM_STATES=num_states,
            SLOTS=_SLOTS,
            LANES=_LANES,
        )
        return states

    def launch(self, name: str, grid: tuple[int, ...], *arguments: Any, **sizes: int) -> None:
        """Launches a kernel; without data there is nothing for it to do."""
        if has_no_data(self.x):
            return
        _kernel(name)[grid](*arguments, **sizes, **_LAUNCH)


def _kernel(name: str) -> Any:
    """A kernel by name; Triton is imported when one is first needed."""
    from nnunetv2_smallseg.ops import triton_kernels

    return getattr(triton_kernels, name)


def _interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on the CPU."""
    import triton

    return not isinstance(_kernel("carry_states"), triton.JITFunction)
