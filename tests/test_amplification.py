"""Amplification: thresholds, windows, the table of slices, the data loader's distribution, trainers."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from conftest import small_networks
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from scipy import stats

from nnunetv2_smallseg import trainers
from nnunetv2_smallseg.augmentation.amplification import (
    NUM_COPIES,
    View,
    Window,
    amplification_thresholds,
    centre_crop,
    draw_view,
    edge_crop,
    place_window,
    take_view,
)
from nnunetv2_smallseg.data.amplified_loader import AmplifiedDataLoader
from nnunetv2_smallseg.data.lesion_table import count_labels
from nnunetv2_smallseg.data.slice_table import SliceTable
from nnunetv2_smallseg.errors import CommandStopped
from nnunetv2_smallseg.trainers.amplification import AmplificationMixin
from nnunetv2_smallseg.trainers.slabs import SlabTrainer

# Chi-square tests have fixed seeds; a wrong distribution gives values many orders of magnitude below this.
SIGNIFICANCE = 1e-3


@pytest.fixture(autouse=True)
def seeded_numpy():
    """The global state, from which nnU-Net's loaders draw."""
    np.random.seed(0)  # noqa: NPY002


def lesion_at(shape: tuple[int, int], *boxes: tuple[int, int, int, int]) -> np.ndarray:
    """A lesion of rectangles (top, bottom, left, right)."""
    lesion = np.zeros(shape, dtype=bool)
    for top, bottom, left, right in boxes:
        lesion[top:bottom, left:right] = True
    return lesion


# ------------------------------------------------------------------------------------------------------- thresholds


@pytest.mark.parametrize(
    ("areas", "expected"),
    [
        ([2000], (2025, 1024)),  # SCCM-2022 of the paper
        ([1089, 1089, 0], (1089, 576)),  # its lung data set
        ([2025], (2025, 1024)),  # a square stays
        ([2026], (2116, 1089)),
        ([1], (1, 1)),
        ([3, 1, 0, 0], (4, 4)),  # mean 2; half of 4 is 2, up to 4
        ([0, 0], (0, 0)),
    ],
)
def test_thresholds(areas, expected):
    assert amplification_thresholds(np.array(areas)) == expected


def test_thresholds_are_exact_for_large_sums():
    side = 3_000_001
    assert amplification_thresholds(np.array([side**2]))[0] == side**2
    assert amplification_thresholds(np.array([side**2 + 1]))[0] == (side + 1) ** 2


# ---------------------------------------------------------------------------------------------------------- windows


def test_window_arithmetic():
    window = Window((10, -4), (20, 30))
    assert window.stop == (30, 26)
    assert window.scaled((0.5, 2.0)) == Window((15, -19), (10, 60))
    pixels = np.ones((25, 100), dtype=bool)
    assert window.count(pixels) == 15 * 26
    assert Window((-10, -10), (5, 5)).count(pixels) == 0


def test_placed_window_shows_the_lesion_and_stays_inside():
    generator = np.random.default_rng(0)
    lesion = lesion_at((200, 50), (3, 6, 1, 4), (190, 193, 40, 44))
    seen = set()
    for _ in range(200):
        window = place_window(lesion, (64, 80), generator)
        assert window.size == (64, 80)
        assert 0 <= window.start[0] <= 200 - 64
        assert window.start[1] == -15  # 50 columns fit: centred on the slice
        assert window.count(lesion) > 0
        seen.add(window.start[0] > 60)
    assert seen == {True, False}


def test_edge_crops_keep_the_lesion():
    generator = np.random.default_rng(0)
    window = Window((0, 0), (100, 60))
    left = lesion_at((100, 60), (40, 50, 0, 4))  # only rows may be cut
    assert {edge_crop(left, window, generator) for _ in range(50)} == {Window((10, 0), (80, 60))}
    top = lesion_at((100, 60), (0, 4, 30, 40))
    assert {edge_crop(top, window, generator) for _ in range(50)} == {Window((0, 6), (100, 48))}
    middle = lesion_at((100, 60), (40, 50, 30, 40))
    crops = [edge_crop(middle, window, generator) for _ in range(3000)]
    counts = [crops.count(Window(*crop)) for crop in (((10, 0), (80, 60)), ((0, 6), (100, 48)), ((10, 6), (80, 48)))]
    assert sum(counts) == 3000
    assert stats.chisquare(counts).pvalue > SIGNIFICANCE


def test_edge_crop_that_must_cut_keeps_most():
    corners = lesion_at((100, 60), (0, 9, 30, 40), (50, 52, 0, 3))  # 90 pixels at the top, 6 at the left
    crops = {edge_crop(corners, Window((0, 0), (100, 60)), np.random.default_rng(i)) for i in range(30)}
    assert crops == {Window((0, 6), (100, 48))}


@pytest.mark.parametrize(
    ("shape", "size"),
    [((480, 480), (480, 480)), ((512, 400), (256, 256)), ((90, 120), (128, 128)), ((300, 90), (64, 96))],
)
def test_centre_crops(shape, size):
    generator = np.random.default_rng(0)
    boxes = [(0, 3, 0, 5), (40, 52, 60, 66), (shape[0] - 2, shape[0], shape[1] - 9, shape[1])]
    lesion = lesion_at(shape, *boxes)
    centres, zooms = np.zeros(3, dtype=int), []
    for _ in range(600):
        window = centre_crop(lesion, size, generator)
        assert min(window.start) >= 0
        assert window.stop[0] <= shape[0]
        assert window.stop[1] <= shape[1]
        zoom = [side / length for side, length in zip(size, window.size, strict=True)]
        assert max(zoom) / min(zoom) <= 1.25 + 0.05  # sides are whole pixels
        zooms.append(zoom)
        held = [window.count(lesion_at(shape, box)) == lesion_at(shape, box).sum() for box in boxes]
        assert any(held)
        centres += held
    assert (centres > 100).all()
    assert np.min(zooms) >= 1.2
    assert np.max(zooms) > 2


def test_centre_crop_leaves_a_margin():
    lesion = lesion_at((300, 300), (140, 150, 100, 103))
    for seed in range(100):
        window = centre_crop(lesion, (256, 256), np.random.default_rng(seed))
        assert window.start[0] <= 140 - 7
        assert window.stop[0] >= 150 + 7
        assert window.start[1] <= 100 - 7
        assert window.stop[1] >= 103 + 7


def test_centre_crop_of_a_narrow_slice_is_centred():
    lesion = lesion_at((200, 20), (90, 110, 5, 8))
    for seed in range(30):
        window = centre_crop(lesion, (256, 256), np.random.default_rng(seed))
        assert 0 <= window.start[0] <= window.stop[0] <= 200
        assert window.count(lesion) == lesion.sum()
        assert abs(window.start[1] + window.stop[1] - 20) <= 1


def test_centre_crop_of_a_component_larger_than_the_patch():
    lesion = lesion_at((300, 300), (10, 290, 140, 143))
    window = centre_crop(lesion, (64, 64), np.random.default_rng(0))
    assert window.size[0] == 64
    assert window.count(lesion) == 64 * 3


def test_diagonal_neighbours_are_one_component():
    lesion = np.eye(40, dtype=bool)
    lesion = np.pad(lesion, 100)
    window = centre_crop(lesion, (240, 240), np.random.default_rng(0))
    assert window.count(lesion) == 40


# ------------------------------------------------------------------------------------------------------------ views


def test_views_of_the_six_copies():
    generator = np.random.default_rng(0)
    lesion = lesion_at((100, 60), (40, 50, 30, 40))
    views = [draw_view(number, lesion, (100, 60), generator) for number in range(NUM_COPIES)]
    whole = Window((0, 0), (100, 60))
    assert views[:3] == [View(whole), View(whole, 1), View(whole, 0)]
    assert views[3].window.count(lesion) == views[4].window.count(lesion) == lesion.sum()
    assert views[3].flip_axis is None
    assert {draw_view(4, lesion, (100, 60), generator).flip_axis for _ in range(30)} == {0, 1}
    assert max(views[5].window.size) < 100
    with pytest.raises(ValueError, match="copy is 6"):
        draw_view(6, lesion, (100, 60), generator)


def test_taking_a_view():
    volume = np.arange(2 * 3 * 4 * 6, dtype=np.float32).reshape(2, 3, 4, 6)
    whole = View(Window((0, 0), (4, 6)))
    assert np.array_equal(take_view(volume, (1, 2), whole, (4, 6), labels=False)[:, 0], volume[:, 1])
    flipped = take_view(volume, (0, 3), View(whole.window, 1), (4, 6), labels=False)
    assert np.array_equal(flipped, volume[..., ::-1])
    flipped = take_view(volume, (0, 3), View(whole.window, 0), (4, 6), labels=False)
    assert np.array_equal(flipped, volume[:, :, ::-1])
    outside = take_view(volume, (-1, 2), View(Window((-1, 0), (5, 7))), (5, 7), labels=False)
    assert np.array_equal(outside[:, 1:, 1:, :6], volume[:, :2])
    assert not outside[:, 0].any()
    assert not outside[:, :, 0].any()
    assert not outside[..., 6].any()
    labels = take_view(volume.astype(np.int8), (-1, 2), View(Window((-1, 0), (5, 7))), (5, 7), labels=True)
    assert labels.dtype == torch.int16
    assert (labels[:, 0] == -1).all()


def test_scaled_views_agree_and_invent_no_label():
    """Image and labels of one window lie on each other; labels remain a subset."""
    rows = np.tile(np.arange(60)[:, None], (1, 80))
    volume = np.stack([rows, rows.T[:1].repeat(60, 0)[:, :60].repeat(2, 1)[:, :80]]).astype(np.float32)[:, None]
    labels = (rows[None, None] >= 30).astype(np.int8) * 7
    view = View(Window((10, 16), (40, 48)), 0)
    image = take_view(volume, (0, 1), view, (60, 80), labels=False)
    segmentation = take_view(labels, (0, 1), view, (60, 80), labels=True)
    assert set(segmentation.unique().tolist()) == {0, 7}
    assert (image[0, 0][segmentation[0, 0] == 7] > 29).all()
    assert (image[0, 0][segmentation[0, 0] == 0] < 30).all()
    assert image[0, 0, 0, 0] > image[0, 0, -1, 0]  # flipped


# --------------------------------------------------------------------------------------------------- table and draws


class MemoryDataset(nnUNetBaseDataset):
    """Cases in memory: (image, segmentation, segmentation of a first stage or None)."""

    def __init__(self, cases: dict[str, tuple]) -> None:
        super().__init__("unused", list(cases))
        self.content = cases

    def load_case(self, identifier):
        image, segmentation, previous = self.content[identifier]
        return image, segmentation, previous, {"class_locations": {}}

    @staticmethod
    def save_case(data, seg, properties, output_filename_truncated): ...

    @staticmethod
    def get_identifiers(folder): ...


def case_of(*slices: np.ndarray, previous: bool = False, channels: int = 1) -> tuple:
    """A case whose first channel shows its labels (times 10)."""
    segmentation = np.stack(slices)[None].astype(np.int8)
    image = np.repeat(10 * segmentation.astype(np.float32), channels, axis=0)
    return image, segmentation, segmentation[0].copy() if previous else None


def small_lesion(shape=(40, 40), label=1) -> np.ndarray:
    return label * lesion_at(shape, (18, 21, 20, 23))


def large_lesion(shape=(40, 40), label=1) -> np.ndarray:
    return label * lesion_at(shape, (5, 35, 5, 35))


def loader_of(
    dataset: MemoryDataset,
    patch_size=(32, 32),
    *,
    initial=None,
    labels=None,
    lesion_labels=(1,),
    amplify=True,
    **options,
) -> AmplifiedDataLoader:
    label_manager = LabelManager(labels or {"background": 0, "lesion": 1}, options.pop("regions_class_order", None))
    counts = {case: count_labels(dataset.load_case(case)[1]) for case in dataset.identifiers}
    slices = SliceTable.build(counts, lesion_labels, ignore_label=label_manager.ignore_label, amplify=amplify)
    return AmplifiedDataLoader(
        dataset,
        options.pop("batch_size", 4),
        initial or patch_size,
        patch_size,
        label_manager,
        slices=slices,
        lesion_labels=lesion_labels,
        **options,
    )


@pytest.fixture
def mixed() -> MemoryDataset:
    """Two cases; of their five slices, two have small lesions, one a large one."""
    empty = np.zeros((40, 40), dtype=np.int8)
    return MemoryDataset({"a": case_of(empty, small_lesion(), large_lesion()), "b": case_of(small_lesion(), empty)})


def test_table_counts_slices(mixed):
    table = loader_of(mixed).slices
    assert table.areas.tolist() == [0, 9, 900, 9, 0]
    assert table.thresholds == (324, 169)  # mean 306
    assert table.copies.tolist() == [1, 6, 1, 6, 1]
    assert [table.cases[case] for case in table.case_of] == ["a", "a", "a", "b", "b"]
    assert table.position_of.tolist() == [0, 1, 2, 0, 1]
    assert "N1 = 324 and N2 = 169 pixels; 2 of 3 slices with lesions" in table.summary()
    assert "5 slices count as 15" in table.summary()
    assert loader_of(mixed, amplify=False).slices.copies.tolist() == [1] * 5


def test_every_copy_is_drawn_equally_often(mixed):
    table = loader_of(mixed).slices
    generator = np.random.default_rng(0)
    drawn = [table.draw(generator) for _ in range(15_000)]
    expected = [(index, number) for index, copies in enumerate(table.copies) for number in range(copies)]
    counts = [drawn.count(pair) for pair in expected]
    assert sum(counts) == 15_000
    assert stats.chisquare(counts).pvalue > SIGNIFICANCE
    with_lesion = [table.draw(generator, lesion=True) for _ in range(13_000)]
    counts = [with_lesion.count(pair) for pair in expected if table.areas[pair[0]] > 0]
    assert sum(counts) == 13_000
    assert stats.chisquare(counts).pvalue > SIGNIFICANCE


def test_without_lesions_every_slice_is_drawn():
    empty = np.zeros((40, 40), dtype=np.int8)
    table = loader_of(MemoryDataset({"a": case_of(empty, empty)})).slices
    assert {table.draw(np.random.default_rng(seed), lesion=True) for seed in range(30)} == {(0, 0), (1, 0)}


def test_loader_draws_small_lesions_six_times_as_often(mixed):
    """What comes out of the loader: slices with small, large and no lesion as 12 : 1 : 2."""
    loader = loader_of(mixed, patch_size=(40, 40), batch_size=50)
    areas = []
    for _ in range(30):
        batch = next(loader)
        assert batch["data"].shape == (50, 1, 40, 40)
        assert len(batch["keys"]) == 50
        areas += (batch["target"] == 1).sum(dim=(1, 2, 3)).tolist()
    counts = [sum(0 < area < 600 for area in areas), sum(area >= 600 for area in areas), areas.count(0)]
    assert stats.chisquare(counts, [1200, 100, 200]).pvalue > SIGNIFICANCE
    enlarged = sum(9 < area < 600 for area in areas)  # three of six copies are crops
    assert stats.chisquare([enlarged, counts[0] - enlarged]).pvalue > SIGNIFICANCE


@pytest.mark.parametrize("initial", [None, (44, 48)])
def test_amplified_slices_always_show_the_lesion(initial):
    shape = (120, 90)
    dataset = MemoryDataset({"a": case_of(large_lesion(shape), lesion_at(shape, (3, 6, 80, 83)))})
    loader = loader_of(dataset, patch_size=(32, 32), initial=initial, batch_size=200)
    batch = next(loader)
    size = initial or (32, 32)
    assert batch["data"].shape == (200, 1, *size)
    margins = [(side - 32) // 2 for side in size]
    middle = batch["target"][..., margins[0] : margins[0] + 32, margins[1] : margins[1] + 32]
    shown = (middle == 1).sum(dim=(1, 2, 3))
    assert (shown > 0).float().mean() > 0.8  # the other slice counts once, and nnU-Net places its window
    # The image is ten times the label, linearly interpolated: on each other to the pixel.
    close = (batch["data"] > 5) == (batch["target"] == 1)
    assert close.float().mean() > 0.98


def test_the_same_seed_gives_the_same_batch(mixed):
    batches = []
    for seed in (1, 1, 2):
        np.random.seed(seed)  # noqa: NPY002
        batches.append(next(loader_of(mixed, batch_size=8)))
    assert torch.equal(batches[0]["data"], batches[1]["data"])
    assert not torch.equal(batches[0]["data"], batches[2]["data"])


@pytest.mark.parametrize("probabilistic", [False, True])
def test_oversampled_elements_show_a_lesion(probabilistic):
    shape = (200, 200)
    empty = np.zeros(shape, dtype=np.int8)
    large = np.pad(np.ones((30, 30), dtype=np.int8), ((5, 165), (165, 5)))
    dataset = MemoryDataset({"a": case_of(empty, *[empty] * 20, large), "b": case_of(lesion_at(shape, (5, 8, 5, 8)))})
    share = 0.5
    loader = loader_of(
        dataset, batch_size=100, oversample_foreground_percent=share, probabilistic_oversampling=probabilistic
    )
    target = next(loader)["target"]
    shown = (target == 1).any(dim=-1).any(dim=-1)[:, 0]
    if not probabilistic:
        assert shown[50:].all()  # as in nnU-Net, the last elements of the batch
    expected = 100 * (share + (1 - share) * 6 / 28)
    assert abs(int(shown.sum()) - expected) < 20


# ----------------------------------------------------------------------------------------- slabs, labels, cascades


@pytest.mark.parametrize("number", [1, 2, 3, 6])
def test_slabs_of_thin_volumes(number):
    """The middle slice is the drawn one; at the ends it is the nearest slab inside; thin volumes are padded."""
    values = [np.full((40, 40), 1 + position, dtype=np.int8) for position in range(number)]
    dataset = MemoryDataset({"a": case_of(*values)})
    labels = {"background": 0, **{f"l{value}": value for value in range(1, number + 1)}}
    loader = loader_of(
        dataset, patch_size=(3, 32, 32), labels=labels, lesion_labels=range(1, number + 1), batch_size=90
    )
    batch = next(loader)
    assert batch["data"].shape == batch["target"].shape == (90, 1, 3, 32, 32)
    columns = {tuple(column) for column in batch["target"][:, 0, :, 16, 16].tolist()}
    expected = {
        1: {(-1, 1, -1)},
        2: {(-1, 1, 2), (1, 2, -1)},
        3: {(1, 2, 3)},
        6: {(1, 2, 3), (2, 3, 4), (3, 4, 5), (4, 5, 6)},
    }
    assert columns == expected[number]
    inside = batch["target"] > 0
    assert torch.equal(batch["data"][inside], 10 * batch["target"][inside].float())
    assert not batch["data"][batch["target"] == -1].any()


def test_all_slices_of_a_slab_are_cut_alike():
    noise = np.random.default_rng(0).integers(0, 2, (60, 60)) * 2
    noise[20:24, 30:33] = 1
    dataset = MemoryDataset({"a": case_of(noise, noise, noise)})
    batch = next(loader_of(dataset, (3, 32, 32), labels={"background": 0, "a": 1, "b": 2}, batch_size=40))
    for name in ("data", "target"):
        assert torch.equal(batch[name][:, :, :1].expand_as(batch[name]), batch[name])


def test_cascade_and_channels_pass_through_the_same_window(mixed):
    cases = {name: case_of(*mixed.content[name][1][0], previous=True, channels=2) for name in mixed.identifiers}
    batch = next(loader_of(MemoryDataset(cases), batch_size=40))
    assert batch["data"].shape == (40, 2, 32, 32)
    assert batch["target"].shape == (40, 2, 32, 32)
    assert torch.equal(batch["target"][:, 0], batch["target"][:, 1])
    assert set(batch["target"].unique().tolist()) <= {-1, 0, 1}


def test_regions_and_organ_labels():
    """All labels of all regions count as lesion, unless the lesion's are named."""
    organ = large_lesion(label=1)
    organ[18:21, 20:23] = 2
    dataset = MemoryDataset({"a": case_of(organ, np.zeros((40, 40), np.int8))})
    labels = {"background": 0, "organ": [1, 2], "tumour": 2}
    everything = loader_of(dataset, labels=labels, regions_class_order=[1, 2], lesion_labels=(1, 2)).slices
    assert everything.areas.tolist() == [900, 0]
    tumour = loader_of(dataset, labels=labels, regions_class_order=[1, 2], lesion_labels=(2,))
    assert tumour.slices.areas.tolist() == [9, 0]
    assert tumour.slices.thresholds == (9, 9)
    assert set(next(tumour)["target"].unique().tolist()) <= {-1, 0, 1, 2}


def test_ignore_label():
    """It is no lesion, and slices on which nothing is annotated are never drawn."""
    unknown = np.full((60, 60), 2, dtype=np.int8)
    partly = unknown.copy()
    partly[50:58, 50:58] = 0
    lesion = small_lesion((60, 60))
    lesion[40:] = 2
    large = large_lesion((60, 60))
    dataset = MemoryDataset({"a": case_of(unknown, partly, lesion, large)})
    loader = loader_of(dataset, (16, 16), labels={"background": 0, "lesion": 1, "ignore": 2}, batch_size=60)
    assert loader.slices.areas.tolist() == [0, 0, 9, 900]
    assert loader.slices.copies.tolist() == [0, 1, 6, 1]
    target = next(loader)["target"]
    assert ((target == 0) | (target == 1)).flatten(1).any(dim=1).all()
    with pytest.raises(ValueError, match="annotated"):
        loader_of(MemoryDataset({"a": case_of(unknown)}), labels={"background": 0, "lesion": 1, "ignore": 2})


# --------------------------------------------------------------------------------------------- cache and trainers


def make(name_or_class, workspace, configuration: str = "2d", fold: int = 0, **dataset_changes) -> nnUNetTrainer:
    plans = copy.deepcopy(workspace.plans())
    plans["continue_training"] = False
    for settings in plans["configurations"].values():
        settings["network_options"] = small_networks()
    trainer_class = getattr(trainers, name_or_class) if isinstance(name_or_class, str) else name_or_class
    dataset_json = {**workspace.dataset_json(), **dataset_changes}
    return trainer_class(plans, configuration, fold, dataset_json, torch.device("cpu"))


def log_of(trainer: nnUNetTrainer) -> str:
    with open(trainer.log_file) as file:
        return file.read()


@pytest.mark.parametrize("configuration", ["2d", "2.5d"])
def test_trainer_replaces_the_training_loader_only(nnunet_folders, configuration):
    trainer = make("nnUNetTrainerAmplification", nnunet_folders, configuration)
    trainer.initialize()
    training, validation = trainer.get_dataloaders()
    assert type(training.data_loader) is AmplifiedDataLoader
    assert type(validation.data_loader) is not AmplifiedDataLoader
    assert training.data_loader.oversample_foreground_percent == 0.33
    patch = trainer.configuration_manager.patch_size
    batch = next(training)
    assert batch["data"].shape[2:] == tuple(patch)
    assert np.isfinite(trainer.train_step(batch)["loss"])
    log = log_of(trainer)
    assert "Amplification: N1 = " in log
    table = training.data_loader.slices
    assert f"count as {table.copies.sum()}" in log


def test_worker_processes_run_our_loader(nnunet_folders, monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    trainer = make("nnUNetTrainerSTSNet", nnunet_folders)
    trainer.initialize()
    training, validation = trainer.get_dataloaders()
    try:
        assert type(training.generator) is AmplifiedDataLoader
        assert len(training._processes) == 1
        batches = [next(training)["data"] for _ in range(3)]
        assert not torch.equal(batches[0], batches[1])
    finally:
        training._finish()
        validation._finish()


def test_ablation_draws_uniformly(nnunet_folders):
    trainer = make("nnUNetTrainerSTSNetNoAmplification", nnunet_folders)
    trainer.initialize()
    loader = trainer.get_dataloaders()[0].data_loader
    assert type(loader) is AmplifiedDataLoader
    assert set(loader.slices.copies) == {1}
    assert loader.oversample_foreground_percent == 0


def test_recipe_of_sts_net(nnunet_folders):
    trainer = make("nnUNetTrainerSTSNet", nnunet_folders)
    trainer.initialize()
    assert isinstance(trainer.optimizer, torch.optim.AdamW)
    assert trainer.optimizer.param_groups[0]["lr"] == 1e-4
    assert trainer.optimizer.param_groups[0]["weight_decay"] == 0.01
    assert trainer.oversample_foreground_percent == 0
    trainer.lr_scheduler.step(1)  # of 2 epochs
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(1e-4 * 0.5**0.9)


def test_mixin_with_lesion_labels_in_a_trainer_of_ones_own(nnunet_folders):
    class Tumours(AmplificationMixin, SlabTrainer):
        lesion_labels = (2,)

    trainer = make(Tumours, nnunet_folders, labels={"background": 0, "lesion": 1, "tumour": 2})
    trainer.initialize()
    table = trainer.get_dataloaders()[0].data_loader.slices
    assert not table.areas.any()  # the phantom has no label 2
    assert table.thresholds == (0, 0)
    trainer.configuration_manager.configuration["lesion_labels"] = [1]  # the plans come first
    assert trainer.get_dataloaders()[0].data_loader.slices.areas.any()
    with pytest.raises(CommandStopped, match=r"lesion_labels of Tumours is \(2,\).*\[1\]"):
        make(Tumours, nnunet_folders)
    trainer = make("nnUNetTrainerAmplification", nnunet_folders)
    for wrong in ([], [3], 1, "1"):
        trainer.configuration_manager.configuration["lesion_labels"] = wrong
        with pytest.raises(CommandStopped, match=r"lesion_labels of the plans' configuration is .*\[1\]"):
            trainer.get_dataloaders()


def test_volumes_are_refused(nnunet_folders):
    class Volumes(AmplificationMixin, nnUNetTrainer):
        pass

    plans = nnunet_folders.plans("nnUNetPlans")
    plans["continue_training"] = False
    trainer = Volumes(plans, "3d_fullres", 0, nnunet_folders.dataset_json(), torch.device("cpu"))
    with pytest.raises(CommandStopped, match=r"'3d_fullres' is three-dimensional.*2.5d"):
        trainer.get_dataloaders()
