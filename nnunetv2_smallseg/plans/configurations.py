"""What a configuration of a plans file means to our trainers: slices (2d) or slabs of slices (2.5d).

A ``2.5d`` configuration inherits from ``2d`` and has a patch of three axes, [slices, height, width]; everything else is
shared, the preprocessed data included. The spacing tells it from nnU-Net's 3D configurations: two values, not three.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from nnunetv2_smallseg.errors import SmallSegError, UsageError, did_you_mean

__all__ = [
    "NETWORK_OPTIONS_KEY",
    "PLANNING_KEY",
    "TRAINING_KEY",
    "check_configuration",
    "check_num_slices",
    "is_volume",
    "network_options",
    "num_slices",
    "resolve",
    "slab_configuration",
]

# Optional part of a configuration with settings of our trainers (switches.py); nnU-Net's own trainers ignore it.
TRAINING_KEY = "training"
# Optional part of a configuration: constructor options of our networks, by class name.
NETWORK_OPTIONS_KEY = "network_options"
# Optional part of a configuration: what it was planned for, the memory predicted and the reasons. For readers only.
PLANNING_KEY = "planning"


def check_num_slices(value: int) -> None:
    """Raises ``UsageError`` unless ``value`` is an odd number of at least 3."""
    if value < 3 or value % 2 == 0:
        raise UsageError(f"the number of slices is {value}, but must be odd and at least 3, e.g. 3 or 5")


def slab_configuration(parent: Mapping, slices: int, parent_name: str = "2d") -> dict:
    """The ``2.5d`` configuration that goes with a ``2d`` one.

    Args:
        parent: The ``2d`` configuration.
        slices: Slices of a slab, odd, at least 3.
        parent_name: Name of ``parent`` in the plans.
    Returns:
        The part of the plans that differs: ``inherits_from`` and ``patch_size`` [slices, height, width] in voxels.
    Raises:
        UsageError: If ``slices`` is even or below 3.
    """
    check_num_slices(slices)
    return {"inherits_from": parent_name, "patch_size": [slices, *parent["patch_size"]]}


def resolve(plans: Mapping, name: str) -> dict:
    """A configuration of a plans file with what it inherits filled in.

    Raises:
        SmallSegError: If the plans have no configuration of that name.
    """
    configurations = plans.get("configurations")
    if not configurations:
        raise SmallSegError(
            f"the plans {plans.get('plans_name', '')} hold no configurations: plans of nnU-Net 1 and damaged files "
            "cannot be used. Write new ones by: smallseg plan -d DATASET"
        )
    if name not in configurations:
        hint = (
            " Data sets of single images have no slices to stack: use 2d."
            if name == "2.5d"
            else " Write plans with 2d and 2.5d by: smallseg plan -d DATASET"
        )
        raise SmallSegError(
            f"the plans {plans.get('plans_name')} have no configuration {name!r}, only {', '.join(configurations)}."
            + did_you_mean(name, configurations)
            + hint
        )
    configuration = dict(configurations[name])
    parent = configuration.pop("inherits_from", None)
    if parent is None:
        return configuration
    # Without this one, a circle of inheritance ends at a name that is not there.
    others = {other: content for other, content in configurations.items() if other != name}
    return {**resolve({**plans, "configurations": others}, parent), **configuration}


def check_configuration(configuration: Mapping, name: str) -> None:
    """Checks the numbers everything else relies on.

    Args:
        configuration: A configuration with inheritance resolved.
        name: Its name, for messages.
    Raises:
        SmallSegError: If patch, spacing or batch size are missing or no positive numbers.
    """
    lengths = {"patch_size": (2, 3), "spacing": (2, 3), "batch_size": (1,)}
    for key, allowed in lengths.items():
        value = configuration.get(key)
        values = value if isinstance(value, (list, tuple)) else [value]
        numbers = int if key != "spacing" else (int, float)
        if len(values) not in allowed or not all(
            isinstance(number, numbers) and 0 < number < math.inf for number in values
        ):
            expected = "a positive number" if allowed == (1,) else "two or three positive numbers"
            raise SmallSegError(
                f"the configuration {name!r} of the plans has the {key} {value!r}, but {expected} must stand there: "
                "write new plans by smallseg plan -d DATASET"
            )


def is_volume(configuration: Mapping) -> bool:
    """Whether a configuration, with inheritance resolved, is one of nnU-Net's 3D configurations."""
    return len(configuration["spacing"]) == 3


def num_slices(configuration: Mapping, name: str) -> int:
    """How many slices a patch of this configuration has.

    Args:
        configuration: A configuration with inheritance resolved.
        name: Its name, for messages.
    Returns:
        1 for a 2D configuration, S for a slab of S slices.
    Raises:
        SmallSegError: If it is a 3D configuration, or a slab with an even number of slices.
    """
    patch_size = configuration["patch_size"]
    if is_volume(configuration):
        raise SmallSegError(
            f"the configuration {name!r} is three-dimensional (patch {list(patch_size)}), but this trainer "
            "works on slices: use 2d, or 2.5d from plans written by smallseg plan -d DATASET"
        )
    if len(patch_size) == 2:
        return 1
    check_num_slices(patch_size[0])
    return patch_size[0]


def network_options(configuration: Mapping, network: str, configurable: Iterable[str]) -> dict:
    """The constructor options a configuration holds for one of our networks.

    Args:
        configuration: A configuration with inheritance resolved.
        network: Class name of the network.
        configurable: Names of the options the network has.
    Returns:
        Keyword arguments for the constructor; none if the configuration says nothing about this network.
    Raises:
        SmallSegError: If the network has no option of a name given.
    """
    options = dict(configuration.get(NETWORK_OPTIONS_KEY, {}).get(network, {}))
    known = sorted(configurable)
    unknown = [name for name in options if name not in known]
    if unknown:
        raise SmallSegError(
            f"the plans have {NETWORK_OPTIONS_KEY!r} for {network} that it does not know: {', '.join(unknown)}. Its "
            f"options are {', '.join(known)}; correct the plans file."
        )
    return options
