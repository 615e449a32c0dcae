"""Voxel, surface and lesion metrics on arrays worked out by hand, edge cases included."""

from __future__ import annotations

import math

import numpy as np
import pytest

from nnunetv2_smallseg.errors import UsageError
from nnunetv2_smallseg.evaluation import edge_cases, probabilities
from nnunetv2_smallseg.evaluation.axes import recist_axes
from nnunetv2_smallseg.evaluation.components import (
    CONNECTIVITIES,
    Components,
    connected_components,
    connectivity_for,
    instance_components,
)
from nnunetv2_smallseg.evaluation.lesion_metrics import evaluate_lesions
from nnunetv2_smallseg.evaluation.matching import MatchingRule
from nnunetv2_smallseg.evaluation.size_groups import (
    area_ratio_groups,
    area_ratio_percent,
    diameter_bin,
    diameter_bins,
    equivalent_diameter_mm,
    share_groups,
)
from nnunetv2_smallseg.evaluation.surface_metrics import border_voxels, surface_dice, surface_distances
from nnunetv2_smallseg.evaluation.voxel_metrics import Counts, confusion_matrix, region_counts, voxel_metrics

NAN = pytest.approx(math.nan, nan_ok=True)


def picture(*rows: str) -> np.ndarray:
    """A mask drawn with # for its pixels, (Y, X)."""
    return np.array([[pixel == "#" for pixel in row] for row in rows])


def lesions_of(reference: np.ndarray, prediction: np.ndarray, rule: MatchingRule | None = None, **options):
    """Evaluates two masks as components with a spacing of 1 mm."""
    options = {"spacing": (1.0,) * reference.ndim, "diameter_limits_mm": (5, 10, 20), **options}
    return evaluate_lesions(
        connected_components(reference), connected_components(prediction), rule=rule or MatchingRule(), **options
    )


# Voxels


def test_voxel_metrics_by_hand():
    metrics = voxel_metrics(Counts(true_positive=3, false_positive=1, false_negative=2, true_negative=4))
    expected = {
        "dice": 6 / 9,
        "iou": 3 / 6,
        "sensitivity": 3 / 5,
        "precision": 3 / 4,
        "specificity": 4 / 5,
        "f2": 15 / 24,
        "mae": 3 / 10,
        "ravd": 1 / 5,
    }
    assert metrics == pytest.approx(expected)
    p, r = metrics["precision"], metrics["sensitivity"]
    assert metrics["f2"] == pytest.approx(5 * p * r / (4 * p + r))


NAMES = ("dice", "iou", "f2", "sensitivity", "precision", "specificity", "mae", "ravd")


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        (Counts(0, 0, 0, 9), (NAN, NAN, NAN, NAN, NAN, 1, 0, NAN)),
        (Counts(0, 3, 0, 6), (0, 0, 0, NAN, 0, 6 / 9, 3 / 9, NAN)),
        (Counts(0, 0, 3, 6), (0, 0, 0, 0, NAN, 1, 3 / 9, 1)),
        (Counts(9, 0, 0, 0), (1, 1, 1, 1, 1, NAN, 0, 0)),
    ],
    ids=["both empty", "reference empty", "prediction empty", "reference fills the image"],
)
def test_voxel_metrics_without_an_answer(counts, expected):
    assert voxel_metrics(counts) == dict(zip(NAMES, expected, strict=True))


@pytest.mark.parametrize(("rule", "value"), edge_cases.BOTH_EMPTY_RULES.items())
def test_both_empty_is_a_named_choice(rule, value):
    metrics = voxel_metrics(Counts(0, 0, 0, 9), rule)
    assert all(metrics[name] == pytest.approx(value, nan_ok=True) for name in ("dice", "iou", "f2"))
    empty = np.zeros((3, 3), dtype=bool)
    assert surface_dice(empty, empty, (1, 1), 1.0, rule) == pytest.approx(value, nan_ok=True)
    # One empty mask is a miss or a false positive under every rule.
    assert voxel_metrics(Counts(0, 3, 0, 6), rule)["dice"] == 0


def test_unknown_rule_names_the_rules():
    with pytest.raises(UsageError, match="undefined, one, zero"):
        edge_cases.value_if_empty("dice", True, True, "half")


def test_counts_of_regions_leave_out_the_ignore_label():
    reference = np.array([[0, 1, 2, 9], [0, 1, 2, 9]], dtype=np.uint8)
    prediction = np.array([[1, 1, 1, 1], [0, 0, 2, 0]], dtype=np.uint8)
    matrix = confusion_matrix(reference, prediction)
    assert matrix == {(0, 0): 1, (0, 1): 1, (1, 0): 1, (1, 1): 1, (2, 1): 1, (2, 2): 1, (9, 0): 1, (9, 1): 1}
    assert region_counts(matrix, (1, 2), 9) == Counts(3, 1, 1, 1)
    assert region_counts(matrix, (1,), 9) == Counts(1, 2, 1, 2)
    assert region_counts(matrix, (1,), None) == Counts(1, 3, 1, 3)
    assert confusion_matrix(reference.astype(int) * 1000, prediction)[9000, 1] == 1


# Surfaces


def test_border_voxels_have_a_neighbour_outside():
    mask = np.zeros((5, 5), dtype=bool)
    mask[0:4, 1:4] = True  # touches the upper border, which counts as outside
    border = {tuple(position) for position in border_voxels(mask)}
    assert border == {(y, x) for y in range(4) for x in (1, 2, 3)} - {(1, 2), (2, 2)}


def test_distances_are_in_mm_along_each_axis():
    reference, prediction = np.zeros((2, 8, 8, 8), dtype=bool)
    reference[2, 2, 2] = True
    prediction[4, 2, 2] = True
    assert surface_distances(reference, prediction, (3.0, 0.5, 0.7)) == {"assd_mm": 6.0, "hd_mm": 6.0, "hd95_mm": 6.0}
    assert surface_distances(reference.T, prediction.T, (3.0, 0.5, 0.7))["hd_mm"] == pytest.approx(1.4)


def test_distances_by_hand():
    # Reference: one pixel at x = 0. Prediction: pixels at x = 0 and x = 3.
    reference, prediction = picture("#......"), picture("#..#...")
    distances = surface_distances(reference, prediction, (1, 2))
    assert distances["assd_mm"] == pytest.approx((0 + 0 + 6) / 3)  # over the border pixels of both
    assert distances["hd_mm"] == 6
    assert distances["hd95_mm"] == pytest.approx(np.percentile([0, 6], 95))


@pytest.mark.parametrize("which", ["reference", "prediction", "both"])
def test_distances_to_nothing_are_undefined(which):
    mask, empty = np.ones((2, 2, 2), dtype=bool), np.zeros((2, 2, 2), dtype=bool)
    pair = (empty if which != "prediction" else mask, empty if which != "reference" else mask)
    assert all(math.isnan(value) for value in surface_distances(*pair, (1, 1, 1)).values())
    assert surface_dice(*pair, (1, 1, 1), 1.0) == (NAN if which == "both" else 0)


def test_surface_dice_by_hand():
    # Two squares of 2 x 2 pixels, shifted by one pixel of 1 mm in y: all corners lie within 1 mm of each other.
    reference, prediction = np.zeros((2, 6, 6), dtype=bool)
    reference[1:3, 1:3] = prediction[2:4, 1:3] = True
    assert surface_dice(reference, prediction, (1, 1), 1.0) == 1
    # Exactly the tolerance counts, whatever the rounding of multiples of the spacing.
    assert surface_dice(reference, prediction, (0.7, 0.7), 0.7) == 1
    assert surface_dice(reference, reference, (3, 1), 0.0) == 1
    assert surface_dice(reference, prediction, (1, 1), 0.5) < 1


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (3.0, 0.7, 0.8), (0.5, 2.0)])
def test_surface_dice_equals_the_library(spacing):
    from scipy import ndimage

    generator = np.random.default_rng(0)
    shape = (14, 17, 16)[: len(spacing)]
    masks = [ndimage.gaussian_filter(generator.normal(size=shape), 1.5) > 0.05 for _ in range(2)]
    surface_distance = pytest.importorskip("surface_distance")
    distances = surface_distance.compute_surface_distances(*masks, spacing)
    for tolerance in (0.0, 0.7, 1.0, 2.5):
        expected = surface_distance.compute_surface_dice_at_tolerance(distances, tolerance)
        assert surface_dice(*masks, spacing, tolerance) == pytest.approx(expected, abs=1e-12)


# Lesions


def test_connectivity_is_checked():
    diagonal = picture("#.", ".#")
    assert connected_components(diagonal).count == 1
    assert connected_components(diagonal, 4).count == 2
    assert connectivity_for(3) == 26
    with pytest.raises(UsageError, match="26 does not exist in 2D"):
        connectivity_for(2, 26)


@pytest.mark.parametrize("num_dimensions", [2, 3])
def test_components_equal_those_of_scipy(num_dimensions):
    from scipy import ndimage

    generator = np.random.default_rng(num_dimensions)
    for _ in range(200):
        mask = generator.random(generator.integers(1, 9, num_dimensions)) < generator.random()
        for connectivity, rank in zip(CONNECTIVITIES[num_dimensions], (1, 2, 3)[:num_dimensions], strict=True):
            components = connected_components(mask, connectivity)
            expected, count = ndimage.label(mask, ndimage.generate_binary_structure(num_dimensions, rank))
            pairs = set(zip(components.labels.ravel().tolist(), expected.ravel().tolist(), strict=True))
            assert components.count == count
            assert len(pairs - {(0, 0)}) == count


def test_one_lesion_split_in_two():
    reference, prediction = picture("#######"), picture("###.###")
    result = lesions_of(reference, prediction)
    assert result.case["num_detected"] == 1
    assert result.case["num_false_positives"] == 0
    assert result.case["detection_f1"] == 1
    (row,) = result.rows
    assert row["dice"] == pytest.approx(12 / 13)  # with both parts together
    assert row["volume_error_mm3"] == -1
    one_to_one = lesions_of(reference, prediction, MatchingRule("iou", 0.1)).case
    assert (one_to_one["num_detected"], one_to_one["num_false_positives"]) == (1, 1)


def test_two_lesions_merged():
    reference, prediction = picture("###.###"), picture("#######")
    result = lesions_of(reference, prediction)
    assert result.case["num_detected"] == 2
    assert result.case["num_predicted_lesions"] == 1
    assert result.case["detection_precision"] == 1
    assert [row["dice"] for row in result.rows] == pytest.approx([6 / 10, 6 / 10])
    one_to_one = lesions_of(reference, prediction, MatchingRule("iou", 0.1)).case
    assert (one_to_one["num_detected"], one_to_one["num_false_positives"]) == (1, 0)


def test_threshold_of_the_overlap():
    reference, prediction = picture("####......"), picture("...#######")
    assert lesions_of(reference, prediction).case["num_detected"] == 1
    quarter = lesions_of(reference, prediction, MatchingRule("overlap", 0.25)).case
    # A quarter of the lesion is predicted; only a seventh of the prediction is lesion.
    assert (quarter["num_detected"], quarter["num_false_positives"]) == (1, 1)
    assert lesions_of(reference, prediction, MatchingRule("overlap", 0.26)).case["num_detected"] == 0


def test_miss_and_false_positive():
    result = lesions_of(picture("##....", "......"), picture("......", "....##"), spacing=(2.0, 1.0))
    missed, false = result.rows
    assert missed["kind"] == "reference"
    assert (missed["detected"], missed["dice"], missed["predicted_volume_mm3"]) == (0, 0.0, 0.0)
    assert "volume_error_mm3" not in missed  # errors are those of detected lesions
    assert false["kind"] == "false_positive"
    assert false["volume_mm3"] == 4
    assert "detected" not in false
    assert (false["touches_border"], false["centroid"]) == (1, "1.00 4.50")
    assert result.case["detection_f1"] == 0
    assert result.case["panoptic_quality"] == 0


@pytest.mark.parametrize(
    ("reference", "prediction", "expected"),
    [("...", "...", (NAN, NAN, NAN, NAN)), ("...", "#..", (NAN, 0, 0, 0)), ("#..", "...", (0, NAN, 0, 0))],
)
def test_lesions_of_empty_masks(reference, prediction, expected):
    case = lesions_of(picture(reference), picture(prediction)).case
    names = ("detection_recall", "detection_precision", "detection_f1", "panoptic_quality")
    assert tuple(case[name] for name in names) == expected


def test_panoptic_quality_by_hand():
    # One pair with IoU 3/4, one with IoU 1/3 (below 0.5: a miss and a false positive).
    result = lesions_of(picture("####.####"), picture("###....##")).case
    assert result["segmentation_quality"] == pytest.approx(3 / 4)
    assert result["recognition_quality"] == pytest.approx(1 / 2)
    assert result["panoptic_quality"] == pytest.approx(3 / 8)


def test_lesion_of_one_voxel_with_anisotropic_spacing():
    mask = np.zeros((3, 4, 5), dtype=bool)
    mask[1, 2, 0] = True
    (row,) = lesions_of(mask, mask, spacing=(5.0, 0.5, 0.5)).rows
    assert row["volume_mm3"] == pytest.approx(1.25)
    assert row["equivalent_diameter_mm"] == pytest.approx((6 * 1.25 / math.pi) ** (1 / 3))
    assert (row["long_axis_mm"], row["short_axis_mm"]) == (0, 0)  # distances of voxel centres
    assert (row["size_bin"], row["dice"], row["touches_border"]) == ("<5 mm", 1, 1)
    assert row["centroid"] == "1.00 2.00 0.00"


def test_instances_split_what_touches_and_lose_nothing():
    mask = picture("######.#")
    instances = np.array([[7, 7, 7, 3, 3, 0, 3, 0]])
    components = instance_components(mask, instances)
    # Numbers of the annotators, then two components without one; the 3 outside of the mask does not count.
    assert components.numbers.tolist() == [3, 7, 8, 9]
    assert components.labels.tolist() == [[2, 2, 2, 1, 1, 3, 0, 4]]


# Axes


@pytest.mark.parametrize(
    ("mask", "axes"),
    [
        (picture("."), (0, 0)),
        (picture("#"), (0, 0)),
        (picture("##"), (1, 1)),
        (picture("#####"), (4, 4)),  # no segment lies across: the angle widens up to the only direction
        (picture("###", "###", "###"), (math.sqrt(8), math.sqrt(8))),
        (picture("#####", "..#..", "..#.."), (4, 2)),
        (picture("####..", "......", "###..."), (3, 3)),  # only the larger component
    ],
)
def test_axes_by_hand(mask, axes):
    assert recist_axes(mask) == pytest.approx(axes)


def test_axes_take_the_slice_with_the_longest():
    volume = np.zeros((3, 6, 6), dtype=bool)
    volume[0, 0, :3] = volume[1, :5, 2] = volume[2, 1, 1:6] = True
    volume[1, 2, 1:4] = True
    # Slices 1 and 2 have a long axis of 4: the first wins, and with it the short axis.
    assert recist_axes(volume) == pytest.approx((4, 2))
    assert recist_axes(volume, (2.0, 0.5)) == pytest.approx((8, 1))


def slow_axes(mask: np.ndarray) -> tuple[float, float]:
    """The rule written down pair by pair, for one component in one slice."""
    points = border_voxels(mask)
    distances = np.sqrt(((points[:, None] - points[None]) ** 2).sum(-1))
    i, j = np.unravel_index(np.argmax(distances), distances.shape)
    long_axis = points[j] - points[i]
    for tolerance in range(1, 92):
        best = 0.0
        for a in range(len(points)):
            for b in range(a + 1, len(points)):
                segment = points[b] - points[a]
                cosine = abs(segment @ long_axis) / (distances[a, b] * distances[i, j])
                if math.degrees(math.asin(min(1.0, cosine))) < tolerance:
                    best = max(best, distances[a, b])
        if best:
            return float(distances[i, j]), float(best)
    return 0.0, 0.0


def test_fast_axes_equal_the_rule():
    from scipy import ndimage

    generator = np.random.default_rng(3)
    for _ in range(6):
        labels, _ = ndimage.label(ndimage.gaussian_filter(generator.normal(size=(24, 24)), 2) > 0.02)
        mask = labels == 1 + np.argmax(np.bincount(labels.ravel())[1:])
        assert recist_axes(mask) == pytest.approx(slow_axes(mask), abs=1e-12)


def test_axes_of_a_large_lesion_in_pieces(monkeypatch):
    from nnunetv2_smallseg.evaluation import axes

    y, x = np.mgrid[:60, :60]
    mask = ((y - 30) / 15) ** 2 + ((x - 28) / 26 - (y - 30) / 40) ** 2 < 1
    whole = recist_axes(mask)
    monkeypatch.setattr(axes, "PAIRS_AT_A_TIME", 500)
    assert recist_axes(mask) == whole


# Sizes


def test_diameter_bins():
    assert diameter_bins() == ["<5 mm", "5-10 mm", "10-20 mm", ">=20 mm"]
    assert [diameter_bin(value) for value in (0, 4.999, 5, 19.9, 20, 90)] == [
        "<5 mm", "<5 mm", "5-10 mm", "10-20 mm", ">=20 mm", ">=20 mm",
    ]  # fmt: skip
    assert diameter_bin(7, (6.5,)) == ">=6.5 mm"
    with pytest.raises(UsageError, match="ascend"):
        diameter_bins((5, 5))
    assert equivalent_diameter_mm(math.pi / 6 * 8, 3) == pytest.approx(2)
    assert equivalent_diameter_mm(math.pi * 4, 2) == pytest.approx(4)


def test_area_ratio_of_simple_shapes():
    image = np.zeros((20, 20), dtype=bool)
    assert area_ratio_percent(image) == 0
    image[5:9, 5:9] = True
    assert area_ratio_percent(image) == pytest.approx(100 * 9 / 400)  # (k - 1)^2
    image[6:8, 6:8] = False
    assert area_ratio_percent(image) == pytest.approx(100 * 9 / 400)  # holes count as filled
    image[12, 2:17] = True
    assert area_ratio_percent(image) == pytest.approx(100 * 9 / 400)  # a line has no area, the largest object counts
    volume = np.zeros((3, 20, 20), dtype=bool)
    volume[1] = image
    assert area_ratio_percent(volume) == area_ratio_percent(image)


def test_groups_of_cases():
    assert area_ratio_groups(0.5) == ["ultra small", "small", "all"]
    assert area_ratio_groups(1.0) == ["small", "all"]
    groups = share_groups({f"case{index}": 10.0 - index for index in range(10)})
    assert [groups[f"case{index}"] for index in range(10)] == ["large"] * 4 + ["medium"] * 3 + ["small"] * 3
    assert share_groups({"only": 1.0}) == {"only": "medium"}  # round(0.3) = 0, round(0.6) = 1


# Probabilities


def test_area_under_roc():
    reference = np.array([True, False, True, False])
    assert probabilities.area_under_roc(np.array([0.9, 0.1, 0.8, 0.2]), reference) == 1
    assert probabilities.area_under_roc(np.array([0.5, 0.5, 0.5, 0.5]), reference) == 0.5
    # Pairs won: 0.9 over both, 0.3 over 0.1, tie of 0.3 with 0.3.
    assert probabilities.area_under_roc(np.array([0.9, 0.1, 0.3, 0.3]), reference) == pytest.approx(3.5 / 4)
    assert math.isnan(probabilities.area_under_roc(np.array([0.5]), np.array([True])))


def test_calibration_by_hand():
    probability, reference = np.array([0.1, 0.1, 0.9, 0.9]), np.array([False, True, True, True])
    metrics = probabilities.calibration_metrics(probability, reference)
    assert metrics["brier"] == pytest.approx((0.01 + 0.81 + 0.01 + 0.01) / 4)
    assert metrics["ece"] == pytest.approx((abs(0.2 - 1) + abs(1.8 - 2)) / 4)


def test_froc_by_hand():
    probability = np.array([[0.9, 0.8, 0, 0.3, 0, 0.6, 0, 0.05]])
    reference = connected_components(picture("#..#...#"))
    found = probabilities.candidates(probability, reference, threshold=0.1, rule=MatchingRule())
    assert found == {"lesions": [0.9, 0.3, 0.0], "false_positives": [0.6]}
    curve = probabilities.froc([found, {"lesions": [], "false_positives": []}])
    assert curve["threshold"] == [0.9, 0.6, 0.3]
    assert curve["sensitivity"] == pytest.approx([1 / 3, 1 / 3, 2 / 3])
    assert curve["false_positives_per_case"] == [0, 0.5, 0.5]
    assert curve["sensitivity_at"]["0.125"] == pytest.approx(1 / 3)
    assert curve["sensitivity_at"]["0.5"] == pytest.approx(2 / 3)
    assert probabilities.froc([{"lesions": [], "false_positives": [0.4]}])["score"] is None


def test_components_without_lesions():
    nothing = connected_components(np.zeros((0, 4, 4), dtype=bool))
    assert nothing.count == 0
    voxels, boxes, centroids = nothing.statistics()
    assert (len(voxels), boxes, centroids.shape) == (0, [], (0, 3))
    assert isinstance(nothing, Components)
