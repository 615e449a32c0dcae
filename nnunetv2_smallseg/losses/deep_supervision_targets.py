"""Targets for the lower resolutions of deep supervision in which no lesion disappears.

nnU-Net takes the label of one voxel of every cell (nearest neighbour), and with it loses lesions smaller than a cell.
Here a cell gets what holds most of its area, and a lesion that would get no cell is given the one it fills most.
Figures and times: ``docs/targets.md``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import cc3d
import numpy as np
import torch

__all__ = ["RULES", "downsample_labels", "downsampled_shape"]

# lesion: most area, and no lesion disappears. foreground: whatever touches a cell owns it, by priority.
RULES = ("lesion", "foreground")

BACKGROUND = 0
# Up to this number of lesions it is faster to search the patch for each than for all at once.
FEW = 16


def downsampled_shape(shape: Sequence[int], scale: float | Sequence[float]) -> tuple[int, ...]:
    """The size nnU-Net gives the target of a scale.

    Args:
        shape: Voxels along each spatial axis.
        scale: Factor for each axis, or one for all, above 0 and at most 1.
    Returns:
        Cells along each axis.
    Raises:
        ValueError: If the scale has another number of axes, is not in (0, 1], or leaves nothing of an axis.
    """
    factors = tuple(scale) if isinstance(scale, Sequence) else (scale,) * len(shape)
    if len(factors) != len(shape) or not all(0 < factor <= 1 for factor in factors):
        raise ValueError(f"the scale {scale} does not fit the size {tuple(shape)}: give {len(shape)} factors in (0, 1]")
    cells = tuple(round(size * factor) for size, factor in zip(shape, factors, strict=True))
    if min(cells) < 1:
        raise ValueError(
            f"nothing is left of the size {tuple(shape)} at the scale {scale}: use a larger patch or scale"
        )
    return cells


def downsample_labels(
    labels: torch.Tensor,
    scales: Sequence[float | Sequence[float]],
    *,
    rule: str = "lesion",
    regions: bool = False,
    ignore_label: int | None = None,
    ignore_channel: bool = False,
    priority: Sequence[int] = (),
) -> list[torch.Tensor]:
    """Targets of a patch for every scale of deep supervision.

    A lesion is a connected component of one label (or region) in the patch: with corners, along the axes that some
    scale pools; the slices of a slab, which no scale pools, are looked at one by one.

    With the rule ``lesion`` a cell gets the label that covers most of it, and a lesion with no cell of its own gets the
    cell it covers most. That is exact for sizes that are no multiple of the cells, too. Only where lesions of different
    labels have nothing but the same cells, some must give way: those of lower priority. With ``foreground`` a cell gets
    the label of highest priority that touches it at all.

    Args:
        labels: (C, Y, X) or (C, Z, Y, X): label maps with 0 for background, or regions, one in a channel, as nnU-Net's
            transforms give them.
        scales: For each target the factor of every spatial axis, or one for all, above 0 and at most 1.
        rule: One of ``RULES``.
        regions: Whether the channels are masks of regions, which may overlap, instead of label maps.
        ignore_label: Label of voxels that nobody annotated. A cell is ignored where they prevail over every other
            label, but never for a lesion that would disappear.
        ignore_channel: For regions: whether the last channel is the mask of such voxels, as in nnU-Net.
        priority: Labels from highest to lowest priority; those not named follow, higher numbers first. It decides
            between labels that cover a cell equally, or need the same one. Foreground comes before background.
    Returns:
        One tensor for each scale, (C, cells along each axis) of the same type; ``labels`` itself where all factors
        are 1.
    Raises:
        ValueError: If the rule is unknown, a scale does not fit, or a label is negative.
    """
    if rule not in RULES:
        raise ValueError(f"there is no rule {rule!r}: use one of {', '.join(RULES)}")
    shape = tuple(labels.shape[1:])
    grids = [downsampled_shape(shape, scale) for scale in scales]
    pooled = tuple(axis for axis in range(len(shape)) if any(grid[axis] != shape[axis] for grid in grids))
    if not pooled:
        return [labels] * len(grids)
    channels = labels.cpu().numpy()
    last = len(channels) - 1
    maps = [
        LabelMap.of_mask(channel, pooled, ignored=ignore_channel and index == last)
        if regions
        else LabelMap.of_labels(channel, pooled, ignore_label, priority)
        for index, channel in enumerate(channels)
    ]
    lower = list(dict.fromkeys(grid for grid in grids if grid != shape))
    owners = [label_map.owners(lower, rule) for label_map in maps]  # of each channel, at each level
    if rule == "lesion":
        given = [label_map.keep_lesions(lower, own) for label_map, own in zip(maps, owners, strict=True)]
        if regions:
            for level in range(len(lower)):
                _agree([own[level] for own in owners], [of[level] for of in given], channels, ignore_channel)
    values = [label_map.values.astype(channels.dtype) for label_map in maps]
    targets = {grid: [value[own[level]] for value, own in zip(values, owners, strict=True)]
               for level, grid in enumerate(lower)}  # fmt: skip
    return [labels if grid == shape else torch.from_numpy(np.stack(targets[grid])).to(labels.device) for grid in grids]


def _agree(owners: list[np.ndarray], given: list[Given | None], channels: np.ndarray, ignore_channel: bool) -> None:
    """Gives a cell to all regions that hold the lesion it was given for, and takes it out of the ignored ones.

    Regions are often nested: a core stays inside its tumour.
    """
    regions = owners[:-1] if ignore_channel else owners
    for own, cells in enumerate(given):
        if cells is None:
            continue
        for other, owner in enumerate(regions):
            if other != own:
                owner.reshape(-1)[cells.inside(channels[other])] = 1
        if ignore_channel:
            owners[-1].reshape(-1)[cells.cells] = BACKGROUND


def cell_area(shape: Sequence[int], grid: Sequence[int]) -> int:
    """Area of a cell in whole numbers: voxels, or smaller units along axes where cells do not hold whole voxels."""
    return math.prod(size * _unit(size, cells) // cells for size, cells in zip(shape, grid, strict=True))


def _unit(size: int, cells: int) -> int:
    """Into how many parts each voxel of an axis is divided, so that every cell holds a whole number of them."""
    return 1 if size % cells == 0 else cells


@lru_cache(maxsize=64)
def _overlap(size: int, cells: int) -> tuple[np.ndarray, np.ndarray]:
    """How the voxels of an axis are divided among its cells.

    Returns:
        First cell of each voxel, and how many parts of the voxel lie in it; the others lie in the next cell.
    """
    unit = _unit(size, cells)
    length = size * unit // cells
    start = np.arange(size) * unit
    first = start // length
    return first, np.minimum((first + 1) * length - start, unit)


def areas_in_cells(mask: np.ndarray, grids: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
    """How much of each cell a mask covers, in the units of ``cell_area``, for each grid."""
    results = []
    source = mask.view(np.int8)
    for grid in grids:
        whole = all(size % cells == 0 for size, cells in zip(mask.shape, grid, strict=True))
        if not (whole and all(size % cells == 0 for size, cells in zip(source.shape, grid, strict=True))):
            source = mask.view(np.int8)
        dtype = np.min_scalar_type(-cell_area(mask.shape, grid) - 1)
        area = source
        for axis, cells in enumerate(grid):
            area = _sum_in_cells(area, axis, cells, dtype)
        results.append(area)
        if whole:  # the next level is made from this one
            source = area
    return results


def _sum_in_cells(values: np.ndarray, axis: int, cells: int, dtype: np.dtype) -> np.ndarray:
    """Sums along an axis within its cells."""
    size = values.shape[axis]
    if size % cells == 0:
        factor = size // cells
        before = (slice(None),) * axis
        total = values[(*before, slice(0, None, factor))].astype(dtype)
        for offset in range(1, factor):
            total += values[(*before, slice(offset, None, factor))]
        return total
    first, parts = _overlap(size, cells)
    weights = np.zeros((cells + 1, size))
    weights[first, np.arange(size)] = parts
    weights[first + 1, np.arange(size)] = _unit(size, cells) - parts
    # In float64, which holds these whole numbers exactly and is faster.
    return np.moveaxis(np.tensordot(weights[:-1], values.astype(np.float64), (1, axis)), 0, axis).astype(dtype)


@dataclass(frozen=True)
class LabelMap:
    """One channel, its labels replaced by ranks.

    0 is background, then come the ignored voxels, if there are any, then the labels from lowest to highest priority.

    Attributes:
        ranks: Rank of every voxel, (Z, Y, X) or (Y, X).
        values: Label of each rank.
        ignored_rank: Rank of ignored voxels, or None.
        pooled: Axes that some scale pools.
    """

    ranks: np.ndarray
    values: np.ndarray
    ignored_rank: int | None
    pooled: tuple[int, ...]

    @classmethod
    def of_mask(cls, mask: np.ndarray, pooled: tuple[int, ...], *, ignored: bool) -> LabelMap:
        """Of a region, or of the mask of ignored voxels."""
        return cls((mask != 0).view(np.uint8), np.array([0, 1]), 1 if ignored else None, pooled)

    @classmethod
    def of_labels(
        cls, labels: np.ndarray, pooled: tuple[int, ...], ignore_label: int | None, priority: Sequence[int]
    ) -> LabelMap:
        """Of a label map; ``ValueError`` if a label is negative."""
        if labels.min() < 0:
            raise ValueError(f"the labels hold {labels.min()}, but must not be negative: replace it, e.g. by 0")
        highest = int(labels.max())
        labels = labels.astype(np.min_scalar_type(highest))
        present = [label for label in range(1, highest + 1) if (labels == label).any()]
        lesions = [label for label in present if label != ignore_label]
        named = [label for label in dict.fromkeys(priority) if label in lesions]
        ignored = [label for label in present if label == ignore_label]
        order = [0, *ignored, *(label for label in lesions if label not in named), *named[::-1]]
        ranks = labels
        if order != list(range(len(order))):
            ranks = np.zeros_like(labels)
            for rank, label in enumerate(order[1:], 1):
                ranks[labels == label] = rank
        return cls(ranks, np.array(order), 1 if ignored else None, pooled)

    def owners(self, grids: Sequence[tuple[int, ...]], rule: str) -> list[np.ndarray]:
        """Rank of the label that owns each cell, for each grid, before lost lesions are looked for."""
        shape = self.ranks.shape
        totals = [cell_area(shape, grid) for grid in grids]
        owners = [np.zeros(grid, dtype=self.ranks.dtype) for grid in grids]
        ranks = range(1, len(self.values))
        areas = {rank: areas_in_cells(self.ranks == rank, grids) for rank in ranks}
        for level, (grid, total) in enumerate(zip(grids, totals, strict=True)):
            highest = np.full(grid, total, dtype=np.min_scalar_type(-total - 1))
            for rank in ranks:  # what is left is the background's
                highest -= areas[rank][level]
            for rank in ranks:
                area = areas[rank][level]
                if rank == self.ignored_rank:
                    wins = area > highest
                elif rule == "foreground":
                    wins = area > 0
                else:
                    wins = area >= highest
                owners[level][wins] = rank
                np.maximum(highest, area, out=highest)
        return owners

    @cached_property
    def components(self) -> np.ndarray:
        """Number of the lesion each voxel belongs to, from 1; 0 for background and ignored voxels."""
        lesions = self.ranks if self.ignored_rank is None else np.where(self.ranks == self.ignored_rank, 0, self.ranks)
        box = []
        rest = lesions
        while rest.ndim:
            filled = np.flatnonzero(rest.max(axis=tuple(range(1, rest.ndim))))
            if not len(filled):
                return np.zeros(lesions.shape, dtype=np.uint8)
            box.append(slice(filled[0], filled[-1] + 1))
            rest = rest.max(axis=0)
        box = tuple(box)
        found = connected(np.ascontiguousarray(lesions[box]), self.pooled)
        components = np.zeros(lesions.shape, dtype=found.dtype)
        components[box] = found
        return components

    @cached_property
    def num_numbers(self) -> int:
        """Numbers in ``components``: one more than there are lesions."""
        return int(self.components.max()) + 1

    def keep_lesions(self, grids: Sequence[tuple[int, ...]], owners: Sequence[np.ndarray]) -> list[Given | None]:
        """Changes the owners of cells, at every level, until no lesion is without a cell.

        Returns:
            For each level what was given to whom; None for nothing.
        """
        if len(self.values) == 1 + (self.ignored_rank is not None):
            return [None for _ in grids]
        levels = [Level(self, grid, owner) for grid, owner in zip(grids, owners, strict=True)]
        doubtful = [~level.has_middle_of_own_cell() for level in levels]
        voxels = self.voxels_of(1 + np.flatnonzero(np.logical_or.reduce(doubtful)[1:]))
        lesions = self.components.reshape(-1)[voxels]
        return [level.keep_lesions(voxels[doubt[lesions]]) for level, doubt in zip(levels, doubtful, strict=True)]

    def voxels_of(self, lesions: np.ndarray) -> np.ndarray:
        """Positions of their voxels in the flattened patch."""
        if len(lesions) > FEW:
            is_wanted = np.zeros(self.num_numbers, dtype=bool)
            is_wanted[lesions] = True
            return np.flatnonzero(is_wanted[self.components])
        wanted, one = np.zeros((2, *self.components.shape), dtype=bool)
        for lesion in lesions:
            np.equal(self.components, lesion, out=one)
            np.logical_or(wanted, one, out=wanted)
        return np.flatnonzero(wanted)


def connected(labels: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """Numbers from 1 for the components of equal labels, connected with corners along ``axes`` only."""
    apart = [axis for axis in range(labels.ndim) if axis not in axes]
    if not apart:
        return cc3d.connected_components(labels, connectivity=8 if labels.ndim == 2 else 26)
    spare = (1,) * (2 - len(axes))  # cc3d knows two and three axes
    stacked = np.transpose(labels, (*apart, *axes))
    numbers = np.zeros(stacked.shape, dtype=np.uint32)
    total = 0
    for index in np.ndindex(stacked.shape[: len(apart)]):
        part = np.ascontiguousarray(stacked[index])
        found = connected(part.reshape(spare + part.shape), tuple(range(max(part.ndim, 2)))).reshape(part.shape)
        numbers[index] = np.where(found > 0, found.astype(np.uint32) + np.uint32(total), 0)
        total += int(found.max())
    return np.ascontiguousarray(np.transpose(numbers, np.argsort((*apart, *axes))))


class Level:
    """One lower level of a label map.

    Args:
        label_map: The labels at full resolution.
        grid: Cells along each axis.
        owner: Rank of the owner of each cell, shaped as the grid.
    """

    def __init__(self, label_map: LabelMap, grid: tuple[int, ...], owner: np.ndarray) -> None:
        self.label_map = label_map
        self.grid = grid
        self.owner = owner.reshape(-1)  # a view: changes show in the target
        middle = label_map.components
        ranks = label_map.ranks
        for axis, cells in enumerate(grid):
            size = ranks.shape[axis]
            where = (slice(None),) * axis + (_middles(size, cells),)
            middle, ranks = middle[where], ranks[where]
        # The lesion in the middle of each cell it owns; a cheap proof that it has a cell.
        self.proven = np.where(ranks == owner, middle, 0).reshape(-1)

    def has_middle_of_own_cell(self, outside: np.ndarray | None = None) -> np.ndarray:
        """For every lesion whether it owns a cell for sure, by number; ``outside``: a cell that is not one of these."""
        found = np.zeros(self.label_map.num_numbers, dtype=bool)
        found[self.proven if outside is None else self.proven[~outside]] = True
        return found

    def keep_lesions(self, voxels: np.ndarray) -> Given | None:
        """Gives lost lesions a cell.

        Args:
            voxels: (N,) positions of all lesions that may be lost, in the flattened patch.
        Returns:
            What was given to whom; None for nothing.
        """
        shares = Shares(self.label_map, self.grid, voxels)
        own_area = shares.own_area(self.owner)
        lost = np.flatnonzero(shares.is_here & (own_area == 0))
        if not len(lost):
            return None
        cells = shares.largest_cells(lost)
        if not self._is_lesion(self.owner[cells]).any() and not _shared_by_ranks(cells, shares.rank_of[lost]):
            # The usual case: nobody else wants them.
            self.owner[cells] = shares.rank_of[lost]
            return Given(lost, cells, shares)
        # Only cells of lost lesions change hands, and those of lesions that could lose all their cells by that.
        concerned = np.zeros(len(self.owner), dtype=bool)
        known = np.zeros(len(own_area), dtype=bool)
        endangered = lost
        while True:
            known[endangered] = True
            concerned[shares.cells_of(known)] = True
            inside = shares.own_area(self.owner, concerned)
            endangered = np.flatnonzero(shares.is_here & (inside == own_area) & ~known)
            if not len(endangered):
                others = self._other_owners(concerned, shares.is_here)
                if not len(others):
                    break
                voxels = np.concatenate([voxels, self.label_map.voxels_of(others)])
                shares = Shares(self.label_map, self.grid, voxels)
                own_area = shares.own_area(self.owner)
        given = Exchange(self.owner, shares.rank_of, own_area, shares.overlaps(concerned)).settle(lost)
        return Given(*np.array(given, dtype=np.intp).reshape(-1, 2).T, shares)

    def _is_lesion(self, ranks: np.ndarray) -> np.ndarray:
        """Where ranks are those of lesions."""
        return (ranks > BACKGROUND) & (ranks != (self.label_map.ignored_rank or BACKGROUND))

    def _other_owners(self, cells: np.ndarray, known: np.ndarray) -> np.ndarray:
        """Lesions, not ``known``, that own some of the cells and perhaps no other."""
        label_map = self.label_map
        contested = np.flatnonzero(cells & self._is_lesion(self.owner))
        if not len(contested):
            return contested
        found = ~self.has_middle_of_own_cell(outside=cells) & ~known
        found[0] = False
        candidates = set()
        shape = label_map.ranks.shape
        for cell, *position in zip(contested, *np.unravel_index(contested, self.grid), strict=True):
            block = tuple(
                slice(at * size // cells_, -(-(at + 1) * size // cells_))
                for at, size, cells_ in zip(position, shape, self.grid, strict=True)
            )
            owned = label_map.ranks[block] == self.owner[cell]
            candidates.update(np.unique(label_map.components[block][owned]).tolist())
        return np.array([lesion for lesion in sorted(candidates) if found[lesion]], dtype=np.intp)


def _middles(size: int, cells: int) -> slice | np.ndarray:
    """The voxel in the middle of each cell of an axis."""
    if size % cells == 0:
        factor = size // cells
        return slice(factor // 2, None, factor)
    return (2 * np.arange(cells) + 1) * size // (2 * cells)


def _shared_by_ranks(cells: np.ndarray, ranks: np.ndarray) -> bool:
    """Whether one of the cells is wanted by lesions of two labels."""
    by_label = np.unique(np.stack([cells, ranks]), axis=1)[0]
    return len(np.unique(by_label)) < len(by_label)


class Shares:
    """Some lesions, divided among the cells of a grid: M shares, each the part of a voxel that lies in a cell.

    Args:
        label_map: The labels at full resolution.
        grid: Cells along each axis.
        voxels: (N,) positions of all voxels of these lesions in the flattened patch.

    Attributes:
        rank_of: Rank of each of these lesions, by number.
        is_here: For every number whether it is one of these lesions.
    """

    def __init__(self, label_map: LabelMap, grid: tuple[int, ...], voxels: np.ndarray) -> None:
        shape = label_map.ranks.shape
        cell: np.ndarray | int = 0
        area = np.ones(len(voxels), dtype=np.int64)
        voxel = np.arange(len(voxels))
        for position, size, cells in zip(np.unravel_index(voxels, shape), shape, grid, strict=True):
            first, parts = _overlap(size, cells)
            unit = _unit(size, cells)
            position = position if len(voxel) == len(voxels) else position[voxel]
            cell = cell * cells + first[position]
            if unit == 1:
                continue
            inside = parts[position]
            both = np.flatnonzero(inside < unit)
            cell = np.concatenate([cell, cell[both] + 1])
            area = np.concatenate([area * inside, area[both] * (unit - inside[both])])
            voxel = np.concatenate([voxel, voxel[both]])
        self.cell, self.area = cell, area
        self.voxel = voxels[voxel]
        self.lesion = label_map.components.reshape(-1)[self.voxel].astype(np.intp)
        self.rank = label_map.ranks.reshape(-1)[self.voxel]
        self.rank_of = np.zeros(label_map.num_numbers, dtype=np.intp)
        self.rank_of[self.lesion] = self.rank
        self.is_here = self.rank_of > 0

    def own_area(self, owner: np.ndarray, cells: np.ndarray | None = None) -> np.ndarray:
        """Area of each lesion in cells of its own label, by number; ``cells``: only in these."""
        counts = owner[self.cell] == self.rank
        if cells is not None:
            counts &= cells[self.cell]
        return np.bincount(self.lesion, self.area * counts, minlength=len(self.rank_of))

    def cells_of(self, lesions: np.ndarray) -> np.ndarray:
        """Cells of the lesions that are True in ``lesions``."""
        return self.cell[lesions[self.lesion]]

    def overlaps(self, cells: np.ndarray) -> Iterator[tuple[int, int, float]]:
        """(lesion, cell, area) for all lesions in cells that are True in ``cells``."""
        here = cells[self.cell]
        keys, share = np.unique(self.lesion[here] * len(cells) + self.cell[here], return_inverse=True)
        areas = np.bincount(share, self.area[here])
        return zip((keys // len(cells)).tolist(), (keys % len(cells)).tolist(), areas.tolist(), strict=True)

    def largest_cells(self, lesions: np.ndarray) -> np.ndarray:
        """For each of the lesions the cell it covers most; of equals, the first."""
        is_wanted = np.zeros(len(self.rank_of), dtype=bool)
        is_wanted[lesions] = True
        wanted = is_wanted[self.lesion]
        number = int(self.cell.max()) + 1
        keys, share = np.unique(self.lesion[wanted] * number + self.cell[wanted], return_inverse=True)
        order = np.lexsort((keys, -np.bincount(share, self.area[wanted]), keys // number))
        found, first = np.unique(keys[order] // number, return_index=True)
        return (keys[order] % number)[first[np.searchsorted(found, lesions)]]


@dataclass(frozen=True)
class Given:
    """Cells of one level that were given to lesions that had none.

    Attributes:
        lesions: (n,) their numbers.
        cells: (n,) their cells.
        shares: The lesions, divided among the cells.
    """

    lesions: np.ndarray
    cells: np.ndarray
    shares: Shares

    def inside(self, mask: np.ndarray) -> np.ndarray:
        """Those of the cells in which the lesion lies inside a mask of the patch."""
        cell_of = np.full(len(self.shares.rank_of), -1)
        cell_of[self.lesions] = self.cells
        here = self.shares.cell == cell_of[self.shares.lesion]
        lesion = self.shares.lesion[here]
        outside = np.bincount(lesion, mask.reshape(-1)[self.shares.voxel[here]] == 0, minlength=len(cell_of))
        return self.cells[outside[self.lesions] == 0]


class Exchange:
    """Finds cells for lesions that have none without taking the last one of another.

    Args:
        owner: Rank of the owner of every cell; changed.
        rank_of: Rank of every lesion.
        own_area: Area of every lesion inside cells of its own label.
        overlaps: (lesion, cell, area) for all lesions in the cells concerned.
    """

    def __init__(self, owner: np.ndarray, rank_of: np.ndarray, own_area: np.ndarray, overlaps: Iterable[tuple]) -> None:
        self.owner = owner
        self.rank_of = rank_of
        self.own_area = own_area
        self.cells_of: dict[int, list[tuple[float, int]]] = {}
        self.lesions_in: dict[int, list[tuple[int, float]]] = {}
        for lesion, cell, area in overlaps:
            self.cells_of.setdefault(lesion, []).append((area, cell))
            self.lesions_in.setdefault(cell, []).append((lesion, area))
        for cells in self.cells_of.values():
            cells.sort(key=lambda entry: (-entry[0], entry[1]))
        self.given: list[tuple[int, int]] = []

    def settle(self, lost: np.ndarray) -> list[tuple[int, int]]:
        """Gives each lesion in ``lost`` a cell where that is possible; returns all (lesion, cell) given."""
        waiting = sorted(lost.tolist(), key=lambda lesion: -int(self.rank_of[lesion]))
        homeless = self._ranks(waiting)
        while waiting:
            for lesion in waiting:
                self._place(lesion)
            waiting = [lesion for lesion in self.cells_of if not self.own_area[lesion]]
            before, homeless = homeless, self._ranks(waiting)
            if homeless >= before:
                break
        return self.given

    def _ranks(self, lesions: list[int]) -> list[int]:
        """From highest to lowest; falls in the order of lists with every lesion that finds a place."""
        return sorted((int(self.rank_of[lesion]) for lesion in lesions), reverse=True)

    def _place(self, lesion: int) -> None:
        """Finds a cell: a free one, one whose owner can move, or one whose owner has lower priority."""
        # It may share a cell given to another of its label.
        if self.own_area[lesion] or self._move_to_free_cell(lesion):
            return
        for _, cell in self.cells_of[lesion]:
            if all(self._move_to_free_cell(other, barred=cell) for other in self._stranded(cell)):
                self._give(cell, lesion)
                return
        for _, cell in self.cells_of[lesion]:
            if all(self.rank_of[other] < self.rank_of[lesion] for other in self._stranded(cell)):
                self._give(cell, lesion)
                return

    def _stranded(self, cell: int) -> list[int]:
        """Lesions that own this cell and no other."""
        rank = self.owner[cell]
        return [
            lesion
            for lesion, area in self.lesions_in[cell]
            if self.rank_of[lesion] == rank and self.own_area[lesion] <= area
        ]

    def _move_to_free_cell(self, lesion: int, barred: int | None = None) -> bool:
        for _, cell in self.cells_of[lesion]:
            if cell != barred and not self._stranded(cell):
                self._give(cell, lesion)
                return True
        return False

    def _give(self, cell: int, lesion: int) -> None:
        for rank, sign in ((self.owner[cell], -1), (self.rank_of[lesion], 1)):
            for other, area in self.lesions_in[cell]:
                if self.rank_of[other] == rank:
                    self.own_area[other] += sign * area
        self.owner[cell] = self.rank_of[lesion]
        self.given.append((lesion, cell))
