"""Draws docs/targets.png: a slice with small lesions and its targets of deep supervision, nnU-Net's and ours.

Run: python scripts/target_pictures.py [DATASET] [-o FILE]. DATASET is a raw nnU-Net data set; without it, the MS
lesions of Lesjak et al. are looked for at ../shared/data.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import SimpleITK
import torch
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform

from nnunetv2_smallseg.evaluation.components import connected_components
from nnunetv2_smallseg.losses.deep_supervision_targets import downsample_labels

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_DATASET = ROOT.parent / "shared" / "data" / "Dataset803_MSLesion3D"
FACTORS = (1, 2, 4, 8, 16)
SIDE = 96
KEPT_COLOUR, LOST_COLOUR, TARGET_COLOUR = "#ffd23f", "#ff3b3b", (0.30, 0.79, 0.94, 0.55)


def read(file: Path) -> np.ndarray:
    """(Z, Y, X), turned so that the front of an axial slice is up."""
    return SimpleITK.GetArrayFromImage(SimpleITK.DICOMOrient(SimpleITK.ReadImage(str(file)), "LPS"))


def busiest_window(labels: np.ndarray) -> tuple[int, int, int, int]:
    """Number of lesions, slice, top and left of the window with most lesions, on a coarse raster."""
    best = (0, 0, 0, 0)
    for position, plane in enumerate(labels):
        for top in range(0, plane.shape[0] - SIDE + 1, 8):
            for left in range(0, plane.shape[1] - SIDE + 1, 8):
                window = plane[top : top + SIDE, left : left + SIDE]
                if window.any():
                    best = max(best, (connected_components(window).count, position, top, left))
    return best


def draw(axes: plt.Axes, image: np.ndarray, labels: np.ndarray, target: np.ndarray, factor: int) -> None:
    """One target over the image; lesions without a cell are outlined in red."""
    axes.imshow(image, cmap="gray", vmin=np.percentile(image, 1), vmax=np.percentile(image, 99.7))
    cells = np.kron(target > 0, np.ones((factor, factor), dtype=bool))
    overlay = np.zeros((*cells.shape, 4))
    overlay[cells] = TARGET_COLOUR
    axes.imshow(overlay, interpolation="nearest")
    components = connected_components(labels)
    lost = [number for number in components.numbers if not cells[components.labels == number].any()]
    for number in components.numbers:
        colour = LOST_COLOUR if number in lost else KEPT_COLOUR
        axes.contour(components.labels == number, levels=[0.5], colors=colour, linewidths=0.9)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(f"1/{factor}: {len(lost)} of {components.count} lost", color="white", fontsize=10)


def main() -> None:
    """Draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", nargs="?", type=Path, default=DEFAULT_DATASET, help="raw nnU-Net data set")
    parser.add_argument("-o", type=Path, default=ROOT / "docs" / "targets.png", help="picture to write")
    arguments = parser.parse_args()
    if not (arguments.dataset / "dataset.json").is_file():
        parser.error(f"{arguments.dataset} is no raw nnU-Net data set: it has no dataset.json")
    ending = json.loads((arguments.dataset / "dataset.json").read_text())["file_ending"]
    files = sorted((arguments.dataset / "labelsTr").glob(f"*{ending}"))
    volumes = {file.name.removesuffix(ending): read(file) > 0 for file in files}
    windows = {case: busiest_window(volume) for case, volume in volumes.items()}
    case = max(windows, key=windows.get)
    volume = volumes[case]
    _, position, top, left = windows[case]
    window = (position, slice(top, top + SIDE), slice(left, left + SIDE))
    labels = volume[window]
    image = read(arguments.dataset / "imagesTr" / f"{case}_0000{ending}")[window].astype(np.float32)

    scales = [[1 / factor] * 2 for factor in FACTORS]
    patch = torch.from_numpy(labels[None].astype(np.int16))
    rows = {
        "nnU-Net's targets": DownsampleSegForDSTransform(scales)(segmentation=patch)["segmentation"],
        "deep_supervision_targets\n= lesion": downsample_labels(patch, scales),
    }
    plt.rcParams["font.family"] = "DejaVu Sans"
    figure, grid = plt.subplots(
        len(rows),
        len(FACTORS),
        figsize=(2.4 * len(FACTORS) + 0.4, 2.65 * len(rows) + 0.3),
        layout="constrained",
        facecolor="#16181d",
    )
    for row, (name, targets) in zip(grid, rows.items(), strict=True):
        for axes, target, factor in zip(row, targets, FACTORS, strict=True):
            draw(axes, image, labels, target[0].numpy(), factor)
        row[0].set_ylabel(name, color="white", fontsize=10)
    figure.savefig(arguments.o, dpi=100, facecolor=figure.get_facecolor())


if __name__ == "__main__":
    main()
