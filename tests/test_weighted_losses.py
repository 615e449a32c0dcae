"""Losses with sample weights: with all weights 1 nnU-Net's own to the last bit; otherwise what the formulae say."""

from __future__ import annotations

import itertools
import socket

import numpy as np
import pytest
import torch
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import distributed, multiprocessing

from nnunetv2_smallseg.losses.weighted import (
    SampleWeightedLoss,
    WeightedDice,
    WeightedDiceBCELoss,
    WeightedDiceCELoss,
)

SCALES = (1.0, 0.5, 0.0)  # weights of deep supervision; the last output is not used


def stock_and_weighted(regions: bool, ignore: bool, batch_dice: bool, ddp: bool = False):
    """nnU-Net's loss as its trainer builds it, and ours."""
    options = {"batch_dice": batch_dice, "smooth": 1e-5, "do_bg": regions, "ddp": ddp}
    dice = WeightedDice(batch_dice=batch_dice, smooth=1e-5, ddp=ddp)
    if regions:
        stock = DC_and_BCE_loss({}, options, use_ignore_label=ignore, dice_class=MemoryEfficientSoftDiceLoss)
        return stock, WeightedDiceBCELoss(dice, use_ignore_label=ignore)
    label = 3 if ignore else None
    stock = DC_and_CE_loss(options, {}, ignore_label=label, dice_class=MemoryEfficientSoftDiceLoss)
    return stock, WeightedDiceCELoss(dice, ignore_label=label)


def random_case(regions: bool, ignore: bool, size: tuple[int, ...], samples: int = 3, seed: int = 0, share=0.3):
    """Logits of three channels and a target."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn((samples, 3, *size), generator=generator) * 3
    missing = torch.rand((samples, 1, *size), generator=generator) < share
    if regions:
        target = torch.rand((samples, 3, *size), generator=generator) < 0.2
        return logits, torch.cat([target, missing], 1) if ignore else target
    target = torch.randint(0, 3, (samples, 1, *size), generator=generator, dtype=torch.int16)
    return logits, torch.where(missing, torch.tensor(3, dtype=torch.int16), target) if ignore else target


def value_and_gradient(loss, logits, *arguments):
    inputs = [one.clone().requires_grad_() for one in logits]
    value = loss(inputs if len(inputs) > 1 else inputs[0], *arguments)
    value.backward()
    return value.detach(), [one.grad for one in inputs]


@pytest.mark.parametrize(
    ("regions", "ignore", "batch_dice", "deep", "volume"), list(itertools.product((False, True), repeat=5))
)
def test_all_weights_one_is_nnunets_loss_to_the_last_bit(regions, ignore, batch_dice, deep, volume):
    stock, weighted = stock_and_weighted(regions, ignore, batch_dice)
    sizes = [(4, 24, 20), (4, 12, 10), (4, 6, 5)] if volume else [(40, 56), (20, 28), (10, 14)]
    cases = [random_case(regions, ignore, size, seed=seed) for seed, size in enumerate(sizes if deep else sizes[:1])]
    logits, targets = [case[0] for case in cases], [case[1] for case in cases]
    if deep:
        ours = SampleWeightedLoss(weighted, DeepSupervisionWrapper(weighted, SCALES))
        stock = DeepSupervisionWrapper(stock, SCALES)
    else:
        ours, targets = SampleWeightedLoss(weighted), targets[0]
    expected, gradients = value_and_gradient(stock, logits, targets)
    for weights in (None, torch.ones(3)):  # validation and training
        ours.weights = weights
        value, own_gradients = value_and_gradient(ours, logits, targets)
        assert torch.equal(value, expected)
        for gradient, own in zip(gradients, own_gradients, strict=True):
            assert (gradient is None and own is None) or torch.equal(gradient, own)
    assert (ours.measured[0] > 0).all()
    ours.weights, ours.measured = None, None
    ours(logits if deep else logits[0], targets)
    assert ours.measured is None  # nothing is measured in validation


@pytest.mark.parametrize("regions", [False, True])
def test_a_batch_without_annotation(regions):
    """Everything ignored: as nnU-Net, whose cross-entropy is 0 then."""
    stock, weighted = stock_and_weighted(regions, True, True)
    logits, target = random_case(regions, True, (8, 8), share=1.1)
    assert torch.equal(stock(logits, target), weighted(logits, target, torch.ones(3)))
    losses, lesion = weighted.measure(logits, target)
    assert torch.isfinite(losses).all()
    assert not lesion.any()


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_weights_one_under_autocast(regions, dtype):
    stock, weighted = stock_and_weighted(regions, False, True)
    logits, target = random_case(regions, False, (16, 16))
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(stock(logits.to(dtype), target), weighted(logits.to(dtype), target, torch.ones(3)))


@pytest.mark.parametrize(("regions", "ignore"), list(itertools.product((False, True), repeat=2)))
def test_weights_enter_as_the_formulae_say(regions, ignore):
    """Cross-entropy and Dice over the batch, written out in float64."""
    weights = torch.tensor([0.4, 1.0, 1.6])
    logits, target = random_case(regions, ignore, (12, 10))
    exact = logits.double().numpy()
    if regions:
        reference = target[:, :3].double().numpy()
        valid = (~target[:, 3:]).double().numpy() if ignore else np.ones((3, 1, 12, 10))
        probabilities = 1 / (1 + np.exp(-exact))
        entropy = -(reference * np.log(probabilities) + (1 - reference) * np.log(1 - probabilities))
        count = valid.sum() if ignore else entropy.size
        counted = slice(0, 3)
    else:
        labels = target[:, 0].numpy()
        valid = (labels != 3)[:, None].astype(float)
        reference = np.stack([labels == label for label in range(3)], 1).astype(float)
        probabilities = np.exp(exact) / np.exp(exact).sum(1, keepdims=True)
        entropy = -(reference * np.log(probabilities)).sum(1, keepdims=True)
        count, counted = valid.sum(), slice(1, 3)
    w = weights.numpy().astype(float)[:, None, None, None]
    cross_entropy = (w * entropy * valid).sum() / count
    reference, probabilities = (reference * valid)[:, counted], (probabilities * valid)[:, counted]
    for batch_dice in (True, False):
        axes = (0, 2, 3) if batch_dice else (2, 3)
        factor, outer = (w, 1) if batch_dice else (1, w[:, :, 0, 0])
        dice = outer * (2 * (factor * reference * probabilities).sum(axes) + 1e-5)
        dice = dice / ((factor * (reference + probabilities)).sum(axes) + 1e-5)
        _, weighted = stock_and_weighted(regions, ignore, batch_dice)
        value = weighted(logits, target, weights)
        assert float(value) == pytest.approx(cross_entropy - dice.mean(), rel=1e-5)


def test_measured_loss_is_that_of_the_sample_alone():
    """One foreground class in each sample: cross-entropy + 1 - Dice as nnU-Net's loss has it for a batch of one."""
    logits, _ = random_case(False, False, (12, 10))
    logits = logits[:, :2]
    target = (torch.rand((3, 1, 12, 10), generator=torch.Generator().manual_seed(1)) < 0.2).short()
    target[1] = 0
    target[2, :, :6] = 3
    stock, weighted = stock_and_weighted(False, True, False)
    losses, lesion = weighted.measure(logits, target)
    assert lesion.tolist() == [True, False, True]
    for index in (0, 2):
        alone = stock(logits[index : index + 1], target[index : index + 1]) + 1
        assert float(losses[index]) == pytest.approx(float(alone), rel=1e-5)


def test_only_target_labels_make_a_sample_worth_measuring():
    target = torch.zeros(3, 1, 4, 4)
    target[0, 0, 0, 0], target[1, 0, 1, 1] = 1, 2
    dice = WeightedDice(batch_dice=True)
    logits = torch.randn(3, 3, 4, 4)
    assert WeightedDiceCELoss(dice).measure(logits, target)[1].tolist() == [True, True, False]
    assert WeightedDiceCELoss(dice, lesion_labels=(2,)).measure(logits, target)[1].tolist() == [False, True, False]
    regions = torch.cat([target == 1, target == 2, target > 0], 1)
    assert WeightedDiceBCELoss(dice).measure(logits, regions)[1].tolist() == [True, True, False]
    chosen = WeightedDiceBCELoss(dice, lesion_channels=(1,))
    assert chosen.measure(logits, regions)[1].tolist() == [False, True, False]


@pytest.mark.parametrize("regions", [False, True])
def test_dice_compiles_whole(regions):
    stock, weighted = stock_and_weighted(regions, True, True)
    weighted.dice = torch.compile(weighted.dice, fullgraph=True, backend="aot_eager")
    logits, target = random_case(regions, True, (16, 16))
    torch.testing.assert_close(weighted(logits, target, torch.ones(3)), stock(logits, target))


def compare_with_nnunet(rank: int, port: int, folder: str) -> None:
    """Two processes with samples of their own, Dice over the batch of both."""
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    results = {}
    for regions, ignore in itertools.product((False, True), repeat=2):
        stock, weighted = stock_and_weighted(regions, ignore, True, ddp=True)
        logits, target = random_case(regions, ignore, (12, 10), seed=rank)
        first = value_and_gradient(stock, [logits], target)
        second = value_and_gradient(lambda *inputs, w=weighted: w(*inputs, torch.ones(3)), [logits], target)
        results[f"{regions}{ignore}"] = torch.equal(first[0], second[0]) and torch.equal(first[1][0], second[1][0])
        weights = torch.tensor([0.5, 1.0, 1.5]) + 0.1 * rank
        results[f"dice{regions}{ignore}"] = weighted.dice(
            torch.sigmoid(logits), (target[:, :3] == 1).float().expand(-1, 3, -1, -1), weights
        )
    torch.save(results, f"{folder}/{rank}.pth")
    distributed.barrier()  # gloo of PyTorch 2.7 may wait forever for a process that is gone
    distributed.destroy_process_group()


def test_two_processes(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(compare_with_nnunet, (port, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pth", weights_only=True) for rank in range(2))
    weights = torch.cat([torch.tensor([0.5, 1.0, 1.5]) + 0.1 * rank for rank in range(2)])
    for regions, ignore in itertools.product((False, True), repeat=2):
        assert first[f"{regions}{ignore}"] is second[f"{regions}{ignore}"] is True
        # Dice over both halves is that of one process with all samples.
        cases = [random_case(regions, ignore, (12, 10), seed=rank) for rank in range(2)]
        together = WeightedDice(batch_dice=True)(
            torch.sigmoid(torch.cat([logits for logits, _ in cases])),
            torch.cat([(target[:, :3] == 1).float().expand(-1, 3, -1, -1) for _, target in cases]),
            weights,
        )
        torch.testing.assert_close(first[f"dice{regions}{ignore}"], together)
        assert torch.equal(first[f"dice{regions}{ignore}"], second[f"dice{regions}{ignore}"])
