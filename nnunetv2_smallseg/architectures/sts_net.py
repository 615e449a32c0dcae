"""STS-Net: a ResNeXt50 encoder with channel attention and the decoder of DeepLabV3.

Paper: Zhao et al., A novel framework for segmentation of small targets in medical images, Scientific Reports 2025,
https://doi.org/10.1038/s41598-025-94437-9. The authors' code is not available. Encoder and decoder are those of
segmentation_models_pytorch (MIT), whose names the paper's tables use; the code here is our own.

With ESCA after the stem and after each stage, 3 channels and 2 classes, fvcore counts 571.3537 G multiply-adds for the
training batch (4, 3, 480, 480) and 39,105,908 parameters; the paper prints 571.35 G and 39.10 M. Of the simple places
for ESCA only this one gives that number.

What the paper leaves open, and what is done here:

- Attention is in line: the weighted map is the output of its stage and the input of the next. The decoder sees the last
  map only, so that attention beside the stages would do nothing in four of five places.
- The kernels of ESCA follow ECA-Net's rule.
- The constructor never reads or downloads weights; ``nnunetv2_smallseg.pretrained`` does, once, before training.
- Any height and width works: inputs are padded to a multiple of 8 and outputs cropped.
- There is one output. With deep supervision on it comes as a list of one.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from nnunetv2_smallseg.architectures.blocks.batch_norm import GuardedBatchNorm2d
from nnunetv2_smallseg.architectures.blocks.esca import ESCA
from nnunetv2_smallseg.architectures.segmentation_network import SegmentationNetwork

__all__ = ["STSNet"]

OUTPUT_STRIDE = 8


def guard_batch_norms(module: nn.Module) -> None:
    """Replaces every ``nn.BatchNorm2d`` below ``module`` by one that bears a single value per channel in training."""
    for name, child in module.named_children():
        if type(child) is nn.BatchNorm2d:
            guarded = GuardedBatchNorm2d(child.num_features, eps=child.eps, momentum=child.momentum)
            guarded.load_state_dict(child.state_dict(), assign=True)
            setattr(module, name, guarded)
        else:
            guard_batch_norms(child)


@contextmanager
def statistics_kept(module: nn.Module) -> Iterator[None]:
    """Leaves running means and variances of all batch normalisations below ``module`` as they are."""
    norms = [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


class DeepLabDecoder(nn.Module):
    """Atrous spatial pyramid, 3x3 convolution, head and bilinear upsampling to the size of the image.

    Args:
        body: Decoder of segmentation_models_pytorch's DeepLabV3; reads the last of its inputs.
        width: Channels of its output.
        num_classes: Channels K of the logits.
        deep_supervision: Return a list of the one output instead of the output.
    """

    def __init__(self, body: nn.Module, width: int, num_classes: int, deep_supervision: bool) -> None:
        super().__init__()
        self.deep_supervision = deep_supervision
        self.body = body
        # A list, because nnU-Net knows by the name ``seg_layers`` what not to transfer to other classes.
        self.seg_layers = nn.ModuleList([nn.Conv2d(width, num_classes, kernel_size=1)])
        self.upsample = nn.Upsample(scale_factor=OUTPUT_STRIDE, mode="bilinear", align_corners=True)

    def forward(self, features: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Maps of the encoder, the last (B, C, h, w) -> logits [(B, K, 8 h, 8 w)]."""
        return [self.upsample(self.seg_layers[0](self.body(features)))]


class STSNet(SegmentationNetwork):
    """STS-Net: ResNeXt50-32x4d of output stride 8, ESCA after stem and stages, DeepLabV3 decoder.

    Args:
        input_channels: Channels C of the image.
        num_classes: Channels K of the output.
        deep_supervision: Return a list of the one output instead of the output; the network has no other outputs.
        encoder_name: A ResNet or ResNeXt of segmentation_models_pytorch.
        decoder_channels: Channels of the decoder.
        dropout: Share of the pyramid's values set to 0 in training.

    Attributes:
        grad_checkpointing: Compute the activations of the four stages again in the backward pass.

    Raises:
        ValueError: If ``encoder_name`` is no ResNet or ResNeXt of segmentation_models_pytorch.
    """

    stride = OUTPUT_STRIDE
    deep_supervision_strides = (1,)

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        deep_supervision: bool = True,
        *,
        encoder_name: str = "resnext50_32x4d",
        decoder_channels: int = 256,
        dropout: float = 0.5,
    ) -> None:
        super().__init__(input_channels, num_classes)
        # Imported here: it takes longer than importing torch, which the other networks need not pay for.
        from segmentation_models_pytorch import DeepLabV3
        from segmentation_models_pytorch.encoders.resnet import resnet_encoders

        known = [name for name in resnet_encoders if name.startswith(("resnet", "resnext"))]
        if encoder_name not in known:
            raise ValueError(f"encoder_name is {encoder_name!r}, but must be one of {', '.join(known)}")
        template = DeepLabV3(
            encoder_name,
            encoder_weights=None,
            encoder_output_stride=OUTPUT_STRIDE,
            decoder_channels=decoder_channels,
            decoder_aspp_dropout=dropout,
            in_channels=input_channels,
            classes=num_classes,
        )
        self.grad_checkpointing = False
        self.encoder = template.encoder
        self.attention = nn.ModuleList(ESCA(width) for width in self.encoder.out_channels[1:])
        self.decoder = DeepLabDecoder(template.decoder, decoder_channels, num_classes, deep_supervision)
        guard_batch_norms(self)

    def _stage(self, stage: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if not (self.grad_checkpointing and self.training):
            return stage(x)
        if torch.compiler.is_compiling():  # the compiler takes no contexts, and does not repeat changes of buffers
            return checkpoint(stage, x, use_reentrant=False)
        # The second pass sees the batch of the first: it must not count in the running statistics again.
        return checkpoint(stage, x, use_reentrant=False, context_fn=lambda: (nullcontext(), statistics_kept(stage)))

    def forward_features(self, image: torch.Tensor) -> list[torch.Tensor]:
        """(B, C, H, W), H and W multiples of 8 -> weighted maps of stem and stages, at strides 2, 4, 8, 8, 8."""
        encoder = self.encoder
        x = self.attention[0](encoder.relu(encoder.bn1(encoder.conv1(image))))
        features = [x]
        x = encoder.maxpool(x)
        stages = (encoder.layer1, encoder.layer2, encoder.layer3, encoder.layer4)
        for stage, attention in zip(stages, self.attention[1:], strict=True):
            x = attention(self._stage(stage, x))
            features.append(x)
        return features

    def forward_padded(self, image: torch.Tensor) -> list[torch.Tensor]:
        """Logits for an image whose height and width are multiples of the stride, in a list of one."""
        return self.decoder(self.forward_features(image))

    def encoder_parameters(self) -> Iterator[nn.Parameter]:
        """What ImageNet weights fill: the ResNeXt without the attention."""
        return self.encoder.parameters()
