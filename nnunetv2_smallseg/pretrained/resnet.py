"""Loads torchvision's ResNet-50 into the encoder of SvANet and LiteSvANet.

Paper: He et al., Deep Residual Learning for Image Recognition, CVPR 2016, arXiv 1512.03385. Weights: torchvision
(BSD-3-Clause). Entries go where their names say. The loader of github.com/anthonyweidai/SvANet pairs entries by order
and shape instead, which puts two convolutions of layer 4 into the third neck of LiteSvANet; that is not copied.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from nnunetv2_smallseg.architectures.blocks.resnet import ResNetEncoder
from nnunetv2_smallseg.pretrained.agreement import adapt_input_channels_of, disagreements, refuse
from nnunetv2_smallseg.pretrained.report import LoadReport

__all__ = ["load_resnet50"]

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
        TypeError: If ``network`` has no ResNet encoder.
    """
    encoder = getattr(network, "encoder", None)
    if not isinstance(encoder, ResNetEncoder):
        raise TypeError(
            f"{type(network).__name__} has no ResNet as its 'encoder'; expected is SvANet or LiteSvANet itself (of a "
            "network wrapped for 2.5D, pass the inner one)"
        )
    target = encoder.state_dict()  # shares memory with the parameters
    parts = ("conv1", "bn1", *(f"layer{number}" for number in range(1, encoder.num_layers + 1)))
    source = {name: tensor for name, tensor in checkpoint.items() if name.split(".", 1)[0] in parts}
    needed = {name: tensor for name, tensor in target.items() if name in source or not name.endswith(COUNTER)}
    _require_agreement(needed, source)

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
        checkpoint="ResNet-50 (ImageNet-1K)",
        matched=tuple(f"encoder.{name}" for name in target if name in values and name not in adapted),
        adapted=tuple(f"encoder.{name}" for name in adapted),
        unused=tuple(name for name in checkpoint if name not in values),
        missing=tuple(f"encoder.{name}" for name in target if name not in values),
    )


def _require_agreement(target: Mapping[str, torch.Tensor], source: Mapping[str, torch.Tensor]) -> None:
    """Raises unless names and shapes agree, but for the number of input channels of the first kernel."""
    problems = disagreements(target, source, FIRST_KERNEL)
    problems += [f"{name} is not part of the network" for name in source if name not in target]
    if FIRST_KERNEL in source:
        given, wanted = source[FIRST_KERNEL].shape, target[FIRST_KERNEL].shape
        if given[:1] + given[2:] != wanted[:1] + wanted[2:]:
            problems.append(f"{FIRST_KERNEL} has shape {tuple(given)}, the network needs {tuple(wanted)}")
    refuse(
        problems,
        f"the checkpoint is not the ResNet-50 this network starts from; nothing was loaded. Below 'encoder', "
        f"{len(problems)} of {len(target)} tensors do not agree:",
        "Use the published file (`smallseg weights fetch resnet50_imagenet_v2`) and a network of the default width and "
        "depths.",
    )
