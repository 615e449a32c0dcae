"""What all converters share: cases in, an nnU-Net data set out, whole or resumable.

A converter lists cases (``cases.Plan``), each with a function that reads it (``Case.read``). Everything else happens
here: checks, parallel workers, files that are whole or absent. ``journal.py`` keeps what is finished, ``summary.py``
writes folds and the report.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for_sentinels
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from nnunetv2_smallseg.datasets.cases import Case, Converted, Plan, Problem, Writable, as_text
from nnunetv2_smallseg.datasets.journal import locked_journal, read_records, remove_temporary_files, start_journal
from nnunetv2_smallseg.datasets.labels import label_counts, lesion_sizes
from nnunetv2_smallseg.datasets.summary import Outcome, write_summary
from nnunetv2_smallseg.datasets.target import JOURNAL, check_folder, file_sha256
from nnunetv2_smallseg.datasets.volumes import Volume, geometry_difference, same_geometry
from nnunetv2_smallseg.errors import CaseError, DatasetError
from nnunetv2_smallseg.files import replacing

__all__ = ["convert"]

# Geometry of image and label: below this share of a voxel they are the same up to rounding.
SAME_GEOMETRY = 0.01


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
    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with locked_journal(folder) as journal:
        remove_temporary_files(folder)
        done = start_journal(journal, folder, dict(settings), overwrite, {case.identifier for case in cases})
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
        remove_temporary_files(folder)
        _, records = read_records(journal, folder)
        records = {name: record for name, record in records.items() if name in done}
        outcome = write_summary(plan, folder, dict(settings), records, failed)
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
        "notes": [as_text(note) for note in converted.notes],
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


def _write(item: Writable, folder: Path, name: str, files: dict[str, dict]) -> None:
    target = folder / name
    target.parent.mkdir(exist_ok=True)
    with replacing(target) as temporary:
        item.write(temporary)
        files[name] = {"bytes": temporary.stat().st_size, "sha256": file_sha256(temporary)}


def _content_sha256(images: Sequence[Writable]) -> str:
    """Checksum of the voxels, so that the same image under two names is found."""
    digest = hashlib.sha256()
    for image in images:
        digest.update(repr((image.array.shape, image.array.dtype.str)).encode())
        array = image.array
        digest.update(array.reshape(-1, order="F" if array.flags.f_contiguous else "C").view(np.uint8).data)
    return digest.hexdigest()
