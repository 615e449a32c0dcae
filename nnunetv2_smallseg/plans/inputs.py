"""What planning reads, checked before nnU-Net's planner sees it: names, ``dataset.json``, images, fingerprint.

The planner itself stops at most of this too, with a traceback out of its middle.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from nnunetv2_smallseg.errors import SmallSegError, UsageError, did_you_mean

__all__ = ["check_fingerprint", "check_plans_name", "check_raw_dataset", "read_object", "unknown_dataset"]

# Other files that lie where the plans are written.
RESERVED_NAMES = ("dataset", "dataset_fingerprint", "splits_final", "lesion_fingerprint")
DATASET_KEYS = ("channel_names", "labels", "numTraining", "file_ending")
FINGERPRINT_KEYS = (
    "spacings",
    "shapes_after_crop",
    "foreground_intensity_properties_per_channel",
    "median_relative_size_after_cropping",
)


def check_plans_name(name: str) -> None:
    """Raises ``UsageError`` unless plans can be called ``name``: it becomes part of names of files and folders."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name) or name in RESERVED_NAMES:
        raise UsageError(
            f"-plans_name {name!r}: use letters, digits, '.', '-' and '_', such as nnUNetSmallSegPlans, and none of "
            f"{', '.join(RESERVED_NAMES)}, which are files of nnU-Net"
        )


def unknown_dataset(dataset: str | int, *places: Path) -> str:
    """What to say about a data set that is in none of the folders ``places``, with the nearest name there is."""
    known = sorted({folder.name for place in places for folder in place.glob("Dataset[0-9][0-9][0-9]_*")})
    hint = did_you_mean(str(dataset), known) or did_you_mean(f"Dataset000_{dataset}", known)
    shown = (", ".join(known[:10]) or "none") + " and more" * (len(known) > 10)
    return (
        f"there is no data set {str(dataset)!r} in {' or '.join(map(str, places))}.{hint} Give the number or the full "
        f"name of a folder DatasetXXX_Name; there are {shown}"
    )


def read_object(file: Path, keys: Iterable[str], next_step: str) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        file: The file.
        keys: What it has to hold.
        next_step: What to do if it does not.
    Raises:
        SmallSegError: If it cannot be read or lacks a key.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SmallSegError(f"{file} cannot be read: {error}. {next_step}") from error
    missing = [key for key in keys if not isinstance(content, dict) or key not in content]
    if missing or not isinstance(content, dict):
        raise SmallSegError(f"{file} lacks {', '.join(missing) or 'everything'}. {next_step}")
    return content


def check_raw_dataset(folder: Path) -> None:
    """Checks ``dataset.json`` and that there are training images.

    Raises:
        SmallSegError: If one of them is missing or damaged.
    """
    file = folder / "dataset.json"
    description = read_object(file, DATASET_KEYS, "Mend it: nnU-Net's documentation on dataset formats names its keys")
    if "dataset" in description:  # its own list of files, which nnU-Net reads
        return
    ending = description["file_ending"]
    if not any((folder / "imagesTr").glob(f"*_[0-9][0-9][0-9][0-9]{ending}")):
        raise SmallSegError(
            f"{folder / 'imagesTr'} holds no images named CASE_0000{ending}: put the training images there, or correct "
            f"file_ending in {file}"
        )


def check_fingerprint(file: Path, number: int) -> dict[str, Any]:
    """Checks a fingerprint of nnU-Net.

    Args:
        file: ``dataset_fingerprint.json``.
        number: Number of its data set, for messages.
    Returns:
        Its content.
    Raises:
        SmallSegError: If it is damaged, or holds numbers that are not finite.
    """
    again = f"nnUNetv2_extract_fingerprint -d {number} --verify_dataset_integrity --clean"
    content = read_object(file, FINGERPRINT_KEYS, f"Extract it again: {again}")
    for place, value in _numbers(content, ()):
        if not math.isfinite(value):
            raise SmallSegError(
                f"{file} holds {value} at {'.'.join(place)}: an image of the data set holds NaN or infinite values, "
                f"with which no network can be trained. Find and mend it, then extract the fingerprint again: {again}"
            )
    return content


def _numbers(content: Any, place: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], float]]:
    """Every number in a JSON content and where it stands."""
    if isinstance(content, float):
        yield place, content
    elif isinstance(content, (dict, list)):
        entries = content.items() if isinstance(content, dict) else enumerate(content)
        for name, value in entries:
            yield from _numbers(value, (*place, str(name)))
