"""Small data sets, one for each kind of data that nnU-Net has: labels, regions, ignored voxels, several channels, ...

They are planned by ``smallseg plan`` and preprocessed by nnU-Net, in this process: its worker processes are threads.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.experiment_planning.plan_and_preprocess_api import preprocess

from nnunetv2_smallseg.plans.planner import DEFAULT_PLANS_NAME, plan_dataset

NUM_CASES = 6
PATCH_SIZE = (64, 64)
SCHEDULE = {"num_epochs": 1, "num_iterations_per_epoch": 1, "num_val_iterations_per_epoch": 1}


@dataclass(frozen=True)
class FeatureDataset:
    """A data set of ``NUM_CASES`` volumes; the last one validates.

    Attributes:
        number: Number of the data set.
        labels: As in dataset.json.
        extra: Further entries of dataset.json.
        channels: Channels of the images.
        num_slices: Slices of each volume, in turn.
        without: Case -> labels it does not have.
    """

    number: int
    labels: dict = field(default_factory=lambda: {"background": 0, "a": 1, "b": 2})
    extra: dict = field(default_factory=dict)
    channels: int = 1
    num_slices: tuple[int, ...] = (3,)
    without: dict[int, tuple[int, ...]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"Dataset{self.number}_Feature"


TRAINING_CASES = tuple(range(NUM_CASES - 1))
VALIDATION_CASE = NUM_CASES - 1

DATASETS = {
    "labels": FeatureDataset(811),
    "regions": FeatureDataset(
        812, labels={"background": 0, "whole": [1, 2], "core": 2}, extra={"regions_class_order": [1, 2]}
    ),
    "ignore": FeatureDataset(813, labels={"background": 0, "a": 1, "b": 2, "ignore": 3}),
    "two channels": FeatureDataset(814, channels=2),
    "four channels": FeatureDataset(815, channels=4),
    "thin": FeatureDataset(816, num_slices=(2, 1, 2)),
    "missing class": FeatureDataset(817, without=dict.fromkeys(TRAINING_CASES, (2,))),
    "no foreground": FeatureDataset(818, without={0: (1, 2), VALIDATION_CASE: (1, 2)}),
}


def draw(dataset: FeatureDataset, case: int) -> tuple[np.ndarray, np.ndarray]:
    """Images (C, Z, Y, X) and labels (Z, Y, X): a large and a small disc of each label through all slices."""
    generator = np.random.default_rng(100 * dataset.number + case)
    slices = dataset.num_slices[case % len(dataset.num_slices)]
    rows, columns = np.mgrid[:64, :64]
    plane = np.zeros((64, 64), dtype=np.uint8)
    for label, (row, column, radius) in {1: (18, 20, 9), 2: (40, 44, 7)}.items():
        for distance, size in ((0, radius), (15, 2)):
            plane[(rows - row - distance) ** 2 + (columns - column - generator.integers(-3, 4)) ** 2 < size**2] = label
    labels = np.repeat(plane[None], slices, axis=0)
    labels[np.isin(labels, dataset.without.get(case, ()))] = 0
    images = labels[None] * 100.0 + generator.normal(0, 20, (dataset.channels, *labels.shape))
    if "ignore" in dataset.labels:
        labels[:, 50:] = dataset.labels["ignore"]
    return images.astype(np.float32), labels


def write_raw(dataset: FeatureDataset, raw: Path) -> Path:
    """Writes the data set into nnU-Net's folder of raw data."""
    folder = raw / dataset.name
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    for case in range(NUM_CASES):
        images, labels = draw(dataset, case)
        for channel, image in enumerate(images):
            sitk.WriteImage(
                sitk.GetImageFromArray(image), str(folder / "imagesTr" / f"case_{case}_{channel:04d}.nii.gz")
            )
        sitk.WriteImage(sitk.GetImageFromArray(labels), str(folder / "labelsTr" / f"case_{case}.nii.gz"))
    description = {
        "channel_names": {str(channel): "MR" for channel in range(dataset.channels)},
        "labels": dataset.labels,
        "numTraining": NUM_CASES,
        "file_ending": ".nii.gz",
        # Named one by one: nnU-Net starts twelve processes to look for them.
        "dataset": {
            f"case_{case}": {
                "images": [f"imagesTr/case_{case}_{channel:04d}.nii.gz" for channel in range(dataset.channels)],
                "label": f"labelsTr/case_{case}.nii.gz",
            }
            for case in range(NUM_CASES)
        },
        **dataset.extra,
    }
    (folder / "dataset.json").write_text(json.dumps(description))
    return folder


def extract_fingerprint(number: int) -> None:
    """The fingerprint of a data set, its intensities from few voxels."""
    extractor = DatasetFingerprintExtractor(number, num_processes=1)
    extractor.num_foreground_voxels_for_intensitystats = 10_000  # a hundred million, drawn again and again, by default
    extractor.run()


def prepare(dataset: FeatureDataset, folder: Path) -> None:
    """Raw data, plans with ``2d`` and ``2.5d``, preprocessed data; the folders are set in the environment."""
    write_raw(dataset, folder / "raw")
    extract_fingerprint(dataset.number)
    plan_dataset(dataset.number, patch_size=PATCH_SIZE, batch_size=2, training=SCHEDULE)
    preprocess([dataset.number], DEFAULT_PLANS_NAME, ["2d"], num_processes=[1])
    names = [f"case_{case}" for case in range(NUM_CASES)]
    # Fold 0 validates the last case, as the data sets expect it; the others follow.
    splits = [{"train": [name for name in names if name != held], "val": [held]} for held in reversed(names[1:])]
    (folder / "preprocessed" / dataset.name / "splits_final.json").write_text(json.dumps(splits))
