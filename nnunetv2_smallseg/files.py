"""Files that are either whole or absent: written under a temporary name beside the target, then renamed."""

from __future__ import annotations

import json
import os
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["replacing", "strangers_can_write", "write_json"]


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Gives a temporary path beside ``target``; at the end it takes the place of ``target``.

    After an exception the temporary file is removed and ``target`` is what it was before. The name cannot be guessed
    and belonged to nobody before (``O_EXCL``, which follows no link), so that several processes may write the same
    target, also where others may write. The permissions are those of any new file: what the umask leaves.

    Raises:
        OSError: If the file cannot be made or renamed; the message names ``target``.
    """
    temporary = target.with_name(f".{target.name[:150]}.{uuid.uuid4().hex}.part")
    try:
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(target)) from None
    try:
        yield temporary
        with temporary.open("rb") as stream:  # on the disk before the name is, should the power fail
            os.fsync(stream.fileno())
        try:
            temporary.replace(target)
        except OSError as error:
            raise type(error)(error.errno, error.strerror, str(target)) from None
    finally:
        temporary.unlink(missing_ok=True)


def strangers_can_write(folder: Path) -> bool:
    """Whether another user may put files into a folder, or owns it; root does not count.

    For folders whose files are run as code. Groups are trusted: on many systems everybody has one of their own, and
    shared folders of a group are made on purpose. False for folders that do not exist, and on Windows.
    """
    if os.name == "nt" or not folder.exists():
        return False
    facts = folder.stat()
    return facts.st_uid not in (0, os.getuid()) or bool(facts.st_mode & stat.S_IWOTH)


def write_json(content: Any, target: Path) -> None:
    """Writes ``content`` as indented JSON, whole or not at all."""
    with replacing(target) as temporary:
        temporary.write_text(json.dumps(content, indent=4, ensure_ascii=False) + "\n", encoding="utf-8")
