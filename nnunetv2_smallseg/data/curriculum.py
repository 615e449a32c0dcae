"""Regularised curriculum: what each training case weighs in the loss, from its lesion size and its loss so far.

Wang et al., S³-Mamba: Small-Size-Sensitive Mamba for Lesion Segmentation, AAAI 2025, arXiv 2412.14546, eq. 6 and 7.
There is no official code. The printed objective, sum v·l + lambda·sum 1/rank(l) + (1 - lambda)·sum v², does not couple
rank and weight: its minimum is v = 0 for every case. Here the rank term is a reward that multiplies the weight,
-lambda·sum v·rho + (1 - lambda)·sum v², and rho moves from easy to hard cases while training goes on
(``docs/curriculum.md``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from scipy.stats import rankdata

from nnunetv2_smallseg.data.lesion_table import LabelCounts

__all__ = ["SIZE_GROUPS", "Curriculum", "lesion_fraction", "size_groups"]

# Shares of the training in which losses replace sizes, and in which preference moves from easy to hard.
LOSSES_FROM, LOSSES_ALONE_FROM = 0.1, 0.2
EASY_UNTIL, HARD_FROM = 0.1, 0.6
# What the running mean of a case's loss keeps when a new one comes.
MEMORY = 0.9

SIZE_GROUPS = ("small", "medium", "large", "no lesion")
# The paper's groups: the smallest 30 % of the cases, the next 30 %, the rest.
SMALL_UP_TO, MEDIUM_UP_TO = 0.3, 0.6


def lesion_fraction(counts: LabelCounts, lesion_labels: Sequence[int], ignore_label: int | None = None) -> float:
    """Share of a case that is lesion.

    Args:
        counts: Label counts of the case (``lesion_table.count_labels``).
        lesion_labels: Labels that count as lesion.
        ignore_label: Label of voxels without annotation; they count in neither part of the fraction.
    Returns:
        Lesion voxels by annotated voxels, in [0, 1]; 0 where nothing is annotated.
    """
    annotated = counts.num_slices * counts.slice_pixels
    if ignore_label is not None:
        annotated -= int(counts.areas([ignore_label]).sum())
    lesion = int(counts.areas(lesion_labels).sum())
    return lesion / annotated if annotated else 0.0


def rank_normalise(values: np.ndarray) -> np.ndarray:
    """Ranks in [0, 1], smallest first, ties averaged; 0.5 for a single value. (N,) -> (N,)."""
    if len(values) < 2:
        return np.full(len(values), 0.5)
    return (rankdata(values) - 1) / (len(values) - 1)


def ramp(progress: float, start: float, end: float) -> float:
    """0 up to ``start``, 1 from ``end``, a line between."""
    return min(max((progress - start) / (end - start), 0.0), 1.0)


def size_difficulties(fractions: np.ndarray) -> np.ndarray:
    """Difficulty by size: 0 for the largest lesion fraction, 1 for the smallest, 0.5 without lesion. (N,) -> (N,)."""
    difficulties = np.full(len(fractions), 0.5)
    with_lesion = fractions > 0
    difficulties[with_lesion] = rank_normalise(-fractions[with_lesion])
    return difficulties


def size_groups(fractions: np.ndarray) -> dict[str, np.ndarray]:
    """Cases by lesion fraction: the smallest 30 %, the next 30 %, the rest (paper, experiments), and those without.

    Args:
        fractions: (N,) lesion fraction of each case.
    Returns:
        Name of the group -> indices of its cases, in the order of ``SIZE_GROUPS``; empty groups are left out.
    """
    with_lesion = np.flatnonzero(fractions > 0)
    ordered = with_lesion[np.argsort(fractions[with_lesion], kind="stable")]
    small, medium = (round(share * len(ordered)) for share in (SMALL_UP_TO, MEDIUM_UP_TO))
    parts = (ordered[:small], ordered[small:medium], ordered[medium:], np.flatnonzero(fractions <= 0))
    return {name: part for name, part in zip(SIZE_GROUPS, parts, strict=True) if len(part)}


class Curriculum:
    """Difficulty Measurer and Training Scheduler of the paper, over the training cases.

    Everything is a function of lesion sizes, running losses and progress: processes that see the same observations have
    the same weights, and a resumed training goes on exactly where it stopped.

    Args:
        fractions: Case -> lesion fraction (``lesion_fraction``).
        balance: lambda of eq. 7, in (0, 1): reward of well-ranked cases against the penalty on large weights. At 2/3
            the weights before normalisation follow rho; a larger value gives more cases the full weight.
        min_weight: Lower limit of a weight before normalisation, in (0, 1]: no case is ever dropped.
    Raises:
        ValueError: If there are no cases or an option is out of range.
    """

    def __init__(self, fractions: Mapping[str, float], *, balance: float = 2 / 3, min_weight: float = 0.2) -> None:
        if not fractions:
            raise ValueError("a curriculum needs at least one training case, got none: check the split of the data set")
        if not 0 < balance < 1:
            raise ValueError(f"curriculum_lambda is {balance}, but must lie between 0 and 1; the default is 2/3")
        if not 0 < min_weight <= 1:
            raise ValueError(f"min_curriculum_weight is {min_weight}, but must lie in (0, 1]; the default is 0.2")
        self.keys = sorted(fractions)
        self.index = {key: index for index, key in enumerate(self.keys)}
        self.fractions = np.array([fractions[key] for key in self.keys], dtype=np.float64)
        self.balance = balance
        self.min_weight = min_weight
        self.size_difficulty = size_difficulties(self.fractions)
        self.groups = size_groups(self.fractions)
        self.mean_loss = np.zeros(len(self.keys))
        self.seen = np.zeros(len(self.keys), dtype=bool)

    def observe(self, observations: Iterable[tuple[str, float]]) -> None:
        """Takes in the losses of an epoch.

        Args:
            observations: (case, loss) of each measured sample, of all processes, in any order. Losses that are not
                finite, as a half-precision step that overflowed has, are left out.
        Raises:
            KeyError: If a case is none of the training cases.
        """
        losses: dict[str, list[float]] = {}
        for key, loss in observations:
            if math.isfinite(loss):
                losses.setdefault(key, []).append(loss)
        for key in sorted(losses):
            # fsum is exact, so that the order in which processes report does not matter.
            loss, index = math.fsum(losses[key]) / len(losses[key]), self.index[key]
            self.mean_loss[index] = MEMORY * self.mean_loss[index] + (1 - MEMORY) * loss if self.seen[index] else loss
            self.seen[index] = True

    def difficulties(self, progress: float) -> np.ndarray:
        """Difficulty of each case at a share ``progress`` of the training: (N,) in [0, 1], 0 is easiest."""
        by_loss = self.size_difficulty.copy()
        by_loss[self.seen] = rank_normalise(self.mean_loss[self.seen])
        share = ramp(progress, LOSSES_FROM, LOSSES_ALONE_FROM)
        # Rounded, so that what is equal on paper ties here, too.
        return rank_normalise(np.round((1 - share) * self.size_difficulty + share * by_loss, 9))

    def weights(self, progress: float) -> np.ndarray:
        """Weight of each case in the loss at a share ``progress`` of the training.

        Minimises -lambda·rho·v + (1 - lambda)·v² over [min_weight, 1], then divides by the mean.

        Args:
            progress: Epochs done by epochs in all, in [0, 1].
        Returns:
            (N,) float64 with mean 1, in the order of ``keys``; all 1 for one case or equal difficulties.
        """
        difficulty = self.difficulties(progress)
        hard = ramp(progress, EASY_UNTIL, HARD_FROM)
        reward = (1 - hard) * (1 - difficulty) + hard * difficulty  # rho
        values = np.clip(self.balance * reward / (2 * (1 - self.balance)), self.min_weight, 1.0)
        return np.ones(len(values)) if (values == values[0]).all() else values / values.mean()

    def state_dict(self) -> dict:
        """What a checkpoint keeps, in plain Python types."""
        return {
            "keys": list(self.keys),
            "d_size": self.size_difficulty.tolist(),
            "mean_loss": self.mean_loss.tolist(),
            "seen": self.seen.tolist(),
            "lambda": self.balance,
            "v_min": self.min_weight,
        }

    def load_state_dict(self, state: Mapping) -> list[str]:
        """Takes over the running losses of the cases that are still there; sizes and options stay those of today.

        Args:
            state: What ``state_dict`` gave.
        Returns:
            Training cases the state does not know; they start from their lesion size.
        """
        known = {key: index for index, key in enumerate(state["keys"])}
        for key in self.keys:
            if key in known:
                self.mean_loss[self.index[key]] = state["mean_loss"][known[key]]
                self.seen[self.index[key]] = state["seen"][known[key]]
        return [key for key in self.keys if key not in known]
