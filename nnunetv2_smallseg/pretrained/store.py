"""The weights folder: finds, checks and downloads the files of ``pretrained.entries``.

Nothing here runs at import or while a network is built. Training only ever reads the folder; the one function that uses
the network is ``fetch``, and only ``smallseg weights fetch`` calls it. Clusters whose nodes are offline are served by
putting the file into the folder by hand.

Environment:
    SMALLSEG_WEIGHTS: Folder of the weight files, in place of the user's cache folder.
    SMALLSEG_WEIGHTS_<NAME>: Another file to use for the entry <NAME> (upper case). If it is not the published one, a
        warning says so and gives its checksum; whether it fits the network is checked as for any other.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import logging
import os
import urllib.request
import uuid
from pathlib import Path

import platformdirs
from tqdm import tqdm

from nnunetv2_smallseg import registry
from nnunetv2_smallseg.errors import WeightsError
from nnunetv2_smallseg.pretrained.entries import WeightEntry, entry

__all__ = ["FOLDER_VARIABLE", "check_file", "fetch", "path", "resolve", "verify", "weights_folder"]

logger = logging.getLogger(__name__)

FOLDER_VARIABLE = "SMALLSEG_WEIGHTS"
CHUNK_BYTES = 1 << 20
TIMEOUT_SECONDS = 30


def weights_folder() -> Path:
    """The folder of the weight files; it need not exist yet.

    Raises:
        WeightsError: If SMALLSEG_WEIGHTS points to something that is not a folder.
    """
    chosen = os.environ.get(FOLDER_VARIABLE)
    if not chosen:
        return Path(platformdirs.user_cache_dir("nnunetv2_smallseg")) / "weights"
    folder = Path(chosen).expanduser().absolute()
    if os.path.lexists(folder) and not folder.is_dir():
        raise WeightsError(
            f"{FOLDER_VARIABLE}={chosen} is not a folder. Set it to the folder that holds the weight files; to use one "
            f"particular file set the variable of that file instead, such as {FOLDER_VARIABLE}_VMAMBA_TINY_IMAGENET."
        )
    return folder


def path(name: str) -> Path:
    """Where the file of ``name`` is in the weights folder, or where it has to be put. It need not exist.

    Raises:
        UsageError: If no entry is called ``name``.
    """
    weights, folder = entry(name), weights_folder()
    for file_name in weights.file_names:
        if os.path.isfile(folder / file_name):
            return folder / file_name
    return folder / weights.file_name


def verify(name: str) -> Path:
    """Checks that the file of ``name`` is in the weights folder, complete and unaltered.

    Returns:
        Its path.

    Raises:
        UsageError: If no entry is called ``name``.
        WeightsError: If the file is absent, cannot be read, or has another size or checksum.
    """
    weights, file = entry(name), path(name)
    if not os.path.isfile(file):
        raise WeightsError(_absent_message(weights, file))
    problem = check_file(file, weights)
    if problem:
        raise WeightsError(
            f"{file} is not the published file of '{name}': {problem}. Delete it and run `smallseg weights fetch "
            f"{name}`, or copy it again from {weights.urls[0]}. To use it as it is, set {weights.variable}={file}"
        )
    return file


def resolve(name: str, file: str | os.PathLike | None = None) -> Path:
    """The file to read for the entry ``name``.

    Args:
        name: Name of the entry.
        file: Another file to use in its place. Without one, the variable ``SMALLSEG_WEIGHTS_<NAME>`` is looked up, then
            the weights folder.

    Returns:
        ``file`` or the variable's file, which may be another than the published one, as a warning then says; else the
        published file, verified.

    Raises:
        UsageError: If no entry is called ``name``.
        WeightsError: If there is no such file, or the file of the weights folder is damaged.
    """
    weights = entry(name)
    origin = "given"
    if file is None and os.environ.get(weights.variable):
        file, origin = os.environ[weights.variable], f"given by {weights.variable}"
    if file is None:
        return verify(name)
    chosen = Path(file).expanduser()
    if not os.path.isfile(chosen):
        raise WeightsError(
            f"weight file {chosen} ({origin} in place of '{name}') does not exist or cannot be reached. Correct the "
            f"path, or leave it out to use the published file ({path(name)})."
        )
    problem = check_file(chosen, weights)
    if problem is None:
        logger.info("weight file %s, %s, is the published file of '%s'", chosen, origin, name)
    else:
        logger.warning(
            "weight file %s, %s, is NOT the published file of '%s': %s. It is used all the same, because you asked for "
            "it: be sure where it comes from.", chosen, origin, name, problem
        )  # fmt: skip
    return chosen


def fetch(name: str) -> Path:
    """Downloads the file of ``name`` into the weights folder, unless it is there already.

    The download gets a temporary name and its final one only after size and checksum were found right, so an
    interrupted or damaged download leaves nothing behind that could be taken for the file.

    Returns:
        Path of the verified file.

    Raises:
        UsageError: If no entry is called ``name``.
        WeightsError: If no address gave the right file, or the folder cannot be written.
    """
    weights, existing = entry(name), path(name)
    if os.path.isfile(existing):
        problem = check_file(existing, weights)
        if not problem:
            logger.info("%s is already there and complete", existing)
            return existing
        logger.warning("%s is replaced: %s", existing, problem)
    target = weights_folder() / weights.file_name
    # A name of its own for every process: two of them may fetch into one shared folder at the same time.
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
    failures = []
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for url in weights.urls:
            problem = _download(url, partial, weights)
            if not problem:
                os.replace(partial, existing)
                return existing
            partial.unlink(missing_ok=True)
            failures.append(f"  {url}\n    {problem}")
            if len(failures) < len(weights.urls):
                logger.warning("%s: %s; trying the next address", url, problem)
    except OSError as error:
        raise WeightsError(
            f"cannot write to the weights folder {target.parent}: {error}. Free space or permissions there, or set "
            f"{FOLDER_VARIABLE} to a folder you can write to, then run `smallseg weights fetch {name}` again."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
    raise WeightsError(
        f"'{name}' could not be downloaded:\n" + "\n".join(failures) + "\n"
        f"Try again later or from a machine with network. By hand: {_by_hand(weights, target)}"
    )


def check_file(file: Path, weights: WeightEntry) -> str | None:
    """What is wrong with ``file`` as the file of ``weights``; None if its size and checksum are right.

    Raises:
        WeightsError: If the file cannot be read.
    """
    digest, size = hashlib.sha256(), 0
    try:
        with file.open("rb") as stream:
            while chunk := stream.read(CHUNK_BYTES):
                digest.update(chunk)
                size += len(chunk)
    except OSError as error:
        raise WeightsError(f"cannot read {file}: {error}. Mend its permissions or copy it again.") from error
    return _difference(size, digest.hexdigest(), weights)


def _difference(size: int, sha256: str, weights: WeightEntry) -> str | None:
    """How size and checksum differ from those of ``weights``; None if they do not."""
    if size != weights.size_bytes:
        return f"it has {size} bytes and should have {weights.size_bytes} (its sha256 is {sha256})"
    if not sha256.startswith(weights.sha256):
        more = "..." if len(weights.sha256) < len(sha256) else ""
        return f"its sha256 is {sha256} and should be {weights.sha256}{more} (stated by {weights.sha256_source})"
    return None


def _download(url: str, partial: Path, weights: WeightEntry) -> str | None:
    """Downloads ``url`` to ``partial`` and checks it.

    Returns:
        What went wrong with this address, or None.

    Raises:
        OSError: If ``partial`` cannot be written; no other address would help.
    """
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "nnunetv2-smallseg"})
        response = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except (OSError, http.client.HTTPException) as error:
        return f"request failed: {error}"
    digest, size = hashlib.sha256(), 0
    # disable=None: no bar when stderr is a file, as in batch jobs.
    bar = tqdm(total=weights.size_bytes, unit="B", unit_scale=True, desc=weights.file_name, disable=None)
    with response, partial.open("xb") as stream, bar:
        # A body that is too long cannot be right: stop before it fills the disk.
        while size <= weights.size_bytes:
            try:
                chunk = response.read(CHUNK_BYTES)
            except (OSError, http.client.HTTPException) as error:
                return f"connection lost after {size} of {weights.size_bytes} bytes: {error}"
            if not chunk:
                break
            stream.write(chunk)
            digest.update(chunk)
            size += len(chunk)
            bar.update(len(chunk))
    problem = _difference(size, digest.hexdigest(), weights)
    return f"not the expected file: {problem}" if problem else None


def _by_hand(weights: WeightEntry, target: Path) -> str:
    """How to bring the file to a machine without network."""
    browser = f" (or, with a browser, {weights.manual_url})" if weights.manual_url else ""
    return f"download {weights.urls[0]}{browser} on any machine and put the file at {target}"


def _absent_message(weights: WeightEntry, target: Path) -> str:
    """What to do about a missing file."""
    trainers = registry.trainers_without_weights(weights.name)
    random_start = f"\n  - train the same network from a random start: {', '.join(trainers)}" if trainers else ""
    return (
        f"the weights '{weights.name}' are not on this machine: {target} does not exist. Do one of these:\n"
        f"  - on a machine with network that shares this folder, run `smallseg weights fetch {weights.name}`\n"
        f"  - {_by_hand(weights, target)}\n"
        f"  - set {weights.variable} to a copy you already have{random_start}"
    )
