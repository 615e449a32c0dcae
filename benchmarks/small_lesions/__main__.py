"""``python -m benchmarks.small_lesions run|collect``: the study of what helps small lesions.

``run`` trains every arm, several runs at a time, and evaluates it on held-out cases; interrupted, it goes on where it
stopped. ``collect`` writes the results files and the figure from what is finished; then
``python scripts/write_tables.py``. What the arms, data sets and budgets are: ``docs/results.md``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.machine import machine_facts
from benchmarks.small_lesions.arms import ARMS, missing
from benchmarks.small_lesions.collect import collect
from benchmarks.small_lesions.data import DATA, prepare, shared_data
from benchmarks.small_lesions.report import draw, read_results
from benchmarks.small_lesions.runs import BUDGETS, Workspace, ordered, run_all
from nnunetv2_smallseg.demo.commands import interrupted_by_signals
from nnunetv2_smallseg.errors import SmallSegError
from nnunetv2_smallseg.files import write_json

ROOT = Path(__file__).resolve().parents[2]
GROUPS = {
    "strategies": [arm.name for arm in ARMS.values() if arm.network is None],
    "networks": [arm.name for arm in ARMS.values() if arm.network is not None],
}


def positive(text: str) -> int:
    """For argparse: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive: use 1 or more")
    return value


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.small_lesions", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train and evaluate what is not finished")
    write = commands.add_parser("collect", help="write results files and figure from what is finished")
    for command in (run, write):
        command.add_argument("-o", metavar="FOLDER", type=Path, default=Path("smallseg_study"), help="workspace")
        command.add_argument("-data", nargs="+", choices=DATA, default=list(DATA), help="data sets (default: all)")
        command.add_argument("--full", action="store_true", help="networks and patches at full size, for a GPU")
        command.add_argument("-device", choices=("cpu", "cuda"), default="cpu")
    run.add_argument(
        "-arms", nargs="+", choices=[*GROUPS, *ARMS], default=list(GROUPS), metavar="ARM",
        help=f"{', '.join(GROUPS)} or any of {', '.join(ARMS)} (default: all)",
    )  # fmt: skip
    run.add_argument("-seeds", nargs="+", type=positive, default=[1, 2, 3])
    run.add_argument("-network_seeds", type=positive, default=1, help="how many of the seeds networks are trained with")
    run.add_argument("-budget", nargs="+", choices=BUDGETS, default=list(BUDGETS))
    run.add_argument("-np", type=positive, default=2, help="runs at a time (default: 2)")
    run.add_argument("-num_loaders", type=int, default=0, help="processes that load patches; with 0 they are seeded")
    run.add_argument("--dry_run", action="store_true", help="only list the runs that are left, in their order")
    write.add_argument("-results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of results files")
    write.add_argument("-figure", type=Path, default=ROOT / "docs" / "small_lesion_study.png")
    return parser.parse_args(arguments)


def warn(message: str) -> None:
    """Prints to stderr."""
    print(message, file=sys.stderr, flush=True)


def run(options: argparse.Namespace) -> int:
    """Does what is left of the study."""
    chosen = [name for entry in options.arms for name in GROUPS.get(entry, [entry])]
    arms = []
    for name in dict.fromkeys(chosen):
        twin = None if options.full else ARMS[name].small_twin
        reason = f"with small networks it is {twin}" if twin is not None else missing(ARMS[name])
        if reason is None:
            arms.append(name)
        else:
            warn(f"skipped arm {name}: {reason}")
    data = []
    for name in options.data:
        if DATA[name].phantom is None and shared_data(DATA[name]) is None:
            warn(
                f"skipped data {name}: {DATA[name].dataset} not found; put it into ../shared/data beside the project "
                "or set SMALLSEG_SHARED to the folder that holds data/"
            )
        else:
            data.append(name)
    workspace = Workspace(options.o.resolve(), options.device, options.full, options.num_loaders)
    runs = ordered(data, arms, options.seeds, options.budget, options.network_seeds)
    if options.dry_run:
        for entry in runs:
            if workspace.result(entry) is None:
                print(entry)
        return 0
    workspace.folder.mkdir(parents=True, exist_ok=True)
    facts = machine_facts(options.device, ("torch", "nnunetv2", "nnunetv2-smallseg", "numba"))
    write_json(facts, workspace.folder / "machine.json")
    for name in data:
        prepare(DATA[name], workspace.scale(DATA[name]), workspace.folder, workspace.environment())
    with interrupted_by_signals():
        failures = run_all(workspace, runs, options.np, lambda line: print(line, flush=True))
    for failure in failures:
        warn(f"failed: {failure}")
    return 1 if failures else 0


def write_results(options: argparse.Namespace) -> int:
    """Writes the results files of the data sets with finished runs, and the figure of all results files."""
    workspace = Workspace(options.o.resolve(), options.device, options.full)
    written = []
    for name in options.data:
        content = collect(workspace, DATA[name])
        if content is None:
            warn(f"no run of {name} is finished in {workspace.folder}")
            continue
        file = options.results / f"small_lesions_{name}{'_full' if options.full else ''}.json"
        write_json(content, file)
        written.append(file)
        print(file)
    if not written:
        return 1
    draw(read_results(options.results), options.figure)
    print(options.figure)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Runs the command."""
    options = parse(arguments)
    try:
        return run(options) if options.command == "run" else write_results(options)
    except SmallSegError as error:
        warn(f"error: {error}")
        return error.exit_status
    except KeyboardInterrupt:
        warn("interrupted: the same command goes on from here")
        return 130


if __name__ == "__main__":
    sys.exit(main())
