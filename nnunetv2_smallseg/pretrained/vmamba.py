"""Loads the ImageNet weights of VMamba's first version: VMamba-Tiny for Swin-UMamba, VMamba-Small for S³-Mamba.

The first version has a gate, 16 states and no MLP, and depths 2-2-9-2 or 2-2-27-2: Liu et al., VMamba: Visual State
Space Model, NeurIPS 2024, arXiv 2401.10166, github.com/MzeroMiko/VMamba (MIT). Every tensor the network expects has to
arrive or nothing is loaded, where the authors' loaders skip what they do not find without an error.

Swin-UMamba: what goes where follows the loaders of github.com/JiarunLiu/Swin-UMamba commit 2c1f72e (Apache-2.0), with
two more differences: the first convolution of SwinUMambaD adapts to other channel counts (the authors' loader leaves it
random), and ``patch_embed.norm.bias`` is not copied into SwinUMamba, whose patch embedding is another one (the authors
copy it by mistake).

S³-Mamba: the paper names VMamba-S only. What goes where is VM-UNet's rule (Ruan & Xiang 2024, arXiv 2402.02491): the
first blocks of each stage go into the encoder stage, and again into the decoder stage of the same width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import nn

from nnunetv2_smallseg.errors import WeightsError
from nnunetv2_smallseg.pretrained.agreement import adapt_input_channels_of, disagreements, refuse
from nnunetv2_smallseg.pretrained.report import LoadReport

__all__ = ["load_vmamba_small", "load_vmamba_tiny"]

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

VMAMBA_SMALL_DEPTHS = (2, 2, 27, 2)


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
    _refuse_newer_architecture(checkpoint, "Swin-UMamba's encoder", "vmamba_tiny_imagenet")
    target = encoder.state_dict()  # shares memory with the parameters
    source = _encoder_names(checkpoint)
    problems = disagreements(target, {name: checkpoint[old] for name, old in source.items()}, PATCH_KERNEL)
    problems += [f"{name} is not part of the network" for name in source if name not in target]
    refuse(
        problems,
        f"the checkpoint is not the VMamba-Tiny this network starts from; nothing was loaded. Below 'encoder', "
        f"{len(problems)} of {len(target)} tensors do not agree:",
        "Use the published file (`smallseg weights fetch vmamba_tiny_imagenet`). A Swin-UMamba you trained with the "
        "authors' code is converted by `smallseg weights import-official`.",
    )

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


def load_vmamba_small(
    network: nn.Module, checkpoint: Mapping[str, torch.Tensor], *, adapt_input_channels: bool = True
) -> LoadReport:
    """Copies VMamba-Small's weights into encoder and decoder of S3Mamba, completely or not at all.

    Patch embedding, patch mergings and the first blocks of each stage fill the encoder; the same blocks fill the
    decoder stage of the same width. Channel attention, patch expanding, TCMA and heads keep their own initialisation.
    Of the checkpoint, deeper blocks, the final norm and the classifier are not used, nor the depthwise convolutions
    where the network has none.

    Args:
        network: S3Mamba of the size of VMamba-S; of a network wrapped for 2.5D, the inner one.
        checkpoint: State dict as given by ``read_checkpoint``, under the names of VMamba's first or current code.
        adapt_input_channels: Adapt the patch embedding to other than 3 input channels. If False, it then keeps its own
            initialisation.

    Returns:
        What became of each tensor; ``missing`` names the rest of the encoder and of the decoder's blocks.

    Raises:
        WeightsError: If the checkpoint is another network or incomplete, or the network has another size; the network
            is unchanged then.
        TypeError: If ``network`` has no encoder and decoder with stages.
    """
    encoder, decoder = getattr(network, "encoder", None), getattr(network, "decoder", None)
    if not hasattr(encoder, "patch_embed") or not hasattr(decoder, "stages"):
        raise TypeError(f"{type(network).__name__} has no encoder and decoder of VSS blocks; expected is S3Mamba")
    _refuse_newer_architecture(checkpoint, "S³-Mamba", "vmamba_small_imagenet")
    if (depths := _depths(checkpoint)) != VMAMBA_SMALL_DEPTHS:
        raise WeightsError(
            f"the checkpoint is not VMamba-Small: its stages have {'-'.join(map(str, depths)) or 'no'} blocks, those "
            f"of VMamba-Small {'-'.join(map(str, VMAMBA_SMALL_DEPTHS))}; nothing was loaded. Use the published file: "
            f"`smallseg weights fetch vmamba_small_imagenet`."
        )
    source = _encoder_names(checkpoint)
    width = checkpoint[source["patch_embed.norm.weight"]].numel() if "patch_embed.norm.weight" in source else None
    if width is not None and encoder.patch_embed.norm.weight.numel() != width:
        raise WeightsError(
            f"VMamba-Small has {width} channels in its first stage, but this {type(network).__name__} has "
            f"{encoder.patch_embed.norm.weight.numel()}: no ImageNet weights of its size exist, nothing was loaded. "
            f"Train it from a random start, or use S3Mamba with its default widths."
        )

    # Names in the network -> names below the checkpoint's encoder; the channel attention has no counterpart.
    state = network.state_dict()  # shares memory with the parameters
    last = len(decoder.stages) - 1
    places = {}
    for name in state:
        if name.startswith("encoder."):
            places[name] = name.removeprefix("encoder.")
        elif match := re.match(r"decoder\.stages\.(\d+)\.(.*)", name):
            places[name] = f"stages.{last - int(match[1])}.{match[2]}"
    target = {name: state[name] for name in places if ".encf." not in name}
    found = {name: checkpoint[source[places[name]]] for name in target if places[name] in source}
    problems = disagreements(target, found, f"encoder.{PATCH_KERNEL}")
    kernel, wanted = found.get(f"encoder.{PATCH_KERNEL}"), state[f"encoder.{PATCH_KERNEL}"]
    if kernel is not None and (kernel.shape[0], *kernel.shape[2:]) != (wanted.shape[0], *wanted.shape[2:]):
        problems.append(f"{PATCH_KERNEL} has shape {tuple(kernel.shape)}, the network needs {tuple(wanted.shape)}")
    refuse(
        problems,
        f"the checkpoint is not the VMamba-Small this network starts from; nothing was loaded. {len(problems)} of "
        f"{len(target)} tensors do not agree:",
        "Use the published file (`smallseg weights fetch vmamba_small_imagenet`) and a network whose stages are no "
        "deeper than VMamba-Small's.",
    )

    patch_values, adapted = _patch_embedding(
        {name: state[f"encoder.{name}"] for name in PATCH_ENTRIES},
        {name: found.pop(f"encoder.{name}") for name in PATCH_ENTRIES},
        adapt_input_channels,
        load_stray_norm_bias=False,
    )
    values = {**{f"encoder.{name}": value for name, value in patch_values.items()}, **found}
    with torch.no_grad():
        for name, value in values.items():
            state[name].copy_(value)
    used = {source[places[name]] for name in values}
    adapted = {f"encoder.{name}" for name in adapted}
    return LoadReport(
        network=type(network).__name__,
        checkpoint="VMamba-Small (ImageNet-1K)",
        matched=tuple(name for name in places if name in values and name not in adapted),
        adapted=tuple(name for name in places if name in adapted),
        unused=tuple(old for old in checkpoint if old not in used),
        missing=tuple(name for name in places if name not in values),
    )


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


def _depths(checkpoint: Mapping[str, torch.Tensor]) -> tuple[int, ...]:
    """Blocks in each stage of a VMamba checkpoint."""
    blocks = {match.groups() for name in checkpoint if (match := re.match(r"layers\.(\d+)\.blocks\.(\d+)\.", name))}
    stages = sorted({int(stage) for stage, _ in blocks})
    return tuple(sum(int(stage) == wanted for stage, _ in blocks) for wanted in stages)


def _refuse_newer_architecture(checkpoint: Mapping[str, torch.Tensor], whose: str, weights_name: str) -> None:
    """Raises for VMamba's later networks, which share names with the first one but have MLPs, one state and no gate.

    Args:
        checkpoint: The checkpoint.
        whose: What it does not fit.
        weights_name: The file to use instead.
    """
    states = [tensor.shape[-1] for name, tensor in checkpoint.items() if name.endswith(".A_logs")]
    has_mlp = any(re.match(r"layers\.\d+\.blocks\.\d+\.mlp\.", name) for name in checkpoint)
    if not has_mlp and not (states and max(states) == 1):
        return
    depths = _depths(checkpoint)
    skip = checkpoint.get("layers.0.blocks.0.op.Ds")
    inner_width = skip.numel() // 4 if skip is not None else None  # four scan directions
    found = NEWER_FILES.get((depths, inner_width), "one of VMamba's later networks")
    raise WeightsError(
        f"the checkpoint is {found} (depths {'-'.join(map(str, depths))}), a newer VMamba architecture with MLP "
        f"branches and one state per channel, which does not fit {whose}; nothing was loaded. Use the first version: "
        f"`smallseg weights fetch {weights_name}`."
    )
