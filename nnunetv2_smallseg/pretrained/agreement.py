"""What loaders of pretrained weights share: comparing names and shapes, adapting a kernel to the input channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from nnunetv2_smallseg.errors import WeightsError

__all__ = ["adapt_input_channels_of", "disagreements", "refuse"]

SHOWN_PROBLEMS = 5


def adapt_input_channels_of(kernel: torch.Tensor, input_channels: int) -> torch.Tensor:
    """A convolution kernel for another number of input channels.

    One channel gets the sum over the kernel's channels: a grey image then gives what the same image in RGB gave. More
    channels get the kernel's channels in turn, scaled so that equal channels give that too.

    Args:
        kernel: (C_out, C, K, K).
        input_channels: Channels wanted.

    Returns:
        (C_out, input_channels, K, K).
    """
    channels = kernel.shape[1]
    if input_channels == 1:
        return kernel.sum(dim=1, keepdim=True)
    if input_channels == channels:
        return kernel
    repeated = kernel[:, [channel % channels for channel in range(input_channels)]]
    return repeated * (channels / input_channels)


def disagreements(target: Mapping[str, torch.Tensor], source: Mapping[str, torch.Tensor], adaptable: str) -> list[str]:
    """What keeps the entries of ``source`` from filling those of ``target``.

    Args:
        target: Entries of the network.
        source: Entries of the checkpoint that belong there, under the network's names; others are not looked at.
        adaptable: The entry whose shape may differ.

    Returns:
        A line for every entry that is missing or has another shape.
    """
    problems = [f"{name} is missing" for name in target if name not in source]
    return problems + [
        f"{name} has shape {tuple(source[name].shape)}, the network needs {tuple(wanted.shape)}"
        for name, wanted in target.items()
        if name in source and name != adaptable and source[name].shape != wanted.shape
    ]


def refuse(problems: Sequence[str], what: str, next_step: str) -> None:
    """Raises ``WeightsError`` with the first of ``problems`` between two sentences; does nothing if there are none."""
    if not problems:
        return
    lines = list(problems[:SHOWN_PROBLEMS])
    if len(problems) > SHOWN_PROBLEMS:
        lines.append(f"and {len(problems) - SHOWN_PROBLEMS} more")
    raise WeightsError("\n".join((what, *(f"  {line}" for line in lines), next_step)))
