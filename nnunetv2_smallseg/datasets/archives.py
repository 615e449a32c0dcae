"""Reading files and members of zip archives that may be damaged or hostile.

Nothing is ever unpacked to the disk, so no name in an archive can choose where something is written. Every read has a
limit, because an archive of a few kilobytes can hold petabytes.
"""

from __future__ import annotations

import gzip
import io
import stat
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from nnunetv2_smallseg.errors import CaseError

__all__ = ["Source", "decompressed", "only_member", "read_into", "split_archive_message", "zip_members"]

GZIP_MAGIC = b"\x1f\x8b"
ENCRYPTED = 0x1


@dataclass(frozen=True)
class Source:
    """A file on the disk, or a member of a zip archive on the disk.

    Attributes:
        path: The file, or the archive.
        member: Name of the member as the archive spells it; None for the file itself.
    """

    path: Path
    member: str | None = None

    def __str__(self) -> str:
        return str(self.path) if self.member is None else f"{self.path}[{self.member}]"

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Opens it for reading.

        Raises:
            CaseError: On opening and on reading inside the ``with`` block, if the file or archive is damaged or absent.
        """
        try:
            if self.member is None:
                with self.path.open("rb") as stream:
                    yield stream
            else:
                facts = self.path.stat()
                with _archive(self.path, facts.st_size, facts.st_mtime_ns).open(self.member) as stream:
                    yield stream
        except (zipfile.BadZipFile, NotImplementedError) as error:
            raise CaseError(_zip_message(self.path, error)) from error
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise CaseError(f"{self} is damaged or was not downloaded completely: {error}") from error
        except (KeyError, RuntimeError, OSError) as error:
            raise CaseError(f"{self} cannot be read: {error}") from error


@lru_cache(maxsize=4)
def _archive(path: Path, size: int, modified: int) -> zipfile.ZipFile:
    """An archive, kept open from one case to the next: reading the table of 30,000 members takes longer than a case.

    ``size`` and ``modified`` tell a replaced archive from the one that is open.
    """
    return zipfile.ZipFile(path)


def _zip_message(path: Path, error: Exception) -> str:
    return f"{path} is no zip archive that can be read ({error}): was it downloaded completely?"


def split_archive_message(path: Path) -> str | None:
    """What to do if ``path`` is one piece of a split archive; None if it is not."""
    if path.with_suffix(".z01").exists():
        return (
            f"{path} is the last piece of a split archive, which Python cannot read. "
            f"Unpack it with 7-Zip, all pieces in one folder: 7z x {path.name}"
        )
    return None


def zip_members(path: Path) -> tuple[list[zipfile.ZipInfo], list[tuple[str, str]]]:
    """Members of a zip archive that are plain files with harmless names.

    Returns:
        The members, and (name, reason) of each one that is refused: absolute names, ``..``, drive letters, control
        characters, links and other special files, encrypted ones.
    Raises:
        CaseError: If the archive cannot be read.
    """
    message = split_archive_message(path)
    if message:
        raise CaseError(message)
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError, EOFError) as error:
        raise CaseError(_zip_message(path, error)) from error
    good, refused = [], []
    for member in members:
        reason = _reason_to_refuse(member)
        if reason is not None:
            refused.append((member.filename, reason))
        elif not member.is_dir():
            good.append(member)
    return good, refused


def _reason_to_refuse(member: zipfile.ZipInfo) -> str | None:
    name = member.filename
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if not name.isprintable() or not name:
        return "its name is empty or holds control characters"
    if name.startswith(("/", "\\")) or name[1:2] == ":":
        return "its name is absolute"
    if ".." in parts:
        return "its name leaves the archive's folder by '..'"
    mode = member.external_attr >> 16
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "it is a link or another special file"
    if member.flag_bits & ENCRYPTED:
        return "it is encrypted"
    return None


def only_member(path: Path, suffix: str) -> Source:
    """The one member of a zip archive whose name ends with ``suffix``.

    Raises:
        CaseError: If there is none, or more than one, or if the archive holds something it must not.
    """
    members, refused = zip_members(path)
    for name, reason in refused:
        raise CaseError(f"{path} holds {name!r}, which is refused: {reason}")
    names = [member.filename for member in members if member.filename.endswith(suffix)]
    if len(names) != 1:
        raise CaseError(f"{path} holds {len(names)} files *{suffix}, and should hold one")
    return Source(path, names[0])


def decompressed(stream: BinaryIO) -> BinaryIO:
    """A stream of the content, unpacked if it is gzip."""
    buffered = io.BufferedReader(stream) if not isinstance(stream, io.BufferedReader) else stream
    if buffered.peek(2)[:2] == GZIP_MAGIC:
        return gzip.GzipFile(fileobj=buffered, mode="rb")
    return buffered


def read_into(stream: BinaryIO, buffer: memoryview, what: str) -> None:
    """Fills ``buffer``.

    Raises:
        CaseError: If the stream ends before.
    """
    position = 0
    while position < len(buffer):
        count = stream.readinto(buffer[position : position + (1 << 20)])
        if not count:
            raise CaseError(
                f"{what} is truncated: {position:,} of {len(buffer):,} bytes of voxels are there. Download it again."
            )
        position += count
