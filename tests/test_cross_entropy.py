"""Cross entropy without Dice, against values worked out pixel by pixel."""

from __future__ import annotations

import math

import pytest
import torch

from nnunetv2_smallseg.losses.cross_entropy import LabelCrossEntropy, RegionCrossEntropy


def test_labels():
    logits = torch.tensor([[[0.0, math.log(3)]], [[0.0, 0.0]]])[None]  # (1, 2, 1, 2)
    target = torch.tensor([[[[0.0, 0.0]]]])
    # Pixel 1: log 2. Pixel 2: class 0 has logit log 3 against 0.
    expected = (math.log(2) + math.log(4 / 3)) / 2
    assert LabelCrossEntropy()(logits, target).item() == pytest.approx(expected)
    target[..., 1] = 2
    assert LabelCrossEntropy(ignore_label=2)(logits, target).item() == pytest.approx(math.log(2))


def test_regions():
    logits = torch.tensor([[[[0.0, math.log(3)]], [[0.0, 0.0]]]])  # two regions, two pixels
    target = torch.tensor([[[[1, 1]], [[0, 1]]]])
    expected = [math.log(2), math.log(4 / 3), math.log(2), math.log(2)]
    assert RegionCrossEntropy()(logits, target).item() == pytest.approx(sum(expected) / 4)
    seen_first_only = torch.cat((target, torch.tensor([[[[0, 1]]]])), dim=1)
    for labels in (seen_first_only, seen_first_only.bool()):
        assert RegionCrossEntropy(ignore=True)(logits, labels).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("loss", [LabelCrossEntropy(ignore_label=3), RegionCrossEntropy(ignore=True)])
def test_nothing_but_ignored_pixels_gives_no_gradient(loss):
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    channels = 1 if isinstance(loss, LabelCrossEntropy) else 4
    value = loss(logits, torch.full((2, channels, 4, 4), 3 if channels == 1 else 1))
    value.backward()
    assert value.item() == 0
    assert not logits.grad.any()
