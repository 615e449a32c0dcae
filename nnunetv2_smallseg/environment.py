"""The export of ``nnUNet_extTrainer`` with which nnU-Net finds the trainers of this package.

nnU-Net imports every module of every folder named there, so the folder holds one file that imports our trainers from
the installed package. Nothing here imports torch or nnunetv2: ``smallseg env`` runs at every start of a shell.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from nnunetv2_smallseg.errors import SmallSegError

__all__ = ["EXTENSION_VARIABLE", "SHELLS", "contains_extension", "export_line", "extended_value", "extension_folder"]

EXTENSION_VARIABLE = "nnUNet_extTrainer"
EXTENSION_FILE = "smallseg_trainers.py"
SHELLS = ("sh", "bash", "zsh", "fish", "powershell")

# PowerShell ends a single-quoted string at the typographic quotes too.
POWERSHELL_QUOTES = "'\u2018\u2019\u201a\u201b"


def extension_folder() -> Path:
    """The installed folder that ``nnUNet_extTrainer`` has to name.

    Raises:
        SmallSegError: If the installation lacks it, or if its path cannot be written into a list of folders.
    """
    folder = Path(__file__).resolve().parent / "extension"
    if not (folder / EXTENSION_FILE).is_file():
        raise SmallSegError(
            f"{folder / EXTENSION_FILE} is missing: the installation is incomplete. "
            "Install again: pip install --force-reinstall --no-deps nnunetv2-smallseg"
        )
    if os.pathsep in str(folder):
        raise SmallSegError(
            f"the installation folder {str(folder)!r} holds {os.pathsep!r}, which separates the folders of "
            f"{EXTENSION_VARIABLE}. Install into an environment whose path has none."
        )
    return folder


def split_folders(value: str | None) -> list[str]:
    """The folders in a value of ``nnUNet_extTrainer``, without empty ones."""
    return [folder for folder in (value or "").split(os.pathsep) if folder.strip()]


def _same_folder(first: str, second: str) -> bool:
    return os.path.normcase(os.path.realpath(first)) == os.path.normcase(os.path.realpath(second))


def contains_extension(value: str | None) -> bool:
    """Whether a value of ``nnUNet_extTrainer`` names our folder, in whatever spelling."""
    ours = str(extension_folder())
    return any(_same_folder(folder, ours) for folder in split_folders(value))


def extended_value(value: str | None) -> str:
    """The value of ``nnUNet_extTrainer`` with our folder in it.

    Args:
        value: The present value; None when the variable is not set.
    Returns:
        All folders of ``value`` in their order, then ours unless it is among them: nnU-Net searches in this order, and
        what a user had before keeps its precedence.
    """
    folders = split_folders(value)
    if not contains_extension(value):
        folders.append(str(extension_folder()))
    return os.pathsep.join(folders)


def export_line(shell: str, value: str) -> str:
    """The line that sets ``nnUNet_extTrainer`` to ``value`` for a shell and its children.

    Args:
        shell: One of ``SHELLS``.
        value: Any text; blanks and quotes are made safe.
    Raises:
        ValueError: If ``shell`` is not one of ``SHELLS``.
    """
    if shell in ("sh", "bash", "zsh"):
        return f"export {EXTENSION_VARIABLE}={shlex.quote(value)}"
    if shell == "fish":
        # Only these two are special between fish's single quotes.
        quoted = value.replace("\\", "\\\\").replace("'", "\\'")
        return f"set -gx {EXTENSION_VARIABLE} '{quoted}'"
    if shell == "powershell":
        quoted = "".join(2 * letter if letter in POWERSHELL_QUOTES else letter for letter in value)
        return f"$env:{EXTENSION_VARIABLE} = '{quoted}'"
    raise ValueError(f"unknown shell {shell!r}: use one of {', '.join(SHELLS)}")
