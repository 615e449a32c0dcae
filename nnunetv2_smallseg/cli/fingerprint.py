"""``smallseg fingerprint``: sizes of the lesions of a data set, and what nnU-Net loses of them."""

from __future__ import annotations

import argparse
import json
import textwrap
from pathlib import Path

from nnunetv2_smallseg.cli.plan import positive_integer

__all__ = ["add_parser", "run"]


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the sub-command."""
    parser = subparsers.add_parser(
        "fingerprint",
        help="measure the lesions of a data set and what nnU-Net loses of them",
        description="Reads all labels once and writes lesion_fingerprint.json, .html and .png: sizes, shares that "
        "vanish by resampling and deep supervision or are cut by the patch, how often lesions are seen, and what "
        "follows for planning. docs/fingerprint.md defines every number.",
    )
    parser.add_argument("-d", required=True, metavar="DATASET", help="number or name of the data set")
    parser.add_argument(
        "-p", default="nnUNetSmallSegPlans", metavar="PLANS", help="name of the plans (default: %(default)s)"
    )
    parser.add_argument(
        "-c", metavar="CONFIGURATION", help="configuration (default: 2.5d, 3d_fullres or 2d, the first there is)"
    )
    parser.add_argument(
        "-o", metavar="FOLDER", help="where the files are written (default: the data set in nnUNet_preprocessed)"
    )
    parser.add_argument(
        "-size_bins",
        nargs="+",
        type=float,
        default=(5.0, 10.0, 20.0),
        metavar="MM",
        help="limits of the equivalent diameter (default: 5 10 20)",
    )
    parser.add_argument("-np", type=positive_integer, metavar="N", help="processes (default: cores, 8 at most)")
    parser.add_argument("--raw", action="store_true", help="read the raw labels even if preprocessed ones are there")
    parser.add_argument("--json", action="store_true", help="print the content of the JSON file instead of a summary")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measures, prints the recommendations and the files written."""
    from nnunetv2_smallseg.fingerprint.recommendations import plan_command
    from nnunetv2_smallseg.fingerprint.run import extract_fingerprint

    fingerprint = extract_fingerprint(
        arguments.d,
        arguments.p,
        arguments.c,
        output=Path(arguments.o) if arguments.o else None,
        raw=arguments.raw,
        num_processes=arguments.np,
        diameter_limits_mm=tuple(arguments.size_bins),
    )
    content = fingerprint.content
    if arguments.json:
        print(json.dumps(content, indent=2, ensure_ascii=False))
        return 0
    lesions = content["lesions"]["all"]
    print(
        f"{content['dataset']}, {content['configuration']} of {content['plans']}: {lesions['count']:,} lesions in "
        f"{lesions['num_cases_with_lesions']:,} of {content['num_cases']:,} cases ({content['labels_read']} labels)"
    )
    if lesions["count"]:
        print("  " + ", ".join(f"{name}: {count:,}" for name, count in lesions["by_size"].items()))
    for advice in content["recommendations"]:
        title = f"{advice['topic']}: {'change' if advice['indicated'] else 'fine'}"
        print(f"{title}\n{textwrap.fill(advice['text'], 100, initial_indent='  ', subsequent_indent='  ')}")
    if command := plan_command(content):
        print(f"next:\n  {command}")
    print("written:")
    for file in fingerprint.files:
        print(f"  {file}")
    return 0
