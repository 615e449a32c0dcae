"""The data sets of the study, how they are trained on, and their preparation through nnU-Net's own commands."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from nnunetv2_smallseg import registry
from nnunetv2_smallseg.demo.commands import run_logged
from nnunetv2_smallseg.demo.phantom import write_phantom
from nnunetv2_smallseg.errors import SmallSegError
from nnunetv2_smallseg.files import write_json
from nnunetv2_smallseg.plans.configurations import NETWORK_OPTIONS_KEY

__all__ = ["DATA", "PLANS", "Data", "Phantom", "Scale", "prepare", "shared_data"]

ROOT = Path(__file__).resolve().parents[2]
PLANS = "nnUNetStudyPlans"
SETTINGS_FILE = "settings.json"


@dataclass(frozen=True)
class Scale:
    """How large a training is.

    Attributes:
        num_epochs: Steps of the learning-rate schedule, of equal shares of the budget.
        num_iterations: Iterations of all epochs together.
        batch_size: Patches in a batch; None for the planner's.
        patch_size: Height and width of a patch in voxels; None for the planner's.
        features: Channels of the stages of nnU-Net's network; None for the planner's network. Small networks also
            have the options ``small`` of the registry.
    """

    num_epochs: int
    num_iterations: int
    batch_size: int | None = None
    patch_size: tuple[int, int] | None = None
    features: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Phantom:
    """How the phantom is drawn, see ``write_phantom``."""

    num_training: int
    num_held_back: int
    noise_hu: float
    shape: tuple[int, int, int] = (22, 96, 96)


@dataclass(frozen=True)
class Data:
    """A data set of the study.

    Attributes:
        name: Short name.
        dataset: Folder in nnU-Net's raw form.
        title: What it is.
        limits_mm: Limits of the size groups of lesions: equivalent diameters, in pixels where files hold no spacing.
        unit: "mm" or "px".
        small: Training on a CPU, with small networks.
        full: Training on a GPU, with the networks at full size.
        num_folds: Seed s trains fold (s - 1) mod ``num_folds``.
        evaluated_shape: Only held-out images of this shape are evaluated; None for all.
        phantom: How it is drawn; None for data that lie in the folder of shared data.
    """

    name: str
    dataset: str
    title: str
    limits_mm: tuple[float, ...]
    small: Scale
    full: Scale
    unit: str = "mm"
    num_folds: int = 1
    evaluated_shape: tuple[int, ...] | None = None
    phantom: Phantom | None = None

    @property
    def number(self) -> str:
        """Number of the data set."""
        return self.dataset[7:10]

    def fold(self, seed: int) -> int:
        """Fold that a seed trains."""
        return (seed - 1) % self.num_folds


_FULL = Scale(num_epochs=50, num_iterations=5000)
DATA: dict[str, Data] = {
    entry.name: entry
    for entry in (
        Data(
            name="phantom",
            dataset="Dataset990_SmallLesionPhantom",
            title="Phantom of `smallseg demo`",
            limits_mm=(5.5, 11.0),
            small=Scale(50, 300, batch_size=8, patch_size=(64, 64), features=(8, 16, 32, 64, 64)),
            full=_FULL,
            phantom=Phantom(num_training=24, num_held_back=24, noise_hu=18.0),
        ),
        Data(
            name="nuclei",
            dataset="Dataset804_DSBNuclei2D",
            title="Nuclei in fluorescence microscopy (Data Science Bowl 2018, BBBC038, CC0)",
            limits_mm=(10.0, 20.0),
            unit="px",
            small=Scale(50, 300, batch_size=4, patch_size=(96, 96), features=(8, 16, 32, 64, 64)),
            full=_FULL,
            evaluated_shape=(256, 256),
        ),
        Data(
            name="ms",
            dataset="Dataset803_MSLesion3D",
            title="Multiple-sclerosis lesions in brain MR (Lesjak et al. 2017, doi 10.1007/s12021-017-9348-7, CC BY)",
            limits_mm=(5.0, 10.0),
            small=Scale(50, 500, batch_size=8, patch_size=(64, 64), features=(8, 16, 32, 64, 64)),
            full=_FULL,
            num_folds=3,
        ),
    )
}


def shared_data(data: Data) -> Path | None:
    """Folder of a data set that is not part of the project: beside it, or below SMALLSEG_SHARED; None if absent."""
    folder = Path(os.environ.get("SMALLSEG_SHARED", ROOT.parent / "shared")) / "data" / data.dataset
    return folder if (folder / "dataset.json").is_file() else None


def prepare(data: Data, scale: Scale, folder: Path, environment: dict[str, str]) -> None:
    """Brings a data set into nnU-Net's folders, plans and preprocesses it, once.

    Args:
        data: The data set.
        scale: Size of its trainings.
        folder: Workspace, with nnU-Net's folders in it.
        environment: Variables for nnU-Net's commands.
    Raises:
        SmallSegError: If the workspace was made with other settings, or a command fails.
    """
    settings = json.loads(json.dumps({"data": asdict(data), "scale": asdict(scale)}))
    settings_file = folder / data.name / SETTINGS_FILE
    if settings_file.is_file():
        if json.loads(settings_file.read_text()) != settings:
            raise SmallSegError(
                f"{folder / data.name} holds trainings with other settings than this version has for {data.name}: name "
                "another folder with -o"
            )
        return
    raw, preprocessed = folder / "nnUNet_raw" / data.dataset, folder / "nnUNet_preprocessed" / data.dataset
    shutil.rmtree(preprocessed, ignore_errors=True)
    for parent in (raw.parent, preprocessed.parent, folder / data.name):
        parent.mkdir(parents=True, exist_ok=True)
    if data.phantom is not None:
        _write_phantom(data.phantom, raw)
    elif not raw.exists():
        raw.symlink_to(shared_data(data).resolve(), target_is_directory=True)

    def call(step: str, *command: str) -> None:
        log = folder / data.name / f"{step}.log"
        run_logged(command, environment, log, lambda line: None, lambda: None)

    call("fingerprint", "nnUNetv2_extract_fingerprint", "-d", data.number, "-np", "2", "--clean", "--no_pbar")
    shutil.copyfile(raw / "splits_final.json", preprocessed / "splits_final.json")
    options = ["-num_epochs", str(scale.num_epochs), "-num_iterations", str(scale.num_iterations // scale.num_epochs)]
    if scale.patch_size is not None:
        options += ["-patch_size", *map(str, scale.patch_size)]
    if scale.batch_size is not None:
        options += ["-batch_size", str(scale.batch_size)]
    call("plan", "smallseg", "plan", "-d", data.number, "-plans_name", PLANS, *options)
    if scale.features is not None:
        _shrink(preprocessed / f"{PLANS}.json", scale.features)
    call(
        *("preprocess", "nnUNetv2_preprocess", "-d", data.number, "-plans_name", PLANS, "-c", "2d", "-np", "2"),
        "--no_pbar",
    )
    for fold in range(data.num_folds):
        _collect_references(data, raw, fold, folder / data.name / f"references_{fold}")
    write_json(settings, settings_file)


def _write_phantom(phantom: Phantom, raw: Path) -> None:
    """Draws the phantom; its cases held back become the validation cases of the one fold."""
    shutil.rmtree(raw, ignore_errors=True)
    write_phantom(
        raw,
        num_training=phantom.num_training,
        num_held_back=phantom.num_held_back,
        shape=phantom.shape,
        noise_hu=phantom.noise_hu,
    )
    train, val = (
        sorted(file.name.removesuffix(".nii.gz") for file in (raw / f"labels{subset}").iterdir())
        for subset in ("Tr", "Ts")
    )
    for kind in ("images", "labels"):
        for file in sorted((raw / f"{kind}Ts").iterdir()):
            file.rename(raw / f"{kind}Tr" / file.name)
    description = json.loads((raw / "dataset.json").read_text())
    write_json({**description, "numTraining": len(train) + len(val)}, raw / "dataset.json")
    write_json([{"train": train, "val": val}], raw / "splits_final.json")


def _shrink(plans_file: Path, features: Sequence[int]) -> None:
    """Gives nnU-Net's network few channels and stages, and ours the small options of the registry."""
    plans = json.loads(plans_file.read_text())
    configuration = plans["configurations"]["2d"]
    options = configuration["architecture"]["arch_kwargs"]
    number = min(len(features), options["n_stages"])
    for name, value in options.items():
        if isinstance(value, list):
            options[name] = value[: number - 1 if name == "n_conv_per_stage_decoder" else number]
    options.update(n_stages=number, features_per_stage=list(features[:number]))
    configuration[NETWORK_OPTIONS_KEY] = {
        name: dict(network.small) for name, network in registry.networks().items() if network.small
    }
    write_json(plans, plans_file)


def _collect_references(data: Data, raw: Path, fold: int, target: Path) -> None:
    """Links to the labels of the held-out cases that are evaluated."""
    ending = json.loads((raw / "dataset.json").read_text())["file_ending"]
    shapes = json.loads((raw / "cases.json").read_text()) if data.evaluated_shape is not None else {}
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for case in json.loads((raw / "splits_final.json").read_text())[fold]["val"]:
        if data.evaluated_shape is None or tuple(shapes[case]["shape"]) == data.evaluated_shape:
            (target / f"{case}{ending}").symlink_to((raw / "labelsTr" / f"{case}{ending}").resolve())
