"""The comparison of ``scripts/curriculum_study.py``: Dice of lesions, its table and its figure."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest
from conftest import ROOT


@pytest.fixture(scope="module")
def study():
    specification = importlib.util.spec_from_file_location("curriculum_study", ROOT / "scripts" / "curriculum_study.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_dice_of_each_lesion(study):
    """Two lesions of 2 x 2 voxels, a component on the first with two more voxels, one that touches nothing."""
    reference, prediction = np.zeros((1, 12, 12), bool), np.zeros((1, 12, 12), bool)
    reference[0, 1:3, 1:3] = reference[0, 8:10, 8:10] = True
    prediction[0, 1:3, 1:4] = True
    prediction[0, 5, 11] = True
    lesions = [{"centre_mm": [0, 2, 2]}, {"centre_mm": [0, 18, 18]}]  # voxels of 2 mm
    dice, false_positives = study.lesion_dice(reference, prediction, lesions, [2.5, 2.0, 2.0])
    assert dice == [pytest.approx(8 / 10), 0.0]
    assert false_positives == 1


def test_size_groups_hold_all_diameters_of_the_phantom(study):
    from nnunetv2_smallseg.demo.phantom import LESION_DIAMETERS_MM

    groups = [study.group_of(diameter) for diameter in LESION_DIAMETERS_MM]
    assert {group: groups.count(group) for group in study.GROUPS} == {"small": 3, "medium": 3, "large": 3}


def test_figure_of_any_number_of_seeds(study, tmp_path):
    run = {"dice": {"small": 0.1, "medium": 0.5, "large": 0.8}, "lesions": {"small": 3, "medium": 3, "large": 2}}
    runs = [{"seed": seed, "arm": arm, **run} for seed in (1, 2) for arm in ("without", "with")]
    for number in (2, 4):
        results = {"settings": {"seeds": list(range(number // 2))}, "runs": runs[:number]}
        study.draw(json.loads(json.dumps(results)), tmp_path / "study.png")
        assert (tmp_path / "study.png").stat().st_size > 10_000
