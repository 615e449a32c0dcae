"""Targets of deep supervision: no lesion disappears, nothing else changes, and sizes and types are nnU-Net's."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from nnunetv2_smallseg.losses.deep_supervision_targets import downsample_labels, downsampled_shape

HALVES = [[1.0] * 3, [0.5] * 3, [0.25] * 3, [0.125] * 3]


def exact_areas(mask: np.ndarray, grid: tuple[int, ...]) -> np.ndarray:
    """Area of a mask in each cell, by dividing every voxel into as many parts as there are cells."""
    for axis, cells in enumerate(grid):
        parts = np.repeat(mask, cells, axis)
        mask = np.add.reduceat(parts, np.arange(cells) * mask.shape[axis], axis, dtype=np.int64)
    return mask


def components(labels: np.ndarray, pooled: list[int]) -> list[tuple[int, np.ndarray]]:
    """(label, mask) of every connected component of one label, with corners along the pooled axes."""
    structure = np.ones((3,) * labels.ndim, dtype=bool)
    for axis in set(range(labels.ndim)) - set(pooled):
        structure[tuple([0, 2] if other == axis else slice(None) for other in range(labels.ndim))] = False
    found = []
    for label in np.unique(labels[labels > 0]):
        numbers, count = ndimage.label(labels == label, structure)
        found += [(int(label), numbers == number) for number in range(1, count + 1)]
    return found


def survives(label: int, mask: np.ndarray, target: np.ndarray) -> bool:
    """Whether a lesion touches a cell of its label."""
    return bool((exact_areas(mask, target.shape)[target == label] > 0).any())


def ball(shape: tuple[int, ...], centre, diameter: float) -> np.ndarray:
    grids = np.meshgrid(*map(np.arange, shape), indexing="ij", sparse=True)
    return sum((grid - middle) ** 2 for grid, middle in zip(grids, centre, strict=True)) <= (diameter / 2) ** 2


@st.composite
def patches(draw) -> tuple[np.ndarray, list[list[float]]]:
    """Random labels of any density, on two or three axes of any size, and scales; 3 may stand for the ignore label."""
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=2, max_size=3)))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    density = draw(st.sampled_from([0.02, 0.1, 0.3, 0.9]))
    labels = generator.integers(1, 4, shape) * (generator.random(shape) < density)
    scales = draw(st.lists(st.lists(st.sampled_from([1.0, 0.5, 0.25, 1 / 3, 0.4]), min_size=len(shape),
                                    max_size=len(shape)), min_size=1, max_size=3))  # fmt: skip
    possible = [all(round(size * factor) for size, factor in zip(shape, scale, strict=True)) for scale in scales]
    return labels, [scale for scale, fits in zip(scales, possible, strict=True) if fits]


@settings(max_examples=250, deadline=None, derandomize=True)
@given(patches(), st.sampled_from([None, 3]), st.sampled_from([np.int16, np.int64, np.uint8, np.float32]))
def test_cells_hold_what_prevails_and_no_lesion_is_lost(patch, ignore_label, dtype):
    labels, scales = patch
    tensor = torch.from_numpy(labels[None].astype(dtype))
    stock = DownsampleSegForDSTransform(scales)(segmentation=tensor)["segmentation"]
    targets = downsample_labels(tensor, scales, ignore_label=ignore_label)
    pooled = [axis for axis in range(labels.ndim) if any(t.shape[axis + 1] != labels.shape[axis] for t in targets)]
    lesions = [(label, mask) for label, mask in components(labels, pooled) if label != ignore_label]
    for target, expected in zip(targets, stock, strict=True):
        assert (target.shape, target.dtype) == (expected.shape, expected.dtype)
        target = target[0].numpy()
        if target.shape == labels.shape:
            assert np.array_equal(target, labels)
            continue
        areas = np.stack([exact_areas(labels == label, target.shape) for label in range(4)])
        order = [2, 1, 0, 3] if ignore_label else [3, 2, 1, 0]  # of falling priority
        prevailing = np.take(order, np.argmax(areas[order], axis=0))
        changed = target != prevailing
        lost = [one for one in lesions if not survives(*one, prevailing)]
        assert bool(lost) or not changed.any()
        for cell in np.argwhere(changed):
            # Every cell that changed hands did so for a lesion in it.
            assert target[tuple(cell)] not in (0, ignore_label)
            assert areas[(int(target[tuple(cell)]), *cell)] > 0
        by_cell = {id(mask): exact_areas(mask, target.shape) > 0 for _, mask in lesions}
        for label, mask in lesions:
            if survives(label, mask, target):
                continue
            # Only if every cell is the last one of a lesion of at least the same priority.
            for cell in np.argwhere(by_cell[id(mask)]):
                owner = target[tuple(cell)]
                holders = [m for other, m in lesions if other == owner and by_cell[id(m)][tuple(cell)]]
                assert owner > label
                assert any((by_cell[id(m)] & (target == owner)).sum() == 1 for m in holders)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(patches(), st.booleans())
def test_regions_are_kept_and_stay_nested(patch, ignore_channel):
    labels, scales = patch
    regions = np.stack([labels > 0, labels > 1, labels == 2])
    if ignore_channel:
        regions = np.stack([(labels == 1) | (labels == 2), labels == 2, labels == 3])
    tensor = torch.from_numpy(regions)
    stock = DownsampleSegForDSTransform(scales)(segmentation=tensor)["segmentation"]
    targets = downsample_labels(tensor, scales, regions=True, ignore_channel=ignore_channel)
    pooled = [axis for axis in range(labels.ndim) if any(t.shape[axis + 1] != labels.shape[axis] for t in targets)]
    for target, expected in zip(targets, stock, strict=True):
        assert (target.shape, target.dtype) == (expected.shape, torch.bool)
        target = target.numpy()
        if target.shape == regions.shape:
            continue
        masks = regions[:-1] if ignore_channel else regions
        for region, kept in zip(masks, target, strict=False):
            assert all(survives(1, mask, kept) for _, mask in components(region.astype(int), pooled))
            half = 2 * exact_areas(region, kept.shape) >= np.prod(labels.shape)
            assert kept[half].all()
        for inner, outer in itertools.permutations(range(len(masks)), 2):
            if not (masks[inner] & ~masks[outer]).any():
                assert not (target[inner] & ~target[outer]).any()
        if ignore_channel:
            assert not (target[-1] & target[:-1].any(0)).any()
            unlabelled = ~target[:-1].any(0)
            more_than_half = 2 * exact_areas(regions[-1], target.shape[1:]) > np.prod(labels.shape)
            assert np.array_equal(target[-1][unlabelled], more_than_half[unlabelled])


@pytest.mark.parametrize("diameter", [1, 2, 3, 4, 6, 8])
def test_no_sphere_is_lost(diameter):
    """As measured by benchmarks/deep_supervision_targets.py, here at a few positions; nnU-Net loses some of them."""
    generator = np.random.default_rng(diameter)
    lost = np.zeros((2, 3), dtype=int)
    for _ in range(8):
        centre = 16 + generator.uniform(-4, 4, 3)
        mask = ball((32,) * 3, centre if diameter > 1 else np.round(centre), diameter)
        tensor = torch.from_numpy(mask[None].astype(np.int16))
        stock = DownsampleSegForDSTransform(HALVES)(segmentation=tensor)["segmentation"]
        for row, targets in enumerate((stock, downsample_labels(tensor, HALVES))):
            lost[row] += [not survives(1, mask, target[0].numpy()) for target in targets[1:]]
    assert lost[1].sum() == 0
    assert lost[0].sum() > 0


def awkward_labels() -> np.ndarray:
    """A patch of thin, touching, nested and branching lesions of three labels, and an ignored margin (4)."""
    labels = np.zeros((24, 40, 40), dtype=np.int16)
    labels[:, :, 36:] = 4
    for step in range(20):
        labels[step, step, step] = 1  # a diagonal thread
        labels[3, 38 - step, 1 + step] = 2
    labels[10, 4:12, 20:28] = 1  # a frame one voxel wide around another lesion
    labels[10, 5:11, 21:27] = 0
    labels[10, 7:9, 23:25] = 3
    labels[20:22, 20:22, 20:22] = 1  # two that share all their cells but one
    labels[20:22, 20:22, 22:25] = 2
    labels[17, 30, 37] = 3  # in the ignored margin, at the border
    labels[23, 39, 39] = 1
    labels[5:12, 25:34, 2:11][ball((7, 9, 9), (3, 4, 4), 7)] = 1  # a core of three voxels in a lesion
    labels[8, 29, 5:8] = 2
    return labels


@pytest.mark.parametrize("scales", [HALVES, [[1, 1, 1], [1, 0.5, 0.5], [0.5, 0.25, 0.25]],
                                    [[1, 1, 1], [0.3, 0.45, 0.45], [0.2, 0.15, 0.15]]])  # fmt: skip
def test_awkward_shapes_survive(scales):
    labels = awkward_labels()
    lesions = [(label, mask) for label, mask in components(labels, [0, 1, 2]) if label != 4]
    assert len(lesions) == 9
    for target in downsample_labels(torch.from_numpy(labels[None]), scales, ignore_label=4):
        assert [label for label, mask in lesions if not survives(label, mask, target[0].numpy())] == []
        # The margin stays ignored but for the cells of the two lesions in it.
        assert (target[0, ..., -1] != 4).sum() <= 2 or target.shape[-1] < 10


def test_large_structures_are_area_averages():
    """Nothing but the lesions that would disappear differs from averaging, thresholded at one half."""
    generator = np.random.default_rng(0)
    labels = np.zeros((1, 64, 64, 64), dtype=np.int16)
    labels[0][ball((64,) * 3, generator.uniform(28, 36, 3), 45)] = 1
    averaged = torch.from_numpy(labels).float()
    for target in downsample_labels(torch.from_numpy(labels), HALVES)[1:]:
        averaged = torch.nn.functional.avg_pool3d(averaged, 2)
        assert torch.equal(target, (averaged >= 0.5).short())


def test_slices_of_a_slab_are_looked_at_one_by_one():
    """A lesion that goes on in the next slice still has a cell in each: no slice is pooled."""
    slab = torch.zeros((1, 3, 16, 16), dtype=torch.int16)
    slab[0, 0, 4:8, 4:8] = 1
    slab[0, 1, 6, 6] = 1
    quarter = downsample_labels(slab, [[1, 0.25, 0.25]])[0]
    assert quarter.shape == (1, 3, 4, 4)
    for index in range(3):
        assert torch.equal(quarter[:, index], downsample_labels(slab[:, index], [0.25])[0])
    assert quarter[0, :, 1, 1].tolist() == [1, 1, 0]


def test_priority_decides_who_owns_a_cell():
    labels = torch.zeros((1, 8, 8), dtype=torch.int16)
    labels[0, 1, 1] = 1
    labels[0, 1, 3] = 2  # both have the first cell only
    labels[0, 4:, 4:6] = 1
    labels[0, 4:, 6:] = 2  # one half each
    expected = {(): 2, (2, 1): 2, (1, 2): 1, (1,): 1}
    for priority, owner in expected.items():
        [target] = downsample_labels(labels, [0.5 / 2], priority=priority)
        assert target[0].tolist() == [[owner, 0], [0, owner]]
        [target] = downsample_labels(labels, [0.25], priority=priority, rule="foreground")
        assert target[0].tolist() == [[owner, 0], [0, owner]]


@pytest.mark.parametrize(("owner", "lost"), [(1, 2), (2, 1)])
def test_an_owner_moves_over_for_a_lesion_that_cannot(owner, lost):
    labels = torch.zeros((1, 4, 8), dtype=torch.int16)
    labels[0, :, 2:5] = owner  # most of the first cell, a quarter of the second
    labels[0, :2, 0] = lost  # in the first cell only
    assert downsample_labels(labels, [0.25])[0].tolist() == [[[lost, owner]]]


def test_foreground_rule_takes_every_cell_that_is_touched():
    labels = torch.zeros((1, 9, 9), dtype=torch.int16)
    labels[0, 1:8, 3:5] = 1
    labels[0, 8, 8] = 2
    [target] = downsample_labels(labels, [1 / 3], rule="foreground", ignore_label=2)
    assert target[0].tolist() == [[0, 1, 0]] * 3
    [target] = downsample_labels(labels, [4 / 9], rule="foreground")
    assert target[0].tolist() == [[0, 1, 1, 0]] * 3 + [[0, 1, 1, 2]]


def test_full_resolution_is_passed_on_untouched():
    labels = torch.randint(0, 3, (2, 8, 8), dtype=torch.int16)
    targets = downsample_labels(labels, [1.0, [1.0, 1.0], 0.5])
    assert targets[0] is labels
    assert targets[1] is labels
    assert targets[2].shape == (2, 4, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "nearest"}, "no rule 'nearest': use one of lesion, foreground"),
        ({"scales": [[0.5, 0.5, 0.5]]}, r"does not fit the size \(8, 8\): give 2 factors"),
        ({"scales": [2.0]}, r"factors in \(0, 1\]"),
        ({"scales": [0.05]}, "nothing is left"),
        ({"labels": torch.full((1, 8, 8), -1)}, "labels hold -1"),
    ],
)
def test_wrong_arguments(options, message):
    arguments = {"labels": torch.zeros((1, 8, 8), dtype=torch.int16), "scales": [0.5], **options}
    with pytest.raises(ValueError, match=message):
        downsample_labels(**arguments)
    assert downsampled_shape((5, 7), 0.5) == (2, 4)  # rounds to even, as Python and nnU-Net do
