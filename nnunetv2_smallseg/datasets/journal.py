"""The journal of a data set under construction: one line a finished case, written after the files of that case.

A process may be killed anywhere: what the journal does not name is done again. The journal disappears last, when
``conversion_report.json`` holds its content.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

from nnunetv2_smallseg.datasets.target import JOURNAL, PARTS, REPORT, file_of_report
from nnunetv2_smallseg.errors import DatasetError, UsageError

__all__ = ["locked_journal", "read_records", "remove_temporary_files", "start_journal"]

LOCK_SECONDS = 10


@contextlib.contextmanager
def locked_journal(folder: Path) -> Iterator[Any]:
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


def read_records(journal: Any, folder: Path) -> tuple[dict | None, dict[str, dict]]:
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


def start_journal(journal: Any, folder: Path, settings: dict, overwrite: bool, planned: Container[str]) -> set[str]:
    """Begins a new part of the journal; returns the cases that earlier runs finished."""
    known, records = read_records(journal, folder)
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


def _is_complete(folder: Path, record: dict) -> bool:
    for name, facts in record["files"].items():
        path = file_of_report(folder, name)
        if not path.is_file() or path.stat().st_size != facts["bytes"]:
            return False
    return True


def remove_temporary_files(folder: Path) -> None:
    """Removes what a killed run was writing."""
    for place in (folder, *(folder / name for name in PARTS)):
        for path in place.glob(".*.part"):
            path.unlink(missing_ok=True)
