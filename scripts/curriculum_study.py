"""Trains the phantom of ``smallseg demo`` with and without the curriculum and compares Dice by lesion size.

Run: python scripts/curriculum_study.py [options]; then python scripts/write_tables.py. It writes
``benchmarks/results/curriculum.json``, ``docs/curriculum_study.png`` and, as the training with the first seed drew it,
``docs/curriculum_weights.png``. Interrupted, it goes on where it stopped.

Both trainings are nnU-Net's own network and recipe through nnU-Net's own commands: the same class, once with the
options of ``nnUNetTrainerCurriculum`` and once with ``min_curriculum_weight = 1``, which makes all weights 1 and then
trains, to the last bit, as without the curriculum (tested). A seed sets the initial weights and, because patches are
drawn and augmented in the training process itself, which patches are drawn and how they are augmented: both trainings
of a seed start alike and see the same patches. nnU-Net by itself has no seed: its workers draw from the system's
randomness. The phantom is the same for all seeds. Another number of threads or another machine rounds differently, so
that the same seed gives other numbers there.

Every lesion of the cases held back has a Dice of its own: of its voxels and of the predicted components that touch it;
0 if none does. A component that touches no lesion is a false positive.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.machine import machine_facts  # noqa: E402 - benchmarks is no installed package
from nnunetv2_smallseg.demo.commands import run_logged  # noqa: E402
from nnunetv2_smallseg.demo.phantom import write_phantom  # noqa: E402
from nnunetv2_smallseg.errors import SmallSegError  # noqa: E402
from nnunetv2_smallseg.files import replacing, write_json  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "curriculum.json"
FIGURE = ROOT / "docs" / "curriculum_study.png"
WEIGHTS_FIGURE = ROOT / "docs" / "curriculum_weights.png"
TRAINERS = ROOT / "scripts" / "curriculum_study_trainers"
DATASET, NUMBER, PLANS = "Dataset990_SmallLesionPhantom", "990", "nnUNetSmallSegPlans"
ARMS = {"without": "nnUNetTrainerStudyWithout", "with": "nnUNetTrainerStudyCurriculum"}
SEED_VARIABLE = "SMALLSEG_STUDY_SEED"

# Options that name files and decide nothing.
FILES = ("o", "results", "figure", "weights_figure")

# Thirds of the diameters the phantom deals out, in mm.
GROUPS = {"small": (0.0, 5.5), "medium": (5.5, 11.0), "large": (11.0, float("inf"))}
GROUP_LABELS = {"small": "small\n3 to 5 mm", "medium": "medium\n6 to 10 mm", "large": "large\n12 to 20 mm"}
ARM_COLOURS = {"without": "#8A8A8A", "with": "#D55E00"}


def positive(text: str) -> int:
    """For argparse: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive: use 1 or more")
    return value


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", metavar="FOLDER", type=Path, default=Path("smallseg_demo_curriculum"), help="workspace")
    parser.add_argument("-seeds", nargs="+", type=int, default=[1, 2, 3], help="one pair of trainings each")
    numbers = {
        "num_epochs": (30, "epochs of a training"),
        "num_iterations": (25, "iterations of an epoch"),
        "num_training": (24, "training cases, four of them for validation"),
        "num_held_back": (12, "cases the comparison is made on"),
        "batch_size": (8, "patches in a batch"),
        "patch_size": (64, "height and width of a patch in voxels"),
        "num_threads": (2, "threads of PyTorch"),
    }
    for name, (default, meaning) in numbers.items():
        parser.add_argument(f"-{name}", type=positive, default=default, help=f"{meaning} (default: {default})")
    parser.add_argument("-results", type=Path, default=RESULTS, help="JSON to write (default: %(default)s)")
    parser.add_argument("-figure", type=Path, default=FIGURE, help="PNG to write (default: %(default)s)")
    parser.add_argument(
        "-weights_figure", type=Path, default=WEIGHTS_FIGURE, help="PNG to write (default: %(default)s)"
    )
    return parser.parse_args()


class Study:
    """The workspace and its commands."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.folder = options.o.resolve()
        self.raw = self.folder / "nnUNet_raw"

    def environment(self, seed: int | None) -> dict[str, str]:
        """Environment of all commands; results of each seed in a folder of its own. None for data and plans."""
        return {
            **os.environ,
            "nnUNet_raw": str(self.raw),
            "nnUNet_preprocessed": str(self.folder / "nnUNet_preprocessed"),
            "nnUNet_results": str(self.folder if seed is None else self.results(seed)),
            "nnUNet_extTrainer": str(TRAINERS),
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
            "PYTHONUNBUFFERED": "1",
            "PYTHONIOENCODING": "utf-8",
            "OMP_NUM_THREADS": str(self.options.num_threads),
            "OMP_WAIT_POLICY": "PASSIVE",
            "nnUNet_compile": "false",
            "nnUNet_def_n_proc": "1",
            # Training draws patches in its own process, where everything is seeded; planning refuses 0.
            "nnUNet_n_proc_DA": "1" if seed is None else "0",
            **({} if seed is None else {SEED_VARIABLE: str(seed)}),
        }

    def results(self, seed: int) -> Path:
        """nnUNet_results of a seed."""
        return self.folder / f"seed_{seed}"

    def model(self, seed: int, arm: str) -> Path:
        """Folder of a model."""
        return self.results(seed) / DATASET / f"{ARMS[arm]}__{PLANS}__2d"

    def predictions(self, seed: int, arm: str) -> Path:
        """Folder of the predictions of the cases held back."""
        return self.results(seed) / f"predictions_{arm}"

    def call(self, log: str, *command: str, seed: int | None = None) -> None:
        """Runs a console command with its output in a log file."""
        file = self.folder / "logs" / f"{log}.log"
        file.parent.mkdir(parents=True, exist_ok=True)
        run_logged(command, self.environment(seed), file, lambda line: None, lambda: None)

    def prepare(self) -> None:
        """Writes, plans and preprocesses the phantom, once; refuses a workspace of other settings."""
        settings = {name: value for name, value in settings_of(self.options).items() if name != "seeds"}
        file = self.folder / "settings.json"
        if file.is_file():
            if json.loads(file.read_text()) != settings:
                sys.exit(f"{self.folder} holds a study with other settings: use those, or name another folder with -o")
            return
        shutil.rmtree(self.raw / DATASET, ignore_errors=True)
        self.raw.mkdir(parents=True, exist_ok=True)
        (self.folder / "nnUNet_preprocessed").mkdir(exist_ok=True)
        options = self.options
        write_phantom(self.raw / DATASET, num_training=options.num_training, num_held_back=options.num_held_back)
        self.call("fingerprint", "nnUNetv2_extract_fingerprint", "-d", NUMBER, "-np", "2", "--clean", "--no_pbar")
        patch = str(options.patch_size)
        self.call(
            *("plan", "smallseg", "plan", "-d", NUMBER, "-plans_name", PLANS, "-patch_size", patch, patch),
            *("-batch_size", str(options.batch_size), "-num_epochs", str(options.num_epochs)),
            *("-num_iterations", str(options.num_iterations), "-num_val_iterations", "5"),
        )
        self.call(
            *("preprocess", "nnUNetv2_preprocess", "-d", NUMBER, "-plans_name", PLANS, "-c", "2d", "-np", "2"),
            "--no_pbar",
        )
        target = self.folder / "nnUNet_preprocessed" / DATASET / "splits_final.json"
        shutil.copyfile(self.raw / DATASET / "splits_final.json", target)
        write_json(settings, file)

    def train_and_predict(self, seed: int, arm: str) -> None:
        """One training and its predictions, unless they are there."""
        model = ["-tr", ARMS[arm], "-p", PLANS, "-device", "cpu"]
        self.results(seed).mkdir(exist_ok=True)
        if not (self.model(seed, arm) / "fold_0" / "checkpoint_final.pth").is_file():
            # Anew: a resumed training would draw other patches than its partner.
            shutil.rmtree(self.model(seed, arm), ignore_errors=True)
            self.call(f"train_{arm}_{seed}", "nnUNetv2_train", NUMBER, "2d", "0", *model, seed=seed)
        predictions = self.predictions(seed, arm)
        names = [path.name for path in (self.raw / DATASET / "labelsTs").glob("*.nii.gz")]
        if not all((predictions / name).is_file() for name in names):
            self.call(
                *(f"predict_{arm}_{seed}", "nnUNetv2_predict", "-d", NUMBER, "-c", "2d", "-f", "0", *model),
                *("-i", str(self.raw / DATASET / "imagesTs"), "-o", str(predictions)),
                *("-npp", "0", "-nps", "0", "--disable_progress_bar"),
                seed=seed,
            )

    def evaluate(self, seed: int, arm: str) -> dict:
        """Dice of every lesion of the cases held back, by size group, and false positives."""
        lesions = json.loads((self.raw / DATASET / "lesions.json").read_text())
        by_group: dict[str, list[float]] = {group: [] for group in GROUPS}
        false_positives, cases = 0, sorted((self.raw / DATASET / "labelsTs").glob("*.nii.gz"))
        for reference in cases:
            own = [lesion for lesion in lesions["lesions"] if lesion["case"] == reference.name.removesuffix(".nii.gz")]
            dice, extra = lesion_dice(
                read(reference), read(self.predictions(seed, arm) / reference.name), own, lesions["spacing_mm"]
            )
            false_positives += extra
            for lesion, value in zip(own, dice, strict=True):
                by_group[group_of(lesion["diameter_mm"])].append(value)
        return {
            "dice": {group: float(np.mean(values)) for group, values in by_group.items()},
            "lesions": {group: len(values) for group, values in by_group.items()},
            "detected": {group: sum(value > 0 for value in values) for group, values in by_group.items()},
            "false_positives_per_case": false_positives / len(cases),
        }


def settings_of(options: argparse.Namespace) -> dict:
    """The options that decide the result."""
    return {name: value for name, value in vars(options).items() if name not in FILES}


def read(file: Path) -> np.ndarray:
    """Lesion voxels (Z, Y, X) of a label file."""
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file))) == 1


def group_of(diameter_mm: float) -> str:
    """Size group of a lesion."""
    return next(group for group, (lowest, highest) in GROUPS.items() if lowest <= diameter_mm < highest)


def lesion_dice(
    reference: np.ndarray, prediction: np.ndarray, lesions: list[dict], spacing_mm: list[float]
) -> tuple[list[float], int]:
    """Dice of each lesion, and the number of false positives.

    Args:
        reference: Lesion voxels (Z, Y, X).
        prediction: The same, predicted.
        lesions: ``centre_mm`` (z, y, x) of each lesion, as in ``lesions.json``; lesions do not touch each other.
        spacing_mm: Voxel size (z, y, x).
    Returns:
        Dice in the order of ``lesions``, and how many predicted components touch no lesion.
    """
    everywhere = np.ones((3, 3, 3))
    labels, _ = ndimage.label(reference, everywhere)
    components, number = ndimage.label(prediction, everywhere)
    touching: set[int] = set()
    dice = []
    for lesion in lesions:
        centre = tuple(np.rint(np.array(lesion["centre_mm"]) / spacing_mm).astype(int))
        voxels = labels == labels[centre]
        found = set(np.unique(components[voxels])) - {0}
        touching |= found
        predicted = np.isin(components, list(found))
        dice.append(float(2 * (predicted & voxels).sum() / (predicted.sum() + voxels.sum())))
    return dice, number - len(touching)


def draw(results: dict, file: Path) -> None:
    """Dice by lesion size: a point for each seed, pairs joined, and the mean of the seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    offset = {"without": -0.17, "with": 0.17}
    for position, group in enumerate(GROUPS):
        values = {arm: [run["dice"][group] for run in results["runs"] if run["arm"] == arm] for arm in ARMS}
        for pair in zip(values["without"], values["with"], strict=True):
            places = [position + offset["without"], position + offset["with"]]
            axes.plot(places, pair, color="#C8C8C8", linewidth=1, zorder=1)
        for arm, dice in values.items():
            place = position + offset[arm]
            colour = ARM_COLOURS[arm]
            axes.scatter([place] * len(dice), dice, s=26, color=colour, alpha=0.75, linewidth=0, zorder=2)
            mean = float(np.mean(dice))
            label = f"{arm} curriculum" if position == 0 else None
            axes.hlines(mean, place - 0.1, place + 0.1, color=colour, linewidth=3, zorder=3, label=label)
            side, align = (-0.12, "right") if arm == "without" else (0.12, "left")
            axes.text(place + side, mean, f"{mean:.3f}", ha=align, va="center", fontsize=10, color=colour)
    first = results["runs"][0]
    names = [f"{GROUP_LABELS[group]}\n{first['lesions'][group]} lesions" for group in GROUPS]
    axes.set_xticks(range(len(GROUPS)), names)
    axes.set_xlim(-0.6, len(GROUPS) - 0.4)
    axes.set_ylabel("mean Dice of lesions")
    axes.grid(axis="y", color="#E8E8E8", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    seeds = len(results["settings"]["seeds"])
    axes.set_title(
        f"Cases held back of the phantom; a point is a training, {seeds} seed{'s' * (seeds != 1)}; bars are means",
        fontsize=10, loc="left", color="#4A4A4A",
    )  # fmt: skip
    axes.legend(frameon=False, loc="best")
    with replacing(file) as temporary:
        figure.savefig(temporary, format="png")


def main() -> None:
    """Runs what is left of the study and writes its results."""
    options = parse()
    study = Study(options)
    study.prepare()
    runs = []
    for seed in options.seeds:
        for arm in ARMS:
            print(f"seed {seed}, {arm} curriculum", flush=True)
            study.train_and_predict(seed, arm)
            runs.append({"seed": seed, "arm": arm, **study.evaluate(seed, arm)})
    machine = machine_facts("cpu", ("torch", "nnunetv2"))
    results = {"machine": machine, "settings": settings_of(options), "runs": runs}
    write_json(results, options.results)
    draw(results, options.figure)
    with replacing(options.weights_figure) as temporary:
        shutil.copyfile(study.model(options.seeds[0], "with") / "fold_0" / "curriculum.png", temporary)


if __name__ == "__main__":
    try:
        main()
    except SmallSegError as error:
        sys.exit(f"error: {error}")
