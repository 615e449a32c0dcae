"""Reads checkpoint files of other projects as plain state dicts, without running anything stored inside them.

PyTorch's weights-only loading refuses every class it does not know. Two kinds of published files hold such classes
beside their weights: VMamba's file of January 2024 (a yacs ``CfgNode`` under "config") and nnU-Net's checkpoints (numpy
numbers in the log). Nobody needs these values here, so inert stand-ins under the same names take them in; neither yacs
nor any numpy function is called. Everything else stays refused.
"""

from __future__ import annotations

import os
import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import torch

from nnunetv2_smallseg.errors import WeightsError

__all__ = ["read_checkpoint"]

CONTAINER_KEYS = ("network_weights", "state_dict", "model")
WRAPPER_PREFIXES = ("module.", "_orig_mod.")  # DistributedDataParallel and torch.compile


class _Discarded:
    """Takes the place of a value that is read past."""

    def __init__(self, *arguments: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


class _DiscardedMapping:
    """Takes the place of a subclass of dict: the unpickler fills items into the standard classes only."""

    def __new__(cls, *arguments: object) -> OrderedDict:
        return OrderedDict()


def _stand_in(full_name: str, base: type) -> type:
    """A class that weights-only loading takes for ``full_name``.

    Class attributes carry the name because the (class, name) pairs of ``safe_globals`` need a newer PyTorch than we do.
    """
    module, name = full_name.rsplit(".", 1)
    return type(name, (base,), {"__module__": module, "__qualname__": name})


STAND_INS = [
    _stand_in("yacs.config.CfgNode", _DiscardedMapping),
    _stand_in("numpy.dtype", _Discarded),
    _stand_in("numpy.ndarray", _Discarded),
    _stand_in("builtins.bytes", _Discarded),  # contents of an empty array
    *(
        _stand_in(f"{module}.{name}", _Discarded)
        for module in ("numpy.core.multiarray", "numpy._core.multiarray")  # numpy 1 and numpy 2
        for name in ("scalar", "_reconstruct")
    ),
]


def read_checkpoint(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """Reads the weights of a checkpoint, on the CPU.

    Accepts a plain state dict and one inside a container: ``{"model": ...}`` (VMamba), ``{"state_dict": ...}``,
    ``{"network_weights": ...}`` (nnU-Net). The prefixes that DistributedDataParallel and ``torch.compile`` put before
    every name are removed.

    Args:
        path: File written by ``torch.save``.

    Returns:
        Name -> tensor, in the order of the file.

    Raises:
        WeightsError: If the file is absent, damaged, no checkpoint, or holds objects that loading would have to trust.
    """
    path = Path(path)
    content = _load(path)
    for _ in CONTAINER_KEYS:
        inner = [content[key] for key in CONTAINER_KEYS if key in content and isinstance(content[key], Mapping)]
        if not inner:
            break
        content = inner[0]
    tensors = {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}
    others = [str(name) for name in content if name not in tensors]
    if not tensors or others or not all(isinstance(name, str) for name in tensors):
        raise WeightsError(
            f"{path} holds no state dict: {_first(others) if others else 'it is empty'}. Expected is a dictionary of "
            f"names and tensors, by itself or under one of the keys {', '.join(CONTAINER_KEYS)}."
        )
    return _without_wrappers(tensors)


def _load(path: Path) -> Mapping:
    """The dictionary in the file, loaded weights-only."""
    try:
        with path.open("rb") as stream:
            start = stream.read(64)
    except OSError as error:
        raise WeightsError(f"cannot read checkpoint {path}: {error}. Check path and permissions.") from error
    if start.lstrip().startswith((b"<", b"version https://git-lfs")):
        raise WeightsError(
            f"{path} is no checkpoint but a web page or a Git LFS pointer that was saved in its place. Download the "
            f"file itself again."
        )
    try:
        with torch.serialization.safe_globals(STAND_INS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols; the outcome says what matters
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes make the unpickler fail in every possible way
        raise WeightsError(_unreadable_message(path, start, error)) from error
    if not isinstance(content, Mapping):
        raise WeightsError(
            f"{path} holds a {type(content).__name__}, not a dictionary of names and tensors. Save a state dict: "
            f"torch.save(network.state_dict(), path)."
        )
    return content


def _unreadable_message(path: Path, start: bytes, error: Exception) -> str:
    """Why ``torch.load`` refused the file, and what to do."""
    refused = re.search(r"GLOBAL ([\w.]+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
    if refused:
        return (
            f"{path} was not loaded: besides weights it holds '{refused[1]}', and unpickling that could run code of "
            f"the file's author. If you trust the file, load it once with full unpickling in a Python of your own, "
            f"save the state dict alone with torch.save, and give that file instead."
        )
    size = path.stat().st_size
    if start.startswith((b"PK\x03\x04", b"\x80")):
        return (
            f"{path} ({size} bytes) is damaged or incomplete: PyTorch cannot read it. Download or copy it again and "
            f"compare the size with the source."
        )
    return (
        f"{path} ({size} bytes) is not a PyTorch checkpoint. Expected is a file written by torch.save, usually named "
        f".pth or .pt; check the path."
    )


def _without_wrappers(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Removes the prefixes that wrappers add, which are shared by every name."""
    while prefix := next((p for p in WRAPPER_PREFIXES if all(name.startswith(p) for name in tensors)), None):
        tensors = {name[len(prefix) :]: tensor for name, tensor in tensors.items()}
    return tensors


def _first(names: list[str], count: int = 5) -> str:
    """The first names for a message."""
    rest = f" and {len(names) - count} more" if len(names) > count else ""
    return f"entries that are no tensors ({', '.join(names[:count])}{rest})"
