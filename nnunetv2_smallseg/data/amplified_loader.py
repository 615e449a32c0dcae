"""nnU-Net's data loader with the slices of the amplified data set in place of uniformly drawn cases.

Drawing a copy of a slice at random is drawing from the data set of Zhao et al. (Scientific Reports 2025) in which every
slice with a small lesion stands six times; but here each copy is made anew, with other crops, whenever it is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from threadpoolctl import threadpool_limits

from nnunetv2_smallseg.augmentation.amplification import NUM_COPIES, View, Window, draw_view, take_view
from nnunetv2_smallseg.data.slice_table import SliceTable

__all__ = ["AmplifiedDataLoader"]


class AmplifiedDataLoader(nnUNetDataLoader):
    """Draws copies of slices from a table and shows of each what its number says.

    For 2D patches and for slabs of slices, of which the middle one is drawn (at the ends of a volume, the nearest slab
    inside). All slices of a slab, all labels and the segmentation of a cascade's first stage are cut alike. Elements of
    a batch that nnU-Net oversamples are drawn from the slices with lesions, and show the lesion. Random numbers come
    from numpy's global state, which nnU-Net seeds in every worker.

    Args:
        data: The training cases.
        batch_size: Elements of a batch.
        patch_size: What transforms get, (H, W) or (S, H, W); nnU-Net cuts more than the network sees.
        final_patch_size: What the network sees of it, in the middle.
        label_manager: Labels of the data set.
        slices: Which slices there are and how often each counts.
        lesion_labels: Labels that count as lesion.
        oversample_foreground_percent: Share of a batch drawn from slices with lesions, 0 to 1.
        probabilistic_oversampling: Whether that share is a probability instead.
        transforms: What is done to each element afterwards.
    """

    def __init__(
        self,
        data: nnUNetBaseDataset,
        batch_size: int,
        patch_size: Sequence[int],
        final_patch_size: Sequence[int],
        label_manager: LabelManager,
        *,
        slices: SliceTable,
        lesion_labels: Sequence[int],
        oversample_foreground_percent: float = 0.0,
        probabilistic_oversampling: bool = False,
        transforms=None,
    ) -> None:
        super().__init__(
            data,
            batch_size,
            patch_size,
            final_patch_size,
            label_manager,
            oversample_foreground_percent=oversample_foreground_percent,
            probabilistic_oversampling=probabilistic_oversampling,
            transforms=transforms,
        )
        self.slices = slices
        self.lesion_labels = tuple(lesion_labels)
        self.ignore_label = label_manager.ignore_label

    def generate_train_batch(self) -> dict:
        """A batch as nnU-Net's trainers expect it: ``data``, ``target`` (a list with deep supervision) and ``keys``."""
        # Seeded from the global state in every batch: workers inherit a copy of this object, but not one state.
        generator = np.random.default_rng(np.random.randint(2**31, size=4))  # noqa: NPY002
        with torch.no_grad(), threadpool_limits(limits=1, user_api=None):
            samples = [self._sample(self.get_do_oversample(j), generator) for j in range(self.batch_size)]
        images, targets, keys = zip(*samples, strict=True)
        if isinstance(targets[0], list):
            stacked = [torch.stack(scale) for scale in zip(*targets, strict=True)]
        else:
            stacked = torch.stack(targets)
        return {"data": torch.stack(images), "target": stacked, "keys": np.array(keys)}

    def _sample(
        self, oversampled: bool, generator: np.random.Generator
    ) -> tuple[torch.Tensor, torch.Tensor | list[torch.Tensor], str]:
        """Image (C, ...), target(s) and case of one element."""
        index, copy = self.slices.draw(generator, lesion=oversampled)
        case = self.slices.cases[self.slices.case_of[index]]
        position = int(self.slices.position_of[index])
        image, segmentation, previous, _ = self._data.load_case(case)

        amplified = self.slices.copies[index] == NUM_COPIES
        if amplified or (oversampled and self.slices.areas[index] > 0):
            lesion = np.isin(np.asarray(segmentation[0, position]), self.lesion_labels)
            view = draw_view(copy, lesion, self.final_patch_size[1:], generator)
            view = View(self._as_transforms_get_it(view.window), view.flip_axis)
        else:
            view = View(self._nnunet_window(segmentation, position))

        slab = self._slab(position, image.shape[1])
        options = {"slices": slab, "view": view, "size": self.patch_size[1:]}
        image = take_view(image, **options, labels=False)
        labels = [take_view(segmentation, **options, labels=True)]
        if previous is not None:
            labels.append(take_view(previous[None], **options, labels=True))
        sample = {"image": image, "segmentation": torch.cat(labels)}
        if self.patch_size_was_2d:
            sample = {name: tensor[:, 0] for name, tensor in sample.items()}
        if self.transforms is not None:
            sample = self.transforms(**sample)
        return sample["image"], sample["segmentation"], case

    def _slab(self, position: int, available: int) -> tuple[int, int]:
        """First slice and the one behind the last: around ``position``, inside the volume if that is thick enough."""
        number = self.patch_size[0]
        missing = number - available
        # Thinner volumes are padded on both ends, as nnU-Net's sliding window does.
        lowest, highest = (-((missing + 1) // 2), -(missing // 2)) if missing > 0 else (0, -missing)
        first = min(max(position - number // 2, lowest), highest)
        return first, first + number

    def _as_transforms_get_it(self, window: Window) -> Window:
        """Enlarges what the network is to see to what the transforms get, which keep the middle."""
        return window.scaled(
            [given / seen for given, seen in zip(self.patch_size[1:], self.final_patch_size[1:], strict=True)]
        )

    def _nnunet_window(self, segmentation: np.ndarray, position: int) -> Window:
        """A window of a slice where nnU-Net puts it: anywhere, or where there is an ignore label, on what has none."""
        locations = None
        if self.has_ignore:
            annotated = np.argwhere(np.asarray(segmentation[0, position]) != self.ignore_label)
            # nnU-Net's locations: channel, slice, row, column.
            locations = {self.annotated_classes_key: np.pad(annotated, ((0, 0), (2, 0)))}
        shape = (self.patch_size[0], *segmentation.shape[2:])
        lower, _ = self.get_bbox(np.array(shape), False, locations)
        return Window((int(lower[1]), int(lower[2])), tuple(self.patch_size[1:]))
