"""Maps with channels last in memory on the CPU: where convolutions are faster on them, and a norm that keeps them so.

PyTorch's own instance normalisation returns every map with channels first, so each convolution after it converts the
map again.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from nnunetv2_smallseg.ops.tracing import runs_on_cpu

__all__ = ["in_faster_layout", "instance_norm"]


def in_faster_layout(x: torch.Tensor) -> torch.Tensor:
    """The map in the memory layout in which 3x3 convolutions from it are faster; values and shape stay.

    On the CPU, PyTorch converts the weights in every call if channels are last. That pays for maps with more pixels
    than a row of the weights has values (9C), and costs more than it gains below. Tensors of other devices, and
    those of a compiler, which chooses layouts itself, are returned as they are.

    Args:
        x: (B, C, H, W).
    Returns:
        (B, C, H, W).
    """
    if torch.compiler.is_compiling() or not runs_on_cpu(x):
        return x
    if x.shape[0] * x.shape[2] * x.shape[3] < 9 * x.shape[1]:
        return x.contiguous()
    # One channel is in both layouts at once; a clone has the strides by which convolutions tell them apart.
    return x if _is_channels_last(x) else x.clone(memory_format=torch.channels_last)


def instance_norm(
    x: torch.Tensor, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None, eps: float = 1e-5
) -> torch.Tensor:
    """``functional.instance_norm`` that keeps channels last on the CPU.

    The batch normalisation of one image is its instance normalisation, and PyTorch computes that in either layout,
    with statistics in float32 or wider, also inside autocast. Other devices and compilers get PyTorch's own function.

    Args:
        x: (B, C, H, W).
        weight: (C,), or None for ones.
        bias: (C,), or None for zeros.
        eps: Added to the variance.
    Returns:
        (B, C, H, W).
    Raises:
        ValueError: If there is only one value per image and channel.
    """
    if torch.compiler.is_compiling() or not runs_on_cpu(x) or not _is_channels_last(x):
        return functional.instance_norm(x, weight=weight, bias=bias, eps=eps)
    images = [functional.batch_norm(image, None, None, weight, bias, training=True, eps=eps) for image in x.split(1)]
    return images[0] if len(images) == 1 else torch.cat(images)


def _is_channels_last(x: torch.Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
