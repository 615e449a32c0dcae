"""Chooses patch and batch size for the network of one trainer and the memory of one GPU.

nnU-Net's rules stay: a patch as large as the images' median shape if it fits, else smaller, axis by axis, along sizes
its own planner proposes; a batch of at least 2; the rest of the memory goes into the batch, which holds at most 5 % of
the voxels of the data set. Memory is predicted for the trainer itself (``memory.py``) instead of estimated from feature
maps of nnU-Net's network, and no patch is smaller than lesions with their surroundings.
"""

from __future__ import annotations

import difflib
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from batchgenerators.utilities.file_and_folder_operations import load_json
from nnunetv2 import paths
from nnunetv2.utilities.json_export import recursive_fix_for_json_export

from nnunetv2_smallseg import registry, trainers
from nnunetv2_smallseg.errors import SmallSegError, UsageError
from nnunetv2_smallseg.plans.configurations import NETWORK_OPTIONS_KEY, PLANNING_KEY
from nnunetv2_smallseg.plans.memory import TrainingMemory, training_memory
from nnunetv2_smallseg.plans.planner import DEFAULT_PLANS_NAME, SmallSegPlanner, plan_dataset

__all__ = ["DEFAULT_MEMORY_TARGET", "NetworkPlanner", "plan_for_network", "plans_name_of", "usable_bytes"]

logger = logging.getLogger(__name__)

DEFAULT_MEMORY_TARGET = 8.0
GIB = 2**30
# Kept free of the target, because the prediction does not see it: the driver's context, and a share for workspaces of
# convolutions and for blocks that the allocator holds. Assumptions, not measurements.
CONTEXT_GIB = 0.5
UNSEEN_SHARE = 0.1
# nnU-Net's batches have at least two patches.
MIN_BATCH_SIZE = 2
# A patch is at least so many times as high and wide as the lesions of this percentile.
LESION_PERCENTILE = "p95"
LESION_CONTEXT = 2.0
LESION_FINGERPRINT = "lesion_fingerprint.json"
# Smaller patches are not tried.
MIN_PATCH_SIZE = 32


def usable_bytes(gpu_memory_target: float) -> int:
    """The part of a memory target (GiB) that a predicted training step may fill, in bytes."""
    return int(max(0.0, gpu_memory_target - CONTEXT_GIB) * (1 - UNSEEN_SHARE) * GIB)


def needed_gib(predicted: int) -> float:
    """The smallest memory target (GiB) for a predicted training step (bytes)."""
    return predicted / GIB / (1 - UNSEEN_SHARE) + CONTEXT_GIB


def plans_name_of(trainer: str, gpu_memory_target: float) -> str:
    """Name of the plans for a trainer and a memory target, such as nnUNetSmallSegPlans_SwinUMamba_8GB."""
    return f"{DEFAULT_PLANS_NAME}_{trainer.removeprefix('nnUNetTrainer')}_{gpu_memory_target:g}GB"


def plan_for_network(
    dataset: str | int,
    trainer: str,
    gpu_memory_target: float = DEFAULT_MEMORY_TARGET,
    plans_name: str | None = None,
    **options: Any,
) -> tuple[Path, dict]:
    """Plans a data set for one trainer and GPU.

    Args:
        dataset: Name or number of the data set.
        trainer: Name of a trainer of the registry.
        gpu_memory_target: Memory of the GPU in GiB.
        plans_name: Name of the plans; None for ``plans_name_of``.
        options: Further arguments of ``NetworkPlanner``.
    Returns:
        Path of the plans file and its content.
    Raises:
        UsageError: If the trainer or the data set is unknown, or an option is impossible.
        SmallSegError: If nothing fits, or something is missing.
    """
    check_trainer(trainer)
    if not (gpu_memory_target > 0 and math.isfinite(gpu_memory_target)):
        raise UsageError(
            f"the GPU memory target is {gpu_memory_target:g} GB, but must be positive: give the memory of the GPU you "
            "will train on, e.g. -gpu_memory_target 24"
        )
    name = plans_name_of(trainer, gpu_memory_target) if plans_name is None else plans_name
    return plan_dataset(
        dataset, name, planner_class=NetworkPlanner, trainer=trainer, gpu_memory_target=gpu_memory_target, **options
    )


def check_trainer(name: str) -> None:
    """Raises ``UsageError`` with similar names unless ``name`` is a trainer of the registry."""
    known = list(registry.trainers())
    if name not in known:
        lowered = {other.lower().removeprefix("nnunettrainer"): other for other in known}
        similar = difflib.get_close_matches(name.lower().removeprefix("nnunettrainer"), lowered, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(lowered[match] for match in similar)}? " if similar else ""
        raise UsageError(f"there is no trainer {name!r}: {hint}smallseg trainers lists all of them")


@dataclass(frozen=True)
class LesionExtent:
    """How large a patch must be for the lesions.

    Attributes:
        required: Smallest height and width in voxels; zeros where nothing is known.
        reason: What it follows from, in words.
    """

    required: tuple[float, float]
    reason: str


@dataclass
class _Choice:
    """What was chosen for a configuration."""

    plan: dict
    batch_size: int
    memory: TrainingMemory
    reasons: list[str] = field(default_factory=list)


class NetworkPlanner(SmallSegPlanner):
    """Plans ``2d`` and ``2.5d`` for one trainer and one memory.

    Preprocessed data are those of the plans ``nnUNetSmallSegPlans`` wherever these would preprocess alike.
    ``network_options`` in older plans of the same name are kept and planned for.

    Args:
        dataset: Name or number of the data set.
        plans_name: Name of the plans.
        trainer: Name of a trainer of the registry.
        gpu_memory_target: Memory of the GPU in GiB.
        options: Further arguments of ``SmallSegPlanner``; a patch or batch size given there is not changed.
    """

    def __init__(
        self,
        dataset: str | int,
        plans_name: str,
        *,
        trainer: str,
        gpu_memory_target: float = DEFAULT_MEMORY_TARGET,
        **options: Any,
    ) -> None:
        super().__init__(dataset, plans_name, **options)
        self.trainer = registry.trainer(trainer)
        self.gpu_memory_target = gpu_memory_target
        # nnU-Net's own network needs nothing but what nnU-Net's planner gives it.
        self.patch_multiple = registry.network(self.trainer.network).stride if self.trainer.network else 1
        self.min_patch_size = max(2 * self.patch_multiple, MIN_PATCH_SIZE)
        self._predictions: dict[tuple, TrainingMemory | None] = {}

    @property
    def budget(self) -> int:
        """Bytes that a training step may take."""
        return usable_bytes(self.gpu_memory_target)

    @property
    def preprocessed(self) -> Path:
        """The folder of the plans."""
        return Path(paths.nnUNet_preprocessed) / self.dataset_name

    @staticmethod
    def static_estimate_VRAM_usage(*arguments: object, **options: object) -> int:
        """nnU-Net's estimate of the memory, which must not limit what it proposes: next to nothing."""
        return 1

    def get_plans_for_configuration(
        self, spacing, median_shape, data_identifier, approximate_n_voxels_dataset, _cache
    ) -> dict:
        """As ``SmallSegPlanner``; the largest patch, which ``configurations`` starts from."""
        if len(spacing) == 2:
            self._spacing, self._median_shape = np.array(spacing), np.array(median_shape)
            self._num_voxels = approximate_n_voxels_dataset
            self._cache = _cache
        return super().get_plans_for_configuration(
            spacing, median_shape, data_identifier, approximate_n_voxels_dataset, _cache
        )

    def configurations(self, plans: dict, num_slices: int | None) -> dict[str, dict]:
        """``2d`` and ``2.5d`` with the patch and the batch that were chosen for each."""
        planar = {**plans["configurations"]["2d"], **self._kept_network_options()}
        planar["data_identifier"], sharing = self._data_identifier(plans, planar)
        candidates = [{**planar, **candidate} for candidate in self._candidates(planar)]
        chosen = self._choose(plans, candidates, None)
        chosen.reasons.append(sharing)
        configurations = {"2d": self._as_configuration(chosen, None)}
        if num_slices is not None:
            slab = self._choose(plans, candidates, num_slices)
            configuration = self._as_configuration(slab, num_slices)
            different = {
                key: value
                for key, value in configuration.items()
                if key not in configurations["2d"] or not _equal(value, configurations["2d"][key])
            }
            configurations["2.5d"] = {"inherits_from": "2d", **different}
        return configurations

    def _kept_network_options(self) -> dict:
        target = self.preprocessed / f"{self.plans_identifier}.json"
        older = load_json(str(target))["configurations"].get("2d", {}) if target.is_file() else {}
        return {NETWORK_OPTIONS_KEY: older[NETWORK_OPTIONS_KEY]} if NETWORK_OPTIONS_KEY in older else {}

    def _data_identifier(self, plans: dict, planar: dict) -> tuple[str, str]:
        """Name of the folder of preprocessed data, and the reason."""
        shared = f"{DEFAULT_PLANS_NAME}_2d"
        ours = _preprocessing(plans, planar)
        for file in sorted(self.preprocessed.glob("*.json")):
            other = load_json(str(file))
            if file.stem == self.plans_identifier or not isinstance(other, dict):
                continue
            configuration = other.get("configurations", {}).get("2d", {})
            if configuration.get("data_identifier") == shared and _preprocessing(other, configuration) != ours:
                own = f"{self.plans_identifier}_2d"
                return own, f"preprocessed data of its own ({own}), because {file.stem} preprocesses otherwise"
        return shared, f"preprocessed data {shared}, shared with the other plans of smallseg plan"

    def _candidates(self, planar: dict) -> Iterator[dict]:
        """Patch and architecture, from the largest patch to the smallest that is allowed."""
        if self.patch_size is not None:
            yield _proposal(planar)
            return
        required = self.lesion_extent.required
        shape = [min(a, b) for a, b in zip(planar["patch_size"], self._rounded_up(self._median_shape), strict=True)]
        last, plan = None, planar
        while True:
            if plan["patch_size"] != last:
                last = plan["patch_size"]
                yield _proposal(plan)
            step = max(8, self.patch_multiple)
            # As nnU-Net does: the axis that covers the most of the image gets smaller.
            axes = np.argsort([-size / full for size, full in zip(shape, self._median_shape, strict=True)])
            axis = next((a for a in axes if shape[a] - step >= max(required[a], self.min_patch_size)), None)
            if axis is None:
                return
            shape[axis] -= step
            plan = self.plan_slices(shape, self._spacing, self._median_shape, "", self._num_voxels, self._cache)

    @cached_property
    def lesion_extent(self) -> LesionExtent:
        """The smallest patch for the lesions of the lesion fingerprint."""
        file = self.preprocessed / LESION_FINGERPRINT
        number = int(self.dataset_name[7:10])
        if not file.is_file():
            return LesionExtent(
                (0, 0),
                f"the sizes of the lesions are unknown (no {LESION_FINGERPRINT}; smallseg fingerprint -d {number} "
                "measures them), so only nnU-Net's rules hold",
            )
        try:
            lesions = load_json(str(file))["lesions"]["all"]
            extent = lesions["extent_mm"][LESION_PERCENTILE] if lesions["count"] else None
            in_plane = None if extent is None else np.array(extent[-2:], dtype=float)
        except (KeyError, TypeError, ValueError) as error:
            raise SmallSegError(
                f"{file} cannot be read ({type(error).__name__}: {error}): write it again with smallseg fingerprint -d "
                f"{number}"
            ) from error
        if in_plane is None:
            return LesionExtent((0, 0), "the lesion fingerprint has no lesions, so only nnU-Net's rules hold")
        required = np.ceil(in_plane / self._spacing * LESION_CONTEXT)
        limit = np.array(self._rounded_up(self._median_shape))
        reason = (
            f"covers {LESION_CONTEXT:g} times the extent of lesions (95th percentile {_times(in_plane)} mm), "
            f"{_times(required)} voxels"
        )
        if (required > limit).any():
            reason += f", as far as the images do ({_times(limit)})"
        return LesionExtent(tuple(np.minimum(required, limit)), reason)

    def _predict(
        self, plans: dict, plan: dict, batch_size: int, num_slices: int | None, *, grad_checkpointing: bool = False
    ) -> TrainingMemory | None:
        """Memory of a training step; None if the network cannot train so."""
        key = (tuple(plan["patch_size"]), batch_size, num_slices, grad_checkpointing)
        if key not in self._predictions:
            name = "2d" if num_slices is None else "2.5d"
            patch = [*([] if num_slices is None else [num_slices]), *plan["patch_size"]]
            configuration = {**plan, "batch_size": batch_size, "patch_size": patch}
            content = {**plans, "configurations": {name: configuration}}
            recursive_fix_for_json_export(content)
            trainer_class = getattr(trainers, self.trainer.name)
            options = {"grad_checkpointing": True} if grad_checkpointing else {}
            try:
                memory = training_memory(trainer_class, content, name, self.dataset_json, **options)
                result = f"{memory.total / GIB:.2f} GiB"
            except (ValueError, NotImplementedError) as error:
                memory, result = None, f"not possible ({error})"
            logger.info(
                "%s, patch %s, batch size %d%s: %s",
                name,
                _times(patch),
                batch_size,
                ", activations computed again" if grad_checkpointing else "",
                result,
            )
            self._predictions[key] = memory
        return self._predictions[key]

    def _choose(self, plans: dict, candidates: list[dict], num_slices: int | None) -> _Choice:
        """The largest patch that fits with two samples, then the largest batch."""
        smallest_batch = self.batch_size or MIN_BATCH_SIZE

        def predict(plan: dict, batch_size: int) -> TrainingMemory | None:
            return self._predict(plans, plan, batch_size, num_slices)

        def fits(memory: TrainingMemory | None) -> bool:
            return memory is not None and memory.total <= self.budget

        place = _first_that_fits(candidates, lambda plan: predict(plan, smallest_batch), self.budget)
        reasons = [f"network {self.trainer.network or 'of the plans (nnU-Net)'}, trained by {self.trainer.name}"]
        if place is None and self.batch_size is None and fits(predict(candidates[-1], 1)):
            place, smallest_batch = len(candidates) - 1, 1
        if place is None:
            batch_sizes = [smallest_batch] if self.batch_size is not None else [smallest_batch, 1]
            self._refuse(candidates[-1], [predict(candidates[-1], size) for size in batch_sizes], num_slices)
        plan = candidates[place]
        reasons.append(self._reason_of_patch(candidates, place, smallest_batch, predict, num_slices))
        if self.patch_size is None:
            reasons.append(f"patch: {self.lesion_extent.reason}")
        limit = self._largest_batch_of(plan, num_slices)
        if self.batch_size is not None or smallest_batch == 1:
            batch_size = smallest_batch
            reasons.append(
                "batch size: as given" if self.batch_size is not None else "batch size: 1, two patches do not fit"
            )
        else:
            batch_size, reason = _largest_batch(lambda size: predict(plan, size), self.budget, smallest_batch, limit)
            reasons.append(f"batch size: {reason}")
        memory = predict(plan, batch_size)
        if place > 0 and self.trainer.network is not None:
            larger = candidates[place - 1]
            less = self._predict(plans, larger, smallest_batch, num_slices, grad_checkpointing=True)
            if fits(less):
                reasons.append(
                    f"{_times(larger['patch_size'])} would fit ({needed_gib(less.total):.1f} GB) if a trainer called "
                    "set_grad_checkpointing of the network, which computes activations again in the backward pass"
                )
        return _Choice(plan, batch_size, memory, reasons)

    def _reason_of_patch(self, candidates, place: int, batch_size: int, predict, num_slices: int | None) -> str:
        if self.patch_size is not None:
            return "patch: as given, rounded up to what the network takes"
        if place == 0:
            return f"patch: covers the images (median {_times(self._median_shape)} voxels)"
        larger = candidates[place - 1]
        memory = predict(larger, batch_size)
        reason = f"patch: the largest that fits with a batch size of {batch_size}"
        if memory is None:
            return reason
        return f"{reason}; {_times(larger['patch_size'])} would need {needed_gib(memory.total):.1f} GB"

    def _largest_batch_of(self, plan: dict, num_slices: int | None) -> int:
        """nnU-Net's limit: 5 % of the voxels of the data set in a batch, but two patches at least."""
        voxels = math.prod(plan["patch_size"]) * (num_slices or 1)
        return max(MIN_BATCH_SIZE, round(self._num_voxels * self.max_dataset_covered / voxels))

    def _refuse(self, plan: dict, memories: Sequence[TrainingMemory | None], num_slices: int | None) -> None:
        known = [memory.total for memory in memories if memory is not None]
        name = "2d" if num_slices is None else "2.5d"
        if not known:
            raise SmallSegError(
                f"{self.trainer.name} cannot train on patches of {_times(plan['patch_size'])} voxels in {name}: give a "
                "larger -patch_size, or a larger -batch_size"
            )
        wishes = "the patch that was given" if self.patch_size is not None else "the smallest patch"
        raise SmallSegError(
            f"{self.trainer.name} does not fit {self.gpu_memory_target:g} GB in {name}: {wishes}, "
            f"{_times(plan['patch_size'])} voxels, needs at least {needed_gib(min(known)):.1f} GB. "
            f"Give -gpu_memory_target {math.ceil(10 * needed_gib(min(known))) / 10:g} or more and train on such a GPU, "
            "choose a smaller network (smallseg trainers), or a smaller -patch_size"
        )

    def _as_configuration(self, chosen: _Choice, num_slices: int | None) -> dict:
        memory = chosen.memory
        slices = [] if num_slices is None else [num_slices]
        return {
            **chosen.plan,
            "patch_size": [*slices, *chosen.plan["patch_size"]],
            "batch_size": chosen.batch_size,
            PLANNING_KEY: {
                "trainer": self.trainer.name,
                "gpu_memory_target_gb": self.gpu_memory_target,
                "predicted_gb": round(needed_gib(memory.total), 2),
                "predicted_step_bytes": memory.total,
                "predicted_parts_bytes": memory.parts(),
                "peak_in": memory.moment,
                "reasons": chosen.reasons,
            },
        }


def _proposal(plan: dict) -> dict:
    return {key: plan[key] for key in ("patch_size", "architecture")}


def _equal(first: object, second: object) -> bool:
    return json.dumps(first, default=str) == json.dumps(second, default=str)


def _preprocessing(plans: Mapping, configuration: Mapping) -> str:
    """What decides how data are preprocessed, as text that compares."""
    keys = [key for key in configuration if key.startswith(("resampling_fn_data", "resampling_fn_seg"))]
    keys += ["spacing", "preprocessor_name", "normalization_schemes", "use_mask_for_norm"]
    facts = {key: configuration.get(key) for key in sorted(keys)}
    for key in ("transpose_forward", "image_reader_writer", "foreground_intensity_properties_per_channel"):
        facts[key] = plans.get(key)
    recursive_fix_for_json_export(facts)
    return json.dumps(facts, sort_keys=True)


def _times(sizes: Sequence[float]) -> str:
    return " x ".join(f"{size:.4g}" for size in sizes)


def _first_that_fits(candidates: Sequence[dict], predict, budget: int) -> int | None:
    """Index of the first candidate, from large to small, whose prediction is within the budget.

    Memory grows with the number of pixels, so that candidates far too large are skipped; the last one skipped is
    checked.
    """
    place, known_not_to_fit = 0, -1
    while True:
        memory = predict(candidates[place])
        if memory is not None and memory.total <= budget:
            break
        known_not_to_fit = place
        if place == len(candidates) - 1:
            return None
        place += 1
        if memory is not None:
            fixed = memory.parameters + memory.optimizer_state
            each = (memory.total - fixed) / math.prod(candidates[known_not_to_fit]["patch_size"])
            while place < len(candidates) - 1 and fixed + each * math.prod(candidates[place]["patch_size"]) > budget:
                place += 1
    while place - 1 > known_not_to_fit:
        memory = predict(candidates[place - 1])
        if memory is None or memory.total > budget:
            break
        place -= 1
    return place


def _largest_batch(predict, budget: int, smallest: int, limit: int) -> tuple[int, str]:
    """The largest batch within the budget and the limit, and the reason; ``smallest`` is known to fit."""
    if smallest >= limit:
        return smallest, f"{smallest}, the smallest: more would be over 5 % of the voxels of the data set"
    fitting, too_large, memory = smallest, limit + 1, predict(smallest)
    base, each = memory, (memory.total - memory.parameters - memory.optimizer_state) / smallest
    while too_large - fitting > 1:
        guess = fitting + int((budget - predict(fitting).total) / max(each, 1))
        guess = min(max(guess, fitting + 1), too_large - 1)
        memory = predict(guess)
        if memory is not None and memory.total <= budget:
            fitting = guess
        else:
            too_large = guess
        if memory is not None and guess != smallest:
            each = (memory.total - base.total) / (guess - smallest)
    if fitting == limit:
        return fitting, f"{fitting}, about 5 % of the voxels of the data set, nnU-Net's limit"
    more = predict(too_large)
    return fitting, f"{fitting}, the largest that fits; {too_large} would need {needed_gib(more.total):.1f} GB"
