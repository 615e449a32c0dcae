"""Official protocols against the numbers of the organisers' own programs."""

from __future__ import annotations

import json

import numpy as np
import pytest
import SimpleITK

from nnunetv2_smallseg.evaluation.protocols import atlas, kits23, s3mamba, stsnet, svanet, uls23


@pytest.fixture(scope="module")
def metrics(shared):
    return shared / "reference" / "datasets" / "metrics"


def expected_numbers(folder) -> dict:
    return json.loads((folder / "expected.json").read_text())


def read_pair(folder, reference: str, prediction: str):
    images = [SimpleITK.ReadImage(str(folder / "pairs" / f"{name}.nii.gz")) for name in (reference, prediction)]
    return *map(SimpleITK.GetArrayFromImage, images), images[1].GetSpacing()[::-1]


def test_uls23_lesions(metrics):
    arrays = np.load(metrics / "uls23" / "pairs.npz")
    pairs = expected_numbers(metrics / "uls23")["pairs"]
    assert len(pairs) >= 10
    for name, expected in pairs.items():
        scores = uls23.lesion_scores(arrays[f"{name}__ref"], arrays[f"{name}__pred"])
        expected.pop("shape_zyx")
        assert scores == pytest.approx(expected, abs=1e-9), name


def test_uls23_consistency(metrics):
    arrays = np.load(metrics / "uls23" / "consistency.npz")
    for name, expected in expected_numbers(metrics / "uls23")["consistency"].items():
        first, second = arrays[f"{name}__a"], arrays[f"{name}__b"]
        where = expected["translation_mm_xyz"], expected["spacing_xyz"]
        moved, shift = uls23.shift_to(second, *where)
        assert list(shift) == expected["applied_shift_voxels_xyz"]
        assert moved.sum() == expected["aligned_voxels"]
        assert uls23.consistency_dice(first, second, *where) == pytest.approx(expected["dice_after"], abs=1e-9)
    assert uls23.consistency_dice(first * 0, first, (0, 0, 0), (1, 1, 1)) == 0


def test_uls23_shift_is_the_spline_of_the_organisers():
    from scipy import ndimage

    mask = np.random.default_rng(0).random((7, 8, 9)) > 0.7
    for translation in ((2.0, -3.0, 1.0), (0.5, 9.0, -2.0)):
        moved, shift = uls23.shift_to(mask, translation, (1.0, 1.0, 1.0))
        spline = ndimage.shift(mask.astype(np.uint8), shift[::-1], order=3, mode="nearest")
        np.testing.assert_array_equal(moved, spline > 0)


def test_uls23_stack(metrics):
    expected = json.loads((metrics / "uls23" / "stack_expected.json").read_text())
    stack = np.load(metrics / "uls23" / "stack.npz")
    result = uls23.evaluate_stack(
        stack["reference"],
        stack["prediction"],
        expected["single_sample"],
        expected["multi_sample"],
        expected["stacked_spacing"],
        expected["voi_depth"],
    )
    aggregates = expected["result"]["aggregates"]
    assert result["ChallengeScore"] == pytest.approx(aggregates["ChallengeScore"], abs=1e-12)
    for name in ("SegmentationDice", "LongAxisErrorPercentage", "ShortAxisErrorPercentage", "ConsistencyDice"):
        aggregates[name].pop("samples", None)
        assert result[name] == pytest.approx(aggregates[name], abs=1e-12)


def test_uls23_folder_without_consistency():
    case = {"dice": 0.5, "long_axis_sape": 0.2, "short_axis_sape": 0.4}
    summary = uls23.summarise({"a": case, "b": {**case, "dice": 1.0}})
    assert summary["score_without_consistency"] == pytest.approx((0.8 * 0.75 + 0.05 * 0.8 + 0.05 * 0.6) / 0.9)
    assert summary["SegmentationDice"]["count"] == 2
    assert uls23.summarise({"a": case})["SegmentationDice"]["std"] is None


def test_kits23(metrics):
    folder = metrics / "kits23"
    expected = expected_numbers(folder)
    cases = {}
    for case, numbers in expected["cases"].items():
        cases[case] = kits23.case_scores(*read_pair(folder, f"{case}_ref", f"{case}_pred"))
        for metric in ("dice", "surface_dice"):
            assert cases[case][metric] == pytest.approx(numbers[metric], abs=1e-9), (case, metric)
    summary = kits23.summarise(cases)
    assert [summary[column] for column in expected["columns"]] == pytest.approx(expected["mean"], abs=1e-9)


def test_kits23_ranking(metrics):
    expected = expected_numbers(metrics / "kits23")["ranking"]
    rows = [line.split(",") for line in expected["summary_csv"][1:]]
    ranking = kits23.rank({name: [float(value) for value in values] for name, *values in rows})
    lines = [
        f"{row.team},{row.final_rank},{row.mean_rank:.4f},{row.mean_dice:.8f},{row.mean_surface_dice:.8f},"
        f"{row.tumor_dice:.8f}"
        for row in ranking
    ]
    assert lines == expected["expected_csv"][1:]


def test_atlas(metrics):
    folder = metrics / "atlas"
    expected = expected_numbers(folder)
    cases = {}
    for index, (case, numbers) in enumerate(expected["cases"].items()):
        reference, prediction, _ = read_pair(folder, f"lb{index}", f"im{index}")
        # The expected numbers were made with the round spacing, the files hold single precision.
        cases[case] = atlas.evaluate_case(reference, prediction, numbers["spacing_zyx"])
        for region in ("liver", "tumour"):
            assert cases[case][region] == pytest.approx(numbers[region], abs=1e-9), (case, region)
        for burden in ("burden_ref", "burden_pred"):
            assert cases[case][burden] == pytest.approx(numbers[burden], abs=1e-12)
    summary = atlas.summarise(cases)
    assert summary["rmse_tumour_burden"] == pytest.approx(expected["rmse_tumour_burden"], abs=1e-12)
    assert summary["tumour_assd_mm"]["num_cases"] == 4
    assert summary["tumour_dice"]["num_cases"] == 5


def test_atlas_ranking():
    good = {f"{region}_{score}": 1.0 for region in atlas.REGIONS for score in ("dice", "surface_dice_5mm")}
    good |= {f"{region}_{score}": 2.0 for region in atlas.REGIONS for score in ("assd_mm", "hausdorff_mm")}
    good["rmse_tumour_burden"] = 0.1
    worse = {**good, "liver_dice": 0.9, "tumour_hausdorff_mm": 3.0}
    assert atlas.rank({"worse": worse, "good": good, "same": good}) == {"worse": 3, "good": 1, "same": 1}


def test_svanet(shared):
    arrays = np.load(shared / "reference" / "svanet" / "metrics_and_size_groups.npz")
    meta = json.loads(str(arrays["meta"]))
    images = [svanet.evaluate_image(*pair) for pair in zip(arrays["target"], arrays["prediction"], strict=True)]
    ratios = [image["area_ratio_percent"] for image in images]
    np.testing.assert_allclose(ratios, arrays["area_ratio_percent_per_image"], atol=1e-9)
    for index, target in enumerate(arrays["target"]):
        expected = arrays[f"area_ratio_percent_per_class/{index}"]
        np.testing.assert_allclose(svanet.class_area_ratios(target), expected, atol=1e-9)
    compared = 0
    for limit, expected in meta["groups"].items():
        assert [index for index, ratio in enumerate(ratios) if ratio < float(limit)] == expected["images"]
        metrics = svanet.group_metrics([images[index] for index in expected["images"]], meta["num_classes"])
        for name in metrics.keys() & expected.keys():
            # The authors compute in single precision.
            assert metrics[name] == pytest.approx(expected[name], rel=1e-6), (limit, name)
            compared += 1
    assert compared == 3 * 10
    summary = svanet.summarise({"stack": svanet.evaluate_case(arrays["target"], arrays["prediction"], (1, 1, 1))})
    assert [summary[name]["num_images"] for name in ("ultra small", "small", "all")] == [6, 8, 12]
    assert summary["all"]["mDice"] == pytest.approx(meta["groups"]["100"]["mDice"], rel=1e-6)


def test_s3mamba_pools_pixels_within_groups():
    reference, prediction = np.zeros((2, 4, 4), dtype=np.uint8)
    reference[0, :2] = prediction[0, 1:4] = 1
    case = s3mamba.evaluate_case(reference, prediction, (1, 1))
    assert case == {"true_positive": 1, "false_positive": 2, "false_negative": 1, "true_negative": 12}
    large = {"true_positive": 5, "false_positive": 0, "false_negative": 5, "true_negative": 6}
    empty = {"true_positive": 0, "false_positive": 1, "false_negative": 0, "true_negative": 15}
    summary = s3mamba.summarise({"a": large, "b": case, "c": case, "d": empty})
    assert [summary[group]["num_cases"] for group in ("small", "medium", "large", "all")] == [1, 1, 1, 4]
    assert summary["large"]["SEN"] == 50
    iou, dsc = summary["all"]["MIOU"] / 100, summary["all"]["DSC"] / 100
    assert iou == pytest.approx(7 / 19)
    assert dsc == pytest.approx(2 * iou / (1 + iou))


def test_stsnet_averages_images_with_background():
    reference, prediction = np.zeros((2, 4, 5), dtype=np.uint8)
    reference[0, :2] = prediction[0, 1:3] = 1
    nothing = stsnet.evaluate_case(reference * 0, reference * 0, (1, 1))
    summary = stsnet.summarise({"a": stsnet.evaluate_case(reference, prediction, (1, 1)), "b": nothing})
    # Image a: foreground Dice 1/2, background Dice 34/36. Image b: background only, 1.
    assert summary["mDice"] == {"mean": pytest.approx(((1 / 2 + 34 / 36) / 2 + 1) / 2), "num_images": 2}
    assert summary["Jaccard"] == {"mean": pytest.approx(1 / 3), "num_images": 1}
    assert summary["Recall"] == {"mean": 0.5, "num_images": 1}
