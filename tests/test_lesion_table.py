"""The table of lesions: what is measured, and the file it is kept in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetNumpy
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import distributed

from nnunetv2_smallseg.data import lesion_table as module
from nnunetv2_smallseg.data.lesion_table import (
    MAX_ANCHORS,
    LesionTable,
    lesion_classes,
    lesion_table,
    measure_case,
    table_file,
)
from nnunetv2_smallseg.trainers.lesion_labels import LesionLabels

LABELS = LabelManager({"background": 0, "lesion": 1, "ignore": 2}, None)


def segmentation_of(*boxes: tuple, shape: tuple[int, ...] = (12, 40, 40)) -> np.ndarray:
    """Boxes (first voxel, one behind the last, label) in a volume that is -1 outside of the body."""
    segmentation = np.zeros(shape, dtype=np.int8)
    segmentation[..., 0] = -1
    for lower, upper, label in boxes:
        segmentation[tuple(map(slice, lower, upper))] = label
    return segmentation


def test_lesions_of_a_case():
    """Components with 26 neighbours, per class; -1, the ignore label and other labels are no lesion."""
    segmentation = segmentation_of(
        ((1, 2, 3), (3, 5, 7), 1),
        ((3, 5, 7), (4, 6, 8), 1),  # touches the first at a corner
        ((8, 10, 10), (11, 38, 38), 1),
        ((8, 20, 20), (11, 22, 22), 3),
        ((0, 30, 1), (1, 31, 2), 2),
    )
    measured = measure_case(segmentation, [(1, 3), (3,), (4,)])
    lesions = measured.lesions
    assert measured.shape == (12, 40, 40)
    assert lesions.classes.tolist() == [0, 0, 1]
    assert lesions.voxels.tolist() == [25, 3 * 28 * 28, 12]
    assert lesions.boxes[[0, 2]].tolist() == [[[1, 2, 3], [4, 6, 8]], [[8, 20, 20], [11, 22, 22]]]
    assert measured.counts.areas([2]).tolist() == [1] + [0] * 11
    small = {tuple(voxel) for voxel in lesions.anchors_of(0).tolist()}
    assert small == {tuple(voxel) for voxel in np.argwhere((segmentation == 1)[:5]).tolist()}  # all of a small lesion
    large = lesions.anchors_of(1)
    assert len({tuple(voxel) for voxel in large.tolist()}) == MAX_ANCHORS
    assert np.isin(segmentation[tuple(large.T)], (1, 3)).all()
    assert all(20 <= number <= 22 for number in np.bincount(large[:, 0])[8:])  # spread over slices
    again = measure_case(segmentation, [(1, 3), (3,), (4,)])
    assert np.array_equal(again.lesions.anchors, lesions.anchors)
    # A sphere of the same volume; extents in array order.
    assert lesions.volumes_mm3((2, 1, 0.5)).tolist() == [25, 2352, 12]
    assert lesions.equivalent_diameters_mm((2, 1, 0.5))[0] == pytest.approx((6 * 25 / np.pi) ** (1 / 3))
    assert lesions.extents_mm((2, 1, 0.5))[0].tolist() == [6, 4, 2.5]


def test_single_images_have_discs():
    measured = measure_case(np.eye(5, dtype=np.uint8), [(1,)])
    assert measured.shape == (1, 5, 5)
    assert measured.lesions.voxels.tolist() == [5]
    assert measured.lesions.equivalent_diameters_mm((999, 2, 2), num_dimensions=2) == pytest.approx(
        2 * np.sqrt(20 / np.pi)
    )
    with pytest.raises(ValueError, match=r"\(1, 1, 5, 5\), but must be"):
        measure_case(np.zeros((1, 1, 5, 5)), [(1,)])


def test_every_voxel_is_an_anchor_equally_often():
    segmentation = segmentation_of(((0, 0, 1), (2, 10, 11), 1), shape=(2, 12, 12))
    hits = np.zeros(segmentation.shape, dtype=int)
    for seed in range(600):
        hits[tuple(measure_case(segmentation, [(1,)], seed=seed).lesions.anchors.T)] += 1
    drawn = hits[segmentation == 1]
    assert drawn.sum() == 600 * MAX_ANCHORS == hits.sum()
    # 192 expected of each; the draws of a voxel are independent between seeds, a binomial with p = 0.32.
    assert abs(drawn - 192).max() < 5 * np.sqrt(600 * 0.32 * 0.68)


def test_classes_are_those_of_nnunet():
    assert lesion_classes(LABELS) == ((1,),)
    regions = LabelManager({"background": 0, "whole": (1, 2), "core": 2, "ignore": 3}, [1, 2])
    assert lesion_classes(regions) == ((1, 2), (2,))


# --------------------------------------------------------------------------------------------------------- the file


@pytest.fixture
def folder(tmp_path) -> Path:
    """Five preprocessed cases: case i has i lesions, the last is a single slice."""
    folder = tmp_path / "nnUNetPlans_3d_fullres"
    folder.mkdir()
    for index in range(5):
        boxes = [((0, 4 * k, 4), (1, 4 * k + 2, 5 + index), 1) for k in range(index)]
        segmentation = segmentation_of(*boxes, ((0, 39, 30), (1, 40, 35), 2), shape=(1 if index == 4 else 12, 40, 40))
        nnUNetDatasetNumpy.save_case(
            np.zeros((1, *segmentation.shape)), segmentation[None], {"spacing": [3, 1, 1]}, str(folder / f"case{index}")
        )
    return folder


@pytest.fixture
def measured(monkeypatch) -> Iterator[list]:
    """One entry for each case that is measured."""
    calls = []
    measure = module.measure_case
    monkeypatch.setattr(module, "measure_case", lambda *arguments: calls.append(1) or measure(*arguments))
    return calls


def dataset_of(folder: Path, *cases: int) -> nnUNetDatasetNumpy:
    return nnUNetDatasetNumpy(str(folder), [f"case{case}" for case in cases] or None)


def facts(table: LesionTable) -> dict:
    """Everything a table says, by case."""
    anchors = [table.lesions.anchors_of(row).tolist() for row in range(len(table.lesions))]
    return {
        case: (
            table.counts[case],
            table.shapes[index].tolist(),
            table.image_spacings[index].tolist(),
            table.lesions.voxels[table.case_of == index].tolist(),
            table.lesions.boxes[table.case_of == index].tolist(),
            [anchors[row] for row in np.flatnonzero(table.case_of == index)],
        )
        for index, case in enumerate(table.cases)
    }


def test_cases_are_measured_once_and_shared_by_folds(folder, measured):
    first = lesion_table(dataset_of(folder, 4, 2, 1), LABELS)
    assert first.cases == ("case1", "case2", "case4")
    assert len(measured) == 3
    assert first.lesion_counts.tolist() == [1, 2, 4]
    assert first.num_dimensions == 3
    assert lesion_table(dataset_of(folder, 4), LABELS).num_dimensions == 2
    assert isinstance(lesion_table(dataset_of(folder, 4), LABELS).lesions.anchors.base, np.memmap)
    assert facts(lesion_table(dataset_of(folder, 4, 2, 1), LABELS)) == facts(first)
    assert len(measured) == 3
    second = lesion_table(dataset_of(folder, 0, 1, 2), LABELS)
    assert len(measured) == 4
    everything = lesion_table(dataset_of(folder), LABELS)
    assert len(measured) == 5
    assert everything.lesion_counts.sum() == 10
    assert {**facts(first), **facts(second)}.items() <= facts(everything).items()
    for case, counts in everything.counts.items():
        segmentation = np.load(folder / f"{case}.npz")["seg"][0]
        for label in (1, 2):
            assert counts.areas([label]).tolist() == (segmentation == label).sum(axis=(1, 2)).tolist()


def test_changed_cases_and_labels_are_measured_again(folder, measured):
    dataset = dataset_of(folder)
    before = facts(lesion_table(dataset, LABELS))
    os.utime(folder / "case3.npz")
    assert facts(lesion_table(dataset, LABELS)) == before
    assert len(measured) == 5 + 1
    other = LabelManager({"background": 0, "first": 1, "second": 2}, None)
    assert lesion_table(dataset, other).lesion_counts.tolist() == [1, 2, 3, 4, 5]
    assert len(measured) == 6 + 5


@pytest.mark.parametrize("damage", ["text", "truncated", "empty", "lengths", "pickled"])
def test_a_damaged_file_is_made_anew(folder, measured, damage, caplog):
    dataset = dataset_of(folder)
    before = facts(lesion_table(dataset, LABELS))
    file = table_file(dataset)
    content = file.read_bytes()
    if damage in ("text", "truncated", "empty"):
        file.write_bytes({"text": b"no archive", "truncated": content[: len(content) // 2], "empty": b""}[damage])
    else:
        arrays = dict(np.load(file))
        arrays["voxels"] = arrays["voxels"][:-1] if damage == "lengths" else np.array([{}])
        np.savez(file, **arrays)
    assert facts(lesion_table(dataset, LABELS)) == before
    assert len(measured) == 10
    assert "is made anew" in caplog.text
    assert facts(lesion_table(dataset, LABELS)) == before
    assert len(measured) == 10


def test_a_file_that_cannot_be_written_costs_time_only(folder, measured, monkeypatch, caplog):
    def refuse(target):
        raise PermissionError("read-only")

    monkeypatch.setattr(module, "replacing", refuse)
    for number in (5, 10):
        assert len(lesion_table(dataset_of(folder), LABELS).cases) == 5
        assert len(measured) == number
    assert "could not be written (read-only)" in caplog.text


def test_interrupted_work_is_not_lost(folder, measured, monkeypatch):
    monkeypatch.setattr(module, "SECONDS_BETWEEN_WRITES", 0.0)
    monkeypatch.setattr(module, "_measure_stored", fail_at_the_fourth(module._measure_stored))
    with pytest.raises(KeyboardInterrupt):
        lesion_table(dataset_of(folder, 0, 1, 2, 3, 4), LABELS)
    monkeypatch.undo()
    assert module._read(table_file(dataset_of(folder)), ((1,),)).cases == ("case0", "case1", "case2")


def fail_at_the_fourth(measure):
    def measured(dataset, classes, case):
        if case == "case3":
            raise KeyboardInterrupt
        return measure(dataset, classes, case)

    return measured


def test_processes_that_write_at_once_lose_nothing(folder, monkeypatch):
    """Another process, which has read the file before we wrote it, writes it right after us."""
    file = table_file(dataset_of(folder))
    others = lesion_table(dataset_of(folder, 3, 4), LABELS)
    write, calls = module._write, []

    def overwritten(target, table):
        write(target, table)
        calls.append(table.cases)
        if len(calls) == 1:
            write(target, others)

    monkeypatch.setattr(module, "_write", overwritten)
    lesion_table(dataset_of(folder, 0, 1, 2), LABELS)
    assert len(calls) == 2
    assert set(module._read(file, ((1,),)).cases) == {f"case{case}" for case in range(5)}


def test_several_processes_measure_the_same(folder, monkeypatch):
    alone = facts(lesion_table(dataset_of(folder), LABELS))
    table_file(dataset_of(folder)).unlink()
    monkeypatch.setattr(module, "CASES_WORTH_PROCESSES", 2)
    assert facts(lesion_table(dataset_of(folder), LABELS, num_processes=2)) == alone


def test_processes_of_a_training_share_the_work(folder, measured, monkeypatch):
    class Trainer(LesionLabels):
        is_ddp, local_rank, label_manager = True, 1, LABELS

        def print_to_log_file(self, line):
            assert "first training on a data set" in line

    at_barrier = []
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed, "barrier", lambda: at_barrier.append(len(measured)))
    dataset = dataset_of(folder)
    table = Trainer().read_lesion_table(dataset)
    assert at_barrier == [2]  # cases 1 and 3
    assert len(measured) == 5  # here nobody else has measured the others
    assert table.cases == tuple(dataset.identifiers) == tuple(f"case{case}" for case in range(5))
