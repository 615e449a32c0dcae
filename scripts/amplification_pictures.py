"""Draws docs/amplification.png: the six copies of slices with small lesions, one row for each case.

Run: python scripts/amplification_pictures.py [DATASET] [-o FILE]. DATASET is a raw nnU-Net data set; without it, the MS
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
from matplotlib.patches import Rectangle

from nnunetv2_smallseg.augmentation.amplification import (
    COPY_NAMES,
    View,
    Window,
    amplification_thresholds,
    draw_view,
    take_view,
)

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_DATASET = ROOT.parent / "shared" / "data" / "Dataset803_MSLesion3D"

LESION_COLOUR = "#ffd23f"
# Crops have the same colour as a window in the slice and as the frame of the copy.
CROP_COLOURS = {3: "#4cc9f0", 4: "#f72585", 5: "#80ed99"}
MAX_CASES = 3


def read(file: Path) -> np.ndarray:
    """(Z, Y, X), or (1, Y, X) of a 2D image; turned so that the front of an axial slice is up."""
    image = SimpleITK.ReadImage(str(file))
    if image.GetDimension() == 3:
        image = SimpleITK.DICOMOrient(image, "LPS")
    array = SimpleITK.GetArrayFromImage(image)
    return array if array.ndim == 3 else array[None]


def outline(axes: plt.Axes, labels: np.ndarray) -> None:
    """Draws the border of the lesions."""
    if labels.any():
        axes.contour(labels, levels=[0.5], colors=LESION_COLOUR, linewidths=1.0)


def draw_row(row: np.ndarray, case: str, image: np.ndarray, labels: np.ndarray, position: int, seed: list[int]) -> None:
    """The six copies of one slice, in six axes."""
    generator = np.random.default_rng(seed)
    height, width = labels.shape[1:]
    side = max(height, width)
    middle = View(Window(((height - side) // 2, (width - side) // 2), (side, side)))
    lowest, highest = np.percentile(image[position][image[position] > 0], [1, 99.7])
    for number, axes in enumerate(row):
        view = middle if number == 0 else draw_view(number, labels[position], (side, side), generator)
        options = {"slices": (position, position + 1), "view": view, "size": (side, side)}
        picture = take_view(image[None].astype(np.float32), **options, labels=False)[0, 0].numpy()
        lesion = take_view(labels[None].astype(np.int8), **options, labels=True)[0, 0].numpy() > 0
        axes.imshow(picture, cmap="gray", vmin=lowest, vmax=highest, interpolation="bilinear")
        outline(axes, lesion)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_xlim(-0.5, side - 0.5)
        axes.set_ylim(side - 0.5, -0.5)
        for spine in axes.spines.values():
            spine.set_color(CROP_COLOURS.get(number, "#444444"))
            spine.set_linewidth(2.5 if number in CROP_COLOURS else 0.8)
        if number in CROP_COLOURS:
            top, left = (start - origin for start, origin in zip(view.window.start, middle.window.start, strict=True))
            frame = Rectangle((left - 0.5, top - 0.5), view.window.size[1], view.window.size[0], fill=False)
            frame.set(edgecolor=CROP_COLOURS[number], linewidth=1.2, linestyle=(0, (4, 2)))
            row[0].add_patch(frame)
    row[0].set_ylabel(f"{case}\n{np.count_nonzero(labels[position])} lesion pixels", color="white", fontsize=9)


def main() -> None:
    """Draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", nargs="?", type=Path, default=DEFAULT_DATASET, help="raw nnU-Net data set")
    parser.add_argument("-o", type=Path, default=ROOT / "docs" / "amplification.png", help="picture to write")
    parser.add_argument("-seed", type=int, default=3)
    arguments = parser.parse_args()
    if not (arguments.dataset / "dataset.json").is_file():
        parser.error(f"{arguments.dataset} is no raw nnU-Net data set: it has no dataset.json")
    ending = json.loads((arguments.dataset / "dataset.json").read_text())["file_ending"]
    files = sorted((arguments.dataset / "labelsTr").glob(f"*{ending}"))
    labels = {file.name.removesuffix(ending): read(file) > 0 for file in files}
    areas = {case: label.sum(axis=(1, 2)) for case, label in labels.items()}
    first, second = amplification_thresholds(np.concatenate(list(areas.values())))
    # The amplified slice of each case with most lesion pixels: lesions that can be seen in a small picture.
    chosen = {case: int(np.argmax(np.where(area < second, area, 0))) for case, area in areas.items()}
    cases = [case for case, position in chosen.items() if 0 < areas[case][position] < second][:MAX_CASES]

    plt.rcParams["font.family"] = "DejaVu Sans"
    figure, grid = plt.subplots(
        len(cases),
        len(COPY_NAMES),
        figsize=(2 * len(COPY_NAMES) + 0.5, 2.05 * len(cases) + 0.7),
        squeeze=False,
        layout="constrained",
        facecolor="#16181d",
    )
    figure.get_layout_engine().set(w_pad=0.05, h_pad=0.05)
    for number, (row, case) in enumerate(zip(grid, cases, strict=True)):
        image = read(arguments.dataset / "imagesTr" / f"{case}_0000{ending}")
        draw_row(row, case, image, labels[case], chosen[case], [arguments.seed, number])
    for number, (axes, name) in enumerate(zip(grid[0], COPY_NAMES, strict=True)):
        axes.set_title(f"{number}  {name}", color="white", fontsize=10)
    figure.suptitle(
        f"N1 = {first}, N2 = {second}: slices with fewer than {second} lesion pixels are amplified",
        color="white",
        fontsize=11,
    )
    figure.savefig(arguments.o, dpi=100, facecolor=figure.get_facecolor())


if __name__ == "__main__":
    main()
