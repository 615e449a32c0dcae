"""``smallseg doctor``: checks the installation; exit status 1 if training or prediction would break."""

from __future__ import annotations

import argparse
import dataclasses
import json

from nnunetv2_smallseg import doctor

__all__ = ["add_parser", "run"]


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the sub-command."""
    parser = subparsers.add_parser(
        "doctor",
        help="check the installation",
        description="Checks Python, PyTorch, nnU-Net, folders, trainers, scan back ends and weights. Exit status 1 if "
        "something would break.",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of a table")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Prints one row a check on stdout."""
    rows = doctor.run_checks()
    if arguments.json:
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=2, ensure_ascii=False))
    else:
        print(table(rows))
    return doctor.exit_status(rows)


def table(rows: list[doctor.Row]) -> str:
    """The rows as aligned text, each next step on the line below."""
    status_width = max(len(row.status) for row in rows)
    check_width = max(len(row.check) for row in rows)
    indent = " " * (status_width + check_width + 4)
    lines = []
    for row in rows:
        lines.append(f"{row.status:<{status_width}}  {row.check:<{check_width}}  {row.message}")
        if row.next_step is not None:
            lines.append(f"{indent}next: {row.next_step}")
    counts = [f"{count} {status}" for status in ("failure", "warning") if (count := _count(rows, status))]
    lines.append(f"\n{', '.join(counts) if counts else 'all is well'}")
    return "\n".join(lines)


def _count(rows: list[doctor.Row], status: str) -> int:
    return sum(row.status == status for row in rows)
