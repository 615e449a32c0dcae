"""SvANet and LiteSvANet: scale-variant attention for small medical objects.

Paper: Dai et al., SvANet, IEEE Transactions on Neural Networks and Learning Systems, 2026.
Official code: github.com/anthonyweidai/SvANet, state of 2026-01-29. The code here is our own.

What differs from the official code, and why:

- ``fusion="grouped"`` is the default. Only with it do the parameters equal the paper's Table III, for both networks;
  the released code fuses densely, ``fusion="dense"``.
- LiteSvANet can be built. It is the one network that fits its numbers in Table III; the released options fail.
- Any height and width: inputs are padded to a multiple of the stride and outputs cropped. The pooling grid of the
  scale-variant attention follows the map, height and width apart, unless ``design_size`` sets it.
- Batch size 1 trains: batch normalisations use their running statistics where they see a single value per channel.
- Random choices come from torch alone, as tensors: they repeat with a seed and under activation checkpointing, and the
  network compiles to one graph. Each cell's scale is a buffer (with ``design_size``) or drawn in every step (without).
- The classifier runs on every map before it is resized. Both are linear and act on other axes, so the result is the
  same, and 2368 channels at half the resolution never exist.
- Deep supervision, which the paper does not have, adds a head to every step of the decoder.
- The network never reads a weight file; ``nnunetv2_smallseg.pretrained`` does, once, before training.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn
from torch.nn import functional

from nnunetv2_smallseg.architectures.blocks.resnet import ResNetEncoder
from nnunetv2_smallseg.architectures.segmentation_network import SegmentationNetwork
from nnunetv2_smallseg.architectures.svanet_blocks import ASPP, UNIT_NORM_EPSILON, DecoderStep, GuidanceBranch, Neck

__all__ = ["LiteSvANet", "SvANet", "from_official", "to_official"]

FUSIONS = ("grouped", "dense")
RESNET50_DEPTHS = (3, 4, 6, 3)


def resize(x: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """(B, C, h, w) -> (B, C, *size), bilinear with aligned corners, as everywhere in the official decoder."""
    return functional.interpolate(x, tuple(size), mode="bilinear", align_corners=True)


class Decoder(nn.Module):
    """Decoder of SvANet: steps from the deepest map up, and a classifier on all their results and the ASPP's.

    Args:
        num_classes: Channels K of the outputs.
        skip_channels: Channels of the guided stages, from stage 1 on.
        input_channels: Channels of the deepest stage.
        context_channels: Channels of the ASPP's output.
        grouped_fusion: See ``DecoderStep``.
        deep_supervision: Build a head for every step, and return all outputs instead of the first.
    """

    def __init__(
        self,
        num_classes: int,
        skip_channels: Sequence[int],
        input_channels: int,
        context_channels: int,
        *,
        grouped_fusion: bool,
        deep_supervision: bool,
    ) -> None:
        super().__init__()
        self.deep_supervision = deep_supervision
        deep_to_shallow = tuple(reversed(skip_channels))
        self.steps = nn.ModuleList(
            DecoderStep(below, here, grouped_fusion)
            for below, here in zip((input_channels, *deep_to_shallow), deep_to_shallow, strict=False)
        )
        self.map_channels = (*skip_channels, context_channels)
        self.seg_layers = nn.ModuleList([nn.Conv2d(sum(self.map_channels), num_classes, kernel_size=1)])
        if deep_supervision:
            self.seg_layers.extend(nn.Conv2d(width, num_classes, kernel_size=1) for width in skip_channels)
        self.register_load_state_dict_pre_hook(self._leave_out_unbuilt_heads)

    def _leave_out_unbuilt_heads(self, module: nn.Module, state_dict: dict, prefix: str, *_: object) -> None:
        """Lets weights trained with deep supervision fit a decoder built without: nnU-Net predicts with such a one."""
        heads = f"{prefix}seg_layers."
        for name in [name for name in state_dict if name.startswith(heads)]:
            if int(name[len(heads) :].split(".", 1)[0]) >= len(self.seg_layers):
                del state_dict[name]

    def classify(self, maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """Logits at stride 2.

        Args:
            maps: Results of the steps, finest first, and the ASPP's output: (B, C_i, h_i, w_i).
        Returns:
            (B, K, H / 2, W / 2).
        """
        classifier = self.seg_layers[0]
        weights = classifier.weight.split(self.map_channels, dim=1)
        size = maps[0].shape[-2:]
        logits = functional.conv2d(maps[0], weights[0], classifier.bias)
        for level, weight in zip(maps[1:], weights[1:], strict=True):
            logits = logits + resize(functional.conv2d(level, weight), size)
        return logits

    def forward(
        self, deepest: torch.Tensor, skips: Sequence[torch.Tensor], context: torch.Tensor, size: Sequence[int]
    ) -> list[torch.Tensor]:
        """Decodes.

        Args:
            deepest: Map of the last encoder stage.
            skips: Guided maps, from stage 1 (stride 2) on.
            context: Output of the ASPP.
            size: Height and width of the image.
        Returns:
            Logits (B, K, h, w) at strides 1, 2, 4, ...; at stride 1 only without deep supervision.
        """
        maps, x = [], deepest
        for step, skip in zip(self.steps, reversed(skips), strict=True):
            x = step(x, skip)
            maps.insert(0, x)
        outputs = [resize(self.classify((*maps, context)), size)]
        if self.deep_supervision:
            outputs += [head(level) for head, level in zip(self.seg_layers[1:], maps, strict=False)]
        return outputs


class SvANet(SegmentationNetwork):
    """SvANet: ResNet-50, a neck on each of the first four stages, guidance between them, ASPP, AssemFormer decoder.

    Args:
        input_channels: Channels C of the image.
        num_classes: Channels K of the outputs.
        deep_supervision: Build a head for every decoder step and return a list of outputs instead of one.
        fusion: How a decoder step fuses the upsampled map and the skip, concatenated to 2C channels: "grouped" (3x3
            convolution with C groups; the parameters of the paper) or "dense" (the released code).
        design_size: Image size that sets the grid of the scale-variant attention, as in the released code (512 there);
            None lets the grid follow the padded image.
        width: Channels of stage 1; all others are multiples.
        depths: Residual blocks of the four encoder layers.
        drop_path_rate: Stochastic depth of guidance; stage s of n has (s - 1) / n of it.

    Raises:
        ValueError: If ``fusion`` is unknown, ``design_size`` or ``width`` is not positive, ``width`` is odd, or
            ``depths`` are not four positive numbers.
    """

    stride = 32
    deep_supervision_strides = (1, 2, 4, 8, 16)
    num_guided_stages = 4

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        deep_supervision: bool = True,
        *,
        fusion: str = "grouped",
        design_size: int | None = None,
        width: int = 64,
        depths: Sequence[int] = RESNET50_DEPTHS,
        drop_path_rate: float = 0.2,
    ) -> None:
        super().__init__(input_channels, num_classes)
        if fusion not in FUSIONS:
            raise ValueError(f"fusion is {fusion!r}, but must be one of {', '.join(FUSIONS)}")
        if design_size is not None and design_size < 1:
            raise ValueError(f"design_size is {design_size}, but must be a number of pixels or None")
        if width < 2 or width % 2:
            raise ValueError(f"width is {width}, but must be a positive even number")
        if len(depths) != len(RESNET50_DEPTHS) or min(depths) < 1:
            raise ValueError(f"depths are {tuple(depths)}, but must be {len(RESNET50_DEPTHS)} positive numbers")
        num_guided = self.num_guided_stages
        self.encoder = ResNetEncoder(input_channels, width, depths[:num_guided], norm_epsilon=UNIT_NORM_EPSILON)
        *skip_channels, deepest_channels = self.encoder.channels
        self.necks = nn.ModuleList(Neck(channels) for channels in skip_channels)
        self.guidance = nn.ModuleDict(
            {
                f"{source}to{target}": GuidanceBranch(
                    skip_channels[source - 1],
                    skip_channels[target - 1],
                    source,
                    target,
                    design_size,
                    drop_path_rate * (source - 1) / num_guided,
                )
                for source in range(1, num_guided + 1)
                for target in range(source + 1, num_guided + 1)
            }
        )
        context_channels = 8 * width
        self.aspp = ASPP(deepest_channels, context_channels)
        self.decoder = Decoder(
            num_classes,
            skip_channels,
            deepest_channels,
            context_channels,
            grouped_fusion=fusion == "grouped",
            deep_supervision=deep_supervision,
        )

    def guide(self, maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Adds to every stage what finer stages tell it; these have been guided themselves by then.

        Args:
            maps: Outputs of the necks, from stage 1 on: (B, C_s, H / 2^s, W / 2^s).
        Returns:
            Guided maps of the same shapes.
        """
        guided = list(maps)
        for name, branch in self.guidance.items():
            source, target = (int(stage) for stage in name.split("to"))
            guided[target - 1] = guided[target - 1] + branch(guided[source - 1])
        return guided

    def forward_padded(self, image: torch.Tensor) -> list[torch.Tensor]:
        """Logits for an image whose height and width are multiples of the stride."""
        *stages, deepest = self.encoder(image)
        skips = self.guide([neck(stage) for neck, stage in zip(self.necks, stages, strict=True)])
        return self.decoder(deepest, skips, self.aspp(deepest), image.shape[-2:])

    def encoder_parameters(self) -> Iterator[nn.Parameter]:
        """What ImageNet weights fill unchanged: all of the encoder, the first convolution for three channels only."""
        for name, parameter in self.encoder.named_parameters():
            if name != "conv1.weight" or self.input_channels == 3:
                yield parameter


class LiteSvANet(SvANet):
    """LiteSvANet: SvANet without the last encoder stage; ASPP on stage 4, necks and guidance on stages 1 to 3.

    Args:
        input_channels: Channels C of the image.
        num_classes: Channels K of the outputs.
        deep_supervision: See ``SvANet``, as for all other options; of ``depths`` the last is not used.
    """

    stride = 16
    deep_supervision_strides = (1, 2, 4, 8)
    num_guided_stages = 3


def _official_modules() -> Iterator[tuple[str, str]]:
    """Our name and the official one of every module that holds tensors, in a SvANet of the paper's size."""

    def unit(ours: str, official: str) -> Iterator[tuple[str, str]]:
        yield f"{ours}.conv", f"{official}.Conv"
        yield f"{ours}.norm", f"{official}.Bn"

    def former(ours: str, official: str) -> Iterator[tuple[str, str]]:
        yield from unit(f"{ours}.local", f"{official}.LocalRep.0")
        yield f"{ours}.reduce", f"{official}.LocalRep.2.Conv"
        for block in range(2):
            inside, official_inside = f"{ours}.blocks.{block}", f"{official}.GlobalRep.{block}"
            yield f"{inside}.attention_norm", f"{official_inside}.PreNormAttn.0"
            yield f"{inside}.score_key_value", f"{official_inside}.PreNormAttn.1.qkv_proj.Conv"
            yield f"{inside}.attention_out", f"{official_inside}.PreNormAttn.1.out_proj.Conv"
            yield f"{inside}.feed_forward_norm", f"{official_inside}.PreNormFfn.0"
            yield f"{inside}.feed_forward_in", f"{official_inside}.PreNormFfn.1.Conv"
            yield f"{inside}.feed_forward_out", f"{official_inside}.PreNormFfn.3.Conv"
        yield f"{ours}.norm", f"{official}.GlobalRep.2"
        yield from unit(f"{ours}.project", f"{official}.ConvProj")

    yield "encoder.conv1", "Encoder.Conv1.Conv"
    yield "encoder.bn1", "Encoder.Conv1.Bn"
    for layer in range(1, 5):
        for block in range(max(RESNET50_DEPTHS)):
            # The official layer 1 begins with the max pooling.
            ours = f"encoder.layer{layer}.{block}"
            official = f"Encoder.Layer{layer}.{'1.' * (layer == 1)}{block}"
            for number in range(1, 4):
                yield f"{ours}.conv{number}", f"{official}.Conv{number}.Conv"
                yield f"{ours}.bn{number}", f"{official}.Conv{number}.Bn"
            yield f"{ours}.downsample.0", f"{official}.Downsample.Conv"
            yield f"{ours}.downsample.1", f"{official}.Downsample.Bn"
    for stage in range(1, 5):
        ours, official = f"necks.{stage - 1}", f"SegHead.ConvB{stage}"
        for index in (0, 1, 3):
            yield from unit(f"{ours}.bottleneck.{index}", f"{official}.Bottleneck.{index}")
        yield f"{ours}.bottleneck.2.squeeze", f"{official}.Bottleneck.2.SELayer.0.Conv"
        yield f"{ours}.bottleneck.2.excite", f"{official}.Bottleneck.2.SELayer.1.Conv"
        yield from former(f"{ours}.former", f"{official}.ViTLayer")
        for target in range(stage + 1, 5):
            ours, official = f"guidance.{stage}to{target}", f"SegHead.Convr{stage}{target}"
            for index in range(target - stage + 1):
                yield from unit(f"{ours}.steps.{index}.0", f"{official}.Conv{index + 1}.Conv.0")
                yield from unit(f"{ours}.steps.{index}.1", f"{official}.Conv{index + 1}.Conv.1")
                yield f"{ours}.squeezes.{index}", f"{official}.Squeeze{index + 1}.Conv"
    for index in range(4):
        yield from unit(f"aspp.branches.{index}", f"SegHead.Aspp.aspp_layer.Convs.{index}")
    yield from unit("aspp.pooled_branch", "SegHead.Aspp.aspp_layer.Convs.4.AsppPool.conv_1x1")
    yield from unit("aspp.project", "SegHead.Aspp.aspp_layer.Project")
    for index in range(4):
        ours, official = f"decoder.steps.{index}", "SegHead.LinkHead"
        yield from unit(f"{ours}.up.reduce", f"{official}.UpLink{index + 1}.TPConv.0")
        yield f"{ours}.up.upsample", f"{official}.UpLink{index + 1}.TPConv.1.Conv"
        yield f"{ours}.up.norm", f"{official}.UpLink{index + 1}.TPConv.1.Bn"
        yield from unit(f"{ours}.up.restore", f"{official}.UpLink{index + 1}.TPConv.2")
        yield from unit(f"{ours}.fuse.0", f"{official}.CatLinkConv{index + 1}.Conv.0")
        yield from unit(f"{ours}.fuse.1", f"{official}.CatLinkConv{index + 1}.Conv.1")
        yield from former(f"{ours}.former", f"{official}.ViTLayer{index + 1}")
    yield "decoder.seg_layers.0", "SegHead.Classifier.Classifier.Conv"


def _renamed(state_dict: Mapping[str, torch.Tensor], modules: Mapping[str, str]) -> dict[str, torch.Tensor]:
    renamed = {}
    for name, tensor in state_dict.items():
        module, _, leaf = name.rpartition(".")
        renamed[f"{modules[module]}.{leaf}" if module in modules else name] = tensor
    return renamed


def to_official(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Renames the entries of a SvANet or LiteSvANet state dict to those of the official code.

    Args:
        state_dict: State dict of one of the two networks, with the encoder's default depths.
    Returns:
        The same tensors under official names, in the order of ``state_dict``. Heads of deep supervision and the cells'
        scales have no official names and keep ours.
    """
    return _renamed(state_dict, dict(_official_modules()))


def from_official(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Renames the entries of an official SvANet or LiteSvANet state dict to those of this module.

    Args:
        state_dict: State dict with official names.
    Returns:
        The same tensors under our names, in the order of ``state_dict``; names that are neither network's are kept, so
        that ``load_state_dict`` reports them.
    """
    return _renamed(state_dict, {official: ours for ours, official in _official_modules()})
