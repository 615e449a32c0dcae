"""``smallseg demo``: a phantom, or any raw data set, from planning to evaluation by nnU-Net's own commands."""

from __future__ import annotations

import argparse
import math
import sys

from nnunetv2_smallseg.cli.plan import positive_integer
from nnunetv2_smallseg.demo import settings as defaults

__all__ = ["add_parser", "run"]


def fold_number(text: str) -> int | str:
    """For argparse: the number of a fold, or ``all``."""
    if text == "all":
        return text
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no fold: use 0, 1, 2, ... or all")
    return int(text)


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the sub-command."""
    parser = subparsers.add_parser(
        "demo",
        help="train and evaluate on a phantom in minutes",
        description="Writes a phantom with small lesions (or takes a raw data set), then plans, preprocesses, trains, "
        "predicts and evaluates by nnU-Net's own commands, all inside one folder. Started again with the same options, "
        "it goes on where it stopped.",
    )
    parser.add_argument("-i", metavar="FOLDER", help="raw data set, DatasetXXX_Name (default: writes a phantom)")
    parser.add_argument(
        "-o", metavar="WORKSPACE", default=defaults.DEFAULT_WORKSPACE, help="folder to work in (default: %(default)s)"
    )
    parser.add_argument("-tr", metavar="TRAINER", default=defaults.DEFAULT_TRAINER, help="default: %(default)s")
    parser.add_argument("-c", choices=defaults.CONFIGURATIONS, default="2d", help="configuration (default: 2d)")
    parser.add_argument("-f", metavar="FOLD", type=fold_number, default=0, help="number of a fold, or all (default: 0)")
    parser.add_argument(
        "-device", choices=defaults.DEVICES, default="auto", help="default: auto, a GPU if there is one"
    )
    numbers = {
        "num_epochs": (defaults.DEFAULT_NUM_EPOCHS, "epochs to train"),
        "num_iterations": (defaults.DEFAULT_NUM_ITERATIONS, "training iterations in an epoch"),
        "num_val_iterations": (defaults.DEFAULT_NUM_VAL_ITERATIONS, "validation iterations in an epoch"),
        "batch_size": (defaults.DEFAULT_BATCH_SIZE, "samples in a batch"),
    }
    for name, (default, meaning) in numbers.items():
        parser.add_argument(
            f"-{name}",
            metavar="N",
            type=positive_integer,
            default=default,
            help=f"{meaning} (default: %(default)s)",
        )
    height, width = defaults.DEFAULT_PATCH_SIZE
    parser.add_argument(
        "-patch_size",
        nargs=2,
        metavar=("H", "W"),
        type=positive_integer,
        default=defaults.DEFAULT_PATCH_SIZE,
        help=f"patch in voxels (default: {height} {width})",
    )
    parser.add_argument("--clean", action="store_true", help="start anew: remove what an earlier demo wrote there")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the demo, with progress on stderr and the result on stdout."""
    from nnunetv2_smallseg.demo.console import format_seconds
    from nnunetv2_smallseg.demo.pipeline import run_demo

    settings = defaults.DemoSettings(
        trainer=arguments.tr,
        configuration=arguments.c,
        fold=arguments.f,
        num_epochs=arguments.num_epochs,
        num_iterations=arguments.num_iterations,
        num_val_iterations=arguments.num_val_iterations,
        patch_size=tuple(arguments.patch_size),
        batch_size=arguments.batch_size,
    )
    try:
        result = run_demo(
            settings,
            dataset_folder=arguments.i,
            workspace=arguments.o,
            device=arguments.device,
            clean=arguments.clean,
        )
    except KeyboardInterrupt:
        print("\nstopped; run the same command again to go on from here", file=sys.stderr)
        raise
    print(f"foreground Dice: {result.foreground_dice:.3f}")
    for case, classes in result.cases.items():
        for name, metrics in classes.items():
            print(f"  {case}  class {name}  {describe(metrics)}")
    for name, path in result.folders.items():
        print(f"{name}: {path}")
    print(f"total time: {format_seconds(result.seconds)}")
    print("next:")
    for command in result.next_commands:
        print(f"  {command}")
    return 0


def describe(metrics: dict[str, float]) -> str:
    """The Dice of one class in one case, with what it means where the class does not occur."""
    if math.isnan(metrics["Dice"]):
        return "no lesion, and none predicted"
    note = "" if metrics["n_ref"] else f" (no lesion, but {metrics['n_pred']:.0f} voxels predicted)"
    return f"Dice {metrics['Dice']:.3f}{note}"
