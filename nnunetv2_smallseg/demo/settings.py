"""What a demo run does: its settings, their defaults, and the checks that need no data.

The defaults are chosen together with the phantom: two CPU cores finish in a few minutes, with 4 GB of memory.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from nnunetv2_smallseg import registry
from nnunetv2_smallseg.environment import split_folders
from nnunetv2_smallseg.errors import SmallSegError, UsageError, did_you_mean

__all__ = ["DemoSettings", "check_trainer", "resolve_device", "trains_by_plan"]

DEFAULT_WORKSPACE = "smallseg_demo"
DEFAULT_TRAINER = "nnUNetTrainerSwinUMambaDScratch"
DEFAULT_NUM_EPOCHS = 6
DEFAULT_NUM_ITERATIONS = 20
DEFAULT_NUM_VAL_ITERATIONS = 3
DEFAULT_PATCH_SIZE = (96, 96)
DEFAULT_BATCH_SIZE = 4

CONFIGURATIONS = ("2d", "2.5d")
DEVICES = ("auto", "cpu", "cuda")

PHANTOM_NAME = "Dataset990_SmallLesionPhantom"
PHANTOM_SEED = 2024
PLANS_NAME = "nnUNetSmallSegPlans"


@dataclass(frozen=True)
class DemoSettings:
    """Everything that decides the result, apart from the data.

    The device is no part of it: a training may go on elsewhere.

    Attributes:
        trainer: Name of the trainer class.
        configuration: ``2d`` or ``2.5d``.
        fold: Number of the fold, or ``all``.
        num_epochs: Epochs to train.
        num_iterations: Training iterations in an epoch.
        num_val_iterations: Validation iterations in an epoch.
        patch_size: Height and width of a patch in voxels.
        batch_size: Samples in a batch.
    """

    trainer: str = DEFAULT_TRAINER
    configuration: str = "2d"
    fold: int | str = 0
    num_epochs: int = DEFAULT_NUM_EPOCHS
    num_iterations: int = DEFAULT_NUM_ITERATIONS
    num_val_iterations: int = DEFAULT_NUM_VAL_ITERATIONS
    patch_size: tuple[int, int] = DEFAULT_PATCH_SIZE
    batch_size: int = DEFAULT_BATCH_SIZE

    def as_options(self) -> dict[str, str]:
        """The settings by the option that sets them, as text."""
        options = {"trainer": "-tr", "configuration": "-c", "fold": "-f"}
        values = {**asdict(self), "patch_size": " ".join(map(str, self.patch_size))}
        return {options.get(name, f"-{name}"): str(value) for name, value in values.items()}


def trains_by_plan(trainer: str) -> bool:
    """Whether a trainer follows the length of training written into the plans: ours do, nnU-Net's do not."""
    return trainer in registry.trainers()


def check_trainer(name: str, extension_folders: str | None) -> None:
    """Checks the name of a trainer from source text alone, because importing all trainers takes long.

    Args:
        name: Name of the trainer class.
        extension_folders: Value of ``nnUNet_extTrainer``, for trainers from elsewhere.
    Raises:
        UsageError: If neither we nor nnU-Net nor a folder of ``nnUNet_extTrainer`` has such a trainer.
        SmallSegError: If its weights are needed and missing or damaged.
    """
    if name in registry.trainers():
        weights = registry.trainer(name).weights
        if weights is not None:
            # Now rather than after minutes of preprocessing.
            from nnunetv2_smallseg.pretrained import store

            store.resolve(weights)
        return
    known = list(registry.trainers())
    specification = importlib.util.find_spec("nnunetv2")
    if specification is None or not specification.submodule_search_locations:
        raise SmallSegError("nnunetv2 is not installed in this environment: pip install 'nnunetv2>=2.8.1,<3'")
    stock_trainers = Path(specification.submodule_search_locations[0], "training", "nnUNetTrainer")
    for file in stock_trainers.rglob("*.py"):
        known += re.findall(r"^class (\w+)", file.read_text(encoding="utf-8"), re.MULTILINE)
    for folder in split_folders(extension_folders):
        for file in Path(folder).rglob("*.py"):
            # Such a folder may define its trainers or import them, as ours does.
            known += re.findall(r"\b[A-Za-z]\w*Trainer\w*", file.read_text(encoding="utf-8", errors="replace"))
    if name not in known:
        raise UsageError(
            f"there is no trainer {name!r} (-tr).{did_you_mean(name, known, 0.5)} `smallseg trainers` lists ours."
        )


def resolve_device(device: str) -> str:
    """``cpu`` or ``cuda`` for one of ``DEVICES``.

    Raises:
        UsageError: If CUDA is asked for and PyTorch finds none.
    """
    if device == "cpu":
        return device
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if device == "cuda":
        raise UsageError(
            "-device cuda, but PyTorch finds no usable GPU. Use -device cpu, or see what `smallseg doctor` says."
        )
    return "cpu"
