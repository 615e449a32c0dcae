"""What all converters share: cases in, an nnU-Net data set out, whole or resumable.

A converter lists cases (``Plan``), each with a function that reads it (``Case.read``). Everything else happens here:
checks, parallel workers, files that are whole or absent, resuming, folds, the report.

A data set under construction holds a journal with one line a finished case, written after the files of that case. A
process may be killed anywhere: what the journal does not name is done again. The journal disappears last, when
``conversion_report.json`` holds its content.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import multiprocessing
import os
import re
import signal
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing.connection import wait as wait_for_sentinels
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from nnunetv2_smallseg import __version__
from nnunetv2_smallseg.datasets.splits import NUM_FOLDS, Splits, patient_folds, patients_on_both_sides
from nnunetv2_smallseg.datasets.volumes import Volume, geometry_difference, same_geometry
from nnunetv2_smallseg.errors import CaseError, DatasetError, UsageError
from nnunetv2_smallseg.files import replacing, write_json

__all__ = [
    "Case",
    "Converted",
    "Outcome",
    "Plan",
    "Problem",
    "case_identifier",
    "convert",
    "dataset_folder",
    "file_of_report",
    "file_sha256",
    "label_counts",
    "lesion_sizes",
]

REPORT = "conversion_report.json"
JOURNAL = ".conversion_journal.jsonl"
TABLE = "cases.json"
SPLITS = "splits_final.json"
# Geometry of image and label: below this share of a voxel they are the same up to rounding.
SAME_GEOMETRY = 0.01
LOCK_SECONDS = 10


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
        object.__setattr__(self, "patient", _as_text(self.patient))
        object.__setattr__(self, "sources", tuple(map(_as_text, self.sources)))


@dataclass(frozen=True)
class Problem:
    """Something in the source that is not converted, and why."""

    name: str
    subset: str
    reason: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", _as_text(self.name))
        object.__setattr__(self, "reason", _as_text(self.reason))


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


@dataclass(frozen=True)
class Outcome:
    """Result of a conversion.

    Attributes:
        folder: Folder of the data set.
        report: Content of ``conversion_report.json``.
        messages: What the user should know.
    """

    folder: Path
    report: dict
    messages: list[str]


def _as_text(text: str) -> str:
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


def dataset_folder(number: int, name: str) -> Path:
    """The folder of a data set in ``nnUNet_raw``.

    Raises:
        UsageError: If the number or name is not nnU-Net's, or another data set has this number.
        DatasetError: If ``nnUNet_raw`` is not set.
    """
    if not 1 <= number <= 999:
        raise UsageError(f"-d {number}: nnU-Net's numbers of data sets go from 1 to 999")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,79}", name):
        raise UsageError(f"-name {name!r}: use letters, digits, '-' and '_', such as BreastUltrasound")
    raw = raw_folder()
    folder = raw / f"Dataset{number:03d}_{name}"
    others = sorted(other.name for other in raw.glob(f"Dataset{number:03d}_*") if other.name != folder.name)
    if others:
        raise UsageError(f"-d {number} is taken by {others[0]} in {raw}: choose another number")
    return folder


def raw_folder() -> Path:
    """The folder in ``nnUNet_raw``; ``DatasetError`` if the variable is not set."""
    value = os.environ.get("nnUNet_raw")
    if not value:
        raise DatasetError(
            "the environment variable nnUNet_raw is not set. Set it to the folder that holds, or shall hold, "
            "nnU-Net's raw data sets: export nnUNet_raw=/path/to/nnUNet_raw"
        )
    return Path(os.path.abspath(value))


def convert(
    plan: Plan,
    folder: Path,
    settings: Mapping[str, Any],
    num_processes: int = 1,
    overwrite: bool = False,
    progress: bool = True,
) -> Outcome:
    """Writes the data set; goes on where an earlier run stopped.

    Args:
        plan: What to write.
        folder: Folder of the data set.
        settings: Converter and options. A data set begun with others is not continued.
        num_processes: Cases converted at a time.
        overwrite: Convert again what is there already.
        progress: Show a progress bar on stderr, if that is a terminal.
    Returns:
        Folder, report and messages; the report lists cases that failed.
    Raises:
        UsageError: If the folder holds something this function has not written, or was written with other settings.
        DatasetError: If no case can be converted, or writing fails.
    """
    if not plan.cases and not plan.failed:
        raise DatasetError("there is nothing to convert")
    cases, failed = _without_collisions(plan)
    _check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with _locked_journal(folder) as journal:
        _remove_temporary_files(folder)
        done = _start_journal(journal, folder, dict(settings), overwrite, {case.identifier for case in cases})
        todo = [case for case in cases if case.identifier not in done]
        tasks = [(case, folder, plan.file_ending, plan.allowed_values(), plan.lesion_values) for case in todo]
        with tqdm(total=len(cases), initial=len(done), unit="case", disable=None if progress else True) as bar:
            for case, result in _run(tasks, num_processes):
                if isinstance(result, str):
                    failed.append(Problem(case.identifier, case.subset, result))
                else:
                    # Kept on the disk only, so that memory does not grow with the number of cases.
                    journal.write(json.dumps(result) + "\n")
                    journal.flush()
                    done.add(case.identifier)
                bar.update()
        _remove_temporary_files(folder)
        _, records = _read_records(journal, folder)
        records = {name: record for name, record in records.items() if name in done}
        outcome = _finish(plan, folder, dict(settings), records, failed)
        (folder / JOURNAL).unlink()
    return outcome


def _without_collisions(plan: Plan) -> tuple[list[Case], list[Problem]]:
    """Cases with a name of their own, also where file systems ignore case, and all problems so far."""
    counts = Counter(case.identifier.casefold() for case in plan.cases)
    cases, failed = [], list(plan.failed)
    for case in plan.cases:
        count = counts[case.identifier.casefold()]
        if count == 1:
            cases.append(case)
        else:
            reason = f"{count} cases would be called {case.identifier}: rename {', '.join(case.sources)}"
            failed.append(Problem(case.identifier, case.subset, reason))
    return cases, failed


def _check_folder(folder: Path) -> None:
    """Stops before anything is written if the folder is not ours to write."""
    for part in (folder, *(folder / name for name in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"))):
        if part.is_symlink():
            raise UsageError(f"{part} is a link: nothing is written through links. Remove it.")
    ours = (folder / REPORT).is_file() or (folder / JOURNAL).is_file()
    if folder.exists() and not ours and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(
            f"{folder} exists and was not written by smallseg convert: choose another number, or move it away"
        )


@contextlib.contextmanager
def _locked_journal(folder: Path) -> Iterator[Any]:
    """The journal, open for reading and appending, held by this process alone."""
    path = folder / JOURNAL
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        with path.open("a+", encoding="utf-8") as journal:
            # Another process may have finished, and removed the journal, between our opening and locking it.
            if _lock(journal) and path.exists() and os.path.samestat(path.stat(), os.fstat(journal.fileno())):
                try:
                    yield journal
                finally:
                    if path.exists() and path.stat().st_size == 0:  # stopped before anything was begun
                        path.unlink()
                return
        if time.monotonic() > deadline:
            raise DatasetError(f"another conversion is writing {folder}: wait for it to end")
        time.sleep(0.05)


def _lock(stream: Any) -> bool:
    """Locks a file until it is closed; False if another process has."""
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # file systems without locks
        return True
    return True


def _read_records(journal: Any, folder: Path) -> tuple[dict | None, dict[str, dict]]:
    """Settings and records, by case, of all runs so far, finished or not."""
    records: dict[str, dict] = {}
    known = None
    if (folder / REPORT).is_file():
        try:
            report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
            known, records = report["settings"], report["cases"]
        except (ValueError, KeyError, TypeError) as error:
            raise DatasetError(f"{folder / REPORT} was changed and cannot be read: {error}. Move it away.") from error
    journal.seek(0)
    for line in journal.read().splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:  # the last line of a process that was killed
            continue
        if "settings" in entry:
            known = entry["settings"]
            if entry["anew"]:
                records = {}
        else:
            records[entry["case"]] = entry
    return known, records


def _start_journal(journal: Any, folder: Path, settings: dict, overwrite: bool, planned: Container[str]) -> set[str]:
    """Begins a new part of the journal; returns the cases that earlier runs finished."""
    known, records = _read_records(journal, folder)
    settings = json.loads(json.dumps(settings))
    if known is not None and known != settings and not overwrite:
        raise UsageError(
            f"{folder} was written with other options ({_difference(known, settings)}): use the same options, "
            "another number, or --overwrite to convert again"
        )
    gone = sorted(name for name in records if name not in planned)
    if gone and not overwrite:
        raise DatasetError(
            f"{len(gone)} converted cases, such as {gone[0]}, are no longer in the source: bring it back to add more "
            "cases, use another number, or --overwrite to convert again what is there now"
        )
    if overwrite:
        # Before the journal forgets them, so that a kill leaves none behind.
        for record in records.values():
            _remove_files(folder, record)
        records = {}
    journal.write("\n" + json.dumps({"settings": settings, "anew": overwrite}) + "\n")
    journal.flush()
    incomplete = {name for name, record in records.items() if not _is_complete(folder, record)}
    for name in incomplete:
        _remove_files(folder, records[name])
    return set(records) - incomplete


def _difference(known: dict, settings: dict) -> str:
    names = [name for name in {**known, **settings} if known.get(name) != settings.get(name)]
    return ", ".join(f"{name}: {known.get(name)!r} then, {settings.get(name)!r} now" for name in names)


def _remove_files(folder: Path, record: dict) -> None:
    for name in record["files"]:
        file_of_report(folder, name).unlink(missing_ok=True)


def file_of_report(folder: Path, name: str) -> Path:
    """A file of a data set that a report names.

    Raises:
        DatasetError: If the name leads elsewhere.
    """
    if not re.fullmatch(r"(images|labels)T[rs]/[A-Za-z0-9][A-Za-z0-9._+-]*", name):
        raise DatasetError(f"{folder / REPORT} names a file {name!r}, which no converter writes: it was changed")
    return folder / name


def _is_complete(folder: Path, record: dict) -> bool:
    for name, facts in record["files"].items():
        path = file_of_report(folder, name)
        if not path.is_file() or path.stat().st_size != facts["bytes"]:
            return False
    return True


def _remove_temporary_files(folder: Path) -> None:
    for place in (folder, *(folder / name for name in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"))):
        for path in place.glob(".*.part"):
            path.unlink(missing_ok=True)


def _run(tasks: Sequence[tuple], num_processes: int) -> Iterator[tuple[Case, dict | str]]:
    """Converts all cases; a constant number of them is under way at a time."""
    if num_processes <= 1 or len(tasks) <= 1:
        for task in tasks:
            yield task[0], _convert_case(*task)
        return
    # A spawned process holds nothing of this one: no locks, no open archives, no threads of other libraries.
    context = multiprocessing.get_context("spawn")
    waiting = iter(tasks)
    running: dict[Future, Case] = {}
    with ProcessPoolExecutor(min(num_processes, len(tasks)), context, _follow_parent) as executor:
        try:
            while True:
                for task in waiting:
                    running[executor.submit(_convert_case, *task)] = task[0]
                    if len(running) >= 2 * num_processes:
                        break
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), future.result()
        except BrokenProcessPool as error:
            raise DatasetError(
                "a worker process died, most likely for want of memory. Start the same command again with a smaller "
                "-np: finished cases are kept"
            ) from error
        finally:
            executor.shutdown(wait=True, cancel_futures=True)


def _follow_parent() -> None:
    """Ends a worker when its parent is gone, so that a killed conversion leaves nothing that still writes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the workers

    def wait_for_parent() -> None:
        wait_for_sentinels([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=wait_for_parent, daemon=True).start()


def _convert_case(
    case: Case, folder: Path, file_ending: str, allowed: tuple[int, ...], lesion_values: tuple[int, ...]
) -> dict | str:
    """Reads, checks and writes a case.

    Returns:
        Its record, or why it cannot be converted.
    Raises:
        DatasetError: If writing fails, which no other case would survive either.
    """
    try:
        converted = case.read()
        counts, label, fixes = _checked(converted, allowed)
    except CaseError as error:
        return str(error)
    except MemoryError:
        return "there is not enough memory for it: use a smaller -np"
    except Exception as error:  # a library on a damaged file: this case is lost, the others are not
        return f"{type(error).__name__}: {error} (while reading {', '.join(case.sources)})"
    suffix = "Ts" if case.test else "Tr"
    files: dict[str, dict] = {}
    try:
        for number, image in enumerate(converted.images):
            _write(image, folder, f"images{suffix}/{case.identifier}_{number:04d}{file_ending}", files)
        _write(label, folder, f"labels{suffix}/{case.identifier}{file_ending}", files)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return f"its name is too long for the file system: {case.identifier}"
        raise DatasetError(f"cannot write into {folder}: {error}. Finished cases are kept.") from error
    spacing = list(label.spacing) if isinstance(label, Volume) else [1.0] * label.array.ndim
    sizes = lesion_sizes(label.array, lesion_values)
    voxel = math.prod(spacing)
    record = {
        "case": case.identifier,
        "test": case.test,
        "train_only": case.train_only,
        "patient": case.patient,
        "subset": case.subset,
        "stratum": case.stratum or case.subset,
        "sources": list(case.sources),
        "shape": list(label.array.shape),
        "spacing": spacing,
        "label_voxels": {str(value): count for value, count in counts.items()},
        "lesion_voxels": sizes,
        "lesion_mm3": [round(size * voxel, 4) for size in sizes],
        "image_sha256": _content_sha256(converted.images),
        "fixes": [*converted.fixes, *fixes],
        "notes": [_as_text(note) for note in converted.notes],
        "details": {**case.details, **converted.details},
        "files": files,
    }
    if isinstance(label, Volume):
        record["orientation"] = label.orientation
        record["orthonormal"] = label.is_orthonormal()
    return record


def _checked(converted: Converted, allowed: tuple[int, ...]) -> tuple[dict[int, int], Writable, list[str]]:
    """Checks the pair; returns label counts, the label as it is written, and what was fixed."""
    label, fixes = converted.label, []
    for image in converted.images:
        shape = image.array.shape[: label.array.ndim]
        if shape != label.array.shape:
            raise CaseError(f"image and label differ in shape: {shape} and {label.array.shape}")
        if image.array.dtype.kind == "f" and not (
            math.isfinite(float(image.array.min())) and math.isfinite(float(image.array.max()))
        ):
            raise CaseError("the image holds NaN or infinite values")
    counts, values = label_counts(label.array, allowed)
    if values is not label.array:
        label = label.with_array(values)
    first = converted.images[0]
    if isinstance(first, Volume) and isinstance(label, Volume):
        difference = geometry_difference(first, label)
        if difference > SAME_GEOMETRY * min(first.spacing):
            raise CaseError(
                f"image and label lie {difference:.3g} mm apart (image: {first.orientation}, spacing {first.spacing}; "
                f"label: {label.orientation}, spacing {label.spacing}): their geometry has to agree"
            )
        if not same_geometry(first, label):
            fixes.append(f"label, {difference:.3g} mm away, written with the geometry of the image")
            label = first.with_array(label.array)
    return counts, label, fixes


def label_counts(array: np.ndarray, allowed: Iterable[int]) -> tuple[dict[int, int], np.ndarray]:
    """Counts the values of a label.

    Args:
        array: Label of any numeric type.
        allowed: Values it may hold, 0 to 255.
    Returns:
        Voxels of each allowed value, and the label as unsigned 8-bit integers (``array`` itself if it is that already).
    Raises:
        CaseError: If it holds NaN, fractions, or other values.
    """
    allowed = tuple(allowed)
    if array.size == 0:
        raise CaseError("the label is empty")
    lowest, highest = array.min(), array.max()
    if not (np.isfinite(lowest) and np.isfinite(highest)):
        raise CaseError("the label holds NaN or infinite values")
    if lowest < 0 or highest > 255:
        raise CaseError(f"the label holds values from {lowest:g} to {highest:g}; known values: {_listed(allowed)}")
    values = array if array.dtype == np.uint8 else array.astype(np.uint8, order="K")
    if array.dtype.kind == "f" and not np.array_equal(values, array):
        raise CaseError(f"the label holds fractions, such as {array[values != array][0]:g}: it is no label map")
    counts = np.zeros(256, np.int64)
    for part in np.moveaxis(values, int(np.argmax(values.strides)), 0):  # counting at once takes 8 bytes a voxel
        counts += np.bincount(part.ravel(order="K"), minlength=256)
    unknown = [f"{value} ({counts[value]} voxels)" for value in np.flatnonzero(counts) if value not in allowed]
    if unknown:
        raise CaseError(f"the label holds unknown values {', '.join(unknown)}; known values: {_listed(allowed)}")
    return {value: int(counts[value]) for value in allowed}, values


def _listed(values: Iterable[int]) -> str:
    return ", ".join(str(value) for value in values)


def lesion_sizes(label: np.ndarray, lesion_values: tuple[int, ...]) -> list[int]:
    """Voxels of each connected lesion, smallest first; voxels that touch at a corner are connected."""
    import cc3d

    mask = np.zeros_like(label, bool)
    for value in lesion_values:
        mask |= label == value
    if not mask.any():
        return []
    components = cc3d.connected_components(mask, connectivity=8 if label.ndim == 2 else 26)
    return sorted(int(size) for size in np.bincount(components[mask])[1:])


def _write(item: Writable, folder: Path, name: str, files: dict[str, dict]) -> None:
    target = folder / name
    target.parent.mkdir(exist_ok=True)
    with replacing(target) as temporary:
        item.write(temporary)
        files[name] = {"bytes": temporary.stat().st_size, "sha256": file_sha256(temporary)}


def file_sha256(path: Path) -> str:
    """Checksum of a file, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _content_sha256(images: Sequence[Writable]) -> str:
    """Checksum of the voxels, so that the same image under two names is found."""
    digest = hashlib.sha256()
    for image in images:
        digest.update(repr((image.array.shape, image.array.dtype.str)).encode())
        array = image.array
        digest.update(array.reshape(-1, order="F" if array.flags.f_contiguous else "C").view(np.uint8).data)
    return digest.hexdigest()


def _finish(plan: Plan, folder: Path, settings: dict, records: dict[str, dict], failed: list[Problem]) -> Outcome:
    """Writes the files about the whole data set."""
    messages = list(plan.notes)
    records = dict(sorted(records.items()))
    training = [record for record in records.values() if not record["test"]]
    duplicates = _duplicates(records)
    groups = _groups(records, duplicates)
    report = {
        "settings": settings,
        "version": __version__,
        "cases_in": len(plan.cases) + len(plan.skipped) + len(plan.failed),
        "cases_written": len(records),
        "training_cases": len(training),
        "test_cases": len(records) - len(training),
        "cases_skipped": len(plan.skipped),
        "cases_failed": len(failed),
        "subsets": _subset_counts(plan, records, failed),
        "label_voxels": _sum_counts(records),
        "skipped": [vars(problem) for problem in _sorted(plan.skipped)],
        "failed": [vars(problem) for problem in _sorted(failed)],
        "geometry_fixes": {name: record["fixes"] for name, record in records.items() if record["fixes"]},
        "notes": {name: record["notes"] for name, record in records.items() if record["notes"]},
        "duplicates": duplicates,
        **plan.report,
        "cases": records,
    }
    if duplicates:
        messages.append(f"{len(duplicates)} images are there more than once; see duplicates in {REPORT}")
    if not records:
        for name in ("dataset.json", SPLITS, TABLE):
            (folder / name).unlink(missing_ok=True)
        write_json(report, folder / REPORT)
        return Outcome(folder, report, messages)
    both = sorted({groups[r["case"]] for r in training} & {groups[n] for n, r in records.items() if r["test"]})
    report["patients_in_training_and_test"] = both
    if both:
        messages.append(f"{len(both)} patients are in training and test cases: {', '.join(both[:5])}")
    splits = plan.folds([{**record, "group": groups[record["case"]]} for record in training])
    if splits is None:
        (folder / SPLITS).unlink(missing_ok=True)
        messages.append("too few patients for a cross-validation: no splits_final.json; nnU-Net will make folds itself")
    else:
        shared = patients_on_both_sides(splits, groups)
        if shared:
            messages.append(f"{len(shared)} patients are in training and validation of a fold: {', '.join(shared[:5])}")
        report["patients_on_both_sides_of_a_fold"] = shared
        write_json(splits, folder / SPLITS)
        if len(splits) < NUM_FOLDS:
            numbers = "fold 0" if len(splits) == 1 else f"folds 0 to {len(splits) - 1}"
            messages.append(f"train {numbers} only: for higher numbers nnU-Net draws a split of its own")
        messages += _about_preprocessed_splits(folder, splits)
    write_json({name: _table_row(record) for name, record in records.items()}, folder / TABLE)
    write_json(_dataset_json(plan, folder, records, len(training)), folder / "dataset.json")
    write_json(report, folder / REPORT)
    return Outcome(folder, report, messages)


def _sorted(problems: Iterable[Problem]) -> list[Problem]:
    return sorted(problems, key=lambda problem: (problem.subset, problem.name, problem.reason))


def _duplicates(records: dict[str, dict]) -> list[list[str]]:
    same = defaultdict(list)
    for name, record in records.items():
        same[record["image_sha256"]].append(name)
    return [names for names in same.values() if len(names) > 1]


def _groups(records: dict[str, dict], duplicates: list[list[str]]) -> dict[str, str]:
    """Patient of each case, where patients who share an image are one."""
    parent: dict[str, str] = {}

    def root(patient: str) -> str:
        while parent.get(patient, patient) != patient:
            patient = parent[patient]
        return patient

    for names in duplicates:
        patients = sorted({root(records[name]["patient"]) for name in names})
        for patient in patients:
            parent[patient] = patients[0]
    return {name: root(record["patient"]) for name, record in records.items()}


def _subset_counts(plan: Plan, records: dict[str, dict], failed: list[Problem]) -> dict[str, dict[str, int]]:
    counts: dict[str, Counter] = defaultdict(Counter)
    for record in records.values():
        counts[record["subset"]]["test" if record["test"] else "training"] += 1
    for problem in plan.skipped:
        counts[problem.subset]["skipped"] += 1
    for problem in failed:
        counts[problem.subset]["failed"] += 1
    keys = ("training", "test", "skipped", "failed")
    return {subset: {key: counts[subset][key] for key in keys} for subset in sorted(counts)}


def _sum_counts(records: dict[str, dict]) -> dict[str, int]:
    total: Counter = Counter()
    for record in records.values():
        total.update(record["label_voxels"])
    return dict(sorted(total.items(), key=lambda item: int(item[0])))


def _table_row(record: dict) -> dict:
    row = {name: record[name] for name in ("patient", "subset", "test", "train_only", "spacing", "shape")}
    row["num_lesions"] = len(record["lesion_voxels"])
    row["lesion_voxels"] = record["lesion_voxels"]
    if "orientation" in record:  # only volumes have millimetres
        row["lesion_mm3"] = record["lesion_mm3"]
    return {**row, **record["details"]}


def _dataset_json(plan: Plan, folder: Path, records: dict[str, dict], num_training: int) -> dict:
    reader = plan.reader
    if reader is None and not all(record.get("orthonormal", True) for record in records.values()):
        reader = "NibabelIOWithReorient"  # SimpleITK, nnU-Net's first choice, refuses such geometry
    content = {
        "channel_names": dict(plan.channel_names),
        "labels": dict(plan.labels),
        "numTraining": num_training,
        "file_ending": plan.file_ending,
        "name": folder.name[len("Dataset000_") :],
        "converted_by": f"smallseg convert {__version__}",
        **plan.description,
    }
    if reader is not None:
        content["overwrite_image_reader_writer"] = reader
    if plan.regions_class_order is not None:
        content["regions_class_order"] = list(plan.regions_class_order)
    return content


def _about_preprocessed_splits(folder: Path, splits: Splits) -> list[str]:
    """Whether nnU-Net will use our folds: it copies them when it plans, unless it has others."""
    preprocessed = os.environ.get("nnUNet_preprocessed")
    if not preprocessed:
        return []
    existing = Path(preprocessed) / folder.name / SPLITS
    if not existing.is_file():
        return []
    with contextlib.suppress(ValueError):  # whatever else it holds, it is not ours
        if json.loads(existing.read_text(encoding="utf-8")) == splits:
            return []
    return [
        f"{existing} holds other folds, and planning will stop because of that. "
        f"If no training depends on it, replace it: cp {folder / SPLITS} {existing}"
    ]
