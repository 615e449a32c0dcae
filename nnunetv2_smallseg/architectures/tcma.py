"""Tensor-based cross-feature multi-scale attention (TCMA) of S³-Mamba.

Paper: Wang et al., S³-Mamba: Small-Size-Sensitive Mamba for Lesion Segmentation, AAAI 2025, arXiv 2412.14546, equations
1 to 5. The authors have released no code, so this is the paper's text; what it leaves open was decided here and is
marked *our choice* below. Paper's names: O image features, E edge features, R class maps of an encoder level, M class
maps of a decoder stage, A the attention.

One reading of equations 2 to 4 makes all shapes agree. The base tensor A_B of a patch has the axes class k, image
channel c and edge channel e; the weights W_D have the axes pixel j and o. A sum of their product over "the last
dimension" closes only if o runs over the pairs (c, e). With patches of d x d pixels, P = sigmoid(R), C image and E edge
channels::

    A_B(k, c, e) = 1/d² sum_{j in patch} P(k, j) O(c, j) E(e, j)
    A^d(k, j)    = 1/(C E) sum_{c, e} W^d(j, c, e) A_B(k, c, e)        A = A^2 + A^4 + A^8

Our choices: the sigmoid on R, and O, E >= 0 (both end in a ReLU), make A an attention >= 0 that cannot flip a sign;
means in place of sums keep it of order 1 whatever d, C and E, where the sums leave the range of float16; each scale has
its own perceptron for W, as with shared ones W would be the same at every scale.

A product of all three factors is never stored: O x E is formed once a level, and two matrix products a patch do the
rest. Equations 2 and 4 in this order are (K x d²)(d² x CE) and (K x CE)(CE x d²), with A_B between them; where A_B has
more than d⁴ values, as for small patches and many classes, (d² x CE)(CE x d²) and (K x d²)(d² x d²) give the same.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.nn import functional

from nnunetv2_smallseg.architectures.blocks.batch_norm import GuardedBatchNorm2d

__all__ = ["TCMA", "InputPyramid", "SobelMagnitude", "TCMALevel", "TensorAttention"]


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Switches autocast off on ``device``; nothing on "meta", which has none."""
    # torch.amp.is_autocast_available is no part of a compiled graph before PyTorch 2.8.
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


class SobelMagnitude(nn.Module):
    """Strength of the edges in each channel: sqrt(gx² + gy² + 1e-6) of the Sobel filters.

    The border is replicated: zeros would draw a frame around every image.
    """

    def __init__(self) -> None:
        super().__init__()
        horizontal = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])
        self.register_buffer("kernels", torch.stack((horizontal, horizontal.T)).unsqueeze(1), persistent=False)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, C, H, W), at least 1e-3."""
        padded = functional.pad(image, (1, 1, 1, 1), mode="replicate")
        gradients = functional.conv2d(padded.flatten(0, 1).unsqueeze(1), self.kernels)  # (B*C, 2, H, W)
        return (gradients.square().sum(1) + 1e-6).sqrt().view_as(image)


def embedding(input_channels: int, width: int, kernel_size: int) -> nn.Sequential:
    """Convolution, batch normalisation, ReLU: (B, input_channels, H, W) -> (B, width, H, W), values >= 0."""
    return nn.Sequential(
        nn.Conv2d(input_channels, width, kernel_size, padding=kernel_size // 2, bias=False),
        GuardedBatchNorm2d(width),
        nn.ReLU(),
    )


class InputPyramid(nn.Module):
    """Image features O (7x7 and 3x3 convolution) and edge features E (Sobel, 3x3 convolution) at several resolutions.

    Both are computed at the image's resolution, once, and averaged to the strides of the levels (our choice), so that
    detail smaller than a patch of the patch embedding reaches the finest level.

    Args:
        input_channels: Channels of the image.
        image_width: Channels C of the image features.
        edge_width: Channels E of the edge features.
        strides: Strides of the levels, each a multiple of the one before.
    """

    def __init__(self, input_channels: int, image_width: int, edge_width: int, strides: Sequence[int]) -> None:
        super().__init__()
        self.image_embedding = nn.Sequential(
            embedding(input_channels, image_width, kernel_size=7), embedding(image_width, image_width, kernel_size=3)
        )
        self.sobel = SobelMagnitude()
        self.edge_embedding = embedding(input_channels, edge_width, kernel_size=3)
        self.pools = [stride // finer for stride, finer in zip(strides, (1, *strides[:-1]), strict=True)]

    def forward(self, image: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(B, input_channels, H, W) -> (O, E) a level, (B, C, H / stride, W / stride) and (B, E, ...), values >= 0."""
        with without_autocast(image.device):
            image = image.to(self.sobel.kernels.dtype)
            image_features, edge_features = self.image_embedding(image), self.edge_embedding(self.sobel(image))
            levels = []
            for pool in self.pools:  # a mean of equally many means is the mean of all
                image_features = functional.avg_pool2d(image_features, pool)
                edge_features = functional.avg_pool2d(edge_features, pool)
                levels.append((image_features, edge_features))
        return levels


class TensorAttention(nn.Module):
    """The attention A of one level, summed over the patch sizes (equations 2 to 4).

    Args:
        num_classes: Classes K.
        image_width: Channels C of the image features.
        edge_width: Channels E of the edge features.
        hidden_width: Hidden width of the perceptrons of equation 3.
        patch_sizes: Sides d of the patches in pixels of the level, each a divisor of the last.

    Raises:
        ValueError: If a patch size does not divide the last.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        image_width: int = 8,
        edge_width: int = 8,
        hidden_width: int = 48,
        patch_sizes: Sequence[int] = (2, 4, 8),
    ) -> None:
        super().__init__()
        if any(patch_sizes[-1] % size for size in patch_sizes):
            raise ValueError(f"patch_sizes are {tuple(patch_sizes)}, but each must divide the last")
        self.patch_sizes = tuple(patch_sizes)
        self.weights = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(image_width + num_classes + edge_width, hidden_width, kernel_size=1, bias=False),
                GuardedBatchNorm2d(hidden_width),
                nn.ReLU(),
                nn.Conv2d(hidden_width, image_width * edge_width, kernel_size=1),
                nn.Sigmoid(),
            )
            for _ in patch_sizes
        )

    def forward(
        self, image_features: torch.Tensor, probabilities: torch.Tensor, edge_features: torch.Tensor
    ) -> torch.Tensor:
        """Attends.

        Args:
            image_features: O, (B, C, h, w), >= 0.
            probabilities: P, (B, K, h, w), in (0, 1).
            edge_features: E, (B, E, h, w), >= 0.
        Returns:
            A, (B, K, h, w), >= 0. Where h or w is no multiple of a patch size, or smaller, the last patches hold fewer
            pixels and are still divided by d².
        """
        height, width = probabilities.shape[-2:]
        below, right = (-size % self.patch_sizes[-1] for size in (height, width))

        def pad(x: torch.Tensor) -> torch.Tensor:
            return functional.pad(x, (0, right, 0, below))  # zeros add nothing to the sums over a patch

        features = torch.cat((image_features, probabilities, edge_features), dim=1)
        pairs = pad((image_features.unsqueeze(2) * edge_features.unsqueeze(1)).flatten(1, 2))  # (B, C*E, h, w)
        classes = pad(probabilities)
        attention = torch.zeros_like(classes)
        for size, perceptron in zip(self.patch_sizes, self.weights, strict=True):
            maps = patches(pad(perceptron(features)), size), patches(pairs, size), patches(classes, size)
            attention = attention + attend(*maps).reshape_as(classes)
        return attention[..., :height, :width]


def attend(weights: torch.Tensor, pairs: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Equations 2 and 4 for one patch size.

    Args:
        weights: W, (B, C*E, H / d, d, W / d, d).
        pairs: O x E, in the shape of ``weights``.
        classes: P, (B, K, H / d, d, W / d, d).
    Returns:
        A^d, in the shape of ``classes``.
    """
    size, num_pairs, num_classes = pairs.shape[-1], pairs.shape[1], classes.shape[1]
    if size**4 < num_classes * num_pairs:
        between = torch.einsum("bchiwj,bchxwy->bhwijxy", weights, pairs)  # pixel x pixel
        total = torch.einsum("bhwijxy,bkhxwy->bkhiwj", between, classes)
    else:
        between = torch.einsum("bkhiwj,bchiwj->bhwkc", classes, pairs)  # A_B
        total = torch.einsum("bhwkc,bchiwj->bkhiwj", between, weights)
    return total / (size**2 * num_pairs)


def patches(x: torch.Tensor, size: int) -> torch.Tensor:
    """(B, C, H, W) -> (B, C, H / size, size, W / size, size): equation 1 without moving data."""
    return x.unflatten(3, (-1, size)).unflatten(2, (-1, size))


class TCMALevel(nn.Module):
    """Modulates one decoder stage with the attention of the encoder level of the same resolution (equation 5).

    M' = A * M is what equation 5 gives; the paper does not say how it re-enters the network. Our choice: a 1x1
    convolution adds it to the decoder's features. It starts at zero, so that the whole module starts as the identity,
    also on pretrained weights. The sum M + M' is an auxiliary output: its supervision gives R and M the meaning of
    class maps that the paper assumes. The paper's pooling of M to the size of A is not needed, since both come from
    the same resolution.

    Args:
        width: Channels of the decoder stage and of the encoder level.
        num_classes: Classes K.
        options: Keywords of ``TensorAttention``.
    """

    def __init__(self, width: int, num_classes: int, **options) -> None:
        super().__init__()
        self.encoder_classes = nn.Conv2d(width, num_classes, kernel_size=1)
        self.decoder_classes = nn.Conv2d(width, num_classes, kernel_size=1)
        self.attention = TensorAttention(num_classes, **options)
        self.back = nn.Conv2d(num_classes, width, kernel_size=1)
        nn.init.zeros_(self.back.weight)
        nn.init.zeros_(self.back.bias)

    def forward(
        self, decoded: torch.Tensor, skip: torch.Tensor, image_features: torch.Tensor, edge_features: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Modulates, in the precision of the parameters, whatever autocast does outside.

        Args:
            decoded: D, channel-last features (B, h, w, width) of the decoder stage.
            skip: F, channel-last features (B, h, w, width) of the encoder level.
            image_features: O of this level, (B, C, h, w).
            edge_features: E of this level, (B, E, h, w).
        Returns:
            ``decoded`` modulated, in its shape and type, and the auxiliary logits (1 + A) M, (B, K, h, w).
        """
        dtype = self.back.weight.dtype
        with without_autocast(decoded.device):
            probabilities = self.encoder_classes(skip.to(dtype).permute(0, 3, 1, 2)).sigmoid()
            classes = self.decoder_classes(decoded.to(dtype).permute(0, 3, 1, 2))
            modulated = self.attention(image_features, probabilities, edge_features) * classes
            change = self.back(modulated).permute(0, 2, 3, 1).to(decoded.dtype)
            return decoded + change, classes + modulated


class TCMA(nn.Module):
    """The attention of all levels with the pyramid of image and edge features they share.

    Args:
        input_channels: Channels of the image.
        num_classes: Classes K; with regions, the number of regions.
        widths: Channels of the levels, finest first.
        strides: Strides of the levels.
        image_width: Channels C of the image features.
        edge_width: Channels E of the edge features.
        hidden_width: Hidden width of the perceptrons of equation 3.
        patch_sizes: Sides of the patches in pixels of a level.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        widths: Sequence[int],
        strides: Sequence[int],
        *,
        image_width: int = 8,
        edge_width: int = 8,
        hidden_width: int = 48,
        patch_sizes: Sequence[int] = (2, 4, 8),
    ) -> None:
        super().__init__()
        self.pyramid = InputPyramid(input_channels, image_width, edge_width, strides)
        # The levels depend on the classes; nnUNetv2_train -pretrained_weights leaves out modules of this name only.
        self.seg_layers = nn.ModuleList(
            TCMALevel(
                width,
                num_classes,
                image_width=image_width,
                edge_width=edge_width,
                hidden_width=hidden_width,
                patch_sizes=patch_sizes,
            )
            for width in widths
        )
