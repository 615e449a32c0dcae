"""Whole folders: formats, labels and regions, errors, tables, ``summary.json``, and ``smallseg evaluate``."""

from __future__ import annotations

import csv
import json
import math
import shutil

import numpy as np
import pytest
import SimpleITK
import tifffile
from PIL import Image

from nnunetv2_smallseg.cli.main import main
from nnunetv2_smallseg.errors import UsageError
from nnunetv2_smallseg.evaluation.case import Settings
from nnunetv2_smallseg.evaluation.images import EvaluationError, check_geometry, read_labels
from nnunetv2_smallseg.evaluation.run import PROTOCOLS, evaluate_folders

SPACING = (2.0, 0.5, 0.5)
REGIONS = {"background": 0, "organ": [1, 2], "lesion": 2, "ignore": 3}


def write_volume(path, array, spacing=SPACING, origin=(0.0, 0.0, 0.0)):
    image = SimpleITK.GetImageFromArray(array)
    image.SetSpacing([float(value) for value in spacing[::-1]])
    image.SetOrigin(origin[: array.ndim])
    path.parent.mkdir(parents=True, exist_ok=True)
    SimpleITK.WriteImage(image, str(path))


def read_table(path) -> list[dict]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def label_volume(shift: int = 0) -> np.ndarray:
    """An organ with one lesion of 1 x 4 x 4 and one of 1 x 2 x 2 voxels, shifted along x."""
    volume = np.zeros((5, 20, 24), dtype=np.uint8)
    volume[1:4, 4:16, 4:16] = 1
    volume[2, 6:10, 6 + shift : 10 + shift] = 2
    volume[2, 12:14, 12:14] = 2
    return volume


@pytest.fixture
def folders(tmp_path):
    """Three cases with and without lesions: reference, prediction, dataset.json."""
    for case, reference, prediction in (
        ("a", label_volume(), label_volume(1)),
        ("b", label_volume(), np.where(label_volume() == 2, 1, label_volume()).astype(np.uint8)),
        ("c", np.zeros((5, 20, 24), dtype=np.uint8), np.zeros((5, 20, 24), dtype=np.uint8)),
    ):
        write_volume(tmp_path / "reference" / f"{case}.nii.gz", reference)
        write_volume(tmp_path / "prediction" / f"{case}.nii.gz", prediction)
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": REGIONS, "regions_class_order": [1, 2]}))
    return tmp_path


def region_names(evaluation) -> list[str]:
    return [region.name for region in evaluation.scheme.regions]


def evaluate(folder, **options):
    options = {"dataset_json": folder / "dataset.json", "num_processes": 1, **options}
    predictions = options.pop("predictions", {"model": folder / "prediction"})
    return evaluate_folders(folder / "reference", predictions, folder / "output", **options)


def test_tables(folders):
    evaluation = evaluate(folders)
    cases = read_table(folders / "output" / "cases.csv")
    assert len(cases) == 6 == len(evaluation.cases)
    assert region_names(evaluation) == ["organ", "lesion"]
    columns = (
        "prediction case region dice iou sensitivity precision specificity f2 mae ravd assd_mm hd_mm hd95_mm nsd auc "
        "num_reference_lesions num_predicted_lesions num_detected num_false_positives reference_volume_mm3 "
        "predicted_volume_mm3 area_ratio_percent"
    )
    assert set(columns.split()) <= set(cases[0])
    assert list(cases[0])[:11] == columns.split()[:11]
    lesion = next(row for row in cases if (row["case"], row["region"]) == ("a", "lesion"))
    assert float(lesion["dice"]) == pytest.approx(2 * 16 / 40)
    assert float(lesion["hd_mm"]) == 0.5
    assert float(lesion["reference_volume_mm3"]) == 20 * 0.5
    assert float(lesion["area_ratio_percent"]) == pytest.approx(100 * 9 / 480)
    empty = next(row for row in cases if (row["case"], row["region"]) == ("c", "lesion"))
    assert (empty["dice"], empty["hd_mm"], empty["auc"], empty["area_ratio_percent"]) == ("", "", "", "")

    lesions = read_table(folders / "output" / "lesions.csv")
    assert [row["detected"] for row in lesions if row["region"] == "lesion"] == ["1", "1", "0", "0"]
    first = next(row for row in lesions if row["region"] == "lesion")
    assert first["centroid"] == "2.00 7.50 7.50"  # in the whole image
    assert float(first["long_axis_mm"]) == pytest.approx(math.sqrt(18) * 0.5)
    assert float(first["dice"]) == pytest.approx(24 / 32)

    summary = json.loads((folders / "output" / "summary.json").read_text())["smallseg"]["regions"]["lesion"]
    assert summary["metrics"]["dice"]["count"] == 2  # the empty case is left out and the count says so
    assert summary["metrics"]["hd_mm"]["count"] == 1
    assert summary["lesions"]["num_detected"] == 2
    assert summary["lesions"]["detection_recall"] == 0.5
    assert summary["by_diameter"]["<5 mm"]["num_reference_lesions"] == 4
    assert summary["by_area_ratio"]["small"]["num_cases"] == 2
    assert [group["num_cases"] for group in summary["by_share"].values()] == [1, 0, 1]


def test_summary_equals_that_of_nnunet(folders, tmp_path):
    from nnunetv2.evaluation.evaluate_predictions import compute_metrics_on_folder
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    reference = label_volume()
    reference[0, :5] = 3
    write_volume(folders / "reference" / "d.nii.gz", reference)
    write_volume(folders / "prediction" / "d.nii.gz", label_volume(2))
    evaluate(folders)
    compute_metrics_on_folder(
        str(folders / "reference"), str(folders / "prediction"), str(tmp_path / "summary.json"), SimpleITKIO(),
        ".nii.gz", [(1, 2), 2], 3, num_processes=1,
    )  # fmt: skip
    expected = json.loads((tmp_path / "summary.json").read_text())
    ours = json.loads((folders / "output" / "summary.json").read_text())
    assert ours.pop("smallseg")
    assert ours.keys() == expected.keys()
    for part in ("foreground_mean", "mean"):
        np.testing.assert_equal(ours[part], expected[part])
    np.testing.assert_equal(ours["metric_per_case"], expected["metric_per_case"])


def test_ignored_voxels_count_nowhere(folders):
    reference = label_volume()
    reference[2, 6:10, 10:14] = 3  # where the prediction goes too far
    write_volume(folders / "reference" / "a.nii.gz", reference)
    evaluation = evaluate(folders)
    row = next(row for row in evaluation.cases if (row["case"], row["region"]) == ("a", "lesion"))
    assert row["precision"] == 1
    assert row["hd_mm"] == 0.5
    assert row["mae"] == pytest.approx(4 / (2400 - 16))


@pytest.mark.parametrize("ending", [".nii", ".mha", ".nrrd", ".tif", ".png", ".bmp"])
def test_formats(tmp_path, ending):
    flat = ending in (".png", ".bmp")
    for name, shift in (("reference", 0), ("prediction", 1)):
        labels = label_volume(shift)
        path = tmp_path / name / f"case{ending}"
        path.parent.mkdir()
        if ending == ".tif":
            tifffile.imwrite(path, labels)
            path.with_suffix(".json").write_text(json.dumps({"spacing": SPACING}))
        elif flat:
            Image.fromarray(labels[2]).save(path)
        else:
            write_volume(path, labels)
    settings = Settings(spacing=SPACING[1:]) if flat else None
    evaluation = evaluate(tmp_path, dataset_json=None, settings=settings)
    row = next(row for row in evaluation.cases if row["region"] == "2")
    assert row["dice"] == pytest.approx(2 * 16 / 40)
    assert row["hd_mm"] == 0.5
    assert row["reference_volume_mm3"] == pytest.approx(20 * (0.25 if flat else 0.5))
    assert evaluation.settings["has_spacing"]
    assert evaluation.settings["num_dimensions"] == (2 if flat else 3)


def test_flat_tiff_and_missing_spacing(tmp_path):
    for name in ("reference", "prediction"):
        (tmp_path / name).mkdir()
        tifffile.imwrite(tmp_path / name / "case.tiff", label_volume()[2])
    evaluation = evaluate(tmp_path, dataset_json=None)
    assert not evaluation.settings["has_spacing"]
    assert [row["dice"] for row in evaluation.cases] == [1, 1]


def test_files_that_do_not_match(folders):
    shutil.copy(folders / "prediction" / "a.nii.gz", folders / "prediction" / "extra.nii.gz")
    (folders / "prediction" / "b.nii.gz").unlink()
    with pytest.raises(
        EvaluationError, match=r"1 missing in .*prediction: b; 1 missing in .*reference: extra.*--chill"
    ):
        evaluate(folders)
    evaluation = evaluate(folders, chill=True)
    assert evaluation.skipped == {"model": ["b", "extra"]}
    assert {row["case"] for row in evaluation.cases} == {"a", "c"}
    assert evaluation.summaries["model"]["smallseg"]["skipped"] == ["b", "extra"]


def test_folders_without_a_common_case(folders):
    for path in (folders / "prediction").iterdir():
        path.rename(path.with_name(f"other_{path.name}"))
    with pytest.raises(EvaluationError, match="no case in common"):
        evaluate(folders, chill=True)
    with pytest.raises(EvaluationError, match="is not a folder"):
        evaluate(folders, predictions={"model": folders / "nowhere"})
    (folders / "empty").mkdir()
    with pytest.raises(EvaluationError, match="holds no label maps"):
        evaluate(folders, predictions={"model": folders / "empty"})


def test_two_files_for_one_case(folders):
    write_volume(folders / "prediction" / "a.mha", label_volume())
    with pytest.raises(EvaluationError, match=r"two files for the case a: a\.mha and a\.nii\.gz"):
        evaluate(folders)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"array": label_volume()[:4]}, r"different shapes, \(5, 20, 24\) and \(4, 20, 24\)"),
        ({"spacing": (2.0, 0.5, 0.6)}, r"spacing \(2, 0\.5, 0\.5\) and \(2, 0\.5, 0\.6\)"),
        ({"origin": (0.0, 5.0, 0.0)}, r"origin \(0, 0, 0\) and \(0, 5, 0\)"),
    ],
)
def test_geometry_mismatch_names_both_files(folders, change, message):
    write_volume(folders / "prediction" / "a.nii.gz", **{"array": label_volume(), **change})
    with pytest.raises(EvaluationError, match=message) as caught:
        evaluate(folders)
    assert str(folders / "reference" / "a.nii.gz") in str(caught.value)
    assert str(folders / "prediction" / "a.nii.gz") in str(caught.value)


def test_rounded_headers_are_no_mismatch(folders):
    write_volume(folders / "prediction" / "a.nii.gz", label_volume(), spacing=(2.0, 0.5001, 0.5))
    check_geometry(*(read_labels(folders / name / "a.nii.gz") for name in ("reference", "prediction")))


@pytest.mark.parametrize(
    ("value", "message"),
    [(np.nan, "holds NaN"), (0.5, "holds 0.5: a label map holds whole numbers"), (-1.0, "holds -1"), (7.0, r"\[7\]")],
)
def test_values_that_are_no_labels(folders, value, message):
    array = label_volume().astype(np.float32)
    array[0, 0, 0] = value
    write_volume(folders / "prediction" / "a.nii.gz", array)
    with pytest.raises(EvaluationError, match=message) as caught:
        evaluate(folders)
    assert str(folders / "prediction" / "a.nii.gz") in str(caught.value)


def test_nan_is_found_in_other_formats(tmp_path):
    array = np.full((2, 3, 4), np.nan, dtype=np.float32)
    write_volume(tmp_path / "case.mha", array)
    with pytest.raises(EvaluationError, match="holds NaN"):
        read_labels(tmp_path / "case.mha")


def test_ignore_label_in_a_prediction_is_an_error(folders):
    write_volume(folders / "prediction" / "a.nii.gz", np.full((5, 20, 24), 3, dtype=np.uint8))
    with pytest.raises(EvaluationError, match=r"holds the labels \[3\]"):
        evaluate(folders)


def test_colour_pictures_and_damaged_files(tmp_path):
    path = tmp_path / "case.png"
    Image.fromarray(np.zeros((4, 4, 3), dtype=np.uint8)).save(path)
    with pytest.raises(EvaluationError, match="a label map is grey"):
        read_labels(path)
    (tmp_path / "case.nii.gz").write_bytes(b"nothing")
    with pytest.raises(EvaluationError, match="cannot be read"):
        read_labels(tmp_path / "case.nii.gz")


def test_arguments_are_checked(folders):
    with pytest.raises(UsageError, match="no protocol 'brats'"):
        evaluate(folders, protocol="brats")
    with pytest.raises(UsageError, match="cannot name a prediction"):
        evaluate(folders, predictions={"a/b": folders / "prediction"})
    with pytest.raises(EvaluationError, match="does not name labels"):
        evaluate(folders, dataset_json=folders / "nowhere.json")
    with pytest.raises(UsageError, match="tolerance is 0 mm or more"):
        Settings(tolerance_mm=-1)


def test_labels_by_number_and_beside_the_prediction(folders):
    evaluation = evaluate(folders, dataset_json=None, labels=[1, 2])
    assert region_names(evaluation) == ["1", "2"]
    (folders / "dataset.json").rename(folders / "prediction" / "dataset.json")
    assert region_names(evaluate(folders, dataset_json=None)) == ["organ", "lesion"]
    assert region_names(evaluate(folders, dataset_json=None, labels=[2])) == ["2"]
    assert region_names(evaluate(folders, dataset_json=folders / "prediction" / "dataset.json", labels=[2])) == [
        "lesion"
    ]


def test_instances(folders):
    numbers = (label_volume() > 0).astype(np.uint8)
    numbers[2, 6:10, 6:10] = 5
    for case in "abc":
        write_volume(folders / "instances" / f"{case}.nii.gz", numbers)
    evaluation = evaluate(folders, instances=folders / "instances")
    rows = [row for row in evaluation.lesions if (row["case"], row["region"]) == ("a", "lesion")]
    assert sorted(row["lesion"] for row in rows) == [1, 5]
    (folders / "instances" / "b.nii.gz").unlink()
    with pytest.raises(EvaluationError, match="1 without a file of instances: b"):
        evaluate(folders, instances=folders / "instances")


def test_probabilities(folders):
    for case in "abc":
        reference = read_labels(folders / "reference" / f"{case}.nii.gz").array
        lesion = np.where(reference == 2, 0.75, 0.05)
        lesion[4, 18, 20] = 0.4  # a false candidate
        np.savez_compressed(folders / "prediction" / f"{case}.npz", probabilities=np.stack([reference > 0, lesion]))
    evaluation = evaluate(folders, with_probabilities=True)
    row = next(row for row in evaluation.cases if (row["case"], row["region"]) == ("a", "lesion"))
    assert row["auc"] == 1
    assert row["ece"] == pytest.approx((20 * 0.25 + 2379 * 0.05 + 0.4) / 2400)
    assert math.isnan(evaluation.cases[-1]["auc"])  # case c has no lesion
    summary = evaluation.summaries["model"]["smallseg"]["regions"]["lesion"]
    assert summary["froc"]["num_lesions"] == 4
    assert summary["froc"]["threshold"] == [0.75, 0.4]
    assert summary["froc"]["sensitivity"] == [1, 1]
    assert summary["froc"]["false_positives_per_case"] == [0, 1]
    assert sum(summary["calibration"]["num_voxels"]) == 3 * 2400
    scores = [row["score"] for row in evaluation.lesions if row["region"] == "lesion"]
    assert scores == [0.75] * 4
    np.savez_compressed(folders / "prediction" / "a.npz", probabilities=np.zeros((3, 5, 20, 24)))
    with pytest.raises(EvaluationError, match=r"need \(2, 5, 20, 24\)"):
        evaluate(folders, with_probabilities=True)
    (folders / "prediction" / "a.npz").unlink()
    with pytest.raises(EvaluationError, match="--save_probabilities"):
        evaluate(folders, with_probabilities=True)


def test_several_processes_give_the_same(folders):
    alone = evaluate(folders)
    together = evaluate(folders, num_processes=2)
    np.testing.assert_equal(together.cases, alone.cases)
    np.testing.assert_equal(together.lesions, alone.lesions)
    (folders / "prediction" / "b.nii.gz").write_bytes(b"nothing")
    with pytest.raises(EvaluationError, match=r"b\.nii\.gz cannot be read"):
        evaluate(folders, num_processes=2)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_protocols_run_on_folders(folders, protocol):
    from nnunetv2_smallseg.cli import evaluate as command

    assert command.PROTOCOLS == PROTOCOLS
    evaluation = evaluate(folders, protocol=protocol)
    written = json.loads((folders / "output" / f"protocol_{protocol}.json").read_text())
    assert set(written["model"]["cases"]) == {"a", "b", "c"}
    assert written["model"]["summary"] == json.loads(json.dumps(evaluation.protocol["model"]["summary"]))


def test_protocols_know_no_ignore_label(folders):
    reference = label_volume()
    reference[0] = 3
    write_volume(folders / "reference" / "b.nii.gz", reference)
    with pytest.raises(EvaluationError, match="ignore label 3, which no protocol knows"):
        evaluate(folders, protocol="s3mamba")


def test_command_line(folders, capsys):
    options = ["-djfile", folders / "dataset.json", "-o", folders / "output", "-np", 1]
    predictions = [f"ours={folders / 'prediction'}", folders / "reference"]
    arguments = ["evaluate", "-ref", folders / "reference", *options, "-pred", *predictions]
    arguments = [str(argument) for argument in arguments]
    # The reference holds no ignored voxels here, so it can stand for a perfect prediction.
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "ours        lesion" in out
    assert "0.400 (2)" in out  # a mean is never without its number of cases
    assert "2 of 4" in out
    assert sorted(path.name for path in (folders / "output").iterdir()) == [
        "cases.csv", "figures", "lesions.csv", "report.html", "statistics.json", "summary.json", "summary_ours.json",
        "summary_reference.json",
    ]  # fmt: skip
    assert main([*arguments, "--json", "--no_report", "--protocol", "s3mamba"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["predictions"]["reference"]["lesion"]["metrics"]["dice"]["mean"] == 1
    assert content["protocol"]["reference"]["all"]["DSC"] == 100
    assert main([*arguments, "-pred", str(folders / "prediction"), f"prediction={folders}"]) == 2
    assert "two predictions are named prediction" in capsys.readouterr().err
    (folders / "prediction" / "a.nii.gz").unlink()
    assert main(arguments) == 1
    assert "error: 1 missing in" in capsys.readouterr().err
