"""Finding files in downloaded folders by their marks, wherever they were unpacked."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path

from nnunetv2_smallseg.errors import UsageError

__all__ = ["existing_folder", "folders_below", "visible_files"]


def existing_folder(path: str | Path, what: str) -> Path:
    """The absolute path of a folder; ``UsageError`` if there is none."""
    folder = Path(os.path.abspath(path))
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder: name the folder that holds {what}")
    return folder


def folders_below(root: Path, not_into: Collection[str] = ()) -> Iterator[Path]:
    """``root`` and all folders below it, parents first, sorted; links and hidden folders are not followed."""
    for name, folders, _ in os.walk(root):
        folders[:] = sorted(folder for folder in folders if not folder.startswith(".") and folder != "__MACOSX")
        yield Path(name)
        folders[:] = [folder for folder in folders if folder not in not_into]


def visible_files(folder: Path, *endings: str) -> list[Path]:
    """Files of a folder with one of the endings (lower case), sorted, without hidden ones such as ``._x`` of macOS."""
    return sorted(
        path
        for path in folder.iterdir()
        if not path.name.startswith(".") and path.name.lower().endswith(endings) and path.is_file()
    )
