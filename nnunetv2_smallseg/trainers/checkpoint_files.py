"""The checkpoint files of a training: which there are, which are whole, what a killed training left."""

from __future__ import annotations

import zipfile
from pathlib import Path

__all__ = ["CHECKPOINTS", "damage", "newest_first", "remove_leftovers"]

# What nnU-Net writes, in the order in which its --c looks for them.
CHECKPOINTS = ("checkpoint_final.pth", "checkpoint_latest.pth", "checkpoint_best.pth")


def newest_first(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the one written last first; in nnU-Net's order where times are equal."""
    files = [folder / name for name in CHECKPOINTS if (folder / name).is_file()]
    return sorted(files, key=lambda file: file.stat().st_mtime, reverse=True)


def damage(file: Path) -> str | None:
    """What is wrong with a file written by ``torch.save``, or None if every byte is as it was written.

    Such a file is a ZIP archive with check sums. ``torch.load`` does not look at them: it loads changed weights without
    a word.
    """
    try:
        size = file.stat().st_size
        if size == 0:
            return "the file is empty"
        if not zipfile.is_zipfile(file):
            return f"{size} bytes that are no checkpoint, or only the beginning of one"
        with zipfile.ZipFile(file) as archive:
            changed = archive.testzip()
    except (OSError, zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        return f"it cannot be read: {error}"
    return None if changed is None else f"the check sum of its part {changed} is wrong"


def remove_leftovers(folder: Path) -> list[Path]:
    """Removes the unfinished files that ``files.replacing`` leaves when its process is killed; returns them."""
    leftovers = sorted(folder.glob(".*.part"))
    for file in leftovers:
        file.unlink(missing_ok=True)
    return leftovers
