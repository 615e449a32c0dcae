"""The checks of ``smallseg doctor``: what this machine has, what would break, and what to do about it.

A check is a function that returns rows and needs nothing from the others. One that raises becomes a failure row: the
command exists for installations that are broken.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import io
import json
import os
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nnunetv2_smallseg import registry
from nnunetv2_smallseg.environment import EXTENSION_VARIABLE, contains_extension, extension_folder, split_folders
from nnunetv2_smallseg.errors import WeightsError
from nnunetv2_smallseg.files import strangers_can_write

__all__ = ["CHECKS", "Row", "exit_status", "run_checks"]

OK, INFO, WARNING, FAILURE = "ok", "info", "warning", "failure"

MINIMUM_PYTHON = (3, 10)
MINIMUM_TORCH = (2, 5)
MINIMUM_NNUNET, FIRST_UNSUPPORTED_NNUNET = (2, 8, 1), (3,)
MINIMUM_FREE_BYTES = 10 * 10**9
# Largest relative difference of a scan in float32 from the reference in float64.
SCAN_TOLERANCE = 1e-4

# Whether nnU-Net has to write there: raw data may well be read-only.
FOLDER_VARIABLES = {"nnUNet_raw": False, "nnUNet_preprocessed": True, "nnUNet_results": True}


@dataclass(frozen=True)
class Row:
    """Result of one check.

    Attributes:
        check: What was looked at.
        status: ``ok``, ``info`` (worth knowing), ``warning`` (works, but not well) or ``failure`` (would break).
        message: What was found.
        next_step: What to do about it; None if there is nothing to do.
    """

    check: str
    status: str
    message: str
    next_step: str | None = None


def version_numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: ``2.8.1+local`` -> (2, 8, 1)."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(number) for number in match[0].split(".")) if match else ()


def check_python() -> list[Row]:
    """The interpreter."""
    version = ".".join(map(str, sys.version_info[:3]))
    message = f"{version} at {sys.executable}"
    if sys.version_info[:2] < MINIMUM_PYTHON:
        wanted = ".".join(map(str, MINIMUM_PYTHON))
        return [Row("python", FAILURE, message, f"make an environment with Python {wanted} or newer")]
    return [Row("python", OK, message)]


def check_torch() -> list[Row]:
    """PyTorch and the GPUs it can use."""
    import torch

    rows = []
    if version_numbers(torch.__version__) < MINIMUM_TORCH:
        wanted = ".".join(map(str, MINIMUM_TORCH))
        rows.append(Row("torch", FAILURE, torch.__version__, f"pip install --upgrade 'torch>={wanted}'"))
    else:
        rows.append(Row("torch", OK, torch.__version__))
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        rows.append(Row("cuda", OK, f"CUDA {torch.version.cuda}: {', '.join(names)}"))
    elif torch.version.cuda is None:
        next_step = "for a GPU, install PyTorch with CUDA (https://pytorch.org/get-started); else use -device cpu"
        rows.append(Row("cuda", WARNING, "this PyTorch is built without CUDA: training will be slow", next_step))
    else:
        next_step = "for a GPU, see whether nvidia-smi lists it and update its driver; else use -device cpu"
        message = f"PyTorch is built for CUDA {torch.version.cuda} but finds no GPU: training will be slow"
        rows.append(Row("cuda", WARNING, message, next_step))
    return rows


def check_nnunet() -> list[Row]:
    """The version of nnU-Net, and that it imports."""
    install = "pip install 'nnunetv2>=2.8.1,<3'"
    try:
        version = importlib.metadata.version("nnunetv2")
    except importlib.metadata.PackageNotFoundError:
        return [Row("nnunetv2", FAILURE, "not installed", install)]
    if not MINIMUM_NNUNET <= version_numbers(version) < FIRST_UNSUPPORTED_NNUNET:
        return [Row("nnunetv2", FAILURE, f"{version}, but this package works with 2.8.1 or newer 2.x", install)]
    importlib.import_module("nnunetv2.training.nnUNetTrainer.nnUNetTrainer")
    return [Row("nnunetv2", OK, version)]


def check_tested_versions() -> list[Row]:
    """Whether the versions here lie within those the tests of this package were run with."""
    tested = json.loads(Path(__file__).with_name("tested_versions.json").read_text(encoding="utf-8"))
    rows = []
    for package in ("nnunetv2", "torch"):
        check = f"{package} tested"
        here = importlib.metadata.version(package)
        versions = sorted((run[package] for run in tested.values()), key=version_numbers)
        lowest, newest = versions[0], versions[-1]
        span = lowest if lowest == newest else f"{lowest} to {newest}"
        if not version_numbers(lowest) <= version_numbers(here) <= version_numbers(newest):
            next_step = "watch the first training, and report what breaks with your versions"
            rows.append(Row(check, INFO, f"the tests were run with {span}, here is {here}", next_step))
        elif version_numbers(here) in (version_numbers(lowest), version_numbers(newest)):
            rows.append(Row(check, OK, f"the tests were run with {here}"))
        else:
            rows.append(Row(check, OK, f"{here} lies between {lowest} and {newest}, which the tests were run with"))
    return rows


def _existing_part(folder: Path) -> Path:
    """The folder itself or the nearest of its parents that exists."""
    return next((path for path in (folder, *folder.parents) if path.exists()), folder)


def _is_writable(folder: Path) -> bool:
    """Whether a file can be created there; permission bits do not tell on network file systems."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def check_folder(variable: str, needs_writing: bool) -> list[Row]:
    """A folder of nnU-Net: set, there or creatable, writable, with space left."""
    value = os.environ.get(variable)
    if not value:
        what = "not set" if value is None else "set to nothing"
        return [Row(variable, FAILURE, what, f"export {variable}=/absolute/path, also in your shell's start-up file")]
    folder = Path(value)
    if not folder.is_absolute():
        next_step = f"export {variable} with an absolute path; nothing expands ~ or variables in it later"
        return [Row(variable, FAILURE, f"{value} is not absolute: it means another folder wherever you are", next_step)]
    existing = _existing_part(folder)
    if not existing.is_dir():
        return [Row(variable, FAILURE, f"{existing} is not a folder", f"point {variable} to a folder")]
    writable = _is_writable(existing)
    if not folder.exists():
        if not writable:
            message = f"{folder} does not exist and cannot be created in {existing}"
            return [Row(variable, FAILURE, message, f"create it, or point {variable} to a folder of yours")]
        rows = [Row(variable, INFO, f"{folder} does not exist yet, but can be created", f"mkdir -p '{folder}'")]
    elif writable:
        rows = [Row(variable, OK, str(folder))]
    else:
        next_step = f"mend the permissions, or point {variable} to a folder of yours"
        if needs_writing:
            return [Row(variable, FAILURE, f"{folder} cannot be written to", next_step)]
        rows = [Row(variable, WARNING, f"{folder} can be read but not written to: no data can be added", next_step)]
    free = shutil.disk_usage(existing).free
    text = f"{free / 1e9:.1f} GB free"
    if free < MINIMUM_FREE_BYTES:
        next_step = f"free some space, or point {variable} to a larger disk"
        rows.append(Row(f"space in {variable}", WARNING, text, next_step))
    else:
        rows.append(Row(f"space in {variable}", OK, text))
    return rows


def check_folders() -> list[Row]:
    """The three folders of nnU-Net."""
    return [
        row for variable, needs_writing in FOLDER_VARIABLES.items() for row in check_folder(variable, needs_writing)
    ]


def check_strangers() -> list[Row]:
    """Other users of the machine cannot change what nnU-Net runs as this user: trainers, and pickled checkpoints."""
    folders = dict.fromkeys(split_folders(os.environ.get(EXTENSION_VARIABLE)), EXTENSION_VARIABLE)
    if results := os.environ.get("nnUNet_results"):
        folders[results] = "nnUNet_results"
    return [
        Row(
            f"trust in {variable}",
            WARNING,
            f"other users can write into {folder}, and nnU-Net runs what it finds there",
            f"chmod o-w '{folder}', or use a folder of your own (docs/trust.md)",
        )
        for folder, variable in folders.items()
        if strangers_can_write(Path(folder))
    ]


def check_extension() -> list[Row]:
    """``nnUNet_extTrainer`` names our folder."""
    value = os.environ.get(EXTENSION_VARIABLE)
    if contains_extension(value):
        return [Row(EXTENSION_VARIABLE, OK, value)]
    message = f"{value} lacks {extension_folder()}" if value else "not set: nnU-Net will not find our trainers"
    return [Row(EXTENSION_VARIABLE, FAILURE, message, 'eval "$(smallseg env)" (other shells: smallseg env --help)')]


def check_trainer(name: str) -> Row:
    """nnU-Net finds a trainer, and finds the class of this installation rather than another of the same name."""
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    import nnunetv2_smallseg.trainers as ours

    expected = getattr(ours, name)
    check = f"trainer {name}"
    # nnU-Net tells about every file it looks into.
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            found = recursive_find_trainer_class_by_name(name)
        except RuntimeError as error:
            if not str(error).startswith("Could not find requested nnunet trainer"):
                raise
            return Row(check, FAILURE, "nnU-Net does not find it", 'eval "$(smallseg env)"')
    if found is not expected:
        module = sys.modules.get(found.__module__)
        source = getattr(module, "__file__", None) or found.__module__
        return Row(check, FAILURE, f"nnU-Net finds another class of that name: {source}", "remove or rename that class")
    return Row(check, OK, "nnU-Net finds it")


def check_trainers() -> list[Row]:
    """Every trainer of the registry, by nnU-Net's own look-up."""
    return [_guarded_row(f"trainer {name}", lambda name=name: [check_trainer(name)])[0] for name in registry.trainers()]


def check_scans() -> list[Row]:
    """The back ends of the selective scan: there or not, right or not, and which would run."""
    import torch

    from nnunetv2_smallseg.ops import dispatch

    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    availability = dispatch.backend_availability()
    served = {device for name in availability if availability[name] is None for device in _fast_devices(name)}
    rows = []
    for name, reason in availability.items():
        check = f"scan back end {name}"
        if reason is not None:
            slow = [device for device in devices if device in _fast_devices(name) and device not in served]
            next_step = dispatch.BACKENDS[name].install or "nothing: other back ends serve"
            message = f"{reason}: scans on {', '.join(slow)} will be slow" if slow else reason
            rows.append(Row(check, WARNING if slow else INFO, message, next_step))
            continue
        for device in devices:
            if not _fast_devices(name) or device in _fast_devices(name):
                rows += _guarded_row(f"{check} on {device}", lambda n=name, d=device: [_check_back_end(n, d)])
    for device in devices:
        rows += _guarded_row(f"scan on {device}", lambda d=device: [_check_choice(d)])
    return rows


def _fast_devices(name: str) -> tuple[str, ...]:
    """The device types a back end is made for; none for those that run anywhere, slowly."""
    from nnunetv2_smallseg.ops import dispatch

    return dispatch.BACKENDS[name].device_types


def _check_back_end(name: str, device: str) -> Row:
    """Compares a back end with the reference on a small scan and a small SS2D."""
    from nnunetv2_smallseg.ops import dispatch

    check = f"scan back end {name} on {device}"
    difference = dispatch.self_check(name, device)
    # A result that is not a number is larger than no tolerance.
    if not difference <= SCAN_TOLERANCE:
        message = f"differs from the reference by {difference:.1e}, more than {SCAN_TOLERANCE:.0e}"
        next_step = f"use another one ({dispatch.ENVIRONMENT_VARIABLE}=torch) and report this with your versions"
        return Row(check, FAILURE, message, next_step)
    return Row(check, OK, f"agrees with the reference (difference {difference:.1e})")


def _check_choice(device: str) -> Row:
    """Which back end would run the scans of the networks, SS2D, on a device."""
    from nnunetv2_smallseg.ops import dispatch

    requested = dispatch.requested_backend()
    name = dispatch.chosen_backend_name(device, operator="ss2d")
    origin = "chosen automatically" if requested == "auto" else f"set by {dispatch.ENVIRONMENT_VARIABLE}"
    return Row(f"scan on {device}", OK, f"runs with {name}, {origin}")


def check_weights() -> list[Row]:
    """The pretrained weight files: missing ones are needed by some trainers only, damaged ones are a failure."""
    from nnunetv2_smallseg.pretrained import entries, store

    rows = []
    for entry in entries.ENTRIES:
        check, file = f"weights {entry.name}", store.path(entry.name)
        replacement = os.environ.get(entry.variable)
        users = ", ".join(trainer.name for trainer in registry.trainers().values() if trainer.weights == entry.name)
        if replacement:
            if Path(replacement).expanduser().is_file():
                problem = store.check_file(Path(replacement).expanduser(), entry)
                if problem is None:
                    rows.append(Row(check, OK, f"{replacement}, set by {entry.variable}"))
                    continue
                message = f"{replacement}, set by {entry.variable}, is used and is not the published file: {problem}"
                rows.append(Row(check, WARNING, message, f"unset {entry.variable} to use the published file"))
            else:
                message = f"{replacement}, set by {entry.variable}, does not exist"
                rows.append(Row(check, FAILURE, message, f"correct or unset {entry.variable}"))
        elif not file.is_file():
            next_step = f"smallseg weights fetch {entry.name}, or put the file at {file}"
            rows.append(Row(check, INFO, f"not here; needed by {users}", next_step))
        else:
            try:
                store.verify(entry.name)
                rows.append(Row(check, OK, str(file)))
            except WeightsError as error:
                rows.append(Row(check, FAILURE, str(error), f"delete {file}, then smallseg weights fetch {entry.name}"))
    return rows


CHECKS: dict[str, Callable[[], list[Row]]] = {
    "python": check_python,
    "torch": check_torch,
    "nnunetv2": check_nnunet,
    "tested versions": check_tested_versions,
    "folders": check_folders,
    EXTENSION_VARIABLE: check_extension,
    "trainers": check_trainers,
    "trust": check_strangers,
    "scan back ends": check_scans,
    "weights": check_weights,
}
"""All checks by what they look at."""


def _guarded_row(name: str, check: Callable[[], list[Row]]) -> list[Row]:
    """The rows of a check, or one failure row if it raises."""
    try:
        return check()
    # SystemExit and friends included: no code under test may end the examination.
    except (Exception, SystemExit) as error:
        message = " ".join(f"{type(error).__name__}: {error}".split())
        next_step = "mend what the message names; for a broken package: pip install --force-reinstall PACKAGE"
        return [Row(name, FAILURE, message, next_step)]


def run_checks(checks: dict[str, Callable[[], list[Row]]] | None = None) -> list[Row]:
    """Runs all checks; a check that raises becomes a failure row.

    Args:
        checks: Checks by name (default: ``CHECKS``).
    Returns:
        All rows in order.
    """
    with warnings.catch_warnings():
        # Deprecations inside other packages are not what is examined here.
        warnings.simplefilter("ignore")
        chosen = CHECKS if checks is None else checks
        return [row for name, check in chosen.items() for row in _guarded_row(name, check)]


def exit_status(rows: Sequence[Row]) -> int:
    """1 if something would break, else 0."""
    return int(any(row.status == FAILURE for row in rows))
