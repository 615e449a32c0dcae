"""``smallseg plan``: writes plans with ``2d`` and ``2.5d`` for a data set."""

from __future__ import annotations

import argparse

from nnunetv2_smallseg.plans.switches import LARGEST_NUMBER, SETTINGS

__all__ = ["add_parser", "positive_integer", "run"]


def positive_integer(text: str) -> int:
    """For argparse: an integer from 1 to a million."""
    if not text.strip().isdecimal() or not 1 <= int(text) <= LARGEST_NUMBER:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number: use a whole number from 1 to a million")
    return int(text)


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
        "-plans_name", default="nnUNetSmallSegPlans", metavar="NAME", help="name of the plans (default: %(default)s)"
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
        help="patch in voxels, rounded up to multiples of 32 (default: chosen by nnU-Net's planner)",
    )
    parser.add_argument("-batch_size", type=positive_integer, metavar="N", help="default: chosen by nnU-Net's planner")
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
    from nnunetv2_smallseg.plans.configurations import resolve
    from nnunetv2_smallseg.plans.planner import plan_dataset

    training = {name: getattr(arguments, name) for name in SETTINGS}
    path, plans = plan_dataset(
        arguments.d,
        arguments.plans_name,
        num_slices=arguments.num_slices,
        patch_size=arguments.patch_size,
        batch_size=arguments.batch_size,
        training={name: value for name, value in training.items() if value is not None},
    )
    number = int(plans["dataset_name"][7:10])
    print(f"plans written to {path}")
    for name in plans["configurations"]:
        configuration = resolve(plans, name)
        patch = " x ".join(str(size) for size in configuration["patch_size"])
        spacing = " x ".join(f"{value:g}" for value in configuration["spacing"])
        print(f"  {name:<5} patch {patch}, batch size {configuration['batch_size']}, in-plane spacing {spacing} mm")
    last = list(plans["configurations"])[-1]
    print("next:")
    print(f"  nnUNetv2_preprocess -d {number} -plans_name {arguments.plans_name} -c 2d")
    print(f"  nnUNetv2_train {number} {last} 0 -tr nnUNetTrainerSwinUMamba -p {arguments.plans_name}")
    return 0
