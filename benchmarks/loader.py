"""The loader of lesion-balanced sampling beside nnU-Net's: batches per second, and what it draws.

Four questions, all answered on made-up volumes with spherical lesions:

- throughput: time of a batch, without and with nnU-Net's transforms, in 2D and 3D;
- frequencies: how often lesions of each diameter are drawn by nnU-Net, "lesion" and "size_bin";
- jitter: how often a drawn lesion is still in the patch after nnU-Net's augmentation;
- table: size and reading time of the file for a data set of 5,000 cases with 100 lesions each.

Run: python -m benchmarks.loader [-rounds N] [-draws N] [-patches N]; writes ``benchmarks/results/loader.json``.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.data_augmentation.compute_initial_patch_size import get_patch_size
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from benchmarks.machine import machine_facts
from nnunetv2_smallseg.data import lesion_table as tables
from nnunetv2_smallseg.data.lesion_loader import SAMPLINGS, LesionDataLoader, LesionSampler
from nnunetv2_smallseg.data.lesion_table import Lesions, LesionTable, lesion_table
from nnunetv2_smallseg.files import write_json

RESULTS = Path(__file__).parent / "results" / "loader.json"
LABELS = LabelManager({"background": 0, "lesion": 1}, None)
OVERSAMPLED = 0.33
# Voxels are 1 mm wide. Diameter in mm -> number in a case; large lesions are rarer.
LESIONS_OF_A_CASE = {40: 1, 20: 2, 10: 4, 5: 8}
SHAPE = (80, 176, 176)
NUM_CASES = 8
PATCHES = {"2d": ((160, 160), 12), "3d": ((64, 96, 96), 2)}
JITTERS = (0.0, 0.25, 0.5, 0.75, 1.0)
# Lesions of this diameter, one in a case, in patches of this size.
JITTER_DIAMETER = 6
JITTER_PATCHES = {"2d": (64, 64), "3d": (40, 40, 40)}


def spheres(shape: tuple[int, ...], diameters: list[int], generator: np.random.Generator) -> np.ndarray:
    """Labels of a case with spheres that do not touch, largest first."""
    labels = np.zeros(shape, dtype=np.int8)
    grid = np.ogrid[tuple(map(slice, shape))]
    for diameter in diameters:
        radius = diameter / 2
        for _ in range(10_000):
            centre = [generator.uniform(radius, side - radius) for side in shape]
            distance = sum((axis - middle) ** 2 for axis, middle in zip(grid, centre, strict=True))
            if not labels[distance < (radius + 3) ** 2].any():
                break
        else:
            raise RuntimeError(f"no room for a lesion of {diameter} mm")
        labels[distance < radius**2] = 1
    return labels


def write_data_set(
    folder: Path, patch_size: tuple[int, ...], shape: tuple[int, ...], diameters: list[int], num_cases: int
) -> nnUNetDatasetBlosc2:
    """Cases as nnU-Net's preprocessing leaves them."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for case in range(num_cases):
        labels = spheres(shape, diameters, generator)[None]
        image = generator.standard_normal(labels.shape, dtype=np.float32) + labels
        locations = DefaultPreprocessor._sample_foreground_locations(labels, [1])
        blocks, chunks = comp_blosc2_params(image.shape, patch_size)
        nnUNetDatasetBlosc2.save_case(
            image,
            labels,
            {"class_locations": locations, "spacing": [1.0, 1.0, 1.0]},
            str(folder / f"case_{case}"),
            chunks=chunks,
            blocks=blocks,
        )
    return nnUNetDatasetBlosc2(str(folder))


class SameForAll:
    """Transforms that draw the same for the same element of each loader, so that only the loaders differ."""

    def __init__(self, transforms: object) -> None:
        self.transforms = transforms
        self.calls = 0

    def __call__(self, **sample: object) -> dict:
        """The transformed element."""
        self.calls += 1
        np.random.seed(self.calls)  # noqa: NPY002
        torch.manual_seed(self.calls)
        return self.transforms(**sample)


def augmentation(patch_size: tuple[int, ...]) -> tuple[tuple[int, ...], object]:
    """What nnU-Net's trainer does with patches of this size: size of what is cut, and the transforms."""
    angle = np.pi if len(patch_size) == 2 else np.pi / 6
    initial = get_patch_size(patch_size, *[(-angle, angle)] * 3, (0.85, 1.25))
    axes = tuple(range(len(patch_size)))
    transforms = nnUNetTrainer.get_training_transforms(patch_size, (-angle, angle), None, axes, False)
    return tuple(map(int, initial)), transforms


def loader_of(
    dataset: nnUNetDatasetBlosc2,
    sampling: str,
    patch_size: tuple[int, ...],
    *,
    initial: tuple[int, ...] | None = None,
    batch_size: int = 2,
    jitter: float = 0.5,
    share: float = OVERSAMPLED,
    transforms: object = None,
) -> nnUNetDataLoader:
    """nnU-Net's loader for "voxel", else ours."""
    arguments = (dataset, batch_size, initial or patch_size, patch_size, LABELS)
    options = {"oversample_foreground_percent": share, "transforms": transforms}
    if sampling == "voxel":
        return nnUNetDataLoader(*arguments, **options)
    table = lesion_table(dataset, LABELS)
    sampler = LesionSampler(table, sampling, table.spacings([1.0, 1.0, 1.0], [0, 1, 2]))
    return LesionDataLoader(*arguments, lesions=sampler, jitter=jitter, **options)


def time_batches(loaders: dict[str, nnUNetDataLoader], rounds: int) -> dict[str, np.ndarray]:
    """Processor time of batches in milliseconds, (rounds,) for each loader; they take turns, and turns at being first.

    Processor time: other processes on the machine change the wall time more than the loaders differ.
    """
    for loader in loaders.values():
        next(loader)
    names = list(loaders)
    times = {name: np.zeros(rounds) for name in names}
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            start = time.process_time()
            next(loaders[name])
            times[name][number] = 1000 * (time.process_time() - start)
    return times


def measure_throughput(folder: Path, rounds: int) -> list[dict]:
    """Times batches of the three loaders in turns."""
    diameters = [diameter for diameter, number in LESIONS_OF_A_CASE.items() for _ in range(number)]
    runs = []
    for dimension, (patch_size, batch_size) in PATCHES.items():
        dataset = write_data_set(folder / dimension, patch_size, SHAPE, diameters, NUM_CASES)
        initial, transforms = augmentation(patch_size)
        for transformed in (False, True):
            loaders = {
                sampling: loader_of(
                    dataset,
                    sampling,
                    patch_size,
                    initial=initial,
                    batch_size=batch_size,
                    transforms=SameForAll(transforms) if transformed else None,
                )
                for sampling in SAMPLINGS
            }
            np.random.seed(0)  # noqa: NPY002 - what the loaders draw from
            torch.manual_seed(0)
            times = time_batches(loaders, rounds if transformed else 4 * rounds)
            runs.append(
                {
                    "configuration": dimension,
                    "patch_size": list(patch_size),
                    "batch_size": batch_size,
                    "transforms": transformed,
                    "batches": len(times["voxel"]),
                    "median_cpu_ms": {name: float(np.median(values)) for name, values in times.items()},
                    # Batches of a round have the same augmentation; those of two rounds differ tenfold.
                    "throughput_of_nnunets": {
                        name: float(np.median(times["voxel"] / times[name])) for name in SAMPLINGS[1:]
                    },
                }
            )
    return runs


def measure_frequencies(folder: Path, draws: int) -> dict:
    """Draws oversampled patches of one voxel, which is the voxel or anchor drawn, and counts them by lesion."""
    diameters = [diameter for diameter, number in LESIONS_OF_A_CASE.items() for _ in range(number)]
    dataset = write_data_set(folder / "frequencies", (64, 96, 96), SHAPE, diameters, NUM_CASES)
    table = lesion_table(dataset, LABELS)
    lesions = table.lesions
    cases = {case: dataset.load_case(case) for case in dataset.identifiers}
    # The known diameter of a lesion is the nearest to that of a ball of its volume.
    known = np.array(sorted(LESIONS_OF_A_CASE))
    measured = lesions.equivalent_diameters_mm((1, 1, 1))
    diameter_of = known[abs(measured[:, None] - known).argmin(axis=1)]
    counts = {}
    for sampling in SAMPLINGS:
        np.random.seed(0)  # noqa: NPY002
        loader = loader_of(dataset, sampling, (1, 1, 1), batch_size=1, share=1.0)
        drawn = np.zeros(len(lesions), dtype=np.int64)
        for _ in range(draws):
            (case,) = loader.get_indices()
            image, _, _, properties = cases[case]
            voxel, _ = loader.get_bbox(image.shape[1:], loader.get_do_oversample(0), properties["class_locations"])
            of_case = table.case_of == table.cases.index(case)
            inside = ((lesions.boxes[:, 0] <= voxel) & (lesions.boxes[:, 1] > voxel)).all(axis=1)
            drawn[(of_case & inside).argmax()] += 1
        counts[sampling] = [int(drawn[diameter_of == diameter].sum()) for diameter in known]
    return {
        "draws": draws,
        "cases": NUM_CASES,
        "diameters_mm": known.tolist(),
        "lesions": [int((diameter_of == diameter).sum()) for diameter in known],
        "drawn": counts,
    }


def measure_jitter(folder: Path, patches: int) -> list[dict]:
    """Shares of patches in which a drawn lesion is seen, and as a whole, after nnU-Net's augmentation."""
    runs = []
    for dimension, patch_size in JITTER_PATCHES.items():
        shape = (72, 160, 160)
        dataset = write_data_set(folder / f"jitter_{dimension}", patch_size, shape, [JITTER_DIAMETER], NUM_CASES)
        initial, transforms = augmentation(patch_size)
        inside = tuple(slice(1, side - 1) for side in patch_size)
        for jitter in JITTERS:
            np.random.seed(0)  # noqa: NPY002
            torch.manual_seed(0)
            options = {"initial": initial, "batch_size": 1, "share": 1.0, "jitter": jitter, "transforms": transforms}
            loader = loader_of(dataset, "lesion", patch_size, **options)
            seen = whole = 0
            for _ in range(patches):
                lesion = next(loader)["target"][0, 0] == 1
                seen += bool(lesion.any())
                # What does not touch the edge of the patch is not cut.
                whole += bool(lesion.any() and lesion.sum() == lesion[inside].sum())
            runs.append(
                {
                    "configuration": dimension,
                    "patch_size": list(patch_size),
                    "jitter": jitter,
                    "patches": patches,
                    "seen": seen / patches,
                    "whole": whole / patches,
                }
            )
    return runs


def measure_table(folder: Path, num_cases: int = 5000, lesions_of_a_case: int = 100, num_slices: int = 60) -> dict:
    """Writes and reads the file of a large made-up data set; sizes are log-normal with a median of 90 voxels."""
    generator = np.random.default_rng(0)
    number = num_cases * lesions_of_a_case
    voxels = np.minimum(np.exp(generator.normal(4.5, 1.5, number)).astype(np.int64) + 1, 10**6)
    kept = np.minimum(voxels, tables.MAX_ANCHORS)
    lower = generator.integers(0, 400, (number, 3), dtype=np.int32)
    anchors = generator.integers(0, 400, (kept.sum(), 3), dtype=np.int32)
    boxes = np.stack([lower, lower + 9], axis=1)
    lesions = Lesions(np.zeros(number, dtype=np.int16), voxels, boxes, np.cumsum(kept) - kept, kept, anchors)
    table = LesionTable(
        ((1,),),
        tuple(f"case_{index:05d}" for index in range(num_cases)),
        np.full((num_cases, 3), (400, 512, 512), dtype=np.int32),
        np.ones((num_cases, 3)),
        lesions,
        np.full(num_cases, lesions_of_a_case),
        np.stack([np.ones(num_cases * num_slices, dtype=np.int64), np.tile(np.arange(num_slices), num_cases),
                  generator.integers(1, 999, num_cases * num_slices)], axis=1),
        np.full(num_cases, num_slices),
        np.ones((num_cases, 2), dtype=np.int64),
    )  # fmt: skip
    file = folder / "lesions.npz"
    tables._write(file, table)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        read = tables._read(file, table.classes)
        times.append(time.perf_counter() - start)
    held = (read.lesions.classes, read.lesions.voxels, read.lesions.boxes, read.lesions.anchor_starts,
            read.lesions.anchor_counts)  # fmt: skip
    return {
        "cases": num_cases,
        "lesions": number,
        "file_mb": file.stat().st_size / 1e6,
        "read_s": sorted(times)[2],
        "mapped_mb": read.lesions.anchors.nbytes / 1e6,
        "held_mb": sum(array.nbytes for array in held) / 1e6,
    }


def main() -> None:
    """Measures and writes the results file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "-rounds", type=int, default=30, help="batches of each loader; untransformed, four times as many"
    )
    parser.add_argument("-draws", type=int, default=50_000, help="drawn patches of each sampling")
    parser.add_argument("-patches", type=int, default=400, help="patches for each jitter")
    parser.add_argument("-o", type=Path, default=RESULTS, help="results file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = {"machine": machine_facts("cpu", ("torch", "numpy", "nnunetv2", "batchgeneratorsv2", "blosc2"))}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        results["frequencies"] = measure_frequencies(folder, arguments.draws)
        results["table"] = measure_table(folder)
        results["throughput"] = measure_throughput(folder, arguments.rounds)
        results["jitter"] = measure_jitter(folder, arguments.patches)
    write_json(results, arguments.o)
    for run in results["throughput"]:
        shares = ", ".join(f"{name} {100 * share:.1f} %" for name, share in run["throughput_of_nnunets"].items())
        print(f"{run['configuration']}, {'with' if run['transforms'] else 'without'} transforms: {shares}")


if __name__ == "__main__":
    main()
