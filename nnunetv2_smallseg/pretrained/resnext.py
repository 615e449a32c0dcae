"""Loads torchvision's ImageNet weights into the encoder of STS-Net.

The file is torchvision's first one of ResNeXt50-32x4d (Xie et al., Aggregated Residual Transformations for Deep Neural
Networks, CVPR 2017, arXiv 1611.05431; torchvision is BSD-3-Clause), which segmentation_models_pytorch offers as
"imagenet". The encoder has torchvision's names; its dilations change no shapes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from nnunetv2_smallseg.errors import WeightsError
from nnunetv2_smallseg.pretrained.report import LoadReport
from nnunetv2_smallseg.pretrained.vmamba import adapt_input_channels_of

__all__ = ["load_resnext50"]

FIRST_KERNEL = "conv1.weight"
CLASSIFIER = ("fc.weight", "fc.bias")
BATCH_COUNTER = ".num_batches_tracked"  # files saved by early versions of PyTorch have none, and nothing reads them
SHOWN_PROBLEMS = 5


def load_resnext50(
    network: nn.Module, checkpoint: Mapping[str, torch.Tensor], *, adapt_input_channels: bool = True
) -> LoadReport:
    """Copies ResNeXt50's weights into ``network.encoder``, completely or not at all.

    All tensors of the encoder have to be in the checkpoint with equal shapes, but for the input channels of the first
    convolution, and the checkpoint may hold no others but the classifier.

    Args:
        network: STSNet with its default encoder; of a network wrapped for 2.5D, the inner one.
        checkpoint: State dict as given by ``read_checkpoint``, under torchvision's names.
        adapt_input_channels: Adapt the first convolution to other than 3 input channels. If False, it then keeps its
            own initialisation.

    Returns:
        What became of each tensor.

    Raises:
        WeightsError: If the checkpoint is another network or incomplete; the network is unchanged then.
        TypeError: If ``network`` has no encoder.
    """
    encoder = getattr(network, "encoder", None)
    if not isinstance(encoder, nn.Module):
        raise TypeError(
            f"{type(network).__name__} has no 'encoder'; expected is STSNet itself (of a network wrapped for 2.5D, "
            "pass the inner one)"
        )
    target = {name: tensor for name, tensor in encoder.state_dict().items() if not name.endswith(BATCH_COUNTER)}
    source = {
        name: tensor
        for name, tensor in checkpoint.items()
        if name not in CLASSIFIER and not name.endswith(BATCH_COUNTER)
    }
    _require_agreement(target, source)

    adapted = set()
    if source[FIRST_KERNEL].shape != target[FIRST_KERNEL].shape:
        kernel = source.pop(FIRST_KERNEL)
        if adapt_input_channels:
            source[FIRST_KERNEL] = adapt_input_channels_of(kernel, target[FIRST_KERNEL].shape[1])
            adapted.add(FIRST_KERNEL)
    with torch.no_grad():
        for name, value in source.items():
            target[name].copy_(value)  # shares memory with the parameters
    return LoadReport(
        network=type(network).__name__,
        checkpoint="ResNeXt50-32x4d (ImageNet-1K)",
        matched=tuple(f"encoder.{name}" for name in target if name in source and name not in adapted),
        adapted=tuple(f"encoder.{name}" for name in target if name in adapted),
        unused=tuple(name for name in checkpoint if name not in source),
        missing=tuple(f"encoder.{name}" for name in target if name not in source),
    )


def _require_agreement(target: Mapping[str, torch.Tensor], source: Mapping[str, torch.Tensor]) -> None:
    """Raises unless names and shapes agree, but for the input channels of the first convolution."""
    problems = [f"{name} is missing" for name in target if name not in source]
    for name, tensor in source.items():
        if name not in target:
            problems.append(f"{name} is not part of the network")
            continue
        wanted, given = list(target[name].shape), list(tensor.shape)
        if name == FIRST_KERNEL and len(given) == len(wanted):
            wanted[1] = given[1] = 3
        if wanted != given:
            problems.append(f"{name} has shape {tuple(tensor.shape)}, the network needs {tuple(target[name].shape)}")
    if not problems:
        return
    more = f"\n  and {len(problems) - SHOWN_PROBLEMS} more" if len(problems) > SHOWN_PROBLEMS else ""
    raise WeightsError(
        f"the checkpoint is not the ResNeXt50-32x4d this network starts from; nothing was loaded. Below 'encoder', "
        f"{len(problems)} tensors do not agree:\n  " + "\n  ".join(problems[:SHOWN_PROBLEMS]) + more + "\n"
        "Use the published file (`smallseg weights fetch resnext50_imagenet_v1`) and STSNet's default encoder."
    )
