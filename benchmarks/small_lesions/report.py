"""What the results say: verdicts by a fixed rule, the tables of ``docs/results.md`` and its figure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from nnunetv2_smallseg.evaluation.size_groups import diameter_bins
from nnunetv2_smallseg.files import replacing

__all__ = [
    "HARMS",
    "HELPS",
    "MARGIN",
    "NAMES",
    "NO_HELP",
    "UNDECIDED",
    "data_tables",
    "draw",
    "overview",
    "read_results",
    "verdict",
]

RESULTS = Path(__file__).resolve().parents[1] / "results"
FIGURE = "small_lesion_study.png"
NAMES = ("phantom", "nuclei", "ms")
STOCK, ALL_SIZES = "stock", "all sizes"

HELPS, HARMS, NO_HELP, UNDECIDED = "helps", "harms", "does not help", "undecided"
# A gain in Dice below this is not worth a switch.
MARGIN = 0.02
MIN_SEEDS, MIN_CASES = 3, 5


def verdict(difference: Mapping | None) -> str:
    """What a difference in lesion Dice to stock says, by the rule of ``docs/results.md``.

    - ``helps``: the interval over cases lies above 0 and every seed gained;
    - ``harms``: the interval lies below 0 and every seed lost;
    - ``does not help``: the interval lies below a gain of ``MARGIN`` and no seed gained as much;
    - ``undecided``: anything else, or fewer than three seeds or five cases.

    Args:
        difference: ``low``, ``high``, ``per_seed`` and ``num_cases`` as ``collect.summarise`` writes them.
    """
    if difference is None or None in (difference["low"], difference["high"], *difference["per_seed"].values()):
        return UNDECIDED
    seeds = list(difference["per_seed"].values())
    if len(seeds) < MIN_SEEDS or difference["num_cases"] < MIN_CASES:
        return UNDECIDED
    if difference["low"] > 0 and min(seeds) > 0:
        return HELPS
    if difference["high"] < 0 and max(seeds) < 0:
        return HARMS
    if difference["high"] < MARGIN and max(seeds) < MARGIN:
        return NO_HELP
    return UNDECIDED


def read_results(folder: Path = RESULTS) -> dict[str, dict]:
    """Content of the results files that exist, by name: data set, with ``_full`` for trainings at full size."""
    names = [f"{name}{suffix}" for suffix in ("", "_full") for name in NAMES]
    files = {name: folder / f"small_lesions_{name}.json" for name in names}
    return {name: json.loads(file.read_text()) for name, file in files.items() if file.is_file()}


def find(results: Mapping, budget: str, arm: str, group: str, metric: str) -> dict | None:
    """A summary of the results; None if there is none."""
    return next(
        (
            row
            for row in results["summaries"]
            if (row["budget"], row["arm"], row["group"], row["metric"]) == (budget, arm, group, metric)
        ),
        None,
    )


def groups_of(results: Mapping) -> list[str]:
    """Size groups of a data set, smallest first."""
    return diameter_bins(results["data"]["limits_mm"])


def _strategies(results: Mapping) -> list[str]:
    return [name for name, arm in results["arms"].items() if arm["network"] is None and name != STOCK]


def _shown(group: str, results: Mapping) -> str:
    return group.replace("mm", results["data"]["unit"])


def is_stock(results: Mapping, arm: str) -> bool:
    """Whether an arm trained to the last bit as stock: then what it switches on has no effect, and nothing to judge."""
    losses = {
        (run["arm"], run["seed"]): run["last_loss"] for run in results["runs"] if run["counts_for"] == "iterations"
    }
    seeds = [seed for name, seed in losses if name == arm and (STOCK, seed) in losses]
    return bool(seeds) and all(losses[arm, seed] == losses[STOCK, seed] for seed in seeds)


def judge(results: Mapping, budget: str, arm: str) -> str:
    """Verdict on an arm by the smallest lesions; false positives are added where there are more."""
    row = find(results, budget, arm, groups_of(results)[0], "dice")
    if row is None:
        return "not run"
    if is_stock(results, arm):
        return "without effect"
    word = verdict(row.get("difference"))
    false_positives = find(results, budget, arm, ALL_SIZES, "false_positives_per_case").get("difference")
    more = false_positives is not None and false_positives["low"] is not None and false_positives["low"] > 0
    return f"{word}, with more false positives" if word == HELPS and more else word


def overview(results: Mapping[str, Mapping]) -> str:
    """Verdict on every strategy: a column a data set, at equal iterations / at equal time."""
    if not results:
        return "Not run yet: `python -m benchmarks.small_lesions run`."
    arms = {name: arm["title"] for part in results.values() for name, arm in part["arms"].items()}
    lines = [
        f"| strategy | {' | '.join(name.replace('_full', ', full size') for name in results)} |",
        "|" + "---|" * (1 + len(results)),
    ]
    for name in dict.fromkeys(arm for part in results.values() for arm in _strategies(part)):
        cells = []
        for part in results.values():
            words = [judge(part, budget, name) for budget in ("iterations", "time")]
            cells.append(words[0] if words[0] == words[1] else " / ".join(words))
        lines.append(f"| {arms[name]} (`{name}`) | {' | '.join(cells)} |")
    lines += [
        "",
        f"By the rule below, from the Dice of the smallest lesions. One word: the same at equal iterations and at "
        f"equal time; two: at equal iterations / at equal time. At least {MIN_SEEDS} seeds and {MIN_CASES} cases with "
        "such lesions are needed for more than *undecided*.",
        "",
        f"![Differences to stock in lesion Dice by size]({FIGURE})",
    ]
    return "\n".join(lines)


def data_tables(results: Mapping[str, Mapping], name: str) -> str:
    """All numbers of a data set, small and full trainings."""
    parts = [_one_table(results[key]) for key in (name, f"{name}_full") if key in results]
    return "\n\n".join(parts) if parts else f"Not run yet: `python -m benchmarks.small_lesions run -data {name}`."


def _one_table(results: Mapping) -> str:
    machine, settings, groups = results["machine"], results["settings"], groups_of(results)
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    patch, batch = settings["patch_size"], settings["batch_size"]
    device = machine["processor"] + ", one thread a training" if machine["device"] == "cpu" else machine["device"]
    lines = [
        f"{results['data']['title']}. {'Full-size' if settings['full'] else 'Small'} networks, "
        + (f"{batch} patches of {patch[0]} x {patch[1]}" if patch else "patches as planned")
        + f", {settings['num_iterations']} iterations of stock; {_counts(results)}. Run on {device}; "
        f"Python {machine['python']}, {versions}.",
        "",
    ]
    expected = [name for name, arm in results["arms"].items() if arm["network"] is None]
    seeds = {
        (budget, arm): len({run["seed"] for run in results["runs"] if (run["counts_for"], run["arm"]) == (budget, arm)})
        for budget in ("iterations", "time")
        for arm in expected
    }
    fewest, most = min(seeds.values()), max(seeds.values())
    if fewest < MIN_SEEDS:
        lines += [f"**Not all runs are finished**: strategies have {fewest} to {most} seeds.", ""]
    lines += [
        "| arm | equal | seeds | iterations | seconds | "
        + " | ".join(f"Dice (recall), {_shown(group, results)}" for group in groups)
        + f" | false positives per case | Dice minus stock, {_shown(groups[0], results)} | of each seed | verdict |",
        "|" + "---|" * (9 + len(groups)),
    ]
    for name, arm in results["arms"].items():
        for budget in ("iterations", "time"):
            runs = [run for run in results["runs"] if (run["counts_for"], run["arm"]) == (budget, name)]
            if runs:
                lines.append(_row(results, name, arm, budget, runs))
    lines.append("")
    for budget in ("iterations", "time"):
        tried = {entry["arm"] for entry in results["runs"] if entry["counts_for"] == budget}
        tried |= {failed["arm"] for failed in results["failures"] if failed["budget"] == budget}
        if waiting := [f"`{name}`" for name, arm in results["arms"].items() if arm["network"] and name not in tried]:
            lines.append(f"- Networks that have not run yet, equal {budget}: {', '.join(waiting)}")
    lines += [
        f"- Failed: `{failed['arm']}`, equal {failed['budget']}, seed {failed['seed']}: {failed['message']}"
        for failed in results["failures"]
    ]
    return "\n".join(lines).rstrip()


def _row(results: Mapping, name: str, arm: Mapping, budget: str, runs: list[Mapping]) -> str:
    """A line of the table of a data set."""
    groups = groups_of(results)
    cells = [f"`{name}`", budget, str(len(runs)), _range(run["iterations"] for run in runs)]
    cells.append(_range(round(run["training_seconds"]) for run in runs))
    for group in groups:
        dice, recall = (find(results, budget, name, group, metric) for metric in ("dice", "recall"))
        cells.append(f"{_plain(dice['value'])} ({_plain(recall['value'], 2)})")
    cells.append(_plain(find(results, budget, name, ALL_SIZES, "false_positives_per_case")["value"], 2))
    difference = find(results, budget, name, groups[0], "dice").get("difference")
    if difference is None:
        return "| " + " | ".join([*cells, "", "", ""]) + " |"
    each = ", ".join(_signed(value) for value in difference["per_seed"].values())
    cells += [f"{_signed(difference['value'])} ({_signed(difference['low'])} to {_signed(difference['high'])})", each]
    cells.append("too few seeds" if arm["network"] and len(runs) < MIN_SEEDS else judge(results, budget, name))
    return "| " + " | ".join(cells) + " |"


def _counts(results: Mapping) -> str:
    """Held-out cases of a seed."""
    numbers = sorted({run["cases"] for run in results["runs"]})
    shown = " to ".join(str(number) for number in dict.fromkeys((numbers[0], numbers[-1])))
    folds = results["settings"]["num_folds"]
    return f"{shown} held-out case{'s' * (shown != '1')} a seed" + (f", one of {folds} folds each" if folds > 1 else "")


def _range(numbers: Iterable[float]) -> str:
    numbers = sorted(numbers)
    return f"{numbers[0]}" if numbers[0] == numbers[-1] else f"{numbers[0]}-{numbers[-1]}"


def _plain(value: float | None, digits: int = 3) -> str:
    return "undefined" if value is None else f"{value:.{digits}f}"


def _signed(value: float | None) -> str:
    return "undefined" if value is None else f"{value:+.3f}"


def draw(results: Mapping[str, Mapping], file: Path) -> None:
    """Differences to stock in lesion Dice: a panel a data set and budget, a line an arm and size group."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    budgets = ("iterations", "time")
    arms = list(dict.fromkeys(arm for part in results.values() for arm in _strategies(part)))
    size = (1 + 4.2 * len(results), 1.6 + len(arms) * len(budgets))
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(budgets), len(results), squeeze=False, sharey=True)
    colours = ("#D55E00", "#0072B2", "#8A8A8A")
    for line, budget in enumerate(budgets):
        for place, (name, part) in enumerate(results.items()):
            axes, groups = panels[line][place], groups_of(part)
            axes.axvline(0, color="#4A4A4A", linewidth=1)
            axes.axvspan(0, MARGIN, color="#F0F0F0", zorder=0)
            for position, arm in enumerate(arms):
                for step, group in enumerate(groups):
                    row = find(part, budget, arm, group, "dice")
                    difference = row.get("difference") if row is not None else None
                    if difference is None or None in (difference["value"], difference["low"]):
                        continue
                    height = position + 0.22 * (step - 1)
                    colour = colours[step]
                    axes.hlines(height, difference["low"], difference["high"], color=colour, linewidth=2)
                    label = _shown(group, part) if position == 0 else None
                    axes.scatter([difference["value"]], [height], s=26, color=colour, label=label, zorder=3)
                    seeds = [value for value in difference["per_seed"].values() if value is not None]
                    axes.scatter(seeds, [height] * len(seeds), s=16, marker="|", color="black", linewidth=0.8, zorder=4)
            axes.set_title(f"{name.replace('_full', ', full size')}, equal {budget}", fontsize=10, loc="left")
            axes.set_yticks(range(len(arms)), arms)
            axes.tick_params(labelsize=9)
            axes.grid(axis="x", color="#E8E8E8", linewidth=0.8)
            axes.set_axisbelow(True)
            for side in ("top", "right"):
                axes.spines[side].set_visible(False)
            if line == len(budgets) - 1:
                axes.set_xlabel("lesion Dice minus stock")
            if axes.get_legend_handles_labels()[0]:
                axes.legend(frameon=False, fontsize=8, loc="best")
    panels[0][0].set_ylim(len(arms) - 0.4, -0.6)
    with replacing(file) as temporary:
        figure.savefig(temporary, format="png")
