"""What targets of deep supervision keep of small lesions and of large structures, and what making them costs.

Run: python -m benchmarks.deep_supervision_targets [-o FILE]. About two minutes on one core of a CPU.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch.nn.functional import avg_pool2d, avg_pool3d

from benchmarks.machine import interleaved_medians, machine_facts
from nnunetv2_smallseg.files import write_json
from nnunetv2_smallseg.losses.deep_supervision_targets import RULES, downsample_labels

RESULTS = Path(__file__).resolve().parent / "results" / "deep_supervision_targets.json"
FACTORS = (2, 4, 8)
DIAMETERS = (2, 3, 4, 6, 8)
LARGE_DIAMETERS = (30, 60, 100)

Targets = Callable[[torch.Tensor, list], list[torch.Tensor]]


def nearest_targets(labels: torch.Tensor, scales: list) -> list[torch.Tensor]:
    """nnU-Net's targets, by its own transform."""
    return DownsampleSegForDSTransform(scales)(segmentation=labels)["segmentation"]


def with_rule(rule: str) -> Targets:
    """Our targets."""
    return lambda labels, scales: downsample_labels(labels, scales, rule=rule)


METHODS: dict[str, Targets] = {"nearest": nearest_targets, **{rule: with_rule(rule) for rule in RULES}}


def ball(shape: tuple[int, ...], centre: np.ndarray, diameter: float) -> np.ndarray:
    """Voxels whose centre is inside a ball."""
    grids = np.meshgrid(*map(np.arange, shape), indexing="ij", sparse=True)
    return sum((grid - middle) ** 2 for grid, middle in zip(grids, centre, strict=True)) <= (diameter / 2) ** 2


def patch_of(mask: np.ndarray) -> torch.Tensor:
    """As nnU-Net's pipeline gives it: (1, ...) int16."""
    return torch.from_numpy(mask[None].astype(np.int16))


def scales_of(num_axes: int, factors: tuple[int, ...] = FACTORS) -> list[list[float]]:
    """nnU-Net's way to write them."""
    return [[1 / factor] * num_axes for factor in factors]


def measure_survival(num_axes: int, positions: int, seed: int) -> list[dict]:
    """Share of balls of which nothing is left, at random positions between the voxels."""
    rows = []
    for diameter in DIAMETERS:
        generator = np.random.default_rng([seed, num_axes, diameter])
        lost = {name: np.zeros(len(FACTORS), dtype=int) for name in METHODS}
        for _ in range(positions):
            # A position within one of the largest cells; balls without a voxel do not exist in data.
            mask = ball((32,) * num_axes, 16 + generator.uniform(0, max(FACTORS), num_axes) - 0.5, diameter)
            for name, method in METHODS.items():
                targets = method(patch_of(mask), scales_of(num_axes))
                lost[name] += [not target.any() for target in targets]
        for name, count in lost.items():
            rows += [
                {"axes": num_axes, "diameter": diameter, "factor": factor, "targets": name, "lost": number / positions}
                for factor, number in zip(FACTORS, count.tolist(), strict=True)
            ]
    return rows


def dice(first: torch.Tensor, second: torch.Tensor) -> float:
    """Of two maps of shares in [0, 1]."""
    return float(2 * torch.minimum(first, second).sum() / (first.sum() + second.sum()))


def measure_large_structures(num_axes: int, positions: int, seed: int) -> list[dict]:
    """Dice of the targets of large balls with exact area averages, as they are and thresholded at one half."""
    pool = avg_pool2d if num_axes == 2 else avg_pool3d
    rows = []
    for diameter in LARGE_DIAMETERS:
        generator = np.random.default_rng([seed, num_axes, diameter])
        sums = {(name, factor): np.zeros(2) for name in METHODS for factor in FACTORS}
        for _ in range(positions):
            mask = ball((128,) * num_axes, 64 + generator.uniform(-4, 4, num_axes), diameter)
            labels = patch_of(mask)
            averages = [pool(labels.float(), factor) for factor in FACTORS]
            for name, method in METHODS.items():
                targets = method(labels, scales_of(num_axes))
                for factor, target, average in zip(FACTORS, targets, averages, strict=True):
                    sums[name, factor] += [dice(target, (average >= 0.5).float()), dice(target, average)]
        rows += [
            {"axes": num_axes, "diameter": diameter, "factor": factor, "targets": name,
             "dice": total[0] / positions, "soft_dice": total[1] / positions}
            for (name, factor), total in sums.items()
        ]  # fmt: skip
    return rows


def patch_with_lesions(
    shape: tuple[int, ...], diameters: tuple[float, float], number: int, organ: float, seed: int
) -> torch.Tensor:
    """A patch with lesions (label 2), in an organ (label 1) if it has a diameter."""
    generator = np.random.default_rng(seed)
    labels = np.zeros(shape, dtype=np.int16)
    if organ:
        labels[ball(shape, np.array(shape) / 2, organ)] = 1
    for _ in range(number):
        labels[ball(shape, generator.uniform(0, 1, len(shape)) * shape, generator.uniform(*diameters))] = 2
    return patch_of(labels)


PATCHES = {
    "512 x 512, 5 lesions": ((512, 512), (4, 16), 5, 0.0),
    "512 x 512, 200 nuclei": ((512, 512), (4, 16), 200, 0.0),
    "512 x 512, 10 lesions in an organ": ((512, 512), (2, 16), 10, 400.0),
    "128 x 128 x 128, nothing": ((128, 128, 128), (2, 16), 0, 0.0),
    "128 x 128 x 128, 5 lesions": ((128, 128, 128), (4, 16), 5, 0.0),
    "128 x 128 x 128, 10 lesions in an organ": ((128, 128, 128), (2, 12), 10, 110.0),
}


def calls(labels: torch.Tensor, scales: list) -> dict[str, Callable[[], object]]:
    """Each method on one patch."""
    return {name: (lambda method=method: method(labels, scales)) for name, method in METHODS.items()}


def augmentation_ms(labels: torch.Tensor, rounds: int, seed: int) -> float:
    """Processor time of nnU-Net's training transforms for a patch, without the targets; mean of several draws."""
    shape = tuple(labels.shape[1:])
    angle = np.pi if len(shape) == 2 else np.pi / 6
    transforms = nnUNetTrainer.get_training_transforms(
        shape, (-angle, angle), None, tuple(range(len(shape))), do_dummy_2d_data_aug=False
    )
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - what nnU-Net's transforms draw from
    start = time.process_time()
    for _ in range(rounds):
        transforms(image=torch.randn(labels.shape), segmentation=labels.clone())
    return 1000 * (time.process_time() - start) / rounds


def measure_times(rounds: int, seed: int) -> list[dict]:
    """Milliseconds a patch, for all levels of a network that halves it down to 4 voxels, on one thread."""
    rows = []
    for name, options in PATCHES.items():
        labels = patch_with_lesions(*options, seed)
        levels = int(np.log2(min(labels.shape[1:]))) - 1
        functions = calls(labels, scales_of(labels.ndim - 1, tuple(2**level for level in range(levels))))
        for function in functions.values():
            function()
        times = interleaved_medians(functions, rounds)
        rows.append(
            {"patch": name, "levels": levels, "times": times, "augmentation_ms": augmentation_ms(labels, rounds, seed)}
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", type=Path, default=RESULTS, help="results file")
    parser.add_argument("-positions", type=int, default=2000, help="random positions of a small lesion")
    parser.add_argument("-large_positions", type=int, default=10, help="random positions of a large structure")
    parser.add_argument("-rounds", type=int, default=15, help="calls that are timed")
    parser.add_argument("-seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = {
        "machine": machine_facts("cpu", ["nnunetv2", "batchgeneratorsv2", "torch", "numpy", "connected-components-3d"]),
        "settings": {name: value for name, value in vars(arguments).items() if name != "o"},
        "survival": [row for axes in (2, 3) for row in measure_survival(axes, arguments.positions, arguments.seed)],
        "large_structures": [
            row for axes in (2, 3) for row in measure_large_structures(axes, arguments.large_positions, arguments.seed)
        ],
        "times": measure_times(arguments.rounds, arguments.seed),
    }
    write_json(results, arguments.o)


if __name__ == "__main__":
    main()
