"""Conversion of many tiny cases: cases per second and memory; writes ``benchmarks/results/convert.json``.

The cases are tiny so that what is measured is the engine: starting workers, files, journal, report. Reading and writing
real volumes adds its own time to each case and its own, constant, memory to each process.

Seconds include the start of Python and of the workers. Memory is read from /proc, so it needs Linux.

Run: python -m benchmarks.convert [-n 2000]
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nibabel
import numpy as np

from benchmarks.machine import machine_facts

RESULTS = Path(__file__).parent / "results" / "convert.json"
SHAPE = (16, 16, 8)
PROCESSES = (1, 2)
CHILD = """
import sys
from pathlib import Path
from nnunetv2_smallseg.datasets import engine, kits23

if __name__ == "__main__":
    plan = kits23.plan(sys.argv[1])
    outcome = engine.convert(plan, Path(sys.argv[2]), {}, int(sys.argv[3]), progress=False)
    assert outcome.report["cases_written"] == len(plan.cases)
"""
POINTS = 10


def write_cases(folder: Path, count: int) -> None:
    """KiTS23's layout with invented voxels."""
    random = np.random.default_rng(0)
    image = nibabel.Nifti1Image(random.normal(0, 300, SHAPE), np.diag([1, 1, 3, 1]))
    label = np.zeros(SHAPE, np.uint8)
    label[4:8, 4:8, 3:5] = 2
    contents = {
        "imaging.nii.gz": gzip.compress(image.to_bytes(), 1),
        "segmentation.nii.gz": gzip.compress(nibabel.Nifti1Image(label, image.affine).to_bytes(), 1),
    }
    for number in range(count):
        case = folder / f"case_{number:05d}"
        case.mkdir(parents=True)
        for name, content in contents.items():
            (case / name).write_bytes(content)


def resident_mib(process: int) -> float:
    """Memory that a process holds now; 0 if it is gone."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS")), 0.0)


def children(process: int) -> list[int]:
    """Child processes of a process."""
    try:
        return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:
        return []


def watched_run(command: list[str], labels: Path, count: int) -> tuple[float, list[dict]]:
    """Runs a conversion; seconds, and memory each time another tenth of the cases is there."""
    memory: list[dict] = []
    started = time.perf_counter()
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            time.sleep(0.05)
            done = sum(entry.name.startswith("case_") for entry in os.scandir(labels)) if labels.is_dir() else 0
            if done * POINTS >= (len(memory) + 1) * count:
                workers = [resident_mib(child) for child in children(process.pid)]
                main = resident_mib(process.pid)
                row = {
                    "cases": done,
                    "main_mib": round(main, 1),
                    "largest_worker_mib": round(max(workers, default=0), 1),
                }
                memory.append(row)
    if process.returncode:
        raise SystemExit(f"{command} failed")
    return time.perf_counter() - started, memory


def measure(count: int) -> dict:
    """Converts ``count`` cases with each number of processes, each in a process of its own."""
    runs = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_cases(folder / "source", count)
        (folder / "child.py").write_text(CHILD)
        for processes in PROCESSES:
            target = folder / f"target_{processes}"
            command = [sys.executable, str(folder / "child.py"), str(folder / "source"), str(target), str(processes)]
            seconds, memory = watched_run(command, target / "labelsTr", count)
            again, _ = watched_run(command, target / "labelsTr", count)
            runs.append(
                {
                    "processes": processes,
                    "seconds": round(seconds, 2),
                    "cases_per_second": round(count / seconds, 1),
                    "second_run_that_skips_all_seconds": round(again, 2),
                    "memory": memory,
                }
            )
    return {"machine": machine_facts("cpu", ("numpy", "nibabel")), "cases": count, "shape": SHAPE, "runs": runs}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-n", type=int, default=2000, help="number of cases (default: %(default)s)")
    RESULTS.write_text(json.dumps(measure(parser.parse_args().n), indent=2) + "\n")
