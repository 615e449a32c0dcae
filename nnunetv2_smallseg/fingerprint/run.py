"""Makes the lesion fingerprint of a data set: reads every label once, in parallel, and writes the files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from nnunetv2_smallseg.errors import SmallSegError
from nnunetv2_smallseg.evaluation.size_groups import DIAMETER_LIMITS_MM, diameter_bins
from nnunetv2_smallseg.files import write_json
from nnunetv2_smallseg.fingerprint.case import CaseRecord, CaseTask, measure_case
from nnunetv2_smallseg.fingerprint.recommendations import recommend
from nnunetv2_smallseg.fingerprint.source import DEFAULT_PLANS_NAME, Source, find_source
from nnunetv2_smallseg.fingerprint.summary import FORMAT_VERSION, summarise
from nnunetv2_smallseg.parallel import run_in_processes

__all__ = ["FILE_NAME", "Fingerprint", "extract_fingerprint"]

FILE_NAME = "lesion_fingerprint"


@dataclass(frozen=True)
class Fingerprint:
    """A finished fingerprint: ``content`` of the JSON file, and the ``files`` written."""

    content: dict
    files: tuple[Path, ...]


def extract_fingerprint(
    dataset: str | int,
    plans_name: str = DEFAULT_PLANS_NAME,
    configuration_name: str | None = None,
    *,
    output: Path | None = None,
    raw: bool = False,
    num_processes: int | None = None,
    diameter_limits_mm: Sequence[float] = DIAMETER_LIMITS_MM,
) -> Fingerprint:
    """Measures the lesions of a data set and writes ``lesion_fingerprint.json``, ``.html`` and ``.png``.

    An interrupted run goes on where it was if started again: what is measured stands in a hidden file beside the
    results until these are written.

    Args:
        dataset: Name or number.
        plans_name: Plans whose patch, deep supervision and target spacing are looked at.
        configuration_name: A configuration of them; None for 2.5d, 3d_fullres or 2d, the first there is.
        output: Folder for the files; None for the data set's folder in ``nnUNet_preprocessed``.
        raw: Read the raw labels even if preprocessed ones are there.
        num_processes: Processes; 1 measures in this one. With more, a script has to call this below
            ``if __name__ == "__main__"``, because they are spawned.
        diameter_limits_mm: Limits of the size bins.
    Raises:
        UsageError: If the data set is unknown or the limits do not ascend.
        SmallSegError: If plans, configuration or labels are missing or damaged.
    """
    from nnunetv2_smallseg.fingerprint.figure import draw_fingerprint
    from nnunetv2_smallseg.fingerprint.page import write_page

    diameter_bins(diameter_limits_mm)  # raises before anything is read
    source = find_source(dataset, plans_name, configuration_name, raw=raw)
    output = source.folder if output is None else Path(output)
    try:
        output.mkdir(parents=True, exist_ok=True)
        progress = _Progress(output / f".{FILE_NAME}_progress.jsonl", source)
        records = progress.read()
        todo = [task for task in source.tasks if task.case not in records]
        for _, record in run_in_processes(measure_case, todo, num_processes, "cases"):
            records[record.case] = record
            progress.add(record)
        content = summarise(source, [records[task.case] for task in source.tasks], diameter_limits_mm)
        content["recommendations"] = recommend(content, source.median_image_size)
        files = tuple(output / f"{FILE_NAME}.{ending}" for ending in ("json", "html", "png"))
        figure = draw_fingerprint(content, files[2])
        write_page(content, figure, files[1])
        write_json(content, files[0])
        progress.remove()
    except OSError as error:
        raise SmallSegError(f"{output} cannot be written to ({error}): choose another folder with -o") from error
    return Fingerprint(content, files)


class _Progress:
    """The cases measured so far, one a line; of another version, configuration or file they are not used.

    Args:
        file: Where they stand.
        source: What is measured.
    """

    def __init__(self, file: Path, source: Source) -> None:
        self._file = file
        self._tasks = {task.case: task for task in source.tasks}
        settings = repr((FORMAT_VERSION, replace(source.data_set, resample=None)))
        self._key = hashlib.sha256(settings.encode()).hexdigest()

    def read(self) -> dict[str, CaseRecord]:
        """Case -> its record, of those whose files are what they were."""
        return {record.case: record for record in self._records()}

    def _records(self) -> Iterator[CaseRecord]:
        try:
            lines = self._file.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return
        for line in lines:
            try:
                entry = json.loads(line)
            except ValueError:  # the last line of an interrupted run
                continue
            task = self._tasks.get(entry["record"]["case"])
            if task is not None and (entry["key"], entry["file"]) == (self._key, _file_state(task)):
                yield _to_record(entry["record"], len(task.data_set.setup.factors))

    def add(self, record: CaseRecord) -> None:
        """Adds a case."""
        entry = {"key": self._key, "file": _file_state(self._tasks[record.case]), "record": asdict(record)}
        with self._file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry, default=lambda array: array.tolist()) + "\n")

    def remove(self) -> None:
        """Forgets all."""
        self._file.unlink(missing_ok=True)


def _file_state(task: CaseTask) -> list[int]:
    """Sizes and times of change of the files a record was made from."""
    folder = task.data_set.preprocessed
    files = [task.label_file] if task.label_file is not None else []
    if folder is not None:
        files += [folder / f"{task.case}{ending}" for ending in (".pkl", "_seg.b2nd", ".npz")]
    states = [os.stat(file) for file in files if file.is_file()]
    return [number for state in states for number in (state.st_size, state.st_mtime_ns)]


def _to_record(entry: dict, num_levels: int) -> CaseRecord:
    """A record as JSON holds it, with arrays."""
    tables = {}
    for name in ("sizes", "grid", "training", "resampling"):
        tables[name] = {column: np.array(values) for column, values in entry[name].items()}
        for column, width in (("extent_mm", 3), ("extent_voxels", 3)):
            if column in tables[name]:
                tables[name][column] = tables[name][column].reshape(-1, width)
    for name in ("vanished", "sections_vanished"):
        tables["training"][name] = tables["training"][name].reshape(-1, num_levels)
    return CaseRecord(entry["case"], entry["num_slices"], [np.array(areas) for areas in entry["areas"]], **tables)
