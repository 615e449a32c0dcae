"""What the part ``training`` of a configuration may hold: schedule and switches of our trainers, and how they run.

Each is an attribute of the trainers; this table says which values it may have, once for plans, command line, trainers
and documentation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from nnunetv2_smallseg.errors import UsageError, did_you_mean
from nnunetv2_smallseg.plans.configurations import TRAINING_KEY

__all__ = [
    "LARGEST_NUMBER",
    "RUNNING",
    "SCHEDULE",
    "SETTINGS",
    "SWITCHES",
    "Setting",
    "check_setting",
    "training_settings",
]

# Beyond every number that makes sense here: a training of 10**20 epochs is a slip of the keyboard.
LARGEST_NUMBER = 1_000_000


@dataclass(frozen=True)
class Setting:
    """An attribute of our trainers that the plans may set.

    Attributes:
        option: Option of ``smallseg plan``.
        description: One line.
        allowed: The values, in words.
        is_allowed: Whether a value is one of them.
        choices: The values, if they are names.
        kind: Type of a value on the command line.
        metavar: What stands for a value in the help.
        many: Whether the command line takes several, as a list.
    """

    option: str
    description: str
    allowed: str
    is_allowed: Callable[[object], bool]
    choices: tuple[str, ...] = ()
    kind: Callable[[str], object] = str
    metavar: str = "N"
    many: bool = False


def _number(option: str, description: str) -> Setting:
    """A positive integer."""
    return Setting(option, description, "a whole number from 1 to a million", _is_positive_integer, kind=int)


def _is_positive_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= LARGEST_NUMBER


def _is_list_of_labels(value: object) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0 and all(map(_is_positive_integer, value))


def _is_none_or_minutes(value: object) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf)


def whole_number(text: str) -> int:
    """For argparse, which names the function in its message: an integer of at least 0."""
    value = int(text)
    if value < 0:
        raise ValueError
    return value


def _is_none_or_seed(value: object) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 0)


def _one_of(option: str, description: str, *choices: str) -> Setting:
    """A name."""
    allowed = " or ".join(repr(choice) for choice in choices)
    return Setting(option, description, allowed, lambda value: value in choices, choices=choices)


SCHEDULE: Mapping[str, Setting] = {
    "num_epochs": _number("-num_epochs", "epochs our trainers train (nnU-Net: 1000)"),
    "num_iterations_per_epoch": _number("-num_iterations", "iterations of an epoch (nnU-Net: 250)"),
    "num_val_iterations_per_epoch": _number(
        "-num_val_iterations", "validation iterations after an epoch (nnU-Net: 50)"
    ),
}

SWITCHES: Mapping[str, Setting] = {
    "lesion_sampling": _one_of(
        "-lesion_sampling",
        "what foreground patches show: a voxel as nnU-Net draws it, a lesion, or a lesion of a size",
        "voxel",
        "lesion",
        "size_bin",
    ),
    "lesion_jitter": Setting(
        "-lesion_jitter",
        "how far from the middle of the patch a drawn lesion may lie",
        "a number from 0 (in the middle of the patch) to 1 (anywhere in it)",
        lambda value: isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1,
        kind=float,
        metavar="SHARE",
    ),
    "deep_supervision_targets": _one_of(
        "-deep_supervision_targets",
        "targets of the lower resolutions: nnU-Net's nearest voxel, or a cell for every lesion",
        "nearest",
        "lesion",
    ),
    "lesion_labels": Setting(
        "-lesion_labels",
        "labels that count as lesion, where others are organs (null: all)",
        "a list of labels above 0, or null",
        lambda value: value is None or _is_list_of_labels(value),
        kind=int,
        metavar="LABEL",
        many=True,
    ),
}

# How a training runs, whatever it trains.
RUNNING: Mapping[str, Setting] = {
    "checkpoint_every_minutes": Setting(
        "-checkpoint_every_minutes",
        "longest time without a checkpoint (default: 10)",
        "a positive number of minutes, or None for nnU-Net's every 50 epochs",
        _is_none_or_minutes,
        kind=float,
        metavar="MINUTES",
    ),
    "seed": Setting(
        "-seed",
        "number that weights and, without worker processes, data order and augmentation follow from (default: none)",
        "an integer of at least 0, or None",
        _is_none_or_seed,
        kind=whole_number,
    ),
}

SETTINGS: Mapping[str, Setting] = {**SCHEDULE, **SWITCHES, **RUNNING}


def check_setting(name: str, value: object, place: str) -> None:
    """Raises ``UsageError`` unless there is such a setting and it may have this value; ``place`` is where it stands."""
    if name not in SETTINGS:
        raise UsageError(
            f"{place} has {name}: {value!r} under {TRAINING_KEY!r}, but only these may stand there: "
            f"{', '.join(SETTINGS)}; smallseg plan --help says what they are.{did_you_mean(name, SETTINGS)}"
        )
    setting = SETTINGS[name]
    if not setting.is_allowed(value):
        raise UsageError(
            f"{place} has {name}: {value!r}, but it must be {setting.allowed}. Mend it there; in plans also by "
            f"smallseg plan {setting.option} {setting.metavar}"
        )


def training_settings(configuration: Mapping, name: str) -> dict[str, object]:
    """The settings that a configuration asks for.

    Args:
        configuration: A configuration with inheritance resolved.
        name: Its name, for messages.
    Returns:
        Values by name of the trainers' attribute.
    Raises:
        UsageError: If it names something else, or a value is not allowed.
    """
    settings = configuration.get(TRAINING_KEY, {})
    for setting, value in settings.items():
        check_setting(setting, value, f"the configuration {name!r} of the plans")
    return dict(settings)
