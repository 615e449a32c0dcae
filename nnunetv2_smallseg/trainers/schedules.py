"""Learning-rate schedules as nnU-Net drives them: ``step(epoch)`` once an epoch, before its first iteration."""

import math

from torch.optim import Optimizer

__all__ = ["CosineSchedule"]


class CosineSchedule:
    """Cosine annealing without warm-up or restarts (Loshchilov & Hutter 2017, arXiv 1608.03983, eq. 5).

    Args:
        optimizer: Its groups all get the same rate.
        initial_lr: Rate of epoch 0.
        min_lr: Rate the cosine ends at, reached after ``num_epochs``.
        num_epochs: Length of the training in epochs.
    """

    def __init__(self, optimizer: Optimizer, initial_lr: float, min_lr: float, num_epochs: int) -> None:
        self.optimizer = optimizer
        self.initial_lr = initial_lr
        self.min_lr = min_lr
        self.num_epochs = num_epochs

    def rate(self, epoch: int) -> float:
        """Learning rate of an epoch, counted from 0; the minimum after the last."""
        progress = min(epoch / self.num_epochs, 1.0)
        return self.min_lr + (self.initial_lr - self.min_lr) * (1 + math.cos(math.pi * progress)) / 2

    def step(self, epoch: int) -> None:
        """Sets the rate of ``epoch`` in all parameter groups."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(epoch)
