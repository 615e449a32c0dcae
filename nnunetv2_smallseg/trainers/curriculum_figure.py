"""The picture of a curriculum: mean weight of small, medium and large lesions over the epochs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nnunetv2_smallseg.data.curriculum import EASY_UNTIL, HARD_FROM
from nnunetv2_smallseg.files import replacing

__all__ = ["GROUP_COLOURS", "draw_mean_weights"]

# Told apart with every kind of colour vision (Okabe and Ito); grey for what is no lesion.
GROUP_COLOURS = {"small": "#D55E00", "medium": "#009E73", "large": "#0072B2", "no lesion": "#8A8A8A"}
QUIET = "#6B6B6B"
# With many cases no weight exceeds 1 / 0.52, and a fixed scale lets pictures be compared.
HIGHEST_SHOWN = 2.0


def draw_mean_weights(file: Path, history: Mapping[str, Sequence[float]], num_epochs: int) -> None:
    """Draws the mean weight of each size group, and where the preference turns.

    Args:
        file: PNG to write, whole or not at all.
        history: Size group -> mean weight of each epoch so far; NaN leaves a gap.
        num_epochs: Epochs of the whole training.
    """
    # nnU-Net changes matplotlib's settings for its own picture.
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        last = max(num_epochs - 1, 1)
        turns = (0, EASY_UNTIL, HARD_FROM, 1)
        for start, end, name in zip(turns[:-1], turns[1:], ("easy first", "turning", "hard first"), strict=True):
            left, right = min(start * num_epochs, last), min(end * num_epochs, last)
            axes.axvspan(left, right, color="#F2F2F2" if name == "turning" else "white", zorder=0, linewidth=0)
            axes.text(
                (left + right) / 2, 1.02, name, transform=axes.get_xaxis_transform(), ha="center", va="bottom",
                fontsize=9, color=QUIET,
            )  # fmt: skip
        axes.axhline(1, color=QUIET, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
        for group, weights in history.items():
            epochs = range(len(weights))
            marker = "o" if len(weights) <= 30 else None
            axes.plot(
                epochs, weights, color=GROUP_COLOURS[group], linewidth=2, marker=marker, markersize=3.5, label=group,
                zorder=3, clip_on=False,
            )  # fmt: skip
        axes.set_xlim(0, last)
        axes.set_ylim(0, HIGHEST_SHOWN)
        axes.set_xlabel("epoch")
        axes.set_ylabel("mean weight in the loss")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(axis="y", color="#E4E4E4", linewidth=0.8, zorder=0)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        axes.legend(title="lesions", frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
        with replacing(file) as temporary:
            figure.savefig(temporary, format="png")
