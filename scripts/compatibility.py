"""Runs the matrix of trainers and features and writes ``benchmarks/results/compatibility.json``.

Run: python scripts/compatibility.py [-n 2]; then python scripts/write_tables.py, which writes the tables of
``docs/compatibility.md``. The cells are those of ``tests/test_compatibility.py``, all of them; on two cores they take
about twenty minutes. Exit status 1 if a cell failed; the results say which.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.machine import machine_facts  # noqa: E402 - benchmarks is no installed package
from nnunetv2_smallseg import registry  # noqa: E402
from nnunetv2_smallseg.files import write_json  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "compatibility.json"
TESTS = ROOT / "tests" / "test_compatibility.py"


def outcome(case: ElementTree.Element, properties: dict[str, str]) -> str:
    """``passed``, ``failed``, or why the trainer refuses."""
    if case.find("failure") is not None or case.find("error") is not None:
        return "failed"
    return properties.get("not implemented", "passed")


def read_report(report: Path) -> dict:
    """What the cells and the chains of commands came to.

    Args:
        report: The XML file that pytest wrote.
    Returns:
        ``cells``: trainer -> configuration -> feature -> outcome; ``commands``: trainer -> outcome. Trainers and
        features in the order of the registry and of the tests, whichever process was first.
    """
    found: list[tuple[int, str, int, str, str]] = []
    commands: dict[str, str] = {}
    trainers = list(registry.trainers())
    for case in ElementTree.parse(report).iter("testcase"):
        properties = {entry.get("name"): entry.get("value") for entry in case.iter("property")}
        if "cell" in properties:
            name, configuration, column, feature = json.loads(properties["cell"])
            found.append((trainers.index(name), configuration, column, feature, outcome(case, properties)))
        elif "commands" in properties:
            name, folds = json.loads(properties["commands"])
            if folds == 5:
                commands[name] = outcome(case, properties)
    cells: dict[str, dict[str, dict[str, str]]] = {}
    for row, configuration, _, feature, result in sorted(found):
        cells.setdefault(trainers[row], {}).setdefault(configuration, {})[feature] = result
    return {"cells": cells, "commands": {name: commands[name] for name in trainers if name in commands}}


def main() -> int:
    """Runs, writes, and says how many cells failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument("-o", type=Path, default=RESULTS, help="JSON to write (default: %(default)s)")
    options = parser.parse_args()
    machine = machine_facts("cpu", ("torch", "nnunetv2"))
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", str(TESTS), "-m", "slow or not slow", f"--junitxml={report}", "-q"]
        subprocess.run([*command, "-n", str(options.n)], cwd=ROOT, check=False)
        results = read_report(report)
    write_json({"machine": machine, **results}, options.o)
    outcomes = [
        result for rows in results["cells"].values() for features in rows.values() for result in features.values()
    ] + list(results["commands"].values())
    failed = outcomes.count("failed")
    print(f"{len(outcomes)} cells, {failed} failed, {len(outcomes) - failed - outcomes.count('passed')} refused")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
