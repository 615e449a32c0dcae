"""Draws docs/sampling.png from benchmarks/results/loader.json: how often a lesion is drawn, by diameter.

Run: python scripts/sampling_picture.py [-o FILE].
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "loader.json"
# Name in the results -> label, colour and marker.
LINES = {
    "voxel": ("voxel (nnU-Net)", "#d1495b", "o"),
    "lesion": ("lesion", "#2e86ab", "s"),
    "size_bin": ("size_bin", "#3b8b5a", "^"),
}


def draw(frequencies: dict, file: Path) -> None:
    """Draws of one lesion in 1,000 oversampled patches over its diameter, both axes logarithmic."""
    figure = Figure(figsize=(6.4, 3.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    diameters = frequencies["diameters_mm"]
    for sampling, (label, colour, marker) in LINES.items():
        drawn = zip(frequencies["drawn"][sampling], frequencies["lesions"], strict=True)
        rates = [1000 * number / frequencies["draws"] / lesions for number, lesions in drawn]
        axes.plot(diameters, rates, color=colour, marker=marker, label=label, linewidth=2)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(diameters, [f"{diameter}" for diameter in diameters])
    axes.minorticks_off()
    axes.set_xlabel("diameter of the lesion in mm")
    axes.set_ylabel("times drawn in 1,000 patches")
    axes.set_title("How often one lesion is drawn, by lesion_sampling", fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(file)


def main() -> None:
    """Reads the results and writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", type=Path, default=ROOT / "docs" / "sampling.png", help="PNG file to write")
    draw(json.loads(RESULTS.read_text())["frequencies"], parser.parse_args().o)


if __name__ == "__main__":
    main()
