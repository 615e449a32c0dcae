"""The regularised curriculum of S³-Mamba (Wang et al., AAAI 2025, arXiv 2412.14546) for any trainer.

``CurriculumMixin`` weighs the samples of a batch by the case they come from: large lesions and low losses first, small
lesions and high losses at the end. Network, sampling, augmentation and validation stay those of the trainer it is mixed
into. What is done, and where it differs from the paper: ``docs/curriculum.md``; the weights themselves:
``nnunetv2_smallseg/data/curriculum.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import distributed, nn
from torch._dynamo import OptimizedModule

from nnunetv2_smallseg.data.curriculum import SIZE_GROUPS, Curriculum, lesion_fraction
from nnunetv2_smallseg.losses.weighted import (
    SampleWeightedLoss,
    WeightedDice,
    WeightedDiceBCELoss,
    WeightedDiceCELoss,
)
from nnunetv2_smallseg.trainers.checkpoint_state import CheckpointState
from nnunetv2_smallseg.trainers.curriculum_figure import draw_mean_weights
from nnunetv2_smallseg.trainers.lesion_labels import LesionLabels
from nnunetv2_smallseg.trainers.slabs import SlabTrainer, stop_on_user_error

__all__ = ["CurriculumMixin", "nnUNetTrainerCurriculum", "with_sample_weights"]

STATE_KEY = "curriculum_state"
SPREAD_KEY = "curriculum_spread"
WEIGHT_KEYS = {group: f"curriculum_weight_{group.replace(' ', '_')}" for group in SIZE_GROUPS}
# What a training step measured, in its result.
MEASURED_KEY = "curriculum_measured"


def with_sample_weights(
    loss: nn.Module, *, lesion_labels: tuple[int, ...] | None = None, lesion_channels: tuple[int, ...] | None = None
) -> SampleWeightedLoss:
    """nnU-Net's loss as its trainer builds it, with weights for samples and everything else as it was.

    Args:
        loss: ``DC_and_CE_loss`` or ``DC_and_BCE_loss``, alone or in nnU-Net's ``DeepSupervisionWrapper``.
        lesion_labels: For labels: what makes a sample worth measuring; None for all foreground.
        lesion_channels: The same for regions, by channel.
    Raises:
        NotImplementedError: If it is another loss, or one with class weights or label smoothing.
    """
    wrapper = loss if isinstance(loss, DeepSupervisionWrapper) else None
    stock = loss.loss if wrapper else loss
    dice = getattr(stock, "dc", None)
    compiled = isinstance(dice, OptimizedModule)
    if compiled:
        dice = dice._orig_mod
    regions = type(stock) is DC_and_BCE_loss
    supported = (regions or type(stock) is DC_and_CE_loss) and type(dice) is MemoryEfficientSoftDiceLoss
    if supported:
        plain = stock.ce.weight is None and getattr(stock.ce, "pos_weight", None) is None
        supported = plain and not getattr(stock.ce, "label_smoothing", 0) and (dice.do_bg or not regions)
    if not supported:
        raise NotImplementedError(
            f"the curriculum cannot weigh the samples of this loss: {stock}. It knows nnU-Net's Dice and cross-entropy "
            "(labels) and Dice and binary cross-entropy (regions), without class weights: leave _build_loss as it is, "
            "or train without CurriculumMixin."
        )
    weighted_dice = WeightedDice(batch_dice=dice.batch_dice, smooth=dice.smooth, ddp=dice.ddp)
    factors = {"weight_ce": stock.weight_ce, "weight_dice": stock.weight_dice}
    if regions:
        weighted = WeightedDiceBCELoss(
            weighted_dice, use_ignore_label=stock.use_ignore_label, lesion_channels=lesion_channels, **factors
        )
    else:
        weighted = WeightedDiceCELoss(
            weighted_dice,
            ignore_label=stock.ignore_label,
            background=dice.do_bg,
            lesion_labels=lesion_labels,
            **factors,
        )
    if compiled:
        weighted.dice = torch.compile(weighted.dice)
    if wrapper:
        wrapper.loss = weighted
    return SampleWeightedLoss(weighted, wrapper)


class CurriculumMixin(LesionLabels, CheckpointState):
    """Trains with a weight for each case; goes before the trainer it changes: ``class T(CurriculumMixin, Trainer)``.

    The trainer must have nnU-Net's loss. A batch is weighed from ``on_train_start`` on; validation never is.

    Attributes:
        curriculum_lambda: lambda of the paper's eq. 7, in (0, 1); larger values give more cases the full weight.
        min_curriculum_weight: Lower limit of a weight before normalisation, in (0, 1]; 1 makes all weights 1.
        lesion_labels: Labels that count as lesion (``LesionLabels``).
        curriculum: Weights and their state, from ``on_train_start`` on.
    """

    curriculum_lambda: float = 2 / 3
    min_curriculum_weight: float = 0.2
    curriculum: Curriculum | None = None
    _restored_state: dict | None = None
    _resumed: bool = False

    def _build_loss(self) -> SampleWeightedLoss:
        """The trainer's loss, with weights for samples."""
        with stop_on_user_error():
            labels = self.chosen_lesion_labels()
            regions = labels is not None and self.label_manager.has_regions
            channels = self.chosen_lesion_classes() if regions else None
        return with_sample_weights(super()._build_loss(), lesion_labels=labels, lesion_channels=channels)

    def _gather(self, value: object) -> list:
        """The value of every process, in order."""
        if not self.is_ddp:
            return [value]
        values = [None] * distributed.get_world_size()
        distributed.all_gather_object(values, value)
        return values

    def _lesion_fractions(self, dataset: nnUNetBaseDataset) -> dict[str, float]:
        """Lesion fraction of each training case."""
        labels = self.chosen_lesion_labels() or self.label_manager.foreground_labels
        counts = self.read_lesion_table(dataset).counts
        return {case: lesion_fraction(counts[case], labels, self.label_manager.ignore_label) for case in counts}

    def on_train_start(self) -> None:
        """Measures the lesions of the training cases and takes over the state of a checkpoint."""
        super().on_train_start()
        training, _ = self.get_tr_and_val_datasets()
        curriculum = Curriculum(
            self._lesion_fractions(training), balance=self.curriculum_lambda, min_weight=self.min_curriculum_weight
        )
        if self._restored_state is not None:
            new = curriculum.load_state_dict(self._restored_state)
            if new:
                self.print_to_log_file(
                    f"Curriculum: the checkpoint knows {len(curriculum.keys) - len(new)} of {len(curriculum.keys)} "
                    f"training cases; the others start from their lesion size, such as {new[0]}."
                )
        elif self._resumed:
            self.print_to_log_file("Curriculum: the checkpoint has no state of it; it starts from the lesion sizes.")
        self.curriculum = curriculum
        self._register_logged_keys()
        sizes = ", ".join(f"{len(cases)} {name}" for name, cases in curriculum.groups.items())
        self.print_to_log_file(f"Curriculum over {len(curriculum.keys)} training cases by lesion size: {sizes}.")

    def _register_logged_keys(self) -> None:
        """Makes nnU-Net's log take our values; epochs before the curriculum have none."""
        log = self.logger.local_logger.my_fantastic_logging
        for key in (SPREAD_KEY, *WEIGHT_KEYS.values()):
            series = log.setdefault(key, [])
            series.extend([math.nan] * (self.current_epoch - len(series)))

    def on_train_epoch_start(self) -> None:
        """Sets the weights of this epoch. They follow from epoch and state, so resuming needs nothing else."""
        super().on_train_epoch_start()
        if self.curriculum is not None:
            self._weigh_cases()

    def _weigh_cases(self) -> None:
        self._epoch_weights = self.curriculum.weights(self.current_epoch / self.num_epochs)
        self._weight_table = torch.tensor(self._epoch_weights, dtype=torch.float32, device=self.device)

    def prepare_rehearsal(self, keys: Sequence[str]) -> None:
        """A curriculum over cases with lesions of one size."""
        super().prepare_rehearsal(keys)
        self.curriculum = Curriculum(dict.fromkeys(keys, 0.1))
        self._weigh_cases()

    def train_step(self, batch: dict) -> dict:
        """nnU-Net's training step with the weights of the batch's cases; the result holds what it measured, too.

        Raises:
            KeyError: If a sample comes from none of the training cases.
        """
        if self.curriculum is None:
            return super().train_step(batch)
        indices = [self.curriculum.index[str(key)] for key in batch["keys"]]
        self.loss.weights = self._weight_table[torch.tensor(indices, device=self.device)]
        try:
            result = super().train_step(batch)
        finally:
            self.loss.weights = None
        return {**result, MEASURED_KEY: (indices, *self.loss.measured)}

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        """Takes in the measured losses of all processes and logs the weights of this epoch."""
        # nnU-Net takes numbers only.
        numbers = [{key: value for key, value in output.items() if key != MEASURED_KEY} for output in train_outputs]
        super().on_train_epoch_end(numbers)
        if self.curriculum is None:
            return
        observations = [
            (self.curriculum.keys[index], loss)
            for indices, losses, lesion in (output[MEASURED_KEY] for output in train_outputs)
            for index, loss, measured in zip(indices, losses.tolist(), lesion.tolist(), strict=True)
            if measured
        ]
        self.curriculum.observe(entry for part in self._gather(observations) for entry in part)
        self._log_weights()

    def _log_weights(self) -> None:
        """Spread, and mean weight of each size group, to nnU-Net's log and the log file."""
        weights, groups = self._epoch_weights, self.curriculum.groups
        means = {name: float(weights[groups[name]].mean()) if name in groups else math.nan for name in SIZE_GROUPS}
        self.logger.log(SPREAD_KEY, float(weights.std()), self.current_epoch)
        for name, mean in means.items():
            self.logger.log(WEIGHT_KEYS[name], mean, self.current_epoch)
        shown = ", ".join(f"{name} {means[name]:.3f}" for name in groups)
        self.print_to_log_file(
            f"Curriculum weights {weights.min():.3f} to {weights.max():.3f}, spread {weights.std():.3f}, mean {shown}; "
            f"losses known of {int(self.curriculum.seen.sum())} of {len(weights)} cases"
        )

    def on_epoch_end(self) -> None:
        """Draws ``curriculum.png`` beside nnU-Net's ``progress.png``."""
        super().on_epoch_end()
        if self.curriculum is not None and self.local_rank == 0:
            history = {name: self.logger.get_value(WEIGHT_KEYS[name], step=None) for name in self.curriculum.groups}
            draw_mean_weights(Path(self.output_folder, "curriculum.png"), history, self.num_epochs)

    def checkpoint_state(self) -> dict:
        """The running losses of the cases, too."""
        state = super().checkpoint_state()
        return state if self.curriculum is None else {**state, STATE_KEY: self.curriculum.state_dict()}

    def restore_checkpoint_state(self, state: dict) -> None:
        """Keeps the state of the curriculum for ``on_train_start``."""
        super().restore_checkpoint_state(state)
        self._resumed = True
        self._restored_state = state.get(STATE_KEY)


class nnUNetTrainerCurriculum(CurriculumMixin, SlabTrainer):
    """nnU-Net's own network and recipe with the curriculum, for ``2d``, ``2.5d`` and nnU-Net's 3D configurations."""

    accepts_volumes = True
