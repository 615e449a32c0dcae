"""The report of evaluated folders: pictures of the worst cases, read again from their files, and the page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from nnunetv2_smallseg.evaluation.images import EvaluationError, image_file, label_files, read_image, read_labels
from nnunetv2_smallseg.evaluation.previews import Preview, draw_preview, worst_cases
from nnunetv2_smallseg.evaluation.report import write_report
from nnunetv2_smallseg.evaluation.resampling import Resampling
from nnunetv2_smallseg.evaluation.result_tables import ResultTables, Units
from nnunetv2_smallseg.evaluation.run import Evaluation

__all__ = ["check_report_inputs", "report_folders"]

# Settings shown at the head of the page, by what they are called there.
SHOWN_SETTINGS = {
    "Reference": "reference",
    "Data set": "dataset_json",
    "Tolerance of the surface Dice (mm)": "tolerance_mm",
    "Two empty masks": "both_empty",
    "Connectivity": "connectivity",
    "Limits of the size bins (mm)": "diameter_limits_mm",
}


def check_report_inputs(
    reference: Path, *, images: Path | None = None, patients: Mapping[str, str] | None = None
) -> None:
    """Checks what ``report_folders`` will need, before anything is evaluated.

    Args:
        reference: Folder of the reference.
        images: Folder of the images; None without.
        patients: Case -> patient; None without.
    Raises:
        EvaluationError: If a case has no image.
        SmallSegError: If a case has no patient.
    """
    cases = list(label_files(reference))
    Resampling(patients=patients).groups(cases)
    if images is None:
        return
    if not images.is_dir():
        raise EvaluationError(f"{images} is not a folder: give the folder of the images (-images), or leave it out")
    for case in cases:
        image_file(images, case)


def report_folders(
    evaluation: Evaluation, *, images: Path | None = None, patients: Mapping[str, str] | None = None
) -> Path:
    """Writes ``report.html``, ``statistics.json`` and ``figures/`` beside the tables of an evaluation.

    Args:
        evaluation: What ``evaluate_folders`` returned.
        images: Folder of the images, for the pictures of the worst cases: ``<case>_0000`` as nnU-Net names the first
            channel, or ``<case>``. None draws the outlines alone.
        patients: Case -> patient, if patients have several cases: intervals are then over patients.
    Returns:
        Path of ``report.html``.
    Raises:
        EvaluationError: If the image of a case is absent, unreadable or of another shape.
        SmallSegError: If ``patients`` lacks a case.
    """
    settings = evaluation.settings
    tables = ResultTables(evaluation.cases, evaluation.lesions)
    unit = "mm" if settings["has_spacing"] or settings["spacing"] else "px"
    described = {name: settings[key] for name, key in SHOWN_SETTINGS.items() if settings[key] is not None}
    described["Matching of lesions"] = settings["rule"]["description"]
    return write_report(
        tables,
        described,
        evaluation.output,
        _previews(evaluation, tables, images, unit),
        resampling=Resampling(patients=patients),
        units=Units(settings["num_dimensions"], unit),
    )


def _previews(evaluation: Evaluation, tables: ResultTables, images: Path | None, unit: str) -> list[Preview]:
    """A picture of every worst case."""
    settings = evaluation.settings
    regions = {region.name: region for region in evaluation.scheme.regions}
    references = label_files(Path(settings["reference"]))
    predictions = {name: label_files(Path(folder)) for name, folder in settings["predictions"].items()}
    previews = []
    for worst in worst_cases(tables):
        reference = read_labels(references[worst.case], settings["spacing"])
        prediction = read_labels(predictions[worst.prediction][worst.case], settings["spacing"])
        image = None
        if images is not None:
            file = image_file(images, worst.case)
            image = read_image(file)
            if image.shape[: reference.array.ndim] != reference.array.shape:
                raise EvaluationError(
                    f"{file} has shape {image.shape}, but its reference {references[worst.case]} has "
                    f"{reference.array.shape}: give the folder of the images these labels belong to (-images)"
                )
        mask = regions[worst.region].mask
        png = draw_preview(mask(reference.array), mask(prediction.array), reference.spacing, image, unit)
        previews.append(Preview(worst.prediction, worst.case, worst.region, png))
    return previews
