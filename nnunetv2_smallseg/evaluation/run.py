"""Evaluates folders of predictions against a folder of references, in parallel over cases."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nnunetv2_smallseg import __version__
from nnunetv2_smallseg.errors import UsageError
from nnunetv2_smallseg.evaluation.case import CaseResult, CaseTask, Settings, evaluate_case, occurring_labels
from nnunetv2_smallseg.evaluation.images import VOLUME_ENDINGS, EvaluationError, file_ending, label_files
from nnunetv2_smallseg.evaluation.regions import LabelScheme, scheme_from_dataset_json, scheme_from_labels
from nnunetv2_smallseg.evaluation.tables import LESION_COLUMNS, nnunet_summary, region_summary, write_csv
from nnunetv2_smallseg.files import write_json
from nnunetv2_smallseg.parallel import run_in_processes

__all__ = ["PROTOCOLS", "Evaluation", "evaluate_folders"]

PROTOCOLS = ("uls23", "kits23", "atlas", "svanet", "s3mamba", "stsnet")
# How many names an error lists.
NAMES_SHOWN = 10


@dataclass(frozen=True)
class Evaluation:
    """Everything that was measured.

    Attributes:
        output: Folder the files were written to.
        settings: What was chosen, as plain values.
        scheme: The regions, in the order of the tables.
        cases: Rows of ``cases.csv``; undefined values are None or nan.
        lesions: Rows of ``lesions.csv``.
        summaries: Prediction -> content of its ``summary.json``; ours is under ``smallseg``.
        protocol: Prediction -> ``summary`` and ``cases`` of the protocol; None without one.
        skipped: Prediction -> cases that were skipped because a file is missing.
    """

    output: Path
    settings: dict[str, Any]
    scheme: LabelScheme
    cases: list[dict]
    lesions: list[dict]
    summaries: dict[str, dict]
    protocol: dict[str, dict] | None
    skipped: dict[str, list[str]]


def evaluate_folders(
    reference: Path,
    predictions: Mapping[str, Path],
    output: Path,
    *,
    dataset_json: Path | None = None,
    labels: Sequence[int] | None = None,
    ignore_label: int | None = None,
    settings: Settings | None = None,
    instances: Path | None = None,
    with_probabilities: bool = False,
    protocol: str | None = None,
    num_processes: int | None = None,
    chill: bool = False,
) -> Evaluation:
    """Evaluates one or several folders of predictions and writes ``summary.json``, ``cases.csv``, ``lesions.csv``.

    Which labels or regions: those of ``dataset_json``; else ``labels``; else those of the ``dataset.json`` that nnU-Net
    writes beside its predictions; else every label that occurs.

    Args:
        reference: Folder of label maps.
        predictions: Name -> folder of label maps of the same names.
        output: Folder for the results; made if needed.
        dataset_json: ``dataset.json`` of the data set.
        labels: Foreground labels; with ``dataset_json`` only its regions that consist of these. Without, any other
            label may occur and is background.
        ignore_label: Label of reference voxels that are left out; with ``dataset_json`` that of the file.
        settings: What can be chosen about the metrics.
        instances: Folder of maps of lesion numbers of the reference; by default lesions are connected components.
        with_probabilities: Read ``<case>.npz`` beside every prediction.
        protocol: Official protocol to compute besides, one of ``PROTOCOLS``.
        num_processes: Processes; 1 evaluates in this one. With more, a script has to call this below
            ``if __name__ == "__main__"``, because they are spawned.
        chill: Skip cases of which a file is missing, instead of stopping.
    Raises:
        EvaluationError: If files are missing, unreadable or do not fit.
        UsageError: If an argument is none of the allowed ones.
    """
    settings = settings or Settings()
    if protocol is not None and protocol not in PROTOCOLS:
        raise UsageError(f"there is no protocol {protocol!r}: use one of {', '.join(PROTOCOLS)}")
    if not predictions:
        raise UsageError("there is no folder of predictions: give one with -pred")
    for name in predictions:
        if not re.fullmatch(r"[\w.+-]+", name):
            raise UsageError(f"{name!r} cannot name a prediction: use letters, digits and . + - _")
    reference, output = Path(reference), Path(output)
    _check_output(output)
    wrong = [label for label in (*(labels or ()), *(() if ignore_label is None else (ignore_label,))) if label < 0]
    if wrong:
        raise UsageError(f"{wrong[0]} is no label (-l, -il): labels are whole numbers from 0")
    predictions = {name: Path(folder) for name, folder in predictions.items()}
    files, skipped = {}, {}
    reference_files = label_files(reference)
    if settings.spacing is not None and all(file_ending(path) in VOLUME_ENDINGS for path in reference_files.values()):
        raise UsageError(
            f"the spacing {tuple(settings.spacing)} (-spacing) is for PNG, BMP and TIFF: the files in {reference} hold "
            "their own; leave it out, or correct their headers"
        )
    instance_files = label_files(Path(instances)) if instances is not None else None
    for name, folder in predictions.items():
        files[name] = label_files(folder)
        skipped[name] = _missing(reference_files, files[name], instance_files, reference, folder, chill)

    pairs = [(name, case) for name in predictions for case in reference_files if case not in skipped[name]]
    if dataset_json is None and labels is None:
        dataset_json = next(
            (path for folder in predictions.values() if (path := folder / "dataset.json").is_file()), None
        )
    if dataset_json is not None:
        scheme = scheme_from_dataset_json(Path(dataset_json))
        if labels is not None:
            scheme = _only(scheme, labels)
    else:
        if labels is None:
            used = {reference_files[case] for _, case in pairs} | {files[name][case] for name, case in pairs}
            occurring = _run_all(occurring_labels, sorted(used), num_processes, "labels")
            labels = {label for found in occurring for label in found}
        scheme = scheme_from_labels(labels, ignore_label)

    tasks = [
        CaseTask(
            prediction=name,
            case=case,
            reference_file=reference_files[case],
            prediction_file=files[name][case],
            scheme=scheme,
            settings=settings,
            instances_file=instance_files[case] if instance_files is not None else None,
            probabilities_file=predictions[name] / f"{case}.npz" if with_probabilities else None,
            protocol=protocol,
        )
        for name, case in pairs
    ]
    results = _run_all(evaluate_case, tasks, num_processes, "cases")
    return _collect(results, scheme, settings, output, {
        "version": __version__,
        "reference": str(reference),
        "predictions": {name: str(folder) for name, folder in predictions.items()},
        "dataset_json": str(dataset_json) if dataset_json is not None else None,
        "instances": str(instances) if instances is not None else None,
        "probabilities": with_probabilities,
        "protocol": protocol,
    }, skipped)  # fmt: skip


def _check_output(output: Path) -> None:
    """Raises ``UsageError`` if no folder can be made there: better now than after hours of evaluation."""
    existing = next((path for path in (output, *output.parents) if path.exists()), output)
    if not existing.is_dir():
        raise UsageError(f"the results cannot be written to {output}: {existing} is a file; choose another folder (-o)")


def _collect(
    results: list[CaseResult],
    scheme: LabelScheme,
    settings: Settings,
    output: Path,
    described: dict[str, Any],
    skipped: dict[str, list[str]],
) -> Evaluation:
    """Puts the results of all cases together and writes the files."""
    described = {
        **described,
        **asdict(settings),
        "rule": {**asdict(settings.rule), "description": str(settings.rule)},
        "num_dimensions": max(result.num_dimensions for result in results),
        "has_spacing": all(result.has_spacing for result in results),
    }
    by_prediction: dict[str, list[CaseResult]] = {}
    for result in results:
        by_prediction.setdefault(result.task.prediction, []).append(result)
    summaries, protocols = {}, {}
    for name, members in by_prediction.items():
        summaries[name] = {
            **nnunet_summary(members, scheme),
            "smallseg": {
                "prediction": name,
                "settings": described,
                "skipped": skipped[name],
                "regions": {
                    region.name: {"key": region.key, **region_summary(members, region, settings.diameter_limits_mm)}
                    for region in scheme.regions
                },
            },
        }
        if described["protocol"] is not None:
            module = importlib.import_module(f"nnunetv2_smallseg.evaluation.protocols.{described['protocol']}")
            cases = {member.task.case: member.protocol for member in members}
            protocols[name] = {"summary": module.summarise(cases), "cases": cases}
    evaluation = Evaluation(
        output=output,
        settings=described,
        scheme=scheme,
        cases=[row for result in results for row in result.rows],
        lesions=[row for result in results for row in result.lesions],
        summaries=summaries,
        protocol=protocols or None,
        skipped=skipped,
    )
    _write(evaluation)
    return evaluation


def _write(evaluation: Evaluation) -> None:
    output = evaluation.output
    try:
        output.mkdir(parents=True, exist_ok=True)
        write_csv(evaluation.cases, list(evaluation.cases[0]), output / "cases.csv")
        write_csv(evaluation.lesions, LESION_COLUMNS, output / "lesions.csv")
        write_json(next(iter(evaluation.summaries.values())), output / "summary.json")
        if len(evaluation.summaries) > 1:
            for name, summary in evaluation.summaries.items():
                write_json(summary, output / f"summary_{name}.json")
        if evaluation.protocol is not None:
            write_json(evaluation.protocol, output / f"protocol_{evaluation.settings['protocol']}.json")
    except OSError as error:
        raise EvaluationError(f"the results cannot be written to {output} ({error}): choose another folder") from error


def _only(scheme: LabelScheme, labels: Sequence[int]) -> LabelScheme:
    """The scheme with the regions of single labels that were asked for."""
    regions = tuple(region for region in scheme.regions if set(region.labels) <= set(labels))
    if not regions:
        raise UsageError(f"no region of the dataset.json consists of the labels {sorted(labels)}")
    return replace(scheme, regions=regions)


def _missing(
    references: Mapping[str, Path],
    predictions: Mapping[str, Path],
    instances: Mapping[str, Path] | None,
    reference_folder: Path,
    prediction_folder: Path,
    chill: bool,
) -> list[str]:
    """Cases to skip because one of their files is missing; raises if there are any, unless ``chill``."""
    problems = {
        f"missing in {prediction_folder}": sorted(references.keys() - predictions.keys()),
        f"missing in {reference_folder}": sorted(predictions.keys() - references.keys()),
        "without a file of instances": sorted(references.keys() - instances.keys()) if instances is not None else [],
    }
    skipped = sorted({case for cases in problems.values() for case in cases})
    if len(skipped) == len(references.keys() | predictions.keys()):
        raise EvaluationError(
            f"{reference_folder} and {prediction_folder} have no case in common: label maps of a case have the same "
            "name, apart from the ending"
        )
    if skipped and not chill:
        found = "; ".join(f"{len(cases)} {where}: {_names(cases)}" for where, cases in problems.items() if cases)
        raise EvaluationError(f"{found}. Add the files, or skip these cases with --chill")
    return skipped


def _names(cases: Sequence[str]) -> str:
    more = len(cases) - NAMES_SHOWN
    return ", ".join(cases[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _run_all(function: Callable, arguments: Iterable, num_processes: int | None, what: str) -> list:
    """The results of ``run_in_processes`` in the order of the arguments."""
    results = sorted(run_in_processes(function, arguments, num_processes, what), key=lambda found: found[0])
    return [result for _, result in results]
