"""Loads torchvision's residual networks into the encoders of SvANet, LiteSvANet and STS-Net.

ResNet-50: He et al., Deep Residual Learning for Image Recognition, CVPR 2016, arXiv 1512.03385. ResNeXt50-32x4d: Xie et
al., Aggregated Residual Transformations for Deep Neural Networks, CVPR 2017, arXiv 1611.05431. Weights: torchvision
(BSD-3-Clause). Entries go where their names say. The loader of github.com/anthonyweidai/SvANet pairs entries by order
and shape instead, which puts two convolutions of layer 4 into the third neck of LiteSvANet; that is not copied.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from nnunetv2_smallseg.pretrained.agreement import adapt_input_channels_of, disagreements, refuse
from nnunetv2_smallseg.pretrained.report import LoadReport

__all__ = ["load_resnet50", "load_resnext50"]

FIRST_KERNEL = "conv1.weight"
# Number of batches seen: not used by a normalisation with momentum, and absent from old files.
COUNTER = ".num_batches_tracked"


def load_resnet50(
    network: nn.Module, checkpoint: Mapping[str, torch.Tensor], *, adapt_input_channels: bool = True
) -> LoadReport:
    """Copies ResNet-50's weights and running statistics into ``network.encoder``, completely or not at all.

    Every entry of the encoder has to be in the checkpoint with an equal shape, and the checkpoint may hold no others
    of its layers. The classifier is not used, and neither is layer 4 where the encoder ends with layer 3
    (LiteSvANet). With other than 3 input channels the first convolution is adapted.

    Args:
        network: The 2D network; of a network wrapped for 2.5D, the inner one.
        checkpoint: State dict as given by ``read_checkpoint``, under torchvision's names.
        adapt_input_channels: Adapt the first convolution to other than 3 input channels. If False, it then keeps its
            own initialisation.

    Returns:
        What became of each tensor.

    Raises:
        WeightsError: If the checkpoint is another network or incomplete; the network is unchanged then.
        TypeError: If ``network`` has no residual encoder.
    """
    return _load(network, checkpoint, adapt_input_channels, "ResNet-50", "resnet50_imagenet_v2")


def load_resnext50(
    network: nn.Module, checkpoint: Mapping[str, torch.Tensor], *, adapt_input_channels: bool = True
) -> LoadReport:
    """Copies ResNeXt50-32x4d's weights into the encoder of STSNet; all else as ``load_resnet50``."""
    return _load(network, checkpoint, adapt_input_channels, "ResNeXt50-32x4d", "resnext50_imagenet_v1")


def _load(
    network: nn.Module,
    checkpoint: Mapping[str, torch.Tensor],
    adapt_input_channels: bool,
    published_network: str,
    weights_name: str,
) -> LoadReport:
    """See ``load_resnet50``; the last two arguments are for messages."""
    encoder = getattr(network, "encoder", None)
    target = encoder.state_dict() if isinstance(encoder, nn.Module) else {}  # shares memory with the parameters
    if FIRST_KERNEL not in target:
        raise TypeError(
            f"{type(network).__name__} has no {published_network} as its 'encoder'; expected is the 2D network itself "
            "(of a network wrapped for 2.5D, pass the inner one)"
        )
    parts = {name.split(".", 1)[0] for name in target}
    source = {name: tensor for name, tensor in checkpoint.items() if name.split(".", 1)[0] in parts}
    needed = {name: tensor for name, tensor in target.items() if name in source or not name.endswith(COUNTER)}
    _require_agreement(needed, source, published_network, weights_name)

    values, adapted = dict(source), ()
    if source[FIRST_KERNEL].shape != target[FIRST_KERNEL].shape:
        if adapt_input_channels:
            values[FIRST_KERNEL] = adapt_input_channels_of(source[FIRST_KERNEL], target[FIRST_KERNEL].shape[1])
            adapted = (FIRST_KERNEL,)
        else:
            del values[FIRST_KERNEL]
    with torch.no_grad():
        for name, value in values.items():
            target[name].copy_(value)
    return LoadReport(
        network=type(network).__name__,
        checkpoint=f"{published_network} (ImageNet-1K)",
        matched=tuple(f"encoder.{name}" for name in target if name in values and name not in adapted),
        adapted=tuple(f"encoder.{name}" for name in adapted),
        unused=tuple(name for name in checkpoint if name not in values),
        missing=tuple(f"encoder.{name}" for name in needed if name not in values),
    )


def _require_agreement(
    target: Mapping[str, torch.Tensor], source: Mapping[str, torch.Tensor], published_network: str, weights_name: str
) -> None:
    """Raises unless names and shapes agree, but for the number of input channels of the first kernel."""
    problems = disagreements(target, source, FIRST_KERNEL)
    problems += [f"{name} is not part of the network" for name in source if name not in target]
    if FIRST_KERNEL in source:
        given, wanted = source[FIRST_KERNEL].shape, target[FIRST_KERNEL].shape
        if given[:1] + given[2:] != wanted[:1] + wanted[2:]:
            problems.append(f"{FIRST_KERNEL} has shape {tuple(given)}, the network needs {tuple(wanted)}")
    refuse(
        problems,
        f"the checkpoint is not the {published_network} this network starts from; nothing was loaded. Below 'encoder', "
        f"{len(problems)} of {len(target)} tensors do not agree:",
        f"Use the published file (`smallseg weights fetch {weights_name}`) and a network with its default encoder.",
    )
