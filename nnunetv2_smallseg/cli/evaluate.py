"""``smallseg evaluate``: voxel, surface and lesion metrics of predictions, by size, and official protocols."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from nnunetv2_smallseg.cli.plan import positive_integer
from nnunetv2_smallseg.errors import UsageError

__all__ = ["add_parser", "run"]

PROTOCOLS = ("uls23", "kits23", "atlas", "svanet", "s3mamba", "stsnet")
# Metrics of the short table; all are in summary.json.
SHOWN = ("dice", "nsd", "hd95_mm")


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the sub-command."""
    parser = subparsers.add_parser(
        "evaluate",
        help="evaluate predictions, made for small lesions",
        description="Compares folders of predictions with a folder of references: voxels, surfaces, single lesions, "
        "sizes. Writes summary.json, cases.csv, lesions.csv and report.html. docs/evaluation.md defines every metric.",
    )
    parser.add_argument("-ref", required=True, metavar="FOLDER", help="label maps of the reference")
    parser.add_argument(
        "-pred", required=True, nargs="+", action="extend", metavar="[NAME=]FOLDER", help="predictions, one or several"
    )
    parser.add_argument("-o", required=True, metavar="FOLDER", help="where the results are written")
    parser.add_argument(
        "-djfile",
        metavar="FILE",
        help="dataset.json with labels, regions and ignore label (default: the one beside the predictions, else every "
        "label that occurs)",
    )
    parser.add_argument("-l", nargs="+", type=int, metavar="LABEL", help="labels to evaluate (default: all)")
    parser.add_argument("-il", type=int, metavar="LABEL", help="ignore label, without -djfile")
    parser.add_argument("-tolerance", type=float, default=1.0, metavar="MM", help="of the surface Dice (default: 1)")
    parser.add_argument(
        "-both_empty",
        choices=("undefined", "one", "zero"),
        default="undefined",
        help="Dice, IoU, F2 and surface Dice of two empty masks (default: undefined, as in nnU-Net)",
    )
    parser.add_argument(
        "-match", choices=("overlap", "iou"), default="overlap", help="how lesions are matched (default: overlap)"
    )
    parser.add_argument(
        "-match_threshold",
        type=float,
        default=0.0,
        metavar="T",
        help="least share of a lesion that overlaps, or IoU (default: 0, one voxel)",
    )
    parser.add_argument(
        "-connectivity", type=int, metavar="N", help="of lesions: 6, 18, 26 or 4, 8 (default: 26 in 3D, 8 in 2D)"
    )
    parser.add_argument(
        "-size_bins",
        nargs="+",
        type=float,
        default=(5.0, 10.0, 20.0),
        metavar="MM",
        help="limits of the equivalent diameter (default: 5 10 20)",
    )
    parser.add_argument(
        "-spacing", nargs="+", type=float, metavar="MM", help="voxel size of PNG, BMP, TIFF in array order (default: 1)"
    )
    parser.add_argument(
        "--probabilities", action="store_true", help="read CASE.npz beside the predictions: AUC, calibration, FROC"
    )
    parser.add_argument(
        "--instances", metavar="FOLDER", help="lesion numbers of the reference (default: connected components)"
    )
    parser.add_argument("--protocol", choices=PROTOCOLS, help="compute the numbers of a challenge or paper besides")
    parser.add_argument("-images", metavar="FOLDER", help="images, for the pictures of the worst cases in the report")
    parser.add_argument(
        "-patients", metavar="FILE", help="which patient a case belongs to (CSV or JSON): intervals are over patients"
    )
    parser.add_argument("--no_report", action="store_true", help="write the tables only")
    parser.add_argument("--chill", action="store_true", help="skip cases of which a file is missing")
    parser.add_argument("-np", type=positive_integer, metavar="N", help="processes (default: cores, 8 at most)")
    parser.add_argument("--json", action="store_true", help="print a JSON object instead of a table")
    parser.set_defaults(run=run)


def prediction_folders(texts: list[str]) -> dict[str, Path]:
    """Name -> folder of ``NAME=FOLDER`` or ``FOLDER``, which is named after itself.

    Raises:
        UsageError: If two have the same name.
    """
    folders: dict[str, Path] = {}
    for text in texts:
        name, separator, folder = text.partition("=")
        if not separator or "/" in name:
            name, folder = Path(text).resolve().name, text
        if name in folders:
            raise UsageError(f"two predictions are named {name}: tell them apart with -pred NAME=FOLDER")
        folders[name] = Path(folder)
    return folders


def run(arguments: argparse.Namespace) -> int:
    """Evaluates, prints a short table on stdout and the files written."""
    from nnunetv2_smallseg.evaluation.case import Settings
    from nnunetv2_smallseg.evaluation.matching import MatchingRule
    from nnunetv2_smallseg.evaluation.resampling import read_patients
    from nnunetv2_smallseg.evaluation.run import evaluate_folders

    patients = read_patients(Path(arguments.patients)) if arguments.patients else None
    images = Path(arguments.images) if arguments.images else None
    if not arguments.no_report:
        from nnunetv2_smallseg.evaluation.folder_report import check_report_inputs, report_folders

        if not arguments.chill:
            check_report_inputs(Path(arguments.ref), images=images, patients=patients)
    evaluation = evaluate_folders(
        Path(arguments.ref),
        prediction_folders(arguments.pred),
        Path(arguments.o),
        dataset_json=Path(arguments.djfile) if arguments.djfile else None,
        labels=arguments.l,
        ignore_label=arguments.il,
        settings=Settings(
            tolerance_mm=arguments.tolerance,
            both_empty=arguments.both_empty,
            rule=MatchingRule(arguments.match, arguments.match_threshold),
            connectivity=arguments.connectivity,
            diameter_limits_mm=tuple(arguments.size_bins),
            spacing=tuple(arguments.spacing) if arguments.spacing else None,
        ),
        instances=Path(arguments.instances) if arguments.instances else None,
        with_probabilities=arguments.probabilities,
        protocol=arguments.protocol,
        num_processes=arguments.np,
        chill=arguments.chill,
    )
    if not arguments.no_report:
        report_folders(evaluation, images=images, patients=patients)
    protocol = {name: result["summary"] for name, result in (evaluation.protocol or {}).items()}
    if arguments.json:
        content = {
            "output": str(evaluation.output),
            "skipped": evaluation.skipped,
            "predictions": {name: summary["smallseg"]["regions"] for name, summary in evaluation.summaries.items()},
            "protocol": protocol or None,
        }
        print(json.dumps(content, indent=2, ensure_ascii=False))
        return 0
    print(table({name: summary["smallseg"]["regions"] for name, summary in evaluation.summaries.items()}))
    for name, cases in evaluation.skipped.items():
        if cases:
            print(f"{name}: {len(cases)} cases skipped, a file is missing: {', '.join(cases)}")
    if protocol:
        print(json.dumps({arguments.protocol: protocol}, indent=2, ensure_ascii=False))
    print(f"written: {evaluation.output}")
    return 0


def table(predictions: dict[str, dict]) -> str:
    """Means with the number of cases they are over, and lesions found, as aligned text."""
    rows = [["prediction", "region", *(f"{metric} (cases)" for metric in SHOWN), "lesions found", "false/case"]]
    for prediction, regions in predictions.items():
        for region, summary in regions.items():
            lesions = summary["lesions"]
            rows.append(
                [
                    prediction,
                    region,
                    *(with_count(summary["metrics"][metric]) for metric in SHOWN),
                    f"{lesions['num_detected']} of {lesions['num_reference_lesions']}",
                    f"{lesions['false_positives_per_case']:.2f}",
                ]
            )
            for name, group in summary["by_diameter"].items():
                if group["num_reference_lesions"] or group["num_false_positives"]:
                    found = f"{group['num_detected']} of {group['num_reference_lesions']}"
                    per_case = group["num_false_positives"] / summary["num_cases"]
                    rows.append(["", f"  {name}", *([""] * len(SHOWN)), found, f"{per_case:.2f}"])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
                     for row in rows)  # fmt: skip


def with_count(statistics: dict) -> str:
    """A mean with its number of cases; a dash where it is undefined."""
    mean = statistics["mean"]
    return "-" if mean is None or math.isnan(mean) else f"{mean:.3f} ({statistics['count']})"
