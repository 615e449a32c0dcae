"""``smallseg convert``: public data sets into nnU-Net's raw format."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys

from nnunetv2_smallseg.cli.plan import positive_integer
from nnunetv2_smallseg.datasets import registry
from nnunetv2_smallseg.errors import UsageError

__all__ = ["add_parser", "run"]

# Each process holds an image and its label: for a large CT, gigabytes.
DEFAULT_NUM_PROCESSES = min(4, os.cpu_count() or 1)


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the sub-command."""
    parser = subparsers.add_parser(
        "convert",
        help="convert a public data set into nnU-Net's raw format",
        description="Converts a data set as downloaded into nnUNet_raw. Started again with the same options, it goes "
        "on where it stopped. Exit status 1 if cases failed; they are listed in conversion_report.json.",
    )
    parser.add_argument("name", metavar="NAME", nargs="?", help=f"data set: {', '.join(registry.names())}")
    parser.add_argument("source", metavar="SRC", nargs="?", help="folder of the download")
    parser.add_argument("-d", metavar="ID", type=positive_integer, help="number of the data set to write")
    parser.add_argument("-name", dest="dataset_name", metavar="NAME", help="name of the data set (default: see --list)")
    parser.add_argument(
        "-np",
        metavar="N",
        type=positive_integer,
        default=DEFAULT_NUM_PROCESSES,
        help="cases converted at a time (default: %(default)s)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be written, and write nothing")
    parser.add_argument("--overwrite", action="store_true", help="convert again what is there already")
    parser.add_argument("--list", action="store_true", help="list all data sets")
    parser.add_argument("--json", action="store_true", help="with --list: print a JSON list instead of a table")
    parser.add_argument(
        "--check", metavar="ID", type=positive_integer, help="read a converted data set again, compare with its report"
    )
    for option in registry.OPTIONS:
        takers = ", ".join(entry.name for entry in registry.CONVERTERS if option.flag in entry.options)
        values: dict = {"action": "store_true"}
        if option.metavar:
            count: int | str = "+" if option.several else len(option.metavar)
            metavar = option.metavar if isinstance(count, int) and count > 1 else option.metavar[0]
            values = {"nargs": None if count == 1 else count, "metavar": metavar, "type": option.type}
        parser.add_argument(option.flag, dest=option.name, default=None, help=f"{takers}: {option.meaning}", **values)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Lists, checks or converts."""
    if arguments.list:
        return run_list(arguments)
    if arguments.check is not None:
        return run_check(arguments.check)
    if arguments.name is None or arguments.source is None:
        raise UsageError("name a data set and the folder of its download: smallseg convert NAME SRC -d ID, or --list")
    entry = registry.converter(arguments.name)
    if arguments.d is None and not arguments.dry_run:
        raise UsageError("-d is missing: the number of the data set to write, such as -d 901")
    return run_convert(entry, arguments)


def run_list(arguments: argparse.Namespace) -> int:
    """Prints the list on stdout."""
    if arguments.json:
        print(json.dumps([dataclasses.asdict(entry) for entry in registry.CONVERTERS], indent=2, ensure_ascii=False))
        return 0
    print(f"{'name':<14} {'writes':<18} {'licence':<30} contents")
    for entry in registry.CONVERTERS:
        written = entry.dataset_name or "-name NAME"
        print(f"{entry.name:<14} {written:<18} {entry.licence:<30} {entry.contents}")
    print("\nSources, layouts and what each converter does: docs/datasets.md")
    return 0


def _options(entry: registry.Converter, arguments: argparse.Namespace) -> dict:
    """Options of the converter that were given."""
    given = {option: getattr(arguments, option.name) for option in registry.OPTIONS}
    given = {option: value for option, value in given.items() if value is not None}
    for option in given:
        if option.flag not in entry.options:
            takers = [other.name for other in registry.CONVERTERS if option.flag in other.options]
            raise UsageError(f"{option.flag} is an option of {', '.join(takers)}, not of {entry.name}")
    return {option.name: value for option, value in given.items()}


def run_convert(entry: registry.Converter, arguments: argparse.Namespace) -> int:
    """Converts; what was written on stdout, problems on stderr."""
    from nnunetv2_smallseg.datasets.convert import plan_conversion
    from nnunetv2_smallseg.datasets.engine import convert
    from nnunetv2_smallseg.datasets.target import REPORT, dataset_folder

    options = _options(entry, arguments)
    name = arguments.dataset_name or entry.dataset_name
    if name is None:
        raise UsageError(f"{entry.name}: give the data set a name, such as -name MyLesions")
    folder = dataset_folder(arguments.d, name) if arguments.d is not None else None
    plan = plan_conversion(entry, arguments.source, options)
    if arguments.dry_run:
        return _print_plan(plan, folder)
    settings = {"converter": entry.name, "options": options}
    outcome = convert(plan, folder, settings, arguments.np, arguments.overwrite)
    report = outcome.report
    print(f"{outcome.folder}: {report['training_cases']} training cases, {report['test_cases']} test cases")
    for subset, counts in report["subsets"].items():
        print(f"  {subset}: " + ", ".join(f"{count} {kind}" for kind, count in counts.items() if count))
    for message in outcome.messages:
        print(f"note: {message}", file=sys.stderr)
    for problem in report["failed"]:
        print(f"failed: {problem['name']} ({problem['subset']}): {problem['reason']}", file=sys.stderr)
    if report["failed"]:
        print(
            f"{len(report['failed'])} failed; all are listed in {outcome.folder / REPORT}. Mend or replace "
            "their files and start the same command again: finished cases are kept.",
            file=sys.stderr,
        )
        return 1
    print(f"next:\n  nnUNetv2_extract_fingerprint -d {arguments.d} --verify_dataset_integrity")
    return 0


def _print_plan(plan, folder) -> int:
    """What a conversion would do, one line a case."""
    for case in plan.cases:
        place = "Ts" if case.test else "Tr"
        print(f"images{place}/{case.identifier}_0000{plan.file_ending}  <- {', '.join(case.sources)}")
    for problem in plan.skipped:
        print(f"skipped: {problem.name} ({problem.subset}): {problem.reason}")
    for problem in plan.failed:
        print(f"failed: {problem.name} ({problem.subset}): {problem.reason}", file=sys.stderr)
    test = sum(case.test for case in plan.cases)
    where = f" into {folder}" if folder is not None else ""
    print(
        f"would write {len(plan.cases) - test} training cases and {test} test cases{where}; "
        f"{len(plan.skipped)} skipped, {len(plan.failed)} failed"
    )
    return 1 if plan.failed else 0


def run_check(number: int) -> int:
    """Reads a data set again; differences on stderr."""
    from tqdm import tqdm

    from nnunetv2_smallseg.datasets.check import check_dataset, differences

    folder, report = check_dataset(number)
    found = 0
    with tqdm(total=len(report["cases"]) + 1, unit="case", disable=None) as bar:
        for difference in differences(folder, report):
            bar.update()
            if difference is not None:
                found += 1
                print(difference, file=sys.stderr)
    if found:
        print(
            f"{folder}: {found} differences. Bring the named files back, or convert again with --overwrite",
            file=sys.stderr,
        )
        return 1
    print(f"{folder}: {len(report['cases'])} cases as reported")
    return 0
