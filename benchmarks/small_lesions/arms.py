"""The arms of the study: what is trained. Every arm but ``stock`` changes one thing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from nnunetv2_smallseg import registry

if TYPE_CHECKING:  # imports torch
    from nnunetv2_smallseg.trainers.slabs import SlabTrainer

__all__ = ["ARMS", "STOCK", "Arm", "base_trainer", "missing"]


@dataclass(frozen=True)
class Arm:
    """Something to train.

    Attributes:
        name: Short name, also that of its folder.
        title: What it is, in a few words.
        trainer: Trainer of ``nnunetv2_smallseg.trainers``; None for ``SlabTrainer``, nnU-Net's own recipe.
        attributes: Switches of the trainers, class attributes of ``SlabTrainer``, that this arm sets.
        network: Network of the registry; None for nnU-Net's own of the plans.
        small_twin: Arm that is the same with small networks, and is then trained instead.
    """

    name: str
    title: str
    trainer: str | None = None
    attributes: Mapping[str, object] = field(default_factory=dict)
    network: str | None = None
    small_twin: str | None = None


STOCK = "stock"
_STRATEGIES = (
    Arm(STOCK, "nnU-Net's own recipe, all strategies off"),
    Arm("lesion_sampling", "Patches drawn by lesion, all alike", attributes={"lesion_sampling": "lesion"}),
    Arm("size_bin_sampling", "Patches drawn by size bin, then lesion", attributes={"lesion_sampling": "size_bin"}),
    Arm("lesion_targets", "Lesion-preserving deep supervision", attributes={"deep_supervision_targets": "lesion"}),
    Arm(
        "small_lesion",
        "nnUNetTrainerSmallLesion: sampling and targets",
        "nnUNetTrainerSmallLesion",
        {"lesion_sampling": "lesion", "deep_supervision_targets": "lesion"},
    ),
    Arm("amplification", "Slices with small lesions amplified", "nnUNetTrainerAmplification"),
    Arm("curriculum", "Regularised curriculum", "nnUNetTrainerCurriculum"),
)


# Networks that differ by their width only, which the small options set.
_SMALL_TWINS = {"S3MambaSmall": "S3Mamba"}


def _network_arms() -> list[Arm]:
    """The first trainer without weight file of every network."""
    arms = []
    for name, network in registry.networks().items():
        trainer = next(
            (entry for entry in registry.trainers().values() if entry.network == name and entry.weights is None), None
        )
        if trainer is not None:
            twin = _SMALL_TWINS.get(name)
            arms.append(Arm(name, network.description, trainer.name, network=name, small_twin=twin))
    return arms


ARMS: dict[str, Arm] = {arm.name: arm for arm in (*_STRATEGIES, *_network_arms())}


def base_trainer(arm: Arm) -> type[SlabTrainer] | None:
    """The trainer class an arm is made of; None if this version has none of that name."""
    from nnunetv2_smallseg import trainers
    from nnunetv2_smallseg.trainers.slabs import SlabTrainer

    return SlabTrainer if arm.trainer is None else getattr(trainers, arm.trainer, None)


def missing(arm: Arm) -> str | None:
    """Why this version of the package cannot train an arm; None if it can.

    A switch that ``SlabTrainer`` does not have would be set without effect, and the arm would be a second ``stock``.
    """
    from nnunetv2_smallseg.trainers.slabs import SlabTrainer

    if base_trainer(arm) is None:
        return f"there is no trainer {arm.trainer}"
    unknown = [name for name in arm.attributes if not hasattr(SlabTrainer, name)]
    return f"trainers have no switch {', '.join(unknown)}" if unknown else None
