"""The selective scan of mamba-ssm on CUDA, through its extension module ``selective_scan_cuda``.

The extension is called directly: importing the package ``mamba_ssm`` fails where the extension is missing, and pulls in
much that a scan does not need. Source: state-spaces/mamba, csrc/selective_scan (Apache-2.0).

The kernel takes time in chunks of 2048 steps and hands back, for every chunk, channel and state, the pair (product of
the decays so far, state after the chunk). Its backward pass reads only the states, so they are kept at their places
among the package's chunk states, and the pairs are put together again from there.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor

from nnunetv2_smallseg.ops.arguments import CHUNK_STEPS, ScanGradients, ScanInputs, state_shape

__all__ = ["backward", "forward", "unavailable", "unsupported"]

_KERNEL_STEPS = 2048
"""Steps of one chunk of the kernel."""

_MAXIMUM_STATES = 256
"""States per channel that the kernel allows."""

_STRIDE = _KERNEL_STEPS // CHUNK_STEPS


@functools.cache
def _extension() -> ModuleType | ImportError:
    """The extension module, or why it cannot be imported."""
    try:
        # The extension needs torch's libraries, which importing torch has loaded.
        import selective_scan_cuda
    except ImportError as error:
        return error
    return selective_scan_cuda


def unavailable() -> str | None:
    """None, or why the extension cannot be used here."""
    extension = _extension()
    if isinstance(extension, ImportError):
        return f"the module selective_scan_cuda of mamba-ssm cannot be imported ({extension})"
    return None


def unsupported(inputs: ScanInputs) -> str | None:
    """None, or why the kernel cannot serve these tensors."""
    if inputs.u.device.type != "cuda":
        return f"the tensors are on {inputs.u.device}, and the kernel needs them on CUDA"
    if any(x is not None and x.dtype == torch.float64 for x in inputs[:-1]):
        return "the kernel does not compute in float64"
    if inputs.A.shape[1] > _MAXIMUM_STATES:
        return f"N is {inputs.A.shape[1]}, and the kernel allows at most {_MAXIMUM_STATES}"
    return None


def forward(inputs: ScanInputs, keep_states: bool) -> tuple[Tensor, Tensor]:
    """Output (batch, dim, L) and the kept states, ``state_shape`` (no chunks unless kept).

    Only the entries that the kernel's backward pass reads are set, one in ``_STRIDE``; the others are NaN, so that a
    backward pass of another back end cannot go wrong unnoticed.
    """
    u, delta, A, B, C, D, delta_bias, delta_softplus = _converted(inputs)
    out, pairs, *_ = _extension().fwd(u, delta, A, B, C, D, None, delta_bias, delta_softplus)
    batch, chunks, num_states, dim = state_shape(inputs)
    if not keep_states:
        return out, A.new_empty(batch, 0, num_states, dim)
    states = A.new_full((batch, chunks, num_states, dim), torch.nan)
    states[:, 0] = 0
    # (batch, dim, kernel chunks, 2 * N) -> (batch, kernel chunks, N, dim), without the state after the last chunk.
    states[:, _STRIDE::_STRIDE] = pairs[:, :, :-1, 1::2].permute(0, 2, 3, 1)
    return out, states


def backward(inputs: ScanInputs, states: Tensor, gradient: Tensor) -> ScanGradients:
    """Gradients from the gradient (batch, dim, L) of the output and the states kept by ``forward``."""
    u, delta, A, B, C, D, delta_bias, delta_softplus = _converted(inputs)
    batch, dim, length = u.shape
    # The decay products and the last state are never read: any finite value will do.
    pairs = A.new_ones(batch, dim, -(-length // _KERNEL_STEPS), 2 * A.shape[1])
    pairs[:, :, :-1, 1::2] = states[:, _STRIDE::_STRIDE].permute(0, 3, 1, 2)
    gradients = _extension().bwd(
        u, delta, A, B, C, D, None, delta_bias, gradient.to(u.dtype), pairs, None, None, delta_softplus, False
    )
    return ScanGradients(*gradients[:7])


def _converted(inputs: ScanInputs) -> ScanInputs:
    """Contiguous inputs in the types the kernel asks for: u, delta, B and C alike, the rest float32."""
    u, delta, A, B, C, D, delta_bias, delta_softplus = inputs
    sequences = (u, delta, B, C)
    dtype = u.dtype if len({x.dtype for x in sequences}) == 1 else torch.float32
    u, delta, B, C = (x.to(dtype).contiguous() for x in sequences)
    A, D, delta_bias = (None if x is None else x.float().contiguous() for x in (A, D, delta_bias))
    return ScanInputs(u, delta, A, B, C, D, delta_bias, delta_softplus)
