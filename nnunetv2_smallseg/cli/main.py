"""Entry point of ``smallseg``: collects the sub-commands, runs one, and turns errors into messages and exit status."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from nnunetv2_smallseg import __version__
from nnunetv2_smallseg.cli import convert, demo, doctor, env, evaluate, fingerprint, plan, trainers, weights
from nnunetv2_smallseg.errors import SmallSegError, did_you_mean, of_the_system

__all__ = ["build_parser", "main"]

COMMANDS = (env, doctor, demo, convert, plan, fingerprint, weights, trainers, evaluate)


class ExactParser(argparse.ArgumentParser):
    """A parser that takes options by their full name only, so that a mistyped one fails.

    ``allow_abbrev=False`` covers options with two dashes; nnU-Net's long options have one. What is not known is refused
    by the sub-command it was given to, with the nearest name.
    """

    def __init__(self, *arguments, **options) -> None:
        super().__init__(*arguments, **{**options, "allow_abbrev": False})

    def _get_option_tuples(self, option_string: str) -> list:
        return []

    def parse_known_args(self, args=None, namespace=None) -> tuple[argparse.Namespace, list[str]]:
        """Parses; there is no such thing as an unknown argument that is passed on."""
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            hint = did_you_mean(unknown[0], self._option_string_actions) if unknown[0].startswith("-") else ""
            self.error(
                f"unknown argument{'s' * (len(unknown) > 1)}: {' '.join(unknown)}.{hint} See {self.prog} --help."
            )
        return namespace, unknown

    def _check_value(self, action: argparse.Action, value: object) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            error.message += did_you_mean(str(value), map(str, action.choices))
            raise


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``smallseg`` with all its sub-commands.

    Every module of ``COMMANDS`` has ``add_parser(subparsers)``, which sets the default ``run``: a function that takes
    the parsed arguments and returns the exit status.
    """
    parser = ExactParser(prog="smallseg", description="Small-lesion networks and trainers for unmodified nnU-Net v2.")
    parser.add_argument("--version", action="version", version=f"nnunetv2-smallseg {__version__}")
    subparsers = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(subparsers)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs ``smallseg`` and returns its exit status: 0, 1 (failure) or 2 (usage)."""
    # Our messages only: other libraries announce themselves at this level.
    logger = logging.getLogger("nnunetv2_smallseg")
    logger.handlers = [logging.StreamHandler()]
    logger.setLevel(logging.INFO)
    parsed = build_parser().parse_args(arguments)
    try:
        status = parsed.run(parsed)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # The reader of our output, such as head, has seen enough. Python would complain again when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except SmallSegError as error:
        print(f"smallseg {parsed.command}: error: {error}", file=sys.stderr)
        return error.exit_status
    except OSError as error:
        # A full disk, missing permissions, a file where a folder should be: no fault of ours, but the user's to mend.
        print(f"smallseg {parsed.command}: error: {of_the_system(error)}", file=sys.stderr)
        return SmallSegError.exit_status
    except MemoryError:
        print(f"smallseg {parsed.command}: error: there is not enough memory: close other programs, or use fewer "
              "processes (-np) where the command has that option", file=sys.stderr)  # fmt: skip
        return SmallSegError.exit_status
    except KeyboardInterrupt:
        print(f"smallseg {parsed.command}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
