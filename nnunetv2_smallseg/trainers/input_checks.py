"""What a training needs, checked before nnU-Net makes its output folder: a wrong input leaves nothing behind."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from nnunetv2 import paths
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

from nnunetv2_smallseg.errors import SmallSegError, UsageError, stop_on_user_error
from nnunetv2_smallseg.plans.configurations import resolve

__all__ = ["InputChecks"]

# How many names an error lists.
NAMES_SHOWN = 5


class InputChecks:
    """Refuses what cannot be trained; goes before nnU-Net's trainer.

    Attributes:
        needs_preprocessed_data: Whether a trainer is refused whose data are not there; not so where only the memory of
            a training is asked for, which is before preprocessing.
    """

    needs_preprocessed_data: bool = True

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 - nnU-Net's signature
    ) -> None:
        with stop_on_user_error():
            _check_fold(fold)
            _check_intensities(plans)
            _check_environment(device)
            if self.needs_preprocessed_data:
                _check_preprocessed(plans, configuration, fold)
        super().__init__(plans, configuration, fold, dataset_json, device)


def _check_fold(fold: int | str) -> None:
    """Python counts negative numbers from the end: nnU-Net would train another fold into a folder ``fold_-1``."""
    if fold != "all" and (not isinstance(fold, int) or fold < 0):
        raise UsageError(f"there is no fold {fold!r}: use 0, 1, 2, ... or all")


def _check_intensities(plans: Mapping) -> None:
    """Statistics that are no numbers make every preprocessed image NaN."""
    for channel, statistics in plans.get("foreground_intensity_properties_per_channel", {}).items():
        for name, value in statistics.items():
            if not math.isfinite(value):
                raise SmallSegError(
                    f"the plans {plans.get('plans_name')} say that the {name} of the intensities of channel {channel} "
                    f"is {value}: an image of the data set holds NaN or infinite values. Mend it, then extract the "
                    "fingerprint anew (nnUNetv2_extract_fingerprint --clean --verify_dataset_integrity), plan and "
                    "preprocess again."
                )


def _check_environment(device: torch.device) -> None:
    """Folders and device."""
    if not paths.nnUNet_results.get():
        raise SmallSegError(
            "the environment variable nnUNet_results is not set: export it as the folder for trained models, e.g. "
            "export nnUNet_results=/data/nnUNet_results"
        )
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SmallSegError(
            "PyTorch finds no usable GPU (-device cuda, nnU-Net's default): train with -device cpu, or see what "
            "`smallseg doctor` says"
        )


def _check_preprocessed(plans: Mapping, configuration: str, fold: int | str) -> None:
    """The preprocessed data of the configuration, and the cases of the fold."""
    if not paths.nnUNet_preprocessed.get():
        raise SmallSegError(
            "the environment variable nnUNet_preprocessed is not set: export it as the folder of preprocessed data, "
            "e.g. export nnUNet_preprocessed=/data/nnUNet_preprocessed"
        )
    base = Path(paths.nnUNet_preprocessed, plans["dataset_name"])
    folder = base / resolve(plans, configuration)["data_identifier"]
    again = (
        f"nnUNetv2_preprocess -d {int(plans['dataset_name'][7:10])} -plans_name {plans['plans_name']} "
        f"-c {plans['configurations'][configuration].get('inherits_from', configuration)}"
    )
    if not folder.is_dir() or not any(folder.iterdir()):
        raise SmallSegError(f"the data are not preprocessed for these plans: {folder} is missing or empty. Run {again}")
    splits = base / "splits_final.json"
    if fold != "all" and splits.is_file():
        cases = set(infer_dataset_class(str(folder)).get_identifiers(str(folder)))
        _check_splits(splits, fold, cases, folder, again)


def _check_splits(file: Path, fold: int, cases: set[str], folder: Path, again: str) -> None:
    """The cases of a fold are there. A fold beyond the list is nnU-Net's to draw, which it says in the log."""
    try:
        splits = json.loads(file.read_text(encoding="utf-8"))
        wanted = {case for part in ("train", "val") for case in splits[fold][part]} if fold < len(splits) else set()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SmallSegError(
            f'{file} holds no fold {fold} ({error!r}): expected is [{{"train": [cases], "val": [cases]}}, ...]. Mend '
            "it, or remove it to let nnU-Net make five folds"
        ) from error
    missing = sorted(wanted - cases)
    if missing:
        names = ", ".join(map(str, missing[:NAMES_SHOWN])) + " and more" * (len(missing) > NAMES_SHOWN)
        raise SmallSegError(
            f"fold {fold} of {file} names {len(missing)} cases that are not in {folder}: {names}. Preprocess again "
            f"({again}), or correct the file"
        )
