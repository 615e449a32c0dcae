"""Collects what trainings of ``smallseg demo`` printed into ``benchmarks/results/first_runs.json``.

Run: python scripts/collect_first_runs.py WORKSPACE [WORKSPACE ...]; then python scripts/write_tables.py.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.machine import machine_facts  # noqa: E402 - benchmarks is no installed package

RESULTS = ROOT / "benchmarks" / "results" / "first_runs.json"
EPOCH = re.compile(
    r"Epoch (?P<epoch>\d+)\s.*?train_loss (?P<train_loss>\S+).*?val_loss (?P<val_loss>\S+)"
    r".*?Pseudo dice \[(?P<pseudo_dice>[^\n]*)\].*?Epoch time: (?P<seconds>\S+) s",
    re.DOTALL,
)


def read_summary(file: Path) -> dict | None:
    """Number of cases and foreground Dice of nnU-Net's ``summary.json``; None if that step was not run."""
    if not file.is_file():
        return None
    summary = json.loads(file.read_text())
    return {"cases": len(summary["metric_per_case"]), "foreground_dice": summary["foreground_mean"]["Dice"]}


def collect(workspace: Path) -> dict:
    """Settings, epochs and Dice of one demo; its training must be finished."""
    state = json.loads((workspace / "demo_state.json").read_text())
    log = (workspace / "logs" / "train.log").read_text()
    epochs = [
        {
            "epoch": int(match["epoch"]),
            "train_loss": float(match["train_loss"]),
            "val_loss": float(match["val_loss"]),
            "pseudo_dice": [float(value) for value in re.findall(r"[\d.]+(?=\))", match["pseudo_dice"])],
            "seconds": float(match["seconds"]),
        }
        for match in EPOCH.finditer(log)
    ]
    options = state["options"]
    name = state["dataset"]["name"]
    model = f"{options['-tr']}__nnUNetSmallSegPlans__{options['-c']}"
    fold = workspace / "nnUNet_results" / name / model / f"fold_{options['-f']}"
    source = [] if state["dataset"]["source"] == "phantom" else ["-i", name]
    command = ["smallseg", "demo", *source]
    for option, value in options.items():
        command += [option, *value.split()]
    return {
        "command": shlex.join(command),
        "dataset": name,
        "options": options,
        "epochs": epochs,
        "validation": read_summary(fold / "validation" / "summary.json"),
        "prediction": read_summary(workspace / "predictions" / "summary.json"),
        "step_seconds": state["finished"],
    }


def main() -> None:
    """Writes the results file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workspaces", nargs="+", type=Path, help="folders of finished demos")
    runs = [collect(workspace) for workspace in parser.parse_args().workspaces]
    machine = machine_facts("cpu", ("torch", "nnunetv2", "numba"))
    RESULTS.write_text(json.dumps({"machine": machine, "runs": runs}, indent=2) + "\n")


if __name__ == "__main__":
    main()
