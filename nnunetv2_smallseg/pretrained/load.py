"""Finds, checks, reads and loads the weights a trainer starts from."""

from __future__ import annotations

import os

from torch import nn

from nnunetv2_smallseg.errors import WeightsError
from nnunetv2_smallseg.pretrained.checkpoint import read_checkpoint
from nnunetv2_smallseg.pretrained.entries import entry
from nnunetv2_smallseg.pretrained.report import LoadReport
from nnunetv2_smallseg.pretrained.resnet import load_resnet50, load_resnext50
from nnunetv2_smallseg.pretrained.store import resolve
from nnunetv2_smallseg.pretrained.vmamba import load_vmamba_small, load_vmamba_tiny

__all__ = ["load_pretrained"]

LOADERS = {
    "resnet50": load_resnet50,
    "resnext50": load_resnext50,
    "vmamba_small": load_vmamba_small,
    "vmamba_tiny": load_vmamba_tiny,
}


def load_pretrained(
    network: nn.Module,
    weights_name: str,
    adapt_input_channels: bool = True,
    file: str | os.PathLike | None = None,
) -> LoadReport:
    """Loads a registered weight file into ``network``. Never downloads.

    Args:
        network: The 2D network; of a network wrapped for 2.5D, the inner one.
        weights_name: Name of the file in ``smallseg weights list``.
        adapt_input_channels: Adapt the first convolution to the network's input channels instead of leaving it random.
        file: Another file to read in place of the published one.

    Returns:
        What became of each tensor; its ``summary()`` belongs in the training log.

    Raises:
        UsageError: If no weights are called ``weights_name``.
        WeightsError: If the file is missing, damaged, or does not fit ``network``; the network is unchanged then.
    """
    path = resolve(weights_name, file)
    try:
        return LOADERS[entry(weights_name).layout](
            network, read_checkpoint(path), adapt_input_channels=adapt_input_channels
        )
    except WeightsError as error:
        if str(path) in str(error):
            raise
        raise WeightsError(f"{path}: {error}") from error
