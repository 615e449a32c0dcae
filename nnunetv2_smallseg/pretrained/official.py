"""Turns Swin-UMamba networks trained with the authors' code into start weights for nnU-Net's own option.

The authors' checkpoints (github.com/JiarunLiu/Swin-UMamba, nnU-Net 2.1) name their entries differently. The converted
file holds ``{"network_weights": ...}``, which ``nnUNetv2_train -pretrained_weights`` reads.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from nnunetv2_smallseg.architectures.swin_umamba import SwinUMamba, SwinUMambaD, from_official
from nnunetv2_smallseg.errors import WeightsError
from nnunetv2_smallseg.files import replacing
from nnunetv2_smallseg.pretrained.checkpoint import read_checkpoint

__all__ = ["ImportedNetwork", "convert_official", "import_official"]

SHOWN_PROBLEMS = 5

# Entries that tell the networks apart: (first convolution, head at full size). The first axis of a head is the classes.
LANDMARKS = {
    SwinUMamba: ("stem.0.weight", "out_layers.0.conv.conv.weight"),
    SwinUMambaD: ("vssm_encoder.patch_embed.proj.weight", "decoder.seg_layers.3.weight"),
}


@dataclass(frozen=True)
class ImportedNetwork:
    """What an official checkpoint holds.

    Attributes:
        network: Name of our network class.
        input_channels: Channels of its images.
        num_classes: Channels of its outputs.
        state_dict: Its weights under our names.
    """

    network: str
    input_channels: int
    num_classes: int
    state_dict: dict[str, torch.Tensor]


def convert_official(state_dict: Mapping[str, torch.Tensor]) -> ImportedNetwork:
    """Finds out which network an official state dict is and renames its entries.

    Args:
        state_dict: State dict under official names.

    Returns:
        The network with every entry present and of the right shape.

    Raises:
        WeightsError: If it is neither network, or not all of it.
    """
    found = [network for network, landmarks in LANDMARKS.items() if all(name in state_dict for name in landmarks)]
    if not found or any(state_dict[name].ndim != 4 for name in LANDMARKS[found[0]]):
        raise WeightsError(
            "the checkpoint is neither Swin-UMamba nor SwinUMambaD of github.com/JiarunLiu/Swin-UMamba: "
            + " and ".join(f"{landmarks[0]} with {landmarks[1]}" for landmarks in LANDMARKS.values())
            + f" are missing. It starts with {', '.join(list(state_dict)[:SHOWN_PROBLEMS])}. Give a "
            "checkpoint_final.pth or checkpoint_best.pth of one of its trainers; ImageNet weights of VMamba need no "
            "import (`smallseg weights fetch`)."
        )
    first_convolution, head = (state_dict[name] for name in LANDMARKS[found[0]])
    input_channels, num_classes = first_convolution.shape[1], head.shape[0]
    expected = found[0](input_channels, num_classes).state_dict()
    converted = from_official(state_dict)
    problems = [f"{name} is missing" for name in expected if name not in converted]
    problems += [f"{name} is not part of the network" for name in converted if name not in expected]
    problems += [
        f"{name} has shape {tuple(converted[name].shape)}, should be {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in converted and converted[name].shape != tensor.shape
    ]
    if problems:
        more = f"\n  and {len(problems) - SHOWN_PROBLEMS} more" if len(problems) > SHOWN_PROBLEMS else ""
        raise WeightsError(
            f"the checkpoint looks like {found[0].__name__} but does not agree with it (entries under our names):\n  "
            + "\n  ".join(problems[:SHOWN_PROBLEMS])
            + f"{more}\nSupported is the code since 6 March 2024 (commit 2c1f72e); the first public version of "
            "Swin-UMamba, without decoder6, was another network and cannot be imported."
        )
    return ImportedNetwork(found[0].__name__, input_channels, num_classes, converted)


def import_official(
    source: str | os.PathLike, destination: str | os.PathLike, *, overwrite: bool = False
) -> ImportedNetwork:
    """Converts an official checkpoint file for ``nnUNetv2_train -pretrained_weights``.

    Args:
        source: Checkpoint of the authors' trainers, or a plain state dict under their names.
        destination: File to write.
        overwrite: Replace an existing ``destination``.

    Returns:
        What was found.

    Raises:
        WeightsError: If ``source`` cannot be read or is another network, or ``destination`` exists or cannot be
            written. Nothing is written then.
    """
    destination = Path(destination)
    if destination.is_dir():
        raise WeightsError(f"{destination} is a folder. Give the name of the file to write, such as swin_umamba.pth.")
    if os.path.lexists(destination) and not overwrite:
        raise WeightsError(f"{destination} exists. Choose another name or add --overwrite to replace it.")
    try:
        imported = convert_official(read_checkpoint(source))
    except WeightsError as error:
        raise error if str(source) in str(error) else WeightsError(f"{source}: {error}") from error
    try:
        with replacing(destination) as partial:
            torch.save({"network_weights": imported.state_dict}, partial)
    except (OSError, RuntimeError) as error:  # torch.save reports a missing folder or a full disk as RuntimeError
        raise WeightsError(
            f"cannot write {destination}: {error}. Check that its folder exists, is writable and has space."
        ) from error
    return imported
