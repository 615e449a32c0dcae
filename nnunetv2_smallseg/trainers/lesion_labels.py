"""What counts as lesion for a trainer, and the table of the lesions it trains on."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import distributed

from nnunetv2_smallseg.data.lesion_table import LesionTable, lesion_classes, lesion_table
from nnunetv2_smallseg.errors import SmallSegError
from nnunetv2_smallseg.plans.configurations import TRAINING_KEY

__all__ = ["LesionLabels", "chosen_lesion_classes", "chosen_lesion_labels"]


def chosen_lesion_labels(
    trainer: LesionLabels, configuration: Mapping, label_manager: LabelManager
) -> tuple[int, ...] | None:
    """The labels that count as lesion; None for all foreground.

    Args:
        trainer: Has ``lesion_labels``, and need have nothing else yet.
        configuration: A configuration of the plans with inheritance resolved; what its switches say comes first.
        label_manager: Labels of the data set.
    Raises:
        SmallSegError: If labels are named that the data set has not, or none.
    """
    switches = configuration.get(TRAINING_KEY, {})
    chosen = switches.get("lesion_labels", trainer.lesion_labels)
    if chosen is None:
        return None
    known = [int(label) for label in label_manager.foreground_labels]
    if not isinstance(chosen, Sequence) or not chosen or not set(chosen) <= set(known):
        place = "the plans' configuration" if "lesion_labels" in switches else type(trainer).__name__
        raise SmallSegError(
            f"lesion_labels of {place} is {chosen}, but must list some of the labels of the data set, {known}: change "
            "it there, or set it to None for all"
        )
    return tuple(chosen)


def chosen_lesion_classes(
    trainer: LesionLabels, configuration: Mapping, label_manager: LabelManager
) -> tuple[int, ...]:
    """Indices of the classes (labels, or regions) that hold nothing but lesion labels; arguments as above.

    Raises:
        SmallSegError: If there is none, or the labels are wrong.
    """
    classes = lesion_classes(label_manager)
    labels = chosen_lesion_labels(trainer, configuration, label_manager)
    indices = tuple(index for index, held in enumerate(classes) if labels is None or set(held) <= set(labels))
    if not indices:
        raise SmallSegError(
            f"lesion_labels is {list(labels)}, but every region of the data set holds other labels too "
            f"({[list(held) for held in classes]}): name the labels of at least one region"
        )
    return indices


class LesionLabels:
    """Mixin of trainers that treat lesions in a special way.

    Attributes:
        lesion_labels: Labels that count as lesion, for data sets that label organs, too; None for all foreground. A
            configuration of the plans may hold others among its switches, which come first.
    """

    lesion_labels: Sequence[int] | None = None

    def chosen_lesion_labels(self) -> tuple[int, ...] | None:
        """The labels that count as lesion, None for all; ``SmallSegError`` if the data set has no such label."""
        return chosen_lesion_labels(self, self.configuration_manager.configuration, self.label_manager)

    def chosen_lesion_classes(self) -> tuple[int, ...]:
        """Indices of the classes that are lesions; ``SmallSegError`` if there is none."""
        return chosen_lesion_classes(self, self.configuration_manager.configuration, self.label_manager)

    def read_lesion_table(self, dataset: nnUNetBaseDataset) -> LesionTable:
        """The lesions of some cases, found once for each data set; the processes of a training share the work."""
        self.print_to_log_file("Reading the lesions of the cases; the first training on a data set finds them")
        processes = get_allowed_n_proc_DA()
        if self.is_ddp:
            share = copy.copy(dataset)
            share.identifiers = dataset.identifiers[self.local_rank :: distributed.get_world_size()]
            lesion_table(share, self.label_manager, num_processes=processes)
            distributed.barrier()
        return lesion_table(dataset, self.label_manager, num_processes=processes)
