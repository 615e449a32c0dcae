"""Statistics of an evaluation against numbers worked out by hand and against known distributions."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from made_up_tables import lesion_row, made_up_rows

from nnunetv2_smallseg.errors import SmallSegError
from nnunetv2_smallseg.evaluation.froc import FROC_RATES, froc_curve
from nnunetv2_smallseg.evaluation.resampling import (
    Resampling,
    bootstrap_ratios,
    holm,
    percentile_interval,
    read_patients,
    wilcoxon_p_value,
)
from nnunetv2_smallseg.evaluation.result_tables import ResultTables, Units, size_order
from nnunetv2_smallseg.evaluation.statistics import (
    DETECTION_METRICS,
    compare_predictions,
    summarise_detection,
    summarise_metrics,
)

QUICK = Resampling(num_samples=400)


def seeded(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def case_row(prediction: str, case: str, region: str = "lesion", **metrics) -> dict:
    return {"prediction": prediction, "case": case, "region": region, **metrics}


def shares(samples: np.ndarray) -> dict[float, float]:
    """How often each value occurs."""
    values, counts = np.unique(np.round(samples, 9), return_counts=True)
    return dict(zip(values.tolist(), (counts / len(samples)).tolist(), strict=True))


class TestBootstrap:
    def test_two_cases_by_hand(self):
        """Means of 0 and 1: 0, 1/2, 1 in 1, 2, 1 of 4 samples. Ratios 1/1 and 0/3: 1, 1/4, 0."""
        upper, lower = np.array([[1.0, 1.0], [0.0, 0.0]]), np.array([[1.0, 1.0], [1.0, 3.0]])
        samples = bootstrap_ratios(upper, lower, seeded(), num_samples=40_000)
        assert shares(samples[:, 0]) == pytest.approx({0.0: 0.25, 0.5: 0.5, 1.0: 0.25}, abs=0.01)
        assert shares(samples[:, 1]) == pytest.approx({0.0: 0.25, 0.25: 0.5, 1.0: 0.25}, abs=0.01)
        # The same draws for both columns.
        assert np.array_equal(samples[:, 0] == 0.5, samples[:, 1] == 0.25)

    def test_mean_of_a_normal_distribution(self):
        values = seeded(1).normal(3, 2, (400, 1))
        samples = bootstrap_ratios(values, np.ones_like(values), seeded(2))
        ((low,), (high,)) = percentile_interval(samples)
        error = values.std() / 20
        assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
        assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)

    def test_interval_covers_the_truth_as_often_as_it_says(self):
        values = seeded(3).normal(0, 1, (60, 3000))  # 3000 studies of 60 cases
        low, high = percentile_interval(bootstrap_ratios(values, np.ones_like(values), seeded(4), num_samples=1000))
        assert np.mean((low <= 0) & (high >= 0)) == pytest.approx(0.942, abs=0.013)

    def test_copies_of_a_case_are_one_patient(self):
        values = seeded(5).normal(size=(12, 1))
        once = bootstrap_ratios(values, np.ones_like(values), seeded(6))
        copies = np.repeat(values, 5, axis=0)
        together = bootstrap_ratios(copies, np.ones_like(copies), seeded(6), groups=np.repeat(np.arange(12), 5))
        assert np.allclose(once, together)
        apart = bootstrap_ratios(copies, np.ones_like(copies), seeded(6))
        assert apart.std() < 0.6 * together.std()

    def test_blocks_do_not_matter(self, monkeypatch):
        values = seeded(7).normal(size=(9, 2))
        whole = bootstrap_ratios(values, np.ones_like(values), seeded(8), num_samples=50)
        monkeypatch.setattr("nnunetv2_smallseg.evaluation.resampling.BLOCK", 63)
        assert np.allclose(whole, bootstrap_ratios(values, np.ones_like(values), seeded(8), num_samples=50))

    def test_one_case_has_no_interval(self):
        upper, lower = np.array([[1.0, 1.0], [2.0, 0.0]]), np.array([[1.0, 1.0], [1.0, 0.0]])
        limits = percentile_interval(bootstrap_ratios(upper, lower, seeded()))
        assert limits[:, 0].tolist() == [1.0, 2.0]
        assert np.isnan(limits[:, 1]).all()

    def test_no_case(self):
        samples = bootstrap_ratios(np.zeros((0, 1)), np.zeros((0, 1)), seeded(), num_samples=3)
        assert samples.shape == (3, 1)
        assert np.isnan(percentile_interval(samples)).all()

    @pytest.mark.parametrize("options", [{"num_samples": 0}, {"level": 1.0}, {"level": 0.0}])
    def test_settings_that_make_no_sense(self, options):
        with pytest.raises(ValueError, match=next(iter(options))):
            Resampling(**options)


class TestTests:
    def test_holm_by_hand(self):
        assert holm([0.01, 0.04, 0.03]).tolist() == pytest.approx([0.03, 0.06, 0.06])
        assert holm([0.6, 0.7]).tolist() == [1.0, 1.0]
        corrected = holm([0.02, math.nan, 0.03])
        assert corrected[[0, 2]].tolist() == pytest.approx([0.04, 0.04])
        assert np.isnan(corrected[1])
        assert holm([]).shape == (0,)

    def test_wilcoxon_by_hand(self):
        # All five ranks on one side: 2 of 2 ** 5 sign patterns are as extreme. Equal pairs do not count.
        assert wilcoxon_p_value(np.array([1.0, 2.0, 3.0, 4.0, 5.0])) == pytest.approx(2 / 32)
        assert wilcoxon_p_value(np.array([1.0, 2.0, 0.0, 3.0, 4.0, 5.0, 1e-14])) == pytest.approx(2 / 32)
        # Ranks 1 to 4, the smallest negative: sums of 0 or 1 occur in 2 of 16 patterns, and twice for two sides.
        assert wilcoxon_p_value(np.array([-1.0, 2.0, 3.0, 4.0])) == pytest.approx(4 / 16)
        assert wilcoxon_p_value(np.zeros(7)) == 1.0
        assert math.isnan(wilcoxon_p_value(np.zeros(0)))

    def test_p_values_are_uniform_without_a_difference(self):
        p_values = np.array([wilcoxon_p_value(row) for row in seeded(9).normal(size=(400, 20))])
        assert np.mean(p_values < 0.05) == pytest.approx(0.05, abs=0.025)


class TestMetrics:
    def test_undefined_values_are_left_out_and_counted(self):
        cases = [case_row("a", f"case{number}", dice=value) for number, value in enumerate([0.2, "", 0.6, None, 1.0])]
        (summary,) = summarise_metrics(ResultTables(cases, []), seeded(), QUICK)
        assert (summary.num_cases, summary.num_undefined, summary.num_groups) == (3, 2, 3)
        assert (summary.mean.value, summary.median) == pytest.approx((0.6, 0.6))
        assert 0.2 <= summary.mean.low < 0.6 < summary.mean.high <= 1.0

    def test_absent_cases_and_empty_columns(self):
        cases = [
            case_row("a", "1", dice=0.5, nsd=""),
            case_row("a", "2", dice=0.7, nsd=""),
            case_row("b", "1", dice=0.1),
        ]
        tables = ResultTables(cases, [])
        assert tables.metrics == ["dice"]
        of_a, of_b = summarise_metrics(tables, seeded(), QUICK)
        assert (of_a.num_cases, of_a.num_undefined) == (2, 0)
        assert (of_b.num_cases, of_b.num_undefined) == (1, 1)
        assert math.isnan(of_b.mean.low)

    def test_patients_are_drawn_with_all_their_cases(self):
        cases = [case_row("a", f"{patient}{visit}", dice=patient / 10) for patient in range(8) for visit in "xyz"]
        tables = ResultTables(cases, [])
        patients = {f"{patient}{visit}": f"patient {patient}" for patient in range(8) for visit in "xyz"}
        (by_case,) = summarise_metrics(tables, seeded(), Resampling(2000))
        (by_patient,) = summarise_metrics(tables, seeded(), Resampling(2000, patients=patients))
        assert by_patient.num_groups == 8
        width = by_patient.mean.high - by_patient.mean.low
        assert width == pytest.approx(math.sqrt(3) * (by_case.mean.high - by_case.mean.low), rel=0.15)

    def test_same_seed_same_numbers(self):
        tables = ResultTables(*made_up_rows({"a": 0.2, "b": 0.8}, num_cases=10))
        assert summarise_metrics(tables, seeded(3), QUICK) == summarise_metrics(tables, seeded(3), QUICK)


def small_tables() -> ResultTables:
    """Three cases; a finds 2 of 4 lesions with 1 false positive, b finds 3 with 2 false positives in one case.

    In case 3, one predicted lesion of b covers both lesions: 2 detected, 1 predicted and true.
    """
    cases, lesions = [], []
    found = {
        "a": {"1": ([(4, 1), (12, 0)], [3]), "2": ([], []), "3": ([(8, 1), (6, 0)], [])},
        "b": {"1": ([(4, 0), (12, 1)], [3, 11]), "2": ([], []), "3": ([(8, 1), (6, 1)], [])},
    }
    for prediction, by_case in found.items():
        for case, (reference, false) in by_case.items():
            key = (prediction, case, "lesion")
            for number, (diameter, detected) in enumerate(reference):
                values = {"dice": 0.8 * detected, "score": 0.9 - 0.1 * number} if detected else {"dice": 0.0}
                lesions.append(lesion_row(key, "reference", number, diameter, detected=detected, **values))
            lesions += [lesion_row(key, "false_positive", n, diameter, score=0.85) for n, diameter in enumerate(false)]
            num_true = 1 if (prediction, case) == ("b", "3") else sum(detected for _, detected in reference)
            cases.append(case_row(*key[:2], dice=0.5, num_predicted_lesions=num_true + len(false)))
    return ResultTables(cases, lesions)


class TestDetection:
    def test_all_sizes_by_hand(self):
        of_a, of_b = (row for row in summarise_detection(small_tables(), seeded(), QUICK) if row.size_bin is None)
        assert (of_a.num_cases, of_a.num_lesions, of_a.num_detected, of_a.num_false_positives) == (3, 4, 2, 1)
        assert of_a.pooled_recall.value == pytest.approx(2 / 4)
        assert of_a.pooled_precision.value == pytest.approx(2 / 3)
        assert of_a.pooled_f1.value == pytest.approx(4 / 7)
        assert of_a.false_positives_per_case.value == pytest.approx(1 / 3)
        assert of_a.pooled_dice.value == pytest.approx(0.4)
        assert of_b.pooled_recall.value == pytest.approx(3 / 4)
        assert of_b.pooled_precision.value == pytest.approx(2 / 4)  # one predicted lesion for two
        assert of_b.pooled_f1.value == pytest.approx(2 * 0.75 * 0.5 / 1.25)

    def test_sizes_by_hand(self):
        rows = {(row.prediction, row.size_bin): row for row in summarise_detection(small_tables(), seeded(), QUICK)}
        assert (rows["a", "<5"].num_lesions, rows["a", "<5"].num_detected) == (1, 1)
        assert (rows["a", "5-10"].num_lesions, rows["a", "5-10"].num_detected) == (2, 1)
        assert rows["b", "10-20"].num_false_positives == 1
        assert rows["b", "10-20"].false_positives_per_case.value == pytest.approx(1 / 3)
        assert math.isnan(rows["a", "<5"].pooled_precision.value)
        assert sum(rows["b", name].num_lesions for name in ("<5", "5-10", "10-20")) == rows["b", None].num_lesions

    def test_interval_of_recall_by_hand(self):
        """Two cases with 1 of 1 and 0 of 3 lesions: 0 in a quarter of the samples, 1 in another."""
        lesions = [lesion_row(("a", "1", "lesion"), "reference", 1, 9, detected=1)]
        lesions += [lesion_row(("a", "2", "lesion"), "reference", number, 9, detected=0) for number in range(3)]
        tables = ResultTables([case_row("a", "1"), case_row("a", "2")], lesions)
        (row, _) = summarise_detection(tables, seeded(), Resampling(4000, level=0.4))
        assert row.pooled_recall.value == pytest.approx(0.25)
        assert (row.pooled_recall.low, row.pooled_recall.high) == pytest.approx((0.25, 0.25))
        (row, _) = summarise_detection(tables, seeded(), Resampling(4000, level=0.6))
        assert (row.pooled_recall.low, row.pooled_recall.high) == pytest.approx((0.0, 1.0))

    def test_no_lesion_at_all(self):
        (row,) = summarise_detection(ResultTables([case_row("a", "1", dice="")], []), seeded(), QUICK)
        assert (row.num_cases, row.num_lesions, row.num_false_positives) == (1, 0, 0)
        assert math.isnan(row.pooled_recall.value)
        assert row.false_positives_per_case.value == 0


class TestComparison:
    def test_by_hand(self):
        values = {"a": [0.1, 0.2, 0.3, 0.4, 0.5, ""], "b": [0.2, 0.4, 0.6, 0.8, 0.5, 0.9]}
        cases = [
            case_row(name, str(number), dice=value, hd95_mm=value and 10 * value, reference_volume_mm3=4)
            for name, column in values.items()
            for number, value in enumerate(column)
        ]
        rows = {row.metric: row for row in compare_predictions(ResultTables(cases, []), seeded(), QUICK)}
        assert set(rows) == {"dice", "hd95_mm", *DETECTION_METRICS}  # a volume of the reference ranks nothing
        dice, distance = rows["dice"], rows["hd95_mm"]
        assert (dice.first, dice.second, dice.num_cases, dice.num_undefined) == ("a", "b", 5, 1)
        assert (dice.num_better, dice.num_equal, dice.num_worse) == (4, 1, 0)
        assert (dice.value_first, dice.value_second, dice.difference.value) == pytest.approx((0.3, 0.5, 0.2))
        assert 0 <= dice.difference.low < 0.2 < dice.difference.high <= 0.4
        assert dice.p_value == dice.p_value_holm == pytest.approx(2 / 16)
        assert (distance.num_better, distance.num_equal, distance.num_worse) == (0, 1, 4)  # lower is better

    def test_holm_counts_pairs_and_regions(self):
        names = {"a": 0.0, "b": 0.6, "c": 1.2}
        tables = ResultTables(*made_up_rows(names, num_cases=15, regions=("tumour", "cyst"), scores=False))
        rows = [row for row in compare_predictions(tables, seeded(), QUICK) if row.metric == "dice"]
        assert [(row.first, row.second) for row in rows] == [("a", "b"), ("a", "c"), ("b", "c")] * 2
        assert [row.p_value_holm for row in rows] == pytest.approx(holm([row.p_value for row in rows]).tolist())
        assert min(row.p_value_holm for row in rows) == pytest.approx(6 * min(row.p_value for row in rows))

    def test_patients_are_the_pairs_of_the_test(self):
        cases = [
            case_row(name, f"{patient}{visit}", dice=0.3 + patient / 20 + (name == "b") * (0.01 + patient / 100))
            for name in "ab"
            for patient in range(5)
            for visit in "xyz"
        ]
        patients = {f"{patient}{visit}": str(patient) for patient in range(5) for visit in "xyz"}
        row = compare_predictions(ResultTables(cases, []), seeded(), Resampling(300, patients=patients))[0]
        assert row.num_cases == 15
        assert row.p_value == pytest.approx(2 / 32)  # five patients, not fifteen cases

    def test_detection_is_resampled_in_pairs(self):
        """Predictions that differ by one false positive in every case differ by exactly one per case."""
        cases, lesions = [], []
        for number in range(12):
            for name in "ab":
                count = number % 4 + (name == "b")
                cases.append(case_row(name, str(number), num_predicted_lesions=count))
                lesions += [lesion_row((name, str(number), "lesion"), "false_positive", n, 4) for n in range(count)]
        rows = {row.metric: row for row in compare_predictions(ResultTables(cases, lesions), seeded(), QUICK)}
        difference = rows["false_positives_per_case"].difference
        assert (difference.value, difference.low, difference.high) == pytest.approx((1, 1, 1))
        assert math.isnan(rows["false_positives_per_case"].p_value)

    def test_one_prediction_has_no_comparison(self):
        assert compare_predictions(ResultTables(*made_up_rows({"a": 0.5}, num_cases=3)), seeded(), QUICK) == []


class TestFroc:
    def test_by_hand(self):
        """Prediction b: scores 0.9 and 0.8 of detected lesions (and 0.8 again), two false positives of 0.85."""
        curve = froc_curve(small_tables(), "lesion", "b", seeded(), QUICK)
        assert curve.thresholds.tolist() == [math.inf, 0.9, 0.85, 0.8]
        assert curve.false_positives_per_case.tolist() == pytest.approx([0, 0, 2 / 3, 2 / 3])
        assert curve.recall.tolist() == pytest.approx([0, 1 / 4, 1 / 4, 3 / 4])
        # Up to 0.5 false positives per case only the first threshold fits, from 1 on all do.
        assert [estimate.value for estimate in curve.at_rates] == pytest.approx([0.25] * 3 + [0.75] * 4)
        assert curve.mean_recall.value == pytest.approx((3 * 0.25 + 4 * 0.75) / len(FROC_RATES))

    def test_interval_holds_the_curve(self):
        tables = ResultTables(*made_up_rows({"a": 0.5}))
        curve = froc_curve(tables, "lesion", "a", seeded(), QUICK)
        assert all(estimate.low <= estimate.value <= estimate.high for estimate in curve.at_rates)
        assert np.all(np.diff(curve.low) >= 0)
        assert np.all(curve.low <= curve.high)
        detection = summarise_detection(tables, seeded(), QUICK)[0]
        assert curve.recall[-1] == pytest.approx(detection.pooled_recall.value)
        assert curve.false_positives_per_case[-1] == pytest.approx(detection.false_positives_per_case.value)

    def test_without_scores(self):
        tables = ResultTables(*made_up_rows({"a": 0.5}, num_cases=5, scores=False))
        assert not tables.has_scores
        assert froc_curve(tables, "lesion", "a", seeded(), QUICK) is None


class TestInput:
    def test_files_and_rows_are_the_same(self, tmp_path):
        import csv

        rows = made_up_rows({"a": 0.3}, num_cases=5)
        for name, table in zip(("cases.csv", "lesions.csv"), rows, strict=True):
            with (tmp_path / name).open("w", newline="") as stream:
                writer = csv.DictWriter(stream, list(table[0]))
                writer.writeheader()
                writer.writerows(table)
        read = ResultTables.read(tmp_path)
        assert np.array_equal(
            read.values("lesion", "dice"), ResultTables(*rows).values("lesion", "dice"), equal_nan=True
        )
        assert len(read.lesions) == len(rows[1])

    def test_rows_may_lack_what_is_undefined(self):
        """Rows as the evaluation holds them in memory: false positives have no Dice, undefined values are None."""
        key = {"prediction": "a", "case": "1", "region": "lesion", "size_bin": "<5 mm", "volume_mm3": np.float64(9)}
        lesions = [
            {**key, "kind": "false_positive", "score": None},
            {**key, "kind": "reference", "detected": True, "dice": 0.5, "score": np.float32(0.25)},
        ]
        tables = ResultTables([case_row("a", "1", dice=None, nsd=math.nan, num_predicted_lesions=2)], lesions)
        assert tables.metrics == ["num_predicted_lesions"]
        assert tables.has_scores
        row = summarise_detection(tables, seeded(), QUICK)[0]
        assert (row.num_detected, row.pooled_precision.value, row.pooled_dice.value) == (1, 0.5, 0.5)
        assert math.isnan(row.diameter_error_mm.value)

    def test_missing_file(self, tmp_path):
        with pytest.raises(SmallSegError, match=r"cases\.csv does not exist"):
            ResultTables.read(tmp_path)

    @pytest.mark.parametrize(
        ("cases", "lesions", "message"),
        [
            ([], [], "holds no case"),
            ([case_row("a", "1"), case_row("a", "1")], [], "two rows"),
            ([{"prediction": "a", "case": "1"}], [], "no region"),
            ([case_row("a", "1", dice="inf")], [], "dice holds 'inf'"),
            ([case_row("a", "1", dice="good")], [], "dice holds 'good'"),
            ([case_row("a", "1")], [lesion_row(("a", "2", "lesion"), "reference", 1, 5)], "not in cases.csv"),
            ([case_row("a", "1")], [lesion_row(("a", "1", "lesion"), "blob", 1, 5)], "kind is 'blob'"),
            ([case_row("a", "1")], [lesion_row(("a", "1", "lesion"), "reference", 1, 5)], "was detected"),
        ],
    )
    def test_tables_that_are_wrong(self, cases, lesions, message):
        with pytest.raises(SmallSegError, match=message):
            ResultTables(cases, lesions)

    def test_order_of_size_bins(self):
        assert sorted([">=20 mm", "10-20 mm", "<5 mm", "5-10 mm"], key=size_order) == [
            "<5 mm", "5-10 mm", "10-20 mm", ">=20 mm"
        ]  # fmt: skip
        assert sorted([">20", "tiny", "10-20", "<5", "5-10", "<2.5"], key=size_order) == [
            "<2.5", "<5", "5-10", "10-20", ">20", "tiny"
        ]  # fmt: skip

    def test_units(self):
        assert (Units().volume, Units(2).volume, Units(2, "px").volume) == ("mm³", "mm²", "px²")

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("patients.csv", "case,patient\nc1,p1\nc2,p1\nc3,p2\n"),
            ("patients.json", json.dumps({"c1": "p1", "c2": "p1", "c3": "p2"})),
            ("patients.json", json.dumps({"p1": ["c1", "c2"], "p2": ["c3"]})),
        ],
    )
    def test_patients(self, tmp_path, name, text):
        (tmp_path / name).write_text(text)
        patients = read_patients(tmp_path / name)
        assert patients == {"c1": "p1", "c2": "p1", "c3": "p2"}
        assert Resampling(patients=patients).groups(["c3", "c1", "c2"]).tolist() == [1, 0, 0]
        with pytest.raises(SmallSegError, match="1 of 2 cases have no patient, such as c9"):
            Resampling(patients=patients).groups(["c1", "c9"])

    @pytest.mark.parametrize(
        ("name", "text", "message"),
        [
            ("patients.csv", "id,patient\nc1,p1\n", "does not say"),
            ("patients.json", "[1, 2]", "does not say"),
            ("patients.json", "{", "does not say"),
            ("patients.csv", "case,patient\nc1,p1\nc1,p2\n", "p1 and p2"),
        ],
    )
    def test_patients_that_are_wrong(self, tmp_path, name, text, message):
        (tmp_path / name).write_text(text)
        with pytest.raises(SmallSegError, match=message):
            read_patients(tmp_path / name)
        with pytest.raises(SmallSegError, match="cannot be read"):
            read_patients(tmp_path / "absent.csv")
