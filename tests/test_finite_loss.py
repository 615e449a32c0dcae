"""A loss that is no number: the cases are named, training ends where it cannot recover, and only there."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nnunetv2_smallseg.errors import CommandStopped
from nnunetv2_smallseg.trainers.finite_loss import FiniteLoss


class Scripted:
    """A trainer whose losses are given."""

    current_epoch = 3

    def __init__(self, losses: list[float], broken_after: int | None = None) -> None:
        self.losses, self.broken_after, self.log = losses, broken_after, []
        self.unwrapped_network = nn.BatchNorm1d(2)

    def train_step(self, batch: dict) -> dict:
        if self.broken_after is not None and self.broken_after <= 0:
            self.unwrapped_network.running_mean[0] = float("nan")
        elif self.broken_after is not None:
            self.broken_after -= 1
        return {"loss": torch.tensor(self.losses.pop(0)).numpy()}

    validation_step = train_step

    def print_to_log_file(self, text: str) -> None:
        self.log.append(text)


class Trainer(FiniteLoss, Scripted):
    pass


def batch(*values: float) -> dict:
    """One image a value."""
    data = torch.zeros(len(values), 1, 2, 2)
    data[:, 0, 0, 0] = torch.tensor(values)
    return {"data": data, "keys": [f"case{number}" for number in range(len(values))]}


NAN, INF = float("nan"), float("inf")


def test_overflows_now_and_then_are_tolerated_and_logged():
    trainer = Trainer([NAN, 1.0, *[INF] * 9, 1.0, *[NAN] * 9])
    for _ in range(21):
        trainer.train_step(batch(1.0, 2.0))
    assert len(trainer.log) == 19
    assert "the loss in epoch 3 is nan (cases case0, case1; values of their images from 0 to 2)" in trainer.log[0]


def test_ten_in_a_row_end_the_training():
    trainer = Trainer([NAN] * 10)
    for _ in range(9):
        trainer.train_step(batch(1.0))
    with pytest.raises(CommandStopped, match=r"10th time in a row.*--c"):
        trainer.train_step(batch(1.0))


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("step", ["train_step", "validation_step"])
def test_an_image_that_is_no_number_is_named_at_once(step, value):
    trainer = Trainer([NAN])
    with pytest.raises(CommandStopped, match=r"images of case1 hold NaN or infinite values.*Mend these images"):
        getattr(trainer, step)(batch(1.0, value, 3.0))


def test_weights_that_are_no_numbers_end_the_training_at_once():
    trainer = Trainer([1.0, NAN], broken_after=1)
    trainer.train_step(batch(1.0))
    with pytest.raises(CommandStopped, match=r"weights of the network are no longer finite.*initial_lr in a subclass"):
        trainer.train_step(batch(1.0))


def test_validation_without_a_finite_loss_is_logged_only():
    trainer = Trainer([NAN] * 30)
    for _ in range(30):
        trainer.validation_step(batch(1.0))
    assert len(trainer.log) == 30
