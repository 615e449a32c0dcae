"""What a converter says of a data set before it is written: its cases, how each is read, and what is left out."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from nnunetv2_smallseg.datasets.splits import Splits, patient_folds
from nnunetv2_smallseg.errors import CaseError

__all__ = ["Case", "Converted", "Plan", "Problem", "Writable", "as_text", "case_identifier"]


class Writable(Protocol):
    """An image or label that can be written; ``Volume`` or ``Picture``."""

    array: np.ndarray

    def write(self, target: Path) -> None:
        """Writes it."""

    def with_array(self, array: np.ndarray) -> Writable:
        """The same with other values."""


@dataclass(frozen=True)
class Converted:
    """What the read function of a case returns.

    Attributes:
        images: One image a file; nnU-Net's ``_0000``, ``_0001``, ...
        label: Label of the same shape.
        fixes: What was changed about the geometry, in words.
        notes: Other remarks for the report.
        details: More columns for ``cases.json``.
    """

    images: tuple[Writable, ...]
    label: Writable
    fixes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """A case to be converted.

    Attributes:
        identifier: nnU-Net's name of the case; see ``case_identifier``.
        read: Reads it; runs in a worker process, so it has to be picklable (``functools.partial`` of a function of a
            module). Raises ``CaseError``.
        patient: What must not be divided between training and validation.
        subset: Part of the data set, for counts.
        sources: What is read, for the report and ``--dry-run``.
        test: Goes to ``imagesTs`` and ``labelsTs``.
        train_only: Never used for validation.
        stratum: Folds hold equal shares of each stratum; the subset where not given.
        details: More columns for ``cases.json``.
    """

    identifier: str
    read: Callable[[], Converted]
    patient: str
    subset: str
    sources: tuple[str, ...]
    test: bool = False
    train_only: bool = False
    stratum: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "patient", as_text(self.patient))
        object.__setattr__(self, "sources", tuple(map(as_text, self.sources)))


@dataclass(frozen=True)
class Problem:
    """Something in the source that is not converted, and why."""

    name: str
    subset: str
    reason: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", as_text(self.name))
        object.__setattr__(self, "reason", as_text(self.reason))


@dataclass(frozen=True)
class Plan:
    """Everything a converter knows before it reads a voxel.

    Attributes:
        cases: What to convert.
        labels: nnU-Net's ``labels``.
        channel_names: nnU-Net's ``channel_names``, one a channel.
        file_ending: Ending of all files.
        lesion_values: Label values that count as lesion.
        skipped: What is left out on purpose.
        failed: What should be there or be readable, and is not.
        regions_class_order: nnU-Net's field, where ``labels`` holds regions.
        reader: nnU-Net's ``overwrite_image_reader_writer``.
        description: More fields of ``dataset.json``: licence, reference, ...
        label_values: Values a label may hold; by default all that ``labels`` names.
        folds: Makes ``splits_final.json`` out of the records of the training cases.
        report: More entries of the report, such as known leaks.
        notes: Messages for the user.
    """

    cases: Sequence[Case]
    labels: Mapping[str, int | list[int]]
    channel_names: Mapping[str, str]
    file_ending: str
    lesion_values: tuple[int, ...]
    skipped: Sequence[Problem] = ()
    failed: Sequence[Problem] = ()
    regions_class_order: tuple[int, ...] | None = None
    reader: str | None = None
    description: Mapping[str, Any] = field(default_factory=dict)
    label_values: tuple[int, ...] | None = None
    folds: Callable[[list[dict]], Splits | None] = patient_folds
    report: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def allowed_values(self) -> tuple[int, ...]:
        """Values a label may hold."""
        if self.label_values is not None:
            return self.label_values
        values: set[int] = set()
        for value in self.labels.values():
            values |= set(value) if isinstance(value, (list, tuple)) else {value}
        return tuple(sorted(values))


def as_text(text: str) -> str:
    """The text with whatever cannot be written as UTF-8 escaped: names of files may hold any bytes."""
    return text.encode("utf-8", "backslashreplace").decode()


def case_identifier(name: str) -> str:
    """A name nnU-Net and every file system take: letters, digits, ``.``, ``_``, ``-`` and ``+``.

    Raises:
        CaseError: If nothing usable is left, or the name is longer than file systems allow.
    """
    identifier = re.sub(r"[^A-Za-z0-9._+-]+", "_", name).strip("_.-+")
    if not identifier or len(identifier) > 180:
        raise CaseError(f"{name!r} cannot be the name of a case")
    return identifier
