"""Replaces the training's data loader by one of our own."""

from __future__ import annotations

from collections.abc import Callable

from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader

__all__ = ["loader_arguments", "replace_training_loader"]


def replace_training_loader(
    augmenter: SingleThreadedAugmenter | NonDetMultiThreadedAugmenter,
    build: Callable[[nnUNetDataLoader], nnUNetDataLoader],
) -> None:
    """Puts another loader in the place of nnU-Net's.

    Args:
        augmenter: What ``get_dataloaders`` gave for the training.
        build: Makes the new loader from nnU-Net's, or gives that back to leave it.
    """
    if isinstance(augmenter, SingleThreadedAugmenter):
        augmenter.data_loader = build(augmenter.data_loader)
        return
    loader = build(augmenter.generator)
    if loader is not augmenter.generator:
        # The worker processes run already, with nnU-Net's loader: they start anew with ours.
        augmenter.generator = loader
        augmenter.restart()


def loader_arguments(loader: nnUNetDataLoader, probabilistic_oversampling: bool) -> tuple[tuple, dict]:
    """Arguments for a loader that does what another does: data, batch size, the two patch sizes; and options."""
    axes = slice(1, None) if loader.patch_size_was_2d else slice(None)
    options = {
        "oversample_foreground_percent": loader.oversample_foreground_percent,
        "probabilistic_oversampling": probabilistic_oversampling,
        "transforms": loader.transforms,
    }
    return (loader._data, loader.batch_size, loader.patch_size[axes], loader.final_patch_size[axes]), options
