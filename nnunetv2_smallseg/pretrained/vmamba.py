"""Loads VMamba-Tiny's ImageNet weights into the encoder of SwinUMamba and SwinUMambaD.

The file is the first version of VMamba (depths 2-2-9-2, gate, 16 states, no MLP): Liu et al., VMamba: Visual State
Space Model, NeurIPS 2024, arXiv 2401.10166, github.com/MzeroMiko/VMamba (MIT). What goes where follows the loaders of
github.com/JiarunLiu/Swin-UMamba commit 2c1f72e (Apache-2.0), with three differences: every block has to arrive or
nothing is loaded (the authors' loader skips all blocks of a renamed file without an error), the first convolution of
SwinUMambaD adapts to other channel counts (the authors' loader leaves it random), and ``patch_embed.norm.bias`` is not
copied into SwinUMamba, whose patch embedding is another one (the authors copy it by mistake).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import nn

from nnunetv2_smallseg.errors import WeightsError
from nnunetv2_smallseg.pretrained.report import LoadReport

__all__ = ["adapt_input_channels_of", "load_vmamba_tiny"]

# Names in the checkpoint -> names below ``network.encoder``. Each rule knows the names of the first release
# (ln_1, self_attention, patch_embed.proj) and those of VMamba's current code (norm, op, patch_embed.0).
NAME_RULES = (
    (re.compile(r"layers\.(\d+)\.blocks\.(\d+)\.(?:ln_1|norm)\."), r"stages.\1.blocks.\2.norm."),
    (re.compile(r"layers\.(\d+)\.blocks\.(\d+)\.(?:self_attention|op)\."), r"stages.\1.blocks.\2.ss2d."),
    (re.compile(r"layers\.(\d+)\.downsample\."), r"downsamples.\1."),
    (re.compile(r"patch_embed\.(?:proj|0)\."), "patch_embed.proj."),
    (re.compile(r"patch_embed\.(?:norm|2)\."), "patch_embed.norm."),
)
PATCH_KERNEL = "patch_embed.proj.weight"
PATCH_NORM_BIAS = "patch_embed.norm.bias"
PATCH_ENTRIES = (PATCH_KERNEL, "patch_embed.proj.bias", "patch_embed.norm.weight", PATCH_NORM_BIAS)

# (blocks in each stage, inner width of the first block) -> name of a newer VMamba file
NEWER_FILES = {((2, 2, 5, 2), 192): "vssm_tiny_0230", ((2, 2, 8, 2), 96): "vssm1_tiny_0230s"}
SHOWN_PROBLEMS = 5


def load_vmamba_tiny(
    network: nn.Module,
    checkpoint: Mapping[str, torch.Tensor],
    *,
    adapt_input_channels: bool = True,
    load_stray_norm_bias: bool = False,
) -> LoadReport:
    """Copies VMamba-Tiny's weights into ``network.encoder``, completely or not at all.

    All blocks and downsamplings (204 tensors) have to be in the checkpoint with equal shapes, and the checkpoint may
    hold no others. The patch embedding is loaded where it is the same module (SwinUMambaD); with other than 3 input
    channels its convolution is adapted. The checkpoint's final norm and classifier are not used.

    Args:
        network: The 2D network; of a network wrapped for 2.5D, the inner one.
        checkpoint: State dict as given by ``read_checkpoint``, under the names of VMamba's first or current code.
        adapt_input_channels: Adapt the patch embedding to other than 3 input channels. If False, it then keeps its own
            initialisation, as with the authors' loader.
        load_stray_norm_bias: Also copy ``patch_embed.norm.bias`` into a patch embedding of another design, as the
            authors' loader of SwinUMamba does by mistake. Only of use to reproduce their start exactly.

    Returns:
        What became of each tensor.

    Raises:
        WeightsError: If the checkpoint is another network or incomplete; the network is unchanged then.
        TypeError: If ``network`` has no encoder.
    """
    encoder = getattr(network, "encoder", None)
    if not isinstance(encoder, nn.Module):
        raise TypeError(
            f"{type(network).__name__} has no 'encoder'; expected is SwinUMamba or SwinUMambaD itself (of a network "
            f"wrapped for 2.5D, pass the inner one)"
        )
    _refuse_newer_architecture(checkpoint)
    target = encoder.state_dict()  # shares memory with the parameters
    source = _encoder_names(checkpoint)
    _require_agreement(target, {name: checkpoint[old] for name, old in source.items()})

    values = {name: checkpoint[old] for name, old in source.items() if name not in PATCH_ENTRIES}
    patch_values, adapted = _patch_embedding(
        target, {name: checkpoint[source[name]] for name in PATCH_ENTRIES}, adapt_input_channels, load_stray_norm_bias
    )
    values.update(patch_values)
    with torch.no_grad():
        for name, value in values.items():
            target[name].copy_(value)
    used = {source[name] for name in values}
    return LoadReport(
        network=type(network).__name__,
        checkpoint="VMamba-Tiny (ImageNet-1K)",
        matched=tuple(f"encoder.{name}" for name in target if name in values and name not in adapted),
        adapted=tuple(f"encoder.{name}" for name in target if name in adapted),
        unused=tuple(old for old in checkpoint if old not in used),
        missing=tuple(f"encoder.{name}" for name in target if name not in values),
    )


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


def _patch_embedding(
    target: Mapping[str, torch.Tensor],
    source: Mapping[str, torch.Tensor],
    adapt_input_channels: bool,
    load_stray_norm_bias: bool,
) -> tuple[dict[str, torch.Tensor], set[str]]:
    """The values to load into the patch embedding, and which of them were adapted.

    Args:
        target: The encoder's entries.
        source: The checkpoint's patch embedding, under the encoder's names.
        adapt_input_channels: See ``load_vmamba_tiny``.
        load_stray_norm_bias: See ``load_vmamba_tiny``.
    """
    wanted, given = target[PATCH_KERNEL].shape, source[PATCH_KERNEL].shape
    if wanted == given:
        return dict(source), set()
    if wanted[0] == given[0] and wanted[2:] == given[2:]:
        if not adapt_input_channels:
            return {}, set()
        return {**source, PATCH_KERNEL: adapt_input_channels_of(source[PATCH_KERNEL], wanted[1])}, {PATCH_KERNEL}
    return ({PATCH_NORM_BIAS: source[PATCH_NORM_BIAS]} if load_stray_norm_bias else {}), set()


def _encoder_names(checkpoint: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Names below ``network.encoder`` -> names in the checkpoint; the checkpoint's other entries are left out."""
    names = {}
    for old in checkpoint:
        for pattern, replacement in NAME_RULES:
            if pattern.match(old):
                names[pattern.sub(replacement, old, count=1)] = old
    return names


def _require_agreement(target: Mapping[str, torch.Tensor], source: Mapping[str, torch.Tensor]) -> None:
    """Raises unless names and shapes agree, but for the shape of the patch embedding's kernel.

    Entries too many count as well: the first nine blocks of a stage of VMamba-S have the shapes of VMamba-T's.
    """
    problems = [f"{name} is missing" for name in target if name not in source]
    problems += [
        f"{name} has shape {tuple(source[name].shape)}, the network needs {tuple(wanted.shape)}"
        for name, wanted in target.items()
        if name in source and name != PATCH_KERNEL and source[name].shape != wanted.shape
    ]
    problems += [f"{name} is not part of the network" for name in source if name not in target]
    if not problems:
        return
    more = f"\n  and {len(problems) - SHOWN_PROBLEMS} more" if len(problems) > SHOWN_PROBLEMS else ""
    raise WeightsError(
        f"the checkpoint is not the VMamba-Tiny this network starts from; nothing was loaded. Below 'encoder', "
        f"{len(problems)} of {len(target)} tensors do not agree:\n  "
        + "\n  ".join(problems[:SHOWN_PROBLEMS])
        + more
        + "\n"
        "Use the published file (`smallseg weights fetch vmamba_tiny_imagenet`). A Swin-UMamba you trained with the "
        "authors' code is converted by `smallseg weights import-official`."
    )


def _refuse_newer_architecture(checkpoint: Mapping[str, torch.Tensor]) -> None:
    """Raises for VMamba's later networks, which share names with the first one but have MLPs, one state and no gate."""
    states = [tensor.shape[-1] for name, tensor in checkpoint.items() if name.endswith(".A_logs")]
    has_mlp = any(re.match(r"layers\.\d+\.blocks\.\d+\.mlp\.", name) for name in checkpoint)
    if not has_mlp and not (states and max(states) == 1):
        return
    blocks = {match.groups() for name in checkpoint if (match := re.match(r"layers\.(\d+)\.blocks\.(\d+)\.", name))}
    stages = sorted({int(stage) for stage, _ in blocks})
    depths = tuple(sum(int(stage) == wanted for stage, _ in blocks) for wanted in stages)
    skip = checkpoint.get("layers.0.blocks.0.op.Ds")
    inner_width = skip.numel() // 4 if skip is not None else None  # four scan directions
    found = NEWER_FILES.get((depths, inner_width), "one of VMamba's later networks")
    raise WeightsError(
        f"the checkpoint is {found} (depths {'-'.join(map(str, depths))}), a newer VMamba architecture with MLP "
        f"branches and one state per channel, which does not fit Swin-UMamba's encoder; nothing was loaded. Use the "
        f"first version of VMamba-Tiny: `smallseg weights fetch vmamba_tiny_imagenet`."
    )
