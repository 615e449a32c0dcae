"""What the trainers of SvANet do as the released code does, and how its learning rates stretch."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from test_trainers import make, random_batch

from nnunetv2_smallseg import registry, trainers
from nnunetv2_smallseg.losses.cross_entropy import LabelCrossEntropy, RegionCrossEntropy
from nnunetv2_smallseg.trainers.schedules import FreezingSchedule

NAMES = [name for name in registry.trainers() if "SvANet" in name]
every_trainer = pytest.mark.parametrize("name", NAMES)


def schedule(num_epochs: int) -> FreezingSchedule:
    return FreezingSchedule(torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))]), 5e-4, 1e-6, num_epochs)


def test_rates_of_100_epochs_are_the_released_ones(shared):
    manifest = json.loads((shared / "reference" / "svanet" / "manifest.json").read_text())
    released = manifest["learning_rate_used_in_epoch"]
    ours = schedule(100)
    assert len(released) == 100
    for epoch, rate in enumerate(released):
        ours.step(epoch)
        assert ours.optimizer.param_groups[0]["lr"] == pytest.approx(rate, rel=1e-12)
    assert ours.rate(150) == ours.rate(99)


def test_rates_stretch_with_the_training():
    published, long, half = schedule(100), schedule(1000), schedule(50)
    assert all(long.rate(epoch) == published.rate(epoch // 10) for epoch in range(1000))
    assert all(half.rate(epoch) == published.rate(2 * epoch + 1) for epoch in range(50))
    for num_epochs in (1, 2, 5, 10):  # short trainings do not spend their epochs at the minimum
        assert max(schedule(num_epochs).rate(epoch) for epoch in range(num_epochs)) > 1e-4


@every_trainer
def test_recipe(name, nnunet_folders):
    plans = nnunet_folders.plans()
    plans["configurations"]["2d"]["training"] = {"num_epochs": 95}
    trainer = make(name, nnunet_folders, plans=plans)
    trainer.initialize()
    [group] = trainer.optimizer.param_groups
    assert isinstance(trainer.optimizer, torch.optim.AdamW)
    assert (group["weight_decay"], group["eps"], group["betas"]) == (0.03, 1e-8, (0.9, 0.999))
    assert isinstance(trainer.lr_scheduler, FreezingSchedule)
    assert trainer.lr_scheduler.num_epochs == 95
    assert trainer.freeze_encoder_epochs == (0 if name.endswith("Scratch") else 10)
    assert not trainer.enable_deep_supervision
    assert isinstance(trainer.loss, LabelCrossEntropy)
    assert len(trainer.planar_network.decoder.seg_layers) == 1  # the published network: no head that nothing trains


def test_loss_of_regions_and_several_outputs(nnunet_folders):
    labels = {"background": 0, "lesion": [1, 2], "core": 2, "ignore": 3}
    trainer = make("nnUNetTrainerLiteSvANetScratch", nnunet_folders, labels=labels, regions_class_order=[1, 2])
    trainer.initialize()
    assert isinstance(trainer.loss, RegionCrossEntropy)
    assert trainer.loss.ignore
    trainer = make("nnUNetTrainerLiteSvANetScratch", nnunet_folders, labels={"background": 0, "a": 1, "ignore": 2})
    trainer.enable_deep_supervision = True
    trainer.initialize()
    assert isinstance(trainer.loss, DeepSupervisionWrapper)
    assert trainer.loss.loss.ignore_label == 2
    assert len(trainer.loss.weight_factors) == len(trainer.planar_network.deep_supervision_strides)
    assert np.isfinite(trainer.train_step(random_batch(trainer))["loss"])


def test_a_batch_with_nothing_but_ignored_pixels_is_survived(nnunet_folders):
    trainer = make("nnUNetTrainerLiteSvANet", nnunet_folders, labels={"background": 0, "a": 1, "ignore": 2})
    trainer.initialize()
    batch = random_batch(trainer)
    batch["target"].fill_(2)
    assert trainer.train_step(batch)["loss"] == 0
    assert all(parameter.isfinite().all() for parameter in trainer.network.parameters())


def test_frozen_encoder_keeps_its_values_and_moves_its_statistics(nnunet_folders):
    trainer = make("nnUNetTrainerSvANet", nnunet_folders)
    trainer.initialize()
    trainer.on_train_epoch_start()  # epoch 0
    encoder = trainer.planar_network.encoder
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    trainer.train_step(random_batch(trainer))
    moved = {name for name, tensor in encoder.state_dict().items() if not torch.equal(tensor, before[name])}
    assert "bn1.running_mean" in moved
    # The data have one channel, so the first convolution is adapted and trained from the start.
    assert {name for name, _ in encoder.named_parameters()} & moved == {"conv1.weight"}


def test_all_trainers_are_registered():
    assert {name for name in trainers.__all__ if "SvANet" in name} == set(NAMES)
