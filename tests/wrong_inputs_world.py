"""A small world for wrong inputs: data sets, plans, predictions, checkpoints, and commands that run in this process."""

from __future__ import annotations

import json
import multiprocessing
import shlex
import shutil
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
from conftest import small_networks
from dataset_files import tree, write_nifti
from PIL import Image

from nnunetv2_smallseg.cli.main import main
from nnunetv2_smallseg.files import write_json

DATASET = "Dataset901_Lesions"
PICTURES = "Dataset902_Pictures"
PLANS = "nnUNetSmallSegPlans"
TRAINER = "nnUNetTrainerHUNet"
FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")


def image_and_label(seed: int, shape=(16, 16, 6)) -> tuple[np.ndarray, np.ndarray]:
    """An image (float32) and a label (uint8) with one lesion, in NIfTI's order (X, Y, Z)."""
    image = np.random.default_rng(seed).normal(40, 10, shape).astype(np.float32)
    label = np.zeros(shape, np.uint8)
    label[4:8, 4:8, 2:4] = 1
    return image, label


def write_dataset(folder: Path) -> None:
    """A raw data set of five volumes."""
    for number in range(5):
        image, label = image_and_label(number)
        write_nifti(folder / "imagesTr" / f"case{number}_0000.nii.gz", image)
        write_nifti(folder / "labelsTr" / f"case{number}.nii.gz", label)
    description = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "lesion": 1}, "numTraining": 5}
    write_json({**description, "file_ending": ".nii.gz"}, folder / "dataset.json")


def write_pictures(images: Path, labels: Path, suffix: str = "_0000", count: int = 5) -> None:
    """Grey pictures with masks of 0 and 1."""
    images.mkdir(parents=True)
    labels.mkdir(parents=True)
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 255, (16, 16), np.uint8)
        mask = np.zeros((16, 16), np.uint8)
        mask[4:8, 4:8] = 1
        Image.fromarray(pixels).save(images / f"picture{number}{suffix}.png")
        Image.fromarray(mask).save(labels / f"picture{number}.png")


def fingerprint(shape: list[int], spacing: list[float]) -> dict:
    """A fingerprint as nnU-Net extracts it, of five equal cases."""
    intensities = {"max": 80.0, "mean": 40.0, "median": 40.0, "min": 0.0, "percentile_00_5": 10.0,
                   "percentile_99_5": 70.0, "std": 10.0}  # fmt: skip
    return {
        "spacings": [spacing] * 5,
        "shapes_after_crop": [shape] * 5,
        "foreground_intensity_properties_per_channel": {"0": intensities},
        "median_relative_size_after_cropping": 1.0,
    }


@dataclass
class Result:
    """What a command did: exit status, and all it printed."""

    status: int
    output: str
    errors: str

    @property
    def text(self) -> str:
        return self.output + self.errors


class World:
    """The folders of a test, and ways to break them."""

    def __init__(self, folder: Path, monkeypatch, capsys) -> None:
        self.folder, self.monkeypatch, self.capsys = folder, monkeypatch, capsys
        self.raw = folder / "raw" / DATASET
        self.preprocessed = folder / "preprocessed" / DATASET
        self.plans = self.preprocessed / f"{PLANS}.json"
        self.model = folder / "results" / DATASET / f"{TRAINER}__{PLANS}__2d"

    @property
    def checkpoint(self) -> Path:
        """The final checkpoint of fold 0 of ``TRAINER``."""
        return self.model / "fold_0" / "checkpoint_final.pth"

    def write_checkpoint(self, trainer: str, classes: int, channels: int, named: str) -> None:
        """Writes a checkpoint as nnU-Net does.

        Args:
            trainer: Whose network it holds.
            classes: Its classes.
            channels: Its input channels.
            named: Name of the trainer in the checkpoint.
        """
        from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

        import nnunetv2_smallseg.trainers as trainers

        plans = PlansManager(str(self.plans))
        network = getattr(trainers, trainer).build_network_architecture(
            plans, plans.get_configuration("2d"), channels, classes, True
        )
        self.checkpoint.parent.mkdir(parents=True)
        shutil.copy(self.plans, self.model / "plans.json")
        shutil.copy(self.raw / "dataset.json", self.model)
        content = {
            "network_weights": network.state_dict(),
            "optimizer_state": torch.optim.AdamW(network.parameters()).state_dict(),
            "grad_scaler_state": None,
            "logging": {},
            "_best_ema": None,
            "current_epoch": 1,
            "init_args": {"configuration": "2d"},
            "trainer_name": named,
            "inference_allowed_mirroring_axes": (0, 1),
        }
        torch.save(content, self.checkpoint)

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def edit(self, path: Path, change: Callable[[dict], None]) -> None:
        """Changes a JSON file."""
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    def tree(self) -> dict[str, bytes]:
        """Every file with its content, and every folder."""
        folders = {f"{path.relative_to(self.folder)}/": b"" for path in self.folder.rglob("*") if path.is_dir()}
        return {**folders, **tree(self.folder)}

    def run(self, line: str) -> Result:
        """Runs a command line in this process; ``{}`` stands for the folder of the test."""
        program, *words = shlex.split(line.replace("{}", str(self.folder)))
        status = 0
        self.capsys.readouterr()
        try:
            status = main(words) if program == "smallseg" else self._stock(program, words)
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
            status = 1
        captured = self.capsys.readouterr()
        return Result(status, captured.out, captured.err)

    def _stock(self, program: str, words: list[str]) -> int:
        from nnunetv2.inference.predict_from_raw_data import predict_entry_point
        from nnunetv2.run.run_training import run_training_entry

        entry = {"nnUNetv2_train": run_training_entry, "nnUNetv2_predict": predict_entry_point}[program]

        class Threads:
            Pool = ThreadPool

        threads = torch.get_num_threads()
        with self.monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [program, *words])
            patch.setattr(multiprocessing, "get_context", lambda method: Threads)
            try:
                entry()
            finally:
                torch.set_num_threads(threads)
        return 0


def build(folder: Path) -> None:
    """Writes the world, but for the plans: ``write_plans``."""
    write_dataset(folder / "raw" / DATASET)
    pictures = folder / "raw" / PICTURES
    write_pictures(pictures / "imagesTr", pictures / "labelsTr")
    write_json({"channel_names": {"0": "grey"}, "labels": {"background": 0, "lesion": 1}, "numTraining": 5,
                "file_ending": ".png"}, pictures / "dataset.json")  # fmt: skip
    for name, shape, spacing in ((DATASET, [6, 16, 16], [3.0, 0.8, 0.8]), (PICTURES, [1, 16, 16], [999.0, 1.0, 1.0])):
        preprocessed = folder / "preprocessed" / name
        preprocessed.mkdir(parents=True)
        shutil.copy(folder / "raw" / name / "dataset.json", preprocessed)
        write_json(fingerprint(shape, spacing), preprocessed / "dataset_fingerprint.json")
    (folder / "results").mkdir()
    write_pictures(folder / "source" / "images", folder / "source" / "masks", suffix="")
    for number in range(3):
        _, label = image_and_label(number)
        for name in ("ref", "pred"):
            write_nifti(folder / name / f"case{number}.nii.gz", label)
    for name in ("weights", "empty"):
        (folder / name).mkdir()


def write_plans(folder: Path) -> None:
    """Plans of small networks for both data sets, and files that look like preprocessed data."""
    for number, name in ((901, DATASET), (902, PICTURES)):
        assert main(["plan", "-d", str(number), "-batch_size", "2"]) == 0
        file = folder / "preprocessed" / name / f"{PLANS}.json"
        plans = json.loads(file.read_text())
        plans["configurations"]["2d"]["network_options"] = small_networks()
        file.write_text(json.dumps(plans))
        data = file.parent / plans["configurations"]["2d"]["data_identifier"]
        data.mkdir()
        for case in range(5):
            for ending in (".b2nd", "_seg.b2nd", ".pkl"):
                (data / f"case{case}{ending}").touch()
