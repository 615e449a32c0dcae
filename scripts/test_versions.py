"""Runs the tests with the lowest and the newest versions of torch and nnU-Net that are allowed.

Run: python scripts/test_versions.py [lowest] [newest] [-o FOLDER]. Each gets an environment of its own below FOLDER,
made when it is not there yet. Tests that failed are run once more: some wait for processes, and time out on a busy
machine. What passed is written to ``nnunetv2_smallseg/tested_versions.json``, which ``smallseg doctor`` reads, and
from there into the documentation.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import tomllib

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from nnunetv2_smallseg.files import write_json  # noqa: E402

RESULTS = ROOT / "nnunetv2_smallseg" / "tested_versions.json"
PACKAGES = ("nnunetv2", "torch")
# Run in the environment under test, with the names of the packages as arguments.
READ_VERSIONS = """\
import importlib.metadata, json, platform, sys
versions = {name: importlib.metadata.version(name) for name in sys.argv[1:]}
print(json.dumps({"python": platform.python_version(), **versions}))
"""


# Triton's interpreter, which a few tests use, reads arrays as numbers in a way that numpy gave up in 2.4.
LOWEST_ONLY = ("numpy<2.4",)


def lowest_versions() -> list[str]:
    """Requirements of exactly the lower bounds in pyproject.toml, e.g. ``torch==2.7``."""
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    bounds = (re.match(rf"({'|'.join(PACKAGES)})>=([\d.]+)", dependency) for dependency in dependencies)
    return [f"{bound[1]}=={bound[2]}" for bound in bounds if bound] + list(LOWEST_ONLY)


def interpreter(folder: Path, pins: list[str]) -> Path:
    """Python of an environment with this checkout and its test dependencies."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        # Pinned ones first: otherwise pip downloads the newest torch, only to replace it.
        if pins:
            subprocess.run([str(python), "-m", "pip", "install", "-q", *pins], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", "-e", f"{ROOT}[cpu,test]", *pins], check=True)
    return python


def run_tests(python: Path, arguments: list[str]) -> dict:
    """Versions, the numbers of tests that passed, failed and were skipped, and of those that were run twice."""
    command = [str(python), "-c", READ_VERSIONS, *PACKAGES]
    versions = subprocess.run(command, capture_output=True, text=True, check=True)
    counts = count(python, arguments)
    counts["repeated"] = counts["failed"]
    if counts["failed"]:
        again = count(python, ["--last-failed", *arguments])
        counts["passed"] += again["passed"]
        counts["failed"] -= again["passed"]
    return {**json.loads(versions.stdout), **counts}


def count(python: Path, arguments: list[str]) -> dict[str, int]:
    """Runs pytest; the numbers of tests that passed, failed and were skipped."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        subprocess.run([str(python), "-m", "pytest", f"--junitxml={report}", *arguments], cwd=ROOT, check=False)
        for suite in ElementTree.parse(report).iter("testsuite"):
            numbers = {name: int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")}
            failed = numbers["failures"] + numbers["errors"]
            counts["failed"] += failed
            counts["skipped"] += numbers["skipped"]
            counts["passed"] += numbers["tests"] - failed - numbers["skipped"]
    return counts


def main() -> int:
    """Runs what was asked for; exit status 1 if a test failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="*", metavar="lowest|newest", help="default: both")
    parser.add_argument("-o", type=Path, default=Path("smallseg_versions"), help="folder of the environments")
    parser.add_argument("-n", type=int, default=2, help="processes of pytest (default: %(default)s)")
    options = parser.parse_args()
    chosen = options.which or ["lowest", "newest"]
    if unknown := set(chosen) - {"lowest", "newest"}:
        parser.error(f"{', '.join(sorted(unknown))}: use lowest, newest or both")
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for name in chosen:
        python = interpreter(options.o.resolve() / name, lowest_versions() if name == "lowest" else [])
        results[name] = run_tests(python, ["-q", "-n", str(options.n), "--dist", "loadfile", "--no-loadscope-reorder"])
        write_json(results, RESULTS)
        # The next tests compare the tables of the documentation with the results.
        subprocess.run([str(python), str(ROOT / "scripts" / "write_tables.py")], cwd=ROOT, check=True)
    return int(any(results[name]["failed"] for name in chosen))


if __name__ == "__main__":
    sys.exit(main())
