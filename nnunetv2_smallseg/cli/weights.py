"""``smallseg weights``: lists, downloads and checks weight files, and imports checkpoints of the authors' code."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys

from nnunetv2_smallseg.errors import WeightsError
from nnunetv2_smallseg.pretrained import entries

__all__ = ["add_parser"]


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the sub-command."""
    parser = subparsers.add_parser("weights", help="list, fetch, verify, import weight files")
    actions = parser.add_subparsers(title="actions", dest="action", metavar="ACTION", required=True)

    listing = actions.add_parser("list", help="list all weight files and whether they are here")
    listing.add_argument("--json", action="store_true", help="print a JSON list instead of a table")
    listing.set_defaults(run=run_list)

    fetching = actions.add_parser("fetch", help="download a file into the weights folder")
    fetching.add_argument("name", metavar="NAME", help="name in `smallseg weights list`")
    fetching.set_defaults(run=run_fetch)

    verifying = actions.add_parser("verify", help="check size and checksum; exit 1 if a file is absent or damaged")
    verifying.add_argument("name", metavar="NAME", nargs="?", help="name in `smallseg weights list` (default: all)")
    verifying.set_defaults(run=run_verify)

    locating = actions.add_parser("path", help="print where a file is or has to be put")
    locating.add_argument("name", metavar="NAME", help="name in `smallseg weights list`")
    locating.set_defaults(run=run_path)

    importing = actions.add_parser(
        "import-official",
        help="convert a Swin-UMamba checkpoint of the authors' code for nnUNetv2_train -pretrained_weights",
    )
    importing.add_argument("file", metavar="FILE", help="checkpoint of the authors' code")
    importing.add_argument("-o", dest="output", metavar="OUT", required=True, help="file to write")
    importing.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    importing.set_defaults(run=run_import_official)


def weight_rows() -> list[dict]:
    """One dictionary a file: the entry, its path, and "present", "absent" or "wrong size" (checksums: ``verify``)."""
    from nnunetv2_smallseg.pretrained import store

    rows = []
    for weights in entries.ENTRIES:
        path = store.path(weights.name)
        try:
            state = "present" if os.path.getsize(path) == weights.size_bytes else "wrong size"
        except OSError:
            state = "absent"
        rows.append({**dataclasses.asdict(weights), "variable": weights.variable, "path": str(path), "state": state})
    return rows


def run_list(arguments: argparse.Namespace) -> int:
    """Prints the list on stdout."""
    rows = weight_rows()
    if arguments.json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
        return 0
    print(f"{'name':<22} {'size':>9}  {'licence':<8} {'state':<10} description")
    for row in rows:
        size = f"{row['size_bytes'] / 1e6:.1f} MB"
        print(f"{row['name']:<22} {size:>9}  {row['licence']:<8} {row['state']:<10} {row['description']}")
    for row in rows:
        print(f"\n{row['name']}: fits {', '.join(row['fits'])}\n  {row['paper']}\n  {row['urls'][0]}\n  {row['path']}")
    return 0


def run_fetch(arguments: argparse.Namespace) -> int:
    """Downloads a file and prints its path on stdout."""
    from nnunetv2_smallseg.pretrained import store

    print(store.fetch(arguments.name))
    return 0


def run_verify(arguments: argparse.Namespace) -> int:
    """Prints "ok" and the path of each good file on stdout, what is wrong with the others on stderr."""
    from nnunetv2_smallseg.pretrained import store

    status = 0
    for name in [arguments.name] if arguments.name else entries.names():
        try:
            print(f"{name}: ok, {store.verify(name)}")
        except WeightsError as error:
            print(f"{name}: {error}", file=sys.stderr)
            status = 1
    return status


def run_path(arguments: argparse.Namespace) -> int:
    """Prints the path of a file on stdout, whether it is there or not."""
    from nnunetv2_smallseg.pretrained import store

    print(store.path(arguments.name))
    return 0


def run_import_official(arguments: argparse.Namespace) -> int:
    """Converts a checkpoint; prints what it is and how to train from it."""
    from nnunetv2_smallseg.pretrained.official import import_official

    imported = import_official(arguments.file, arguments.output, overwrite=arguments.overwrite)
    print(
        f"{arguments.file}: {imported.network}, {imported.input_channels} input channels, {imported.num_classes} "
        f"classes, {len(imported.state_dict)} tensors\nwritten: {arguments.output}"
    )
    print(
        f"next: nnUNetv2_train DATASET 2d FOLD -tr nnUNetTrainer{imported.network} "
        f"-pretrained_weights {arguments.output}\n"
        f"The data set has to have {imported.input_channels} input channels; its classes may differ, "
        "because the heads start anew."
    )
    return 0
