"""Writes the generated tables of README and docs from the registry and the results files.

Run: python scripts/write_tables.py [--check]. With --check nothing is written; exit status 1 if a table is out of date.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.small_lesions import report as study  # noqa: E402 - benchmarks is no installed package
from nnunetv2_smallseg import registry  # noqa: E402
from nnunetv2_smallseg.datasets import registry as converters  # noqa: E402
from nnunetv2_smallseg.plans.switches import SETTINGS  # noqa: E402


def measured_sizes() -> dict:
    """Parameters and multiply-adds of every network, by name."""
    return json.loads((ROOT / "benchmarks" / "results" / "network_size.json").read_text())["networks"]


def trainers_table() -> str:
    """All trainers with network, parameters, weights and paper."""
    sizes = measured_sizes()
    lines = ["| trainer | network | parameters | weights | what is special | paper |", "|---|---|---|---|---|---|"]
    for system in registry.SYSTEMS:
        paper = f"[{system.name}, {system.paper.venue}]({system.paper.url})"
        for trainer in system.trainers:
            weights = f"`{trainer.weights}`" if trainer.weights else "none"
            network = f"`{trainer.network}`" if trainer.network else "nnU-Net's own"
            parameters = f"{sizes[trainer.network]['parameters'] / 1e6:.1f} M" if trainer.network else "by plan"
            lines.append(
                f"| `{trainer.name}` | {network} | {parameters} | {weights} | {trainer.description} | {paper} |"
            )
    return "\n".join(lines)


def networks_table() -> str:
    """All networks with measured size and trainers."""
    sizes = measured_sizes()
    lines = [
        "| network | what | parameters | multiply-adds | stride | outputs at strides | trainers |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, network in registry.networks().items():
        strides = ", ".join(str(stride) for stride in network.deep_supervision_strides)
        trainers = ", ".join(f"`{trainer.name}`" for trainer in registry.trainers().values() if trainer.network == name)
        lines.append(
            f"| `{name}` | {network.description} | {sizes[name]['parameters']:,} | "
            f"{sizes[name]['multiply_adds'] / 1e9:.1f} G | {network.stride} | {strides} | {trainers} |"
        )
    return "\n".join(lines)


def published_sizes_table() -> str:
    """The parameter counts that tests compare with the papers or specifications."""
    lines = ["| network | input channels | classes | parameters |", "|---|---|---|---|"]
    for name, network in registry.networks().items():
        for (channels, classes), count in network.parameters.items():
            lines.append(f"| `{name}` | {channels} | {classes} | {count:,} |")
    return "\n".join(lines)


def dice_with_cases(result: dict | None) -> str:
    """Foreground Dice and the number of cases it is a mean of."""
    if result is None:
        return "not run"
    number = result["cases"]
    return f"{result['foreground_dice']:.3f} ({number} case{'s' * (number != 1)})"


def first_runs_tables() -> str:
    """Command, result and epochs of each short training."""
    results = json.loads((ROOT / "benchmarks" / "results" / "first_runs.json").read_text())
    machine = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [
        f"Run on {machine['processor']}, {machine['cores']} cores, no GPU; Python {machine['python']}, {versions}.",
        "",
        "| data set | configuration | trainer | iterations | validation Dice | prediction Dice | all steps, minutes |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in results["runs"]:
        options = run["options"]
        iterations = int(options["-num_epochs"]) * int(options["-num_iterations"])
        steps = run["step_seconds"]
        minutes = f"{sum(steps.values()) / 60:.1f}" if "train" in steps else "stopped after training"
        lines.append(
            f"| {run['dataset']} | {options['-c']} | `{options['-tr']}` | {iterations} | "
            f"{dice_with_cases(run['validation'])} | {dice_with_cases(run['prediction'])} | {minutes} |"
        )
    for run in results["runs"]:
        lines += ["", f"## {run['dataset']}, {run['options']['-c']}", "", "```text", run["command"], "```", ""]
        lines += ["| epoch | train loss | validation loss | pseudo Dice | seconds |", "|---|---|---|---|---|"]
        lines += [
            f"| {epoch['epoch']} | {epoch['train_loss']:.4f} | {epoch['val_loss']:.4f} | "
            f"{', '.join(f'{dice:.4f}' for dice in epoch['pseudo_dice'])} | {epoch['seconds']:.1f} |"
            for epoch in run["epochs"]
        ]
    return "\n".join(lines) + "\n"


def curriculum_table() -> str:
    """Dice by lesion size with and without the curriculum, for each seed."""
    file = ROOT / "benchmarks" / "results" / "curriculum.json"
    if not file.is_file():
        return "Not run yet: `python scripts/curriculum_study.py`."
    results = json.loads(file.read_text())
    machine, settings, runs = results["machine"], results["settings"], results["runs"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    groups = list(runs[0]["dice"])
    counts = ", ".join(f"{runs[0]['lesions'][group]} {group}" for group in groups)
    lines = [
        f"{settings['num_training']} training cases (the last sixth validates), {settings['num_held_back']} held back "
        f"with {counts} lesions; {settings['num_epochs']} epochs of {settings['num_iterations']} iterations, "
        f"{settings['batch_size']} patches of {settings['patch_size']} x {settings['patch_size']}. Run on "
        f"{machine['processor']}, {settings['num_threads']} threads, no GPU; Python {machine['python']}, {versions}.",
        "",
        f"| seed | curriculum | {' | '.join(f'Dice, {group}' for group in groups)} | "
        f"{' | '.join(f'found, {group}' for group in groups)} | false positives per case |",
        "|" + "---|" * (3 + 2 * len(groups)),
    ]
    for run in runs:
        dice = " | ".join(f"{run['dice'][group]:.3f}" for group in groups)
        found = " | ".join(f"{run['detected'][group]} of {run['lesions'][group]}" for group in groups)
        lines.append(f"| {run['seed']} | {run['arm']} | {dice} | {found} | {run['false_positives_per_case']:.2f} |")
    differences = []
    for group in groups:
        dice = {arm: [run["dice"][group] for run in runs if run["arm"] == arm] for arm in ("with", "without")}
        pairs = [ours - others for ours, others in zip(dice["with"], dice["without"], strict=True)]
        mean = sum(pairs) / len(pairs)
        differences.append(f"{group} {mean:+.3f} ({min(pairs):+.3f} to {max(pairs):+.3f})")
    number = len(settings["seeds"])
    lines += [
        "",
        f"With minus without, mean over {number} seed{'s' * (number != 1)} (lowest to highest): "
        f"{', '.join(differences)}.",
        "",
        "![Dice by lesion size with and without the curriculum](curriculum_study.png)",
        "",
        f"The weights of the training with seed {settings['seeds'][0]}, as its `curriculum.png` shows them:",
        "",
        "![Mean weight of small, medium and large lesions over the epochs](curriculum_weights.png)",
    ]
    return "\n".join(lines)


def converters_table() -> str:
    """All data sets that can be converted."""
    lines = ["| data set | command | holds | licence | options |", "|---|---|---|---|---|"]
    for entry in converters.CONVERTERS:
        title = f"[{entry.title}]({entry.source})" if entry.source.startswith("http") else entry.title
        options = ", ".join(f"`{flag}`" for flag in entry.options)
        lines.append(f"| {title} | `{entry.name}` | {entry.contents} | {entry.licence} | {options} |")
    return "\n".join(lines)


def conversion_speed_table() -> str:
    """Cases per second and memory of the conversion engine."""
    results = json.loads((ROOT / "benchmarks" / "results" / "convert.json").read_text())
    lines = [
        "| processes | cases a second | main process after 10 % and 90 % of the cases | largest worker after 90 % |",
        "|---|---|---|---|",
    ]
    for run in results["runs"]:
        first, last = run["memory"][0], run["memory"][-2]
        worker = f"{last['largest_worker_mib']:.1f} MiB" if run["processes"] > 1 else "none"
        lines.append(
            f"| {run['processes']} | {run['cases_per_second']:.0f} | {first['main_mib']:.1f} and "
            f"{last['main_mib']:.1f} MiB | {worker} |"
        )
    machine = results["machine"]
    lines += ["", f"Run on {machine['processor']}, {machine['cores']} cores that also did other work."]
    return "\n".join(lines)


def study_overview() -> str:
    """What each strategy does for the smallest lesions."""
    return study.overview(study.read_results())


def study_table(name: str) -> str:
    """All numbers of the study on a data set."""
    return study.data_tables(study.read_results(), name)


def switches_table() -> str:
    """What the plans may say about the training."""
    lines = ["| option of `smallseg plan` | in the plans | values | meaning |", "|---|---|---|---|"]
    for name, setting in SETTINGS.items():
        allowed = re.sub(r"'(\w+)'", r"`\1`", setting.allowed)
        lines.append(f"| `{setting.option}` | `{name}` | {allowed} | {setting.description} |")
    return "\n".join(lines)


TARGETS = {"nearest": "nnU-Net", "lesion": "`lesion`", "foreground": "`foreground`"}


def measured_targets() -> dict:
    """What deep-supervision targets keep, and what they cost."""
    return json.loads((ROOT / "benchmarks" / "results" / "deep_supervision_targets.json").read_text())


def lost_lesions_table() -> str:
    """Share of small balls lost at each level, by diameter."""
    results = measured_targets()
    rows = {(row["axes"], row["diameter"], row["targets"], row["factor"]): row["lost"] for row in results["survival"]}
    factors = sorted({row["factor"] for row in results["survival"]})
    heads = [f"{title}, 1/{factor}" for title in TARGETS.values() for factor in factors]
    lines = [f"| axes | diameter, voxels | {' | '.join(heads)} |", "|" + "---|" * (2 + len(heads))]
    for axes, diameter in dict.fromkeys((row["axes"], row["diameter"]) for row in results["survival"]):
        shares = [rows[axes, diameter, name, factor] for name in TARGETS for factor in factors]
        lines.append(f"| {axes} | {diameter} | {' | '.join(f'{100 * share:.1f} %' for share in shares)} |")
    settings = results["settings"]
    lines += ["", f"{settings['positions']} random positions for each diameter, seed {settings['seed']}."]
    return "\n".join(lines)


def large_structures_table() -> str:
    """Dice of the targets of large balls with exact area averages."""
    results = measured_targets()
    entries = results["large_structures"]
    rows = {(row["axes"], row["diameter"], row["factor"], row["targets"]): row for row in entries}
    heads = [f"{kind}, {title}" for kind in ("Dice", "soft Dice") for title in TARGETS.values()]
    lines = [f"| axes | diameter, voxels | level | {' | '.join(heads)} |", "|" + "---|" * (3 + len(heads))]
    for key in dict.fromkeys((row["axes"], row["diameter"], row["factor"]) for row in entries):
        values = [rows[(*key, name)][kind] for kind in ("dice", "soft_dice") for name in TARGETS]
        lines.append(f"| {key[0]} | {key[1]} | 1/{key[2]} | {' | '.join(f'{value:.3f}' for value in values)} |")
    settings = results["settings"]
    lines += ["", f"Means of {settings['large_positions']} random positions, seed {settings['seed']}."]
    return "\n".join(lines)


def target_times_table() -> str:
    """Processor time of making all targets of a patch."""
    results = measured_targets()
    lines = [
        f"| patch | levels | {' | '.join(TARGETS.values())} | nnU-Net's other augmentation |",
        "|" + "---|" * (3 + len(TARGETS)),
    ]
    for row in results["times"]:
        times = " | ".join(f"{row['times'][name]['median_cpu_ms']:.1f} ms" for name in TARGETS)
        lines.append(f"| {row['patch']} | {row['levels']} | {times} | {row['augmentation_ms']:.0f} ms |")
    machine = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines += ["", f"Processor time on one thread of {machine['processor']}, which also did other work; {versions}."]
    return "\n".join(lines)


CONFIGURATIONS = ("2d", "2.5d")


def compatibility_results() -> dict | None:
    """What the last whole run of the matrix found; None before the first."""
    file = ROOT / "benchmarks" / "results" / "compatibility.json"
    return json.loads(file.read_text()) if file.is_file() else None


def compatibility_table() -> str:
    """Trainers by features: passed, failed, or a number that stands for why a trainer refuses."""
    results = compatibility_results()
    if results is None:
        return "Not run yet: `python scripts/compatibility.py`."
    features = list(next(iter(next(iter(results["cells"].values())).values())))
    reasons: list[str] = []

    def sign(outcome: str) -> str:
        if outcome in ("passed", "failed"):
            return {"passed": "✓", "failed": "failed"}[outcome]
        if outcome not in reasons:
            reasons.append(outcome)
        return f"[{reasons.index(outcome) + 1}]"

    lines = [f"| trainer | {' | '.join(features)} | commands |", "|---" * (len(features) + 2) + "|"]
    for name, rows in results["cells"].items():
        cells = []
        for feature in features:
            signs = [sign(rows[configuration][feature]) for configuration in CONFIGURATIONS]
            cells.append(signs[0] if len(set(signs)) == 1 else ", ".join(
                f"{configuration} {one}" for configuration, one in zip(CONFIGURATIONS, signs, strict=True)
            ))  # fmt: skip
        lines.append(f"| `{name}` | {' | '.join(cells)} | {sign(results['commands'][name])} |")
    lines += [""] + [f"[{number}] {reason}" for number, reason in enumerate(reasons, 1)] + [""] * bool(reasons)
    outcomes = [one for rows in results["cells"].values() for cells in rows.values() for one in cells.values()]
    outcomes += results["commands"].values()
    versions = ", ".join(f"{name} {version}" for name, version in results["machine"]["versions"].items())
    lines.append(
        f"{len(outcomes)} cells, {outcomes.count('passed')} passed, {outcomes.count('failed')} failed, "
        f"{len(outcomes) - outcomes.count('passed') - outcomes.count('failed')} refused. Run on the CPU; "
        f"Python {results['machine']['python']}, {versions}."
    )
    return "\n".join(lines)


NOT_COUNTED = "not counted"


def versions_table() -> str:
    """The versions of Python, nnU-Net and torch that the tests were run with, and what came of it."""
    runs = json.loads((ROOT / "nnunetv2_smallseg" / "tested_versions.json").read_text())
    lines = ["| versions | Python | nnunetv2 | torch | passed | at the second try | failed | skipped |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for name, run in runs.items():
        second = run["repeated"] - run["failed"] if "repeated" in run else NOT_COUNTED
        counts = (
            run.get("passed", NOT_COUNTED),
            second,
            run.get("failed", NOT_COUNTED),
            run.get("skipped", NOT_COUNTED),
        )
        cells = (name, run["python"], run["nnunetv2"], run["torch"], *counts)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def loader_results() -> dict:
    """What ``benchmarks/loader.py`` measured."""
    return json.loads((ROOT / "benchmarks" / "results" / "loader.json").read_text())


def sampling_frequencies_table() -> str:
    """How often one lesion of each diameter is drawn, and the share of all draws of that diameter."""
    results = loader_results()["frequencies"]
    names = {"voxel": "`voxel` (nnU-Net)", "lesion": "`lesion`", "size_bin": "`size_bin`"}
    lines = [
        f"{results['cases']} cases with the same spherical lesions, {results['draws']:,} drawn patches of each kind.",
        "",
        f"| diameter | lesions | {' | '.join(f'{name}: one lesion, in 1,000 patches' for name in names.values())} | "
        f"{' | '.join(f'{name}: share of the patches' for name in names.values())} |",
        "|" + "---|" * (2 + 2 * len(names)),
    ]
    for row, (diameter, number) in enumerate(zip(results["diameters_mm"], results["lesions"], strict=True)):
        shares = [results["drawn"][name][row] / results["draws"] for name in names]
        lines.append(
            f"| {diameter} mm | {number} | {' | '.join(f'{1000 * share / number:.2f}' for share in shares)} | "
            f"{' | '.join(f'{100 * share:.1f} %' for share in shares)} |"
        )
    return "\n".join(lines)


def sampling_jitter_table() -> str:
    """Shares of patches in which the drawn lesion is seen, and as a whole, after augmentation."""
    runs = loader_results()["jitter"]
    jitters = sorted({run["jitter"] for run in runs})
    lines = [
        f"{runs[0]['patches']} oversampled patches each after nnU-Net's augmentation; lesions of 6 mm, voxels of 1 mm.",
        "",
        f"| patch | the drawn lesion is | {' | '.join(f'`lesion_jitter` {jitter:g}' for jitter in jitters)} |",
        "|" + "---|" * (2 + len(jitters)),
    ]
    for configuration in dict.fromkeys(run["configuration"] for run in runs):
        mine = {run["jitter"]: run for run in runs if run["configuration"] == configuration}
        size = " x ".join(map(str, mine[jitters[0]]["patch_size"]))
        for key, words in (("seen", "in the patch"), ("whole", "not cut by its edge")):
            shares = " | ".join(f"{100 * mine[jitter][key]:.1f} %" for jitter in jitters)
            lines.append(f"| {configuration}, {size} | {words} | {shares} |")
    return "\n".join(lines)


def sampling_throughput_table() -> str:
    """Time of a batch of nnU-Net's loader, and the throughput of ours."""
    results = loader_results()
    lines = [
        "| patches | transforms | nnU-Net, ms a batch | `lesion`, batches a second | `size_bin`, batches a second |",
        "|---|---|---|---|---|",
    ]
    for run in results["throughput"]:
        size = " x ".join(map(str, run["patch_size"]))
        shares = " | ".join(f"{100 * share:.1f} % of nnU-Net's" for share in run["throughput_of_nnunets"].values())
        lines.append(
            f"| {run['batch_size']} of {size} | {'nnU-Net' if run['transforms'] else 'none'} | "
            f"{run['median_cpu_ms']['voxel']:.1f} | {shares} |"
        )
    machine = results["machine"]
    batches = " to ".join(str(number) for number in sorted({run["batches"] for run in results["throughput"]}))
    lines += [
        "",
        "Medians of processor time, and of the ratio of batches with the same augmentation, over "
        f"{batches} batches, on one core of {machine['processor']}, which also did other work.",
    ]
    return "\n".join(lines)


def lesion_table_table() -> str:
    """Size and reading time of the file of a large data set."""
    table = loader_results()["table"]
    return (
        f"For {table['cases']:,} cases with {table['lesions'] // table['cases']} lesions each the file has "
        f"{table['file_mb']:.0f} MB and is read in {table['read_s']:.2f} s (from the system's cache); a process holds "
        f"{table['held_mb']:.0f} MB of it, and {table['mapped_mb']:.0f} MB of voxels are mapped and shared."
    )


def memory_table() -> str:
    """Predicted and measured memory of a training step of each trainer."""
    results = json.loads((ROOT / "benchmarks" / "results" / "memory_cpu.json").read_text())
    lines = [
        "| trainer | patch | batch size | predicted | measured | error | prediction takes |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in results["runs"]:
        patch = " x ".join(map(str, run["patch_size"]))
        lines.append(
            f"| `{run['trainer']}` | {patch} | {run['batch_size']} | {run['predicted_bytes'] / 2**20:.0f} MiB | "
            f"{run['measured_bytes'] / 2**20:.0f} MiB | {100 * run['error']:+.1f} % | "
            f"{run['prediction_cpu_seconds']:.1f} s |"
        )
    versions = ", ".join(f"{name} {version}" for name, version in results["machine"]["versions"].items())
    lines += ["", f"Tensors alive at the peak of a step at full size, on the CPU; {versions}."]
    return "\n".join(lines)


TABLES = (
    ("docs/planning.md", "memory", memory_table),
    ("README.md", "trainers", trainers_table),
    ("docs/networks.md", "networks", networks_table),
    ("docs/networks.md", "published sizes", published_sizes_table),
    ("docs/curriculum.md", "curriculum study", curriculum_table),
    ("docs/results.md", "what helps", study_overview),
    *(("docs/results.md", f"study, {name}", partial(study_table, name)) for name in study.NAMES),
    ("docs/first_runs.md", "first runs", first_runs_tables),
    ("docs/planning.md", "switches", switches_table),
    ("docs/targets.md", "lost lesions", lost_lesions_table),
    ("docs/targets.md", "large structures", large_structures_table),
    ("docs/targets.md", "times of targets", target_times_table),
    ("docs/datasets.md", "converters", converters_table),
    ("docs/datasets.md", "conversion speed", conversion_speed_table),
    ("docs/compatibility.md", "compatibility", compatibility_table),
    ("docs/compatibility.md", "versions", versions_table),
    ("docs/sampling.md", "sampling frequencies", sampling_frequencies_table),
    ("docs/sampling.md", "sampling jitter", sampling_jitter_table),
    ("docs/sampling.md", "sampling throughput", sampling_throughput_table),
    ("docs/sampling.md", "lesion table", lesion_table_table),
)


def main() -> int:
    """Writes or checks all tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a table is out of date")
    check = parser.parse_args().check
    outdated = []
    for file, name, table in TABLES:
        path = ROOT / file
        text = path.read_text()
        pattern = re.compile(rf"(<!-- table: {name} [^\n]*-->\n).*?(<!-- end of table -->)", re.DOTALL)
        updated = pattern.sub(lambda match, table=table: match[1] + table() + "\n" + match[2], text)
        if updated != text:
            outdated.append(f"{file}, table {name}")
            if not check:
                path.write_text(updated)
    for entry in outdated:
        print(f"{entry}: {'out of date; run python scripts/write_tables.py' if check else 'written'}")
    return 1 if check and outdated else 0


if __name__ == "__main__":
    sys.exit(main())
