"""The regularised curriculum: tables worked out by hand, and its life inside a training."""

from __future__ import annotations

import numpy as np
import pytest

from nnunetv2_smallseg.data.curriculum import Curriculum, lesion_fraction, size_groups
from nnunetv2_smallseg.data.lesion_table import count_labels

# Five cases from large to small lesions. Their losses turn the order of the first and the last around.
FRACTIONS = {"a": 0.5, "b": 0.4, "c": 0.3, "d": 0.2, "e": 0.1}
LOSSES = [("a", 1.6), ("b", 0.4), ("c", 0.8), ("d", 1.2), ("e", 0.2)]


def test_easy_cases_first():
    """q = 0: difficulties 0, 1/4, ..., 1 by size; v = 1 - d, but at least 0.2."""
    curriculum = Curriculum(FRACTIONS)
    values = np.array([1.0, 0.75, 0.5, 0.25, 0.2])
    np.testing.assert_allclose(curriculum.weights(0.0), values / 0.54, rtol=1e-12)
    curriculum.observe(LOSSES)  # losses do not count yet
    np.testing.assert_allclose(curriculum.weights(0.0), values / 0.54, rtol=1e-12)


def test_no_preference_half_way():
    """q = 0.35: p = 1/2, rho = 1/2 for all."""
    curriculum = Curriculum(FRACTIONS)
    curriculum.observe(LOSSES)
    np.testing.assert_allclose(curriculum.weights(0.35), np.ones(5), rtol=1e-12)


def test_hard_cases_at_the_end():
    """q = 1: difficulty by loss alone, e < b < c < d < a; v = d."""
    curriculum = Curriculum(FRACTIONS)
    curriculum.observe(LOSSES)
    values = np.array([1.0, 0.25, 0.5, 0.75, 0.2])
    for progress in (0.6, 1.0):
        np.testing.assert_allclose(curriculum.weights(progress), values / 0.54, rtol=1e-12)


def test_cases_not_seen_keep_their_size_difficulty():
    curriculum = Curriculum(FRACTIONS)
    curriculum.observe([("a", 2.0), ("e", 1.0)])  # among the seen: e 0, a 1; b, c, d keep 0.25, 0.5, 0.75
    np.testing.assert_allclose(curriculum.difficulties(1.0), [1, 0.25, 0.5, 0.75, 0])


def test_losses_replace_sizes_gradually():
    """q = 0.15: half of each, 0.5·[0, .25, .5, .75, 1] + 0.5·[1, .25, .5, .75, 0], ranked."""
    curriculum = Curriculum(FRACTIONS)
    curriculum.observe(LOSSES)
    np.testing.assert_allclose(curriculum.difficulties(0.15), [0.5, 0.0, 0.5, 1.0, 0.5])


def test_running_mean():
    curriculum = Curriculum(FRACTIONS)
    curriculum.observe([("a", 1.0), ("a", 3.0), ("b", float("nan")), ("c", float("inf"))])
    assert curriculum.mean_loss[0] == 2.0  # the first observation sets it
    assert curriculum.seen.tolist() == [True, False, False, False, False]
    curriculum.observe([("a", 1.0)])
    assert curriculum.mean_loss[0] == pytest.approx(1.9)
    with pytest.raises(KeyError, match="unknown"):
        curriculum.observe([("unknown", 1.0)])


def test_observations_in_any_order():
    losses = [("a", 0.1), ("a", 0.2), ("a", 0.3), ("b", 1e9), ("b", 1e-9), ("b", 0.7)]
    one, other = Curriculum(FRACTIONS), Curriculum(FRACTIONS)
    one.observe(losses)
    other.observe(reversed(losses))
    assert one.mean_loss.tobytes() == other.mean_loss.tobytes()


def test_the_printed_objective_gives_no_weight_at_all():
    """Paper, eq. 6 and 7: with 1/rank(l) uncoupled from v the minimum is v = 0, whatever the losses."""
    grid = np.linspace(0, 1, 101)
    for balance in (0.1, 0.5, 2 / 3, 0.9):
        for rank, loss in enumerate((0.01, 0.5, 2.0), start=1):
            assert grid[np.argmin(grid * loss + balance / rank + (1 - balance) * grid**2)] == 0


@pytest.mark.parametrize("balance", [0.3, 2 / 3, 0.9])
@pytest.mark.parametrize("progress", [0.0, 0.2, 0.35, 0.5, 1.0])
def test_weights_minimise_the_coupled_objective(balance, progress):
    curriculum = Curriculum(FRACTIONS, balance=balance, min_weight=0.1)
    curriculum.observe(LOSSES)
    difficulty = curriculum.difficulties(progress)
    hard = min(max((progress - 0.1) / 0.5, 0), 1)
    reward = (1 - hard) * (1 - difficulty) + hard * difficulty
    grid = np.linspace(0.1, 1, 9001)
    best = np.array([grid[np.argmin(-balance * rho * grid + (1 - balance) * grid**2)] for rho in reward])
    np.testing.assert_allclose(curriculum.weights(progress), best / best.mean(), atol=1e-3)


def test_equal_cases_have_equal_weights():
    for fractions in ({"a": 0.1}, {"a": 0.1, "b": 0.1, "c": 0.1}, {"a": 0.0, "b": 0.0}):
        curriculum = Curriculum(fractions)
        for progress in (0.0, 0.2, 0.35, 1.0):
            assert curriculum.weights(progress).tolist() == [1.0] * len(fractions)


@pytest.mark.parametrize("cases", [2, 7, 100])
def test_mean_and_range(cases):
    generator = np.random.default_rng(0)
    fractions = {f"case{index}": float(value) for index, value in enumerate(generator.random(cases))}
    curriculum = Curriculum(fractions)
    curriculum.observe((key, float(generator.random())) for key in fractions)
    for progress in np.linspace(0, 1, 21):
        weights = curriculum.weights(progress)
        assert weights.mean() == pytest.approx(1, rel=1e-12)
        assert weights.max() / weights.min() <= 5 + 1e-9  # no more than 1 to v_min
        if cases == 100:
            assert weights.min() >= 0.38
            assert weights.max() <= 1.93


def test_cases_without_lesion_are_of_medium_difficulty():
    curriculum = Curriculum({"large": 0.2, "small": 0.1, "none": 0.0})
    assert curriculum.size_difficulty[curriculum.index["none"]] == 0.5
    assert curriculum.size_difficulty[curriculum.index["large"]] == 0
    assert curriculum.size_difficulty[curriculum.index["small"]] == 1


def test_size_groups_are_those_of_the_paper():
    groups = size_groups(np.array([*np.arange(10, 0, -1) / 100, 0.0]))
    assert {name: len(part) for name, part in groups.items()} == {"small": 3, "medium": 3, "large": 4, "no lesion": 1}
    assert groups["small"].tolist() == [9, 8, 7]
    assert list(size_groups(np.array([0.1]))) == ["medium"]


def test_lesion_fraction():
    segmentation = np.array([[[[0, 1, 2, 3], [-1, 0, 2, 3]]]])
    counts = count_labels(segmentation)
    assert lesion_fraction(counts, [1, 2]) == 3 / 8
    assert lesion_fraction(counts, [2], ignore_label=3) == 2 / 6
    assert lesion_fraction(count_labels(np.full((1, 1, 2, 2), 3)), [1], ignore_label=3) == 0


def test_state_returns_bit_by_bit():
    curriculum = Curriculum(FRACTIONS)
    curriculum.observe([("a", 1 / 3), ("c", 2 / 7)])
    restored = Curriculum(FRACTIONS)
    assert restored.load_state_dict(curriculum.state_dict()) == []
    for _ in range(3):
        for one in (curriculum, restored):
            one.observe([("a", 0.1), ("b", 0.7), ("c", 1.1)])
    assert restored.weights(0.77).tobytes() == curriculum.weights(0.77).tobytes()
    assert restored.state_dict() == curriculum.state_dict()


def test_state_of_other_cases():
    curriculum = Curriculum(FRACTIONS)
    curriculum.observe(LOSSES)
    other = Curriculum({"e": 0.5, "f": 0.1})
    assert other.load_state_dict(curriculum.state_dict()) == ["f"]
    assert other.seen.tolist() == [True, False]
    assert other.mean_loss[0] == 0.2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"balance": 0.0}, "curriculum_lambda is 0.0.*between 0 and 1"),
        ({"balance": 1.0}, "curriculum_lambda is 1.0"),
        ({"min_weight": 0.0}, "min_curriculum_weight is 0.0"),
        ({"min_weight": 1.5}, "min_curriculum_weight is 1.5"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        Curriculum(FRACTIONS, **options)
    with pytest.raises(ValueError, match="at least one training case"):
        Curriculum({})
