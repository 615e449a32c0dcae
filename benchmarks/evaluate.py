"""``smallseg evaluate`` beside nnU-Net's ``nnUNetv2_evaluate_folder`` on made-up volumes, and the axes of a lesion.

Run: python -m benchmarks.evaluate [-cases N] [-rounds N]; writes ``benchmarks/results/evaluate.json``.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import SimpleITK
from nnunetv2.evaluation.evaluate_predictions import compute_metrics
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from scipy import ndimage

from benchmarks.machine import interleaved_medians, machine_facts
from nnunetv2_smallseg.evaluation.axes import recist_axes
from nnunetv2_smallseg.evaluation.case import CaseTask, Settings, count_case, evaluate_case
from nnunetv2_smallseg.evaluation.regions import scheme_from_dataset_json
from nnunetv2_smallseg.evaluation.surface_metrics import border_voxels
from nnunetv2_smallseg.evaluation.voxel_metrics import region_counts, voxel_metrics

RESULTS = Path(__file__).parent / "results" / "evaluate.json"
SHAPE = (96, 320, 320)
SPACING = (2.5, 0.8, 0.8)
NUM_LESIONS = 12
LABELS = {"background": 0, "organ": 1, "lesion": 2}


def write_case(folder: Path, case: str, generator: np.random.Generator) -> None:
    """An organ with lesions of 4 to 25 mm; the prediction is shifted by a voxel, misses one and adds one."""
    z, y, x = np.ogrid[: SHAPE[0], : SHAPE[1], : SHAPE[2]]
    maps = {name: np.zeros(SHAPE, dtype=np.uint8) for name in ("reference", "prediction")}
    maps["reference"][((z - 48) / 35) ** 2 + ((y - 160) / 70) ** 2 + ((x - 130) / 80) ** 2 < 1] = 1
    maps["prediction"][:] = ndimage.shift(maps["reference"], (0, 1, 1), order=0)
    for number in range(NUM_LESIONS + 1):
        radius = generator.uniform(2, 12.5)
        centre = [generator.integers(20, 76), generator.integers(110, 210), generator.integers(80, 180)]
        for name, excluded in (("reference", NUM_LESIONS), ("prediction", 0)):
            offset = 1 if name == "prediction" else 0
            if number != excluded:
                distance = sum(
                    ((axis - middle - offset * (size < 1)) * size) ** 2
                    for axis, middle, size in zip((z, y, x), centre, SPACING, strict=True)
                )
                maps[name][distance <= radius**2] = 2
    for name, labels in maps.items():
        image = SimpleITK.GetImageFromArray(labels)
        image.SetSpacing(SPACING[::-1])
        (folder / name).mkdir(exist_ok=True)
        SimpleITK.WriteImage(image, str(folder / name / f"{case}.nii.gz"))


def axes_pair_by_pair(mask: np.ndarray) -> tuple[float, float]:
    """The rule of ``recist_axes`` with a Python loop over pairs for the short axis, for a lesion in one slice."""
    points = border_voxels(mask)
    distances = np.sqrt(((points[:, None] - points[None]) ** 2).sum(-1))
    start, stop = np.unravel_index(np.argmax(distances), distances.shape)
    direction, length = points[stop] - points[start], distances[start, stop]
    best = 0.0
    for first in range(len(points)):
        for second in range(len(points)):
            if first == second:
                continue
            cosine = abs((points[second] - points[first]) @ direction) / (distances[first, second] * length)
            if math.degrees(math.asin(min(1.0, cosine))) < 1 and distances[first, second] > best:
                best = distances[first, second]
    return float(length), float(best)


def measure_axes(rounds: int) -> dict:
    """Times the axes of an ellipse of 10,753 pixels."""
    y, x = np.mgrid[:200, :200]
    mask = ((y - 100) / 45) ** 2 + ((x - 100) / 76.2) ** 2 < 1
    if not np.allclose(recist_axes(mask), axes_pair_by_pair(mask)):
        raise RuntimeError("the two ways to find the axes differ")
    return {
        "pixels": int(mask.sum()),
        **interleaved_medians(
            {"recist_axes": lambda: recist_axes(mask), "loop over pairs": lambda: axes_pair_by_pair(mask)}, rounds
        ),
    }


def measure(num_cases: int, rounds: int, num_processes: int) -> dict:
    """Times both commands, and within one process the parts of a case."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        generator = np.random.default_rng(0)
        cases = [f"case_{index}" for index in range(num_cases)]
        for case in cases:
            write_case(folder, case, generator)
        (folder / "dataset.json").write_text(json.dumps({"labels": LABELS, "file_ending": ".nii.gz"}))
        (folder / "plans.json").write_text("{}")
        scheme = scheme_from_dataset_json(folder / "dataset.json")
        tasks = [
            CaseTask("", case, *(folder / part / f"{case}.nii.gz" for part in ("reference", "prediction")),
                     scheme=scheme, settings=Settings())
            for case in cases
        ]  # fmt: skip

        def nnunet() -> None:
            for task in tasks:
                compute_metrics(str(task.reference_file), str(task.prediction_file), SimpleITKIO(), [1, 2])

        def voxels() -> None:
            for task in tasks:
                matrix = count_case(task).matrix
                for region in scheme.regions:
                    voxel_metrics(region_counts(matrix, region.labels, None))

        def everything() -> None:
            for task in tasks:
                evaluate_case(task)

        programs = Path(sys.executable).parent
        common = ["-np", str(num_processes), "-djfile", str(folder / "dataset.json")]
        stock = [programs / "nnUNetv2_evaluate_folder", folder / "reference", folder / "prediction", "-pfile",
                 folder / "plans.json", "-o", folder / "summary.json", *common]  # fmt: skip
        ours = [sys.executable, "-m", "nnunetv2_smallseg.cli.main", "evaluate", "-ref", folder / "reference", "-pred",
                folder / "prediction", "-o", folder / "output", *common]  # fmt: skip
        start = partial(subprocess.run, check=True, capture_output=True)
        return {
            "machine": machine_facts("cpu", ("nnunetv2", "numpy", "scipy", "SimpleITK", "connected-components-3d")),
            "axes": measure_axes(5 * rounds),
            "num_cases": num_cases,
            "shape": SHAPE,
            "lesions_per_case": NUM_LESIONS,
            "num_processes": num_processes,
            "commands": interleaved_medians(
                {"nnUNetv2_evaluate_folder": lambda: start(stock), "smallseg evaluate": lambda: start(ours)}, rounds
            ),
            "one_process": interleaved_medians(
                {
                    "nnunetv2 compute_metrics": nnunet,
                    "ours, Dice and other voxel metrics": voxels,
                    "ours, everything": everything,
                },
                rounds,
            ),
        }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-cases", type=int, default=6)
    parser.add_argument("-rounds", type=int, default=3)
    parser.add_argument("-np", type=int, default=2)
    arguments = parser.parse_args()
    RESULTS.write_text(json.dumps(measure(arguments.cases, arguments.rounds, arguments.np), indent=2) + "\n")
