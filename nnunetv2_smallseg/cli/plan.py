"""``smallseg plan``: writes plans with ``2d`` and ``2.5d`` for a data set."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from nnunetv2_smallseg.errors import UsageError
from nnunetv2_smallseg.plans.switches import LARGEST_NUMBER, SETTINGS

__all__ = ["add_parser", "positive_integer", "run"]


def positive_integer(text: str) -> int:
    """For argparse: an integer from 1 to a million."""
    if not text.strip().isdecimal() or not 1 <= int(text) <= LARGEST_NUMBER:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number: use a whole number from 1 to a million")
    return int(text)


def positive_number(text: str) -> float:
    """For argparse: a number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the sub-command."""
    parser = subparsers.add_parser(
        "plan",
        help="write plans with the configurations 2d and 2.5d",
        description="Writes plans with the configurations 2d and 2.5d (slabs of slices) for a data set whose "
        "fingerprint was extracted by nnUNetv2_extract_fingerprint.",
    )
    parser.add_argument("-d", required=True, metavar="DATASET", help="number or name of the data set")
    parser.add_argument(
        "-tr",
        metavar="TRAINER",
        help="choose patch and batch size for the network of this trainer (smallseg trainers) and the memory of a GPU",
    )
    parser.add_argument(
        "-gpu_memory_target",
        type=positive_number,
        metavar="GB",
        help="memory of the GPU, with -tr (default: 8)",
    )
    parser.add_argument(
        "-plans_name",
        metavar="NAME",
        help="name of the plans (default: nnUNetSmallSegPlans; with -tr also trainer and memory, such as "
        "nnUNetSmallSegPlans_SwinUMamba_8GB)",
    )
    parser.add_argument(
        "-num_slices",
        type=positive_integer,
        metavar="S",
        help="slices of a slab, odd (default: 3; none for single images)",
    )
    parser.add_argument(
        "-patch_size",
        type=positive_integer,
        nargs=2,
        metavar=("H", "W"),
        help="patch in voxels, rounded up to what the networks take (default: chosen by the planner)",
    )
    parser.add_argument("-batch_size", type=positive_integer, metavar="N", help="default: chosen by the planner")
    for name, setting in SETTINGS.items():
        parser.add_argument(
            setting.option,
            dest=name,
            type=positive_integer if setting.kind is int else setting.kind,
            choices=setting.choices or None,
            nargs="+" if setting.many else None,
            metavar=None if setting.choices else setting.metavar,
            help=setting.description,
        )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Plans, and prints what was planned and the next commands."""
    from nnunetv2_smallseg.plans.configurations import PLANNING_KEY, resolve
    from nnunetv2_smallseg.plans.network_planner import DEFAULT_MEMORY_TARGET, plan_for_network
    from nnunetv2_smallseg.plans.planner import DEFAULT_PLANS_NAME, plan_dataset

    training = {name: getattr(arguments, name) for name in SETTINGS}
    options = {
        "num_slices": arguments.num_slices,
        "patch_size": arguments.patch_size,
        "batch_size": arguments.batch_size,
        "training": {name: value for name, value in training.items() if value is not None},
    }
    if arguments.tr is not None:
        target = DEFAULT_MEMORY_TARGET if arguments.gpu_memory_target is None else arguments.gpu_memory_target
        path, plans = plan_for_network(arguments.d, arguments.tr, target, arguments.plans_name, **options)
    elif arguments.gpu_memory_target is not None:
        raise UsageError(
            "-gpu_memory_target needs -tr: how much fits depends on the network, e.g. -tr nnUNetTrainerSwinUMamba"
        )
    else:
        path, plans = plan_dataset(
            arguments.d, DEFAULT_PLANS_NAME if arguments.plans_name is None else arguments.plans_name, **options
        )
    number = int(plans["dataset_name"][7:10])
    print(f"plans written to {path}")
    for name in plans["configurations"]:
        configuration = resolve(plans, name)
        patch = " x ".join(str(size) for size in configuration["patch_size"])
        spacing = " x ".join(f"{value:g}" for value in configuration["spacing"])
        print(f"  {name:<5} patch {patch}, batch size {configuration['batch_size']}, in-plane spacing {spacing} mm")
        if PLANNING_KEY in configuration:
            print_planning(configuration[PLANNING_KEY])
    last = list(plans["configurations"])[-1]
    data = path.parent / resolve(plans, "2d")["data_identifier"]
    print("next:")
    if arguments.tr is not None and data.is_dir():
        print(f"  # the data are preprocessed already: {data}")
    else:
        print(f"  nnUNetv2_preprocess -d {number} -plans_name {path.stem} -c 2d")
    print(f"  nnUNetv2_train {number} {last} 0 -tr {arguments.tr or 'nnUNetTrainerSwinUMamba'} -p {path.stem}")
    return 0


def print_planning(planning: Mapping[str, Any]) -> None:
    """Predicted memory and the reasons of the choices, as a configuration of the plans records them."""
    step = planning["predicted_step_bytes"] / 2**30
    print(
        f"        memory {planning['predicted_gb']:.2f} of {planning['gpu_memory_target_gb']:g} GB: {step:.2f} in the "
        f"training step (peak in: {planning['peak_in']}), the rest kept free"
    )
    parts = sorted(planning["predicted_parts_bytes"].items(), key=lambda part: -part[1])
    print("          " + ", ".join(f"{name.replace('_', ' ')} {size / 2**30:.2f}" for name, size in parts))
    for reason in planning["reasons"]:
        print(f"        {reason}")
