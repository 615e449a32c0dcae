"""``smallseg env``: prints the export with which nnU-Net finds our trainers, for ``eval "$(smallseg env)"``."""

from __future__ import annotations

import argparse
import os

from nnunetv2_smallseg import environment

__all__ = ["add_parser", "run"]


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the sub-command."""
    parser = subparsers.add_parser(
        "env",
        help="print the export that makes nnU-Net find the trainers",
        description='Prints the export of nnUNet_extTrainer. sh, bash, zsh: eval "$(smallseg env)"; '
        "fish: smallseg env --shell fish | source; "
        "PowerShell: smallseg env --shell powershell | Invoke-Expression",
    )
    parser.add_argument("--shell", choices=environment.SHELLS, default="sh", help="syntax to print (default: sh)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Prints the export and nothing else on stdout."""
    value = environment.extended_value(os.environ.get(environment.EXTENSION_VARIABLE))
    print(environment.export_line(arguments.shell, value))
    return 0
