"""Lesion-balanced sampling: which lesions are drawn, where they lie in the patch, loaders, trainers."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import small_networks
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from scipy import stats

from nnunetv2_smallseg.data.lesion_loader import LesionDataLoader, LesionSampler, place_patch, size_bins
from nnunetv2_smallseg.data.lesion_table import lesion_classes, lesion_table
from nnunetv2_smallseg.errors import CommandStopped
from nnunetv2_smallseg.trainers import nnUNetTrainerCurriculum, nnUNetTrainerSTSNet
from nnunetv2_smallseg.trainers.slabs import SlabTrainer

# Chi-square tests have fixed seeds; a wrong distribution gives values many orders of magnitude below this.
SIGNIFICANCE = 1e-3
LABELS = {"background": 0, "lesion": 1}


@pytest.fixture(autouse=True)
def seeded_numpy():
    """The global state, from which nnU-Net's loaders draw."""
    np.random.seed(0)  # noqa: NPY002


class MemoryDataset(nnUNetBaseDataset):
    """Cases in memory. The image's three channels hold the coordinates of each voxel."""

    def __init__(self, cases: dict[str, np.ndarray], labels: LabelManager, cascade: bool = False) -> None:
        super().__init__("unused", list(cases))
        self.content, self.cascade = {}, cascade
        for name, segmentation in cases.items():
            image = np.stack(np.meshgrid(*map(np.arange, segmentation.shape), indexing="ij")).astype(np.float32)
            locations = {}
            for held in [*lesion_classes(labels), *([(-1, *labels.all_labels)] if labels.has_ignore_label else [])]:
                voxels = np.argwhere(np.isin(segmentation, held))
                locations[held[0] if len(held) == 1 else held] = np.pad(voxels, ((0, 0), (1, 0)))
            properties = {"class_locations": locations, "spacing": [2.0, 1.0, 1.0]}
            self.content[name] = (image, segmentation[None], properties)

    def load_case(self, identifier):
        image, segmentation, properties = self.content[identifier]
        return image, segmentation, segmentation[0] if self.cascade else None, properties

    @staticmethod
    def save_case(data, seg, properties, output_filename_truncated): ...

    @staticmethod
    def get_identifiers(folder): ...


def volume(*boxes: tuple, shape: tuple[int, int, int] = (24, 64, 64)) -> np.ndarray:
    """Labels of boxes: first voxel, extents, label."""
    segmentation = np.zeros(shape, dtype=np.int8)
    for first, extents, label in boxes:
        segmentation[tuple(slice(start, start + extent) for start, extent in zip(first, extents, strict=True))] = label
    return segmentation


def loader_of(
    cases: dict[str, np.ndarray],
    final: tuple[int, ...] = (16, 32, 32),
    initial: tuple[int, ...] | None = None,
    *,
    labels: dict = LABELS,
    regions_class_order: list[int] | None = None,
    sampling: str = "lesion",
    jitter: float = 1.0,
    batch_size: int = 6,
    share: float = 0.33,
    cascade: bool = False,
    classes: tuple[int, ...] | None = None,
    **options,
) -> LesionDataLoader:
    manager = LabelManager(labels, regions_class_order)
    dataset = MemoryDataset(cases, manager, cascade)
    table = lesion_table(dataset, manager)
    spacings = table.spacings([1.0, 1.0], [0, 1, 2])
    probabilities = options.get("sampling_probabilities")
    sampler = LesionSampler(table, sampling, spacings, classes=classes, case_probabilities=probabilities)
    return LesionDataLoader(
        dataset,
        batch_size,
        initial or final,
        final,
        manager,
        lesions=sampler,
        jitter=jitter,
        oversample_foreground_percent=share,
        **options,
    )


# ------------------------------------------------------------------------------------------------- which is drawn

# Equivalent diameters 2.5, 2.5, 2.5 and 19.8 mm with label 1; 9.8 mm with label 2; c has none.
CASES = {
    "a": volume(((1, 5, 5), (2, 2, 1), 1), ((8, 20, 20), (8, 16, 16), 1)),
    "b": volume(((1, 5, 5), (2, 2, 1), 1), ((20, 5, 5), (2, 2, 1), 1), ((8, 40, 40), (4, 8, 8), 2)),
    "c": volume(),
}
TWO = {"background": 0, "lesion": 1, "other": 2}


@pytest.mark.parametrize(
    ("sampling", "options", "expected"),
    [
        ("lesion", {}, [1 / 8, 1 / 8, 1 / 8, 1 / 8, 1 / 2]),
        ("size_bin", {}, [1 / 12, 1 / 4, 1 / 12, 1 / 12, 1 / 2]),
        ("lesion", {"classes": (0,)}, [1 / 4, 1 / 4, 1 / 4, 1 / 4, 0]),
        ("lesion", {"sampling_probabilities": [0.5, 0.25, 0.25]}, [1 / 6, 1 / 6, 1 / 12, 1 / 12, 1 / 2]),
        ("size_bin", {"sampling_probabilities": [0.5, 0.25, 0.25]}, [1 / 8, 1 / 4, 1 / 16, 1 / 16, 1 / 2]),
        ("lesion", {"sampling_probabilities": [1, 0, 0]}, [1 / 2, 1 / 2, 0, 0, 0]),
    ],
)
def test_lesions_are_drawn_alike(sampling, options, expected):
    sampler = loader_of(CASES, labels=TWO, sampling=sampling, **options).lesions
    assert sampler.lesions.voxels.tolist() == [4, 2048, 4, 4, 256]
    assert sampler.diameters_mm == pytest.approx([2.481, 19.85, 2.481, 2.481, 9.926], abs=0.01)
    assert sampler.probabilities() == pytest.approx(expected)
    drawn = np.bincount([sampler.draw() for _ in range(6000)], minlength=5)
    possible = np.array(expected) > 0
    assert not drawn[~possible].any()
    assert stats.chisquare(drawn[possible], 6000 * np.array(expected)[possible]).pvalue > SIGNIFICANCE


def test_size_bins_double_the_diameter():
    assert size_bins(np.array([0.3, 1, 1.99, 2, 3.9, 4, 40])).tolist() == [-2, 0, 0, 1, 1, 2, 5]


def test_summary():
    summary = loader_of(CASES, labels=TWO, sampling="size_bin").lesions.summary()
    assert summary.splitlines() == [
        "  label 1: 4 lesions in 2 of 3 cases, by diameter and share of the draws: 3 of 2 to 4 mm (25.0 %), "
        "1 of 16 to 32 mm (25.0 %)",
        "  label 2: 1 lesions in 1 of 3 cases, by diameter and share of the draws: 1 of 8 to 16 mm (50.0 %)",
    ]


@pytest.mark.parametrize("probabilistic", [False, True])
def test_batches_show_drawn_lesions_and_negatives_keep_their_share(probabilistic):
    """What comes out of the loader, by case and content."""
    loader = loader_of(
        CASES, (4, 16, 16), labels=TWO, batch_size=6, share=0.5, probabilistic_oversampling=probabilistic
    )
    drawn = {True: [], False: []}
    for _ in range(2000):
        for case, lesion in zip(loader.get_indices(), loader._planned, strict=True):
            drawn[lesion is not None].append(case)
    assert abs(len(drawn[True]) - 6000) < (300 if probabilistic else 1)
    shown, others = ([drawn[kind].count(case) for case in "abc"] for kind in (True, False))
    assert shown[2] == 0
    assert stats.chisquare(shown[:2], sum(shown) * np.array([1 / 4, 3 / 4])).pvalue > SIGNIFICANCE
    assert stats.chisquare(others).pvalue > SIGNIFICANCE  # nnU-Net's: all cases alike

    rows = []
    for _ in range(150):
        batch = next(loader)
        oversampled = np.array([lesion is not None for lesion in loader._planned])
        if not probabilistic:
            assert oversampled.tolist() == [False] * 3 + [True] * 3
        assert (batch["target"][oversampled] > 0).flatten(1).any(dim=1).all()
        rows += batch["data"][~oversampled, 1, 0, 0, 0].tolist()
    places = np.bincount(np.array(rows, dtype=int), minlength=49)  # 64 - 16 + 1, all alike
    assert len(places) == 49
    assert stats.chisquare(places).pvalue > SIGNIFICANCE


# ------------------------------------------------------------------------------------------------------- positions


def test_lesions_that_fit_lie_anywhere_alike():
    box, anchor, size = np.array([[50, 50, 50], [53, 58, 66]]), np.array([51, 50, 60]), np.array([8, 16, 16])
    bounds = np.zeros(3, dtype=int), np.full(3, 100)
    places = np.array([place_patch(box, anchor, size, bounds, 1.0) for _ in range(6000)])
    assert (places.min(axis=0) == [45, 42, 50]).all()
    assert (places.max(axis=0) == [50, 50, 50]).all()
    for axis in (0, 1):
        assert stats.chisquare(np.bincount(places[:, axis] - places[:, axis].min())).pvalue > SIGNIFICANCE
    half = np.array([place_patch(box, anchor, size, bounds, 0.5) for _ in range(300)])
    assert np.unique(half[:, 1]).tolist() == [44, 45, 46, 47, 48]  # a half of 8 steps
    centred = {tuple(place_patch(box, anchor, size, bounds, 0).tolist()) for _ in range(20)}
    assert centred == {(47, 46, 50)}  # 3 of 8 voxels, 8 of 16, 16 of 16


def test_of_larger_lesions_the_anchor_is_inside():
    box, anchor, size = np.array([[0, 40], [100, 60]]), np.array([3, 59]), np.array([16, 17])
    bounds = np.zeros(2, dtype=int), np.full(2, 84)
    places = np.array([place_patch(box, anchor, size, bounds, 1.0) for _ in range(2000)])
    assert np.unique(places[:, 0]).tolist() == [0, 1, 2, 3]  # not outside of the volume
    assert np.unique(places[:, 1]).tolist() == list(range(43, 60))
    assert place_patch(box, anchor, size, bounds, 0).tolist() == [0, 51]  # as nnU-Net: anchor - size // 2
    assert place_patch(box, np.array([50, 50]), size, bounds, 0).tolist() == [42, 42]


@pytest.mark.parametrize("shape", [(24, 64, 64), (3, 20, 33), (1, 18, 17), (17, 31, 32)])
@pytest.mark.parametrize("initial", [(16, 32, 32), (21, 41, 38)])
def test_bounds_are_those_of_nnunet(shape, initial, monkeypatch):
    corners = [((0, 0, 0), (1, 1, 1), 1), (tuple(side - 1 for side in shape), (1, 1, 1), 1)]
    loader = loader_of({"a": volume(*corners, shape=shape)}, (16, 32, 32), initial)
    for lesion, limit in enumerate((lambda low, high: low, lambda low, high: high - 1)):
        # nnU-Net draws lengths of lists, too.
        monkeypatch.setattr(
            np.random, "randint", lambda low, high=None, limit=limit: 0 if high is None else limit(low, high)
        )
        loader._current = lesion
        ours = loader.get_bbox(shape, True, None)
        nnunets = nnUNetDataLoader.get_bbox(loader, shape, False, None)
        assert [list(map(int, side)) for side in ours] == [list(map(int, side)) for side in nnunets]


@pytest.mark.parametrize("jitter", [0.0, 1.0])
@pytest.mark.parametrize(
    ("final", "initial"),
    [((32, 32), (40, 45)), ((32, 32), None), ((3, 32, 32), (3, 40, 45)), ((16, 32, 32), (22, 41, 40))],
)
def test_what_the_network_sees_holds_the_whole_lesion(final, initial, jitter):
    """Slices, slabs and volumes: the middle of what the transforms get, as nnU-Net's transforms cut it out."""
    cases = {
        "a": volume(((0, 0, 0), (2, 5, 20), 1), ((10, 30, 30), (3, 9, 32), 1)),
        "b": volume(((21, 55, 60), (3, 9, 4), 1), ((7, 40, 10), (1, 1, 1), 1)),
    }
    loader = loader_of(cases, final, initial, batch_size=40, share=1.0, jitter=jitter)
    boxes = loader.lesions.lesions.boxes
    batch = next(loader)
    assert batch["data"].shape[2:] == (initial or final)
    starts = [whole // 2 - seen // 2 for whole, seen in zip(initial or final, final, strict=True)]
    middle = (..., *[slice(start, start + seen) for start, seen in zip(starts, final, strict=True)])
    for lesion, image, target in zip(loader._planned, batch["data"][middle], batch["target"][middle], strict=True):
        inside = image.flatten(1)[:, target.flatten() == 1]
        lower, upper = inside.amin(dim=1), inside.amax(dim=1)
        # On each axis but that of a single slice, the patch is long enough for the lesion.
        axes = [axis for axis in range(3) if (1, *final)[-3:][axis] >= (boxes[lesion, 1] - boxes[lesion, 0])[axis]]
        assert len(axes) >= 2
        for axis in axes:
            assert lower[axis] <= boxes[lesion, 0, axis]
            assert upper[axis] >= boxes[lesion, 1, axis] - 1
    centres = {tuple(image[:, image.shape[1] // 2].tolist()) for image in batch["data"][middle].flatten(2)}
    assert len(centres) > 12 if jitter == 1 else len(centres) <= 4 * 3


# ----------------------------------------------------------------------------- labels, cascade, workers, no lesions


def test_regions_ignore_label_and_cascade():
    labels = {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}
    case = volume(((2, 10, 10), (4, 12, 12), 1), ((3, 12, 12), (2, 3, 3), 2), ((16, 0, 0), (8, 64, 64), 3))
    options = {"labels": labels, "regions_class_order": [1, 2], "cascade": True, "batch_size": 20, "share": 0.5}
    loader = loader_of({"a": case}, (4, 16, 16), **options)
    assert loader.lesions.lesions.voxels.tolist() == [576, 18]
    assert loader.lesions.probabilities().tolist() == [0.5, 0.5]
    batch = next(loader)
    assert batch["target"].shape == (20, 2, 4, 16, 16)
    assert torch.equal(batch["target"][:, 0], batch["target"][:, 1])
    assert (batch["target"][10:, 0] > 0).flatten(1).any(dim=1).all()
    # Patches that are not oversampled hold annotated voxels, as nnU-Net's.
    assert (batch["target"][:10, 0] < 3).flatten(1).any(dim=1).all()
    core = loader_of({"a": case}, (4, 16, 16), **options, classes=(1,))
    assert (next(core)["target"][10:, 0] == 2).flatten(1).any(dim=1).all()


def test_the_same_seed_gives_the_same_batch_also_in_another_process():
    loader = loader_of(CASES, labels=TWO)
    batches = []
    for seed, given in ((1, loader), (1, pickle.loads(pickle.dumps(loader))), (2, loader)):
        np.random.seed(seed)  # noqa: NPY002
        batches.append(next(given)["data"])
    assert torch.equal(batches[0], batches[1])
    assert not torch.equal(batches[0], batches[2])


def test_wrong_arguments():
    with pytest.raises(ValueError, match="no lesion to draw"):
        loader_of({"a": volume()})
    with pytest.raises(ValueError, match=r"jitter is 1.5"):
        loader_of(CASES, jitter=1.5)
    with pytest.raises(ValueError, match="'voxel', but must be one of lesion, size_bin"):
        loader_of(CASES, sampling="voxel")


# --------------------------------------------------------------------------------------------------------- trainers


class Trainer(SlabTrainer):
    accepts_volumes = True
    lesion_sampling = "lesion"


class Sized(nnUNetTrainerCurriculum):
    lesion_sampling = "size_bin"


class Amplified(nnUNetTrainerSTSNet):
    lesion_sampling = "lesion"


def make(trainer: type, workspace, configuration: str = "2d", **dataset_changes):
    plans = copy.deepcopy(workspace.plans("nnUNetPlans" if configuration == "3d_fullres" else None))
    plans["continue_training"] = False
    for name, settings in plans["configurations"].items():
        settings["network_options"] = small_networks()
        settings["batch_size"] = 3
        settings["patch_size"] = {"2d": [32, 32], "2.5d": [3, 32, 32]}.get(name, [16, 32, 32])
    dataset_json = {**workspace.dataset_json(), **dataset_changes}
    return trainer(plans, configuration, 0, dataset_json, torch.device("cpu"))


def log_of(trainer) -> str:
    return Path(trainer.log_file).read_text()


@pytest.mark.parametrize("configuration", ["2d", "2.5d", "3d_fullres"])
def test_trainers_train_on_drawn_lesions(nnunet_folders, configuration):
    trainer = make(Trainer, nnunet_folders, configuration)
    trainer.initialize()
    training, validation = trainer.get_dataloaders()
    assert type(training.data_loader) is LesionDataLoader
    assert type(validation.data_loader) is nnUNetDataLoader
    assert training.data_loader.oversample_foreground_percent == 0.33
    assert training.data_loader.transforms is not None
    batch = next(training)
    assert batch["data"].shape[2:] == tuple(trainer.configuration_manager.patch_size)
    assert np.isfinite(trainer.train_step(batch)["loss"])
    log = log_of(trainer)
    assert "lesion_sampling = lesion: 1 of 3 patches of a batch show a drawn lesion (lesion_jitter = 0.5)" in log
    assert "label 1: " in log


def test_curriculum_and_workers(nnunet_folders, monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    trainer = make(Sized, nnunet_folders)
    try:
        trainer.on_train_start()
        assert type(trainer.dataloader_train.generator) is LesionDataLoader
        assert len(trainer.dataloader_train._processes) == 1
        trainer.on_train_epoch_start()
        trainer.on_train_epoch_end([trainer.train_step(next(trainer.dataloader_train)) for _ in range(3)])
        assert trainer.curriculum.seen.any()
        assert "lesion_sampling = size_bin" in log_of(trainer)
        debug = (Path(trainer.output_folder) / "debug.json").read_text()
        assert '"lesion_sampling": "size_bin"' in debug
        assert '"lesion_jitter": "0.5"' in debug
    finally:
        trainer.dataloader_train._finish()
        trainer.dataloader_val._finish()


def test_data_without_lesions_are_drawn_as_nnunet_does(nnunet_folders):
    class OnlyTwo(Trainer):
        lesion_labels = (2,)

    trainer = make(OnlyTwo, nnunet_folders, labels={"background": 0, "organ": 1, "lesion": 2})
    trainer.initialize()
    training, _ = trainer.get_dataloaders()
    assert type(training.data_loader) is nnUNetDataLoader
    assert "lesion_sampling = lesion has no effect: none of the 4 training cases has a lesion" in log_of(trainer)


@pytest.mark.parametrize(
    ("trainer", "attributes", "message"),
    [
        (Trainer, {"lesion_sampling": "lesions"}, "Wrong has lesion_sampling: 'lesions', .* 'voxel' or 'lesion'"),
        (Trainer, {"lesion_jitter": 1.5}, "Wrong has lesion_jitter: 1.5, but it must be a number from 0"),
        (Trainer, {"lesion_jitter": "half"}, "Wrong has lesion_jitter: 'half'"),
        (Trainer, {"lesion_labels": (7,)}, r"lesion_labels of Wrong is \(7,\), but must list some .*\[1\]"),
        (Amplified, {}, "Wrong draws slices by amplification, but has lesion_sampling = 'lesion'"),
    ],
)
def test_wrong_values_stop_before_anything_is_written(nnunet_folders, tmp_path, trainer, attributes, message):
    wrong = type("Wrong", (trainer,), attributes)
    with pytest.raises(CommandStopped, match=message):
        make(wrong, nnunet_folders)
    assert not (tmp_path / "results").exists()


def test_plans_switch_sampling_on(nnunet_folders, tmp_path):
    plans = nnunet_folders.plans()
    plans["continue_training"] = False
    plans["configurations"]["2d"]["training"] = {"lesion_sampling": "size_bin", "lesion_jitter": 1}
    with pytest.raises(CommandStopped, match="by amplification, but has lesion_sampling = 'size_bin'"):
        nnUNetTrainerSTSNet(plans, "2d", 0, nnunet_folders.dataset_json(), torch.device("cpu"))
    assert not (tmp_path / "results").exists()
    trainer = SlabTrainer(plans, "2d", 0, nnunet_folders.dataset_json(), torch.device("cpu"))
    trainer.initialize()
    loader = trainer.get_dataloaders()[0].data_loader
    assert loader.lesions.sampling == "size_bin"
    assert loader.jitter == 1


def test_nnunets_way_is_nnunets_loader(nnunet_folders):
    class Stock(Trainer):
        lesion_sampling = "voxel"

    trainer = make(Stock, nnunet_folders)
    trainer.initialize()
    assert type(trainer.get_dataloaders()[0].data_loader) is nnUNetDataLoader
    trainer.lesion_sampling = "nonsense"  # set after the start
    with pytest.raises(CommandStopped, match="'nonsense', but it must be 'voxel'"):
        trainer.get_dataloaders()
