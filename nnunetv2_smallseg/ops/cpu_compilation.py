"""Compiled CPU kernels: compiled when first asked for, kept on the disk, loaded from there by later processes."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import logging
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import platformdirs
import torch

from nnunetv2_smallseg.files import strangers_can_write

__all__ = ["KernelStore", "Kernels", "unavailable"]

_logger = logging.getLogger(__name__)


@functools.cache
def unavailable() -> str | None:
    """None, or why numba cannot be used here."""
    if importlib.util.find_spec("numba") is None:
        return "numba is not installed"
    try:
        import numba
    except ImportError as error:
        # numba refuses to be imported beside a numpy that is too new for it.
        return f"numba cannot be imported ({error})"
    return "NUMBA_DISABLE_JIT is set" if numba.config.DISABLE_JIT else None


class Kernels(NamedTuple):
    """A forward and a backward kernel, compiled on their first call, and the largest block of channels they take."""

    forward: Callable[..., None]
    backward: Callable[..., None]
    block: int


class KernelStore:
    """The compiled kernels of one module, by type.

    Args:
        module: Dotted name of the module with ``forward``, ``backward``, ``BLOCK`` and ``KERNEL_OPTIONS``.
        sources: Dotted names of all modules whose code goes into the kernels.
        warm_up: Calls both kernels once with tensors of a type; this compiles them.
    """

    def __init__(self, module: str, sources: Sequence[str], warm_up: Callable[[Kernels, torch.dtype], Any]) -> None:
        self.module, self.sources, self.warm_up = module, tuple(sources), warm_up
        self.compiled: dict[torch.dtype, Kernels] = {}
        self.renew_lock()
        if hasattr(os, "register_at_fork"):
            # In a forked child, the thread that may hold the lock does not exist.
            os.register_at_fork(after_in_child=self.renew_lock)

    def renew_lock(self) -> None:
        """Replaces the lock by one that nobody holds."""
        self._lock = threading.Lock()

    def kernels(self, dtype: torch.dtype) -> Kernels:
        """The compiled kernels for a type."""
        with self._lock:
            if dtype not in self.compiled:
                self.compiled[dtype] = self.compile(dtype)
            return self.compiled[dtype]

    def compile(self, dtype: torch.dtype) -> Kernels:
        """Compiles the kernels, which takes some seconds, or loads them from ``folder``, which takes far less."""
        folder = self.folder(dtype)
        if folder is not None:
            try:
                return self._warmed_up(folder, dtype)
            except Exception as error:
                # A full disk, a damaged file: no fault of the cache may stop a scan; any other fault shows up below.
                _logger.warning(
                    "Compiled scan kernels cannot be kept in %s (%s: %s).", folder, type(error).__name__, error
                )
        _logger.info(
            "The scan kernels for %s are compiled for this process only. To keep them, set NUMBA_CACHE_DIR to a folder "
            "that can be written.",
            dtype,
        )
        return self._warmed_up(None, dtype)

    def _warmed_up(self, folder: Path | None, dtype: torch.dtype) -> Kernels:
        """New kernels, with their cache in ``folder`` or without one, after their first call."""
        import numba

        code = importlib.import_module(self.module)
        compilers = [numba.njit(**code.KERNEL_OPTIONS)(function) for function in (code.forward, code.backward)]
        if folder is not None:
            # numba reads this setting when caching is switched on for a function, and has no other way to be told.
            before = numba.config.CACHE_DIR
            numba.config.CACHE_DIR = str(folder)
            try:
                for compiler in compilers:
                    compiler.enable_caching()
            finally:
                numba.config.CACHE_DIR = before
        kernels = Kernels(*compilers, code.BLOCK)
        self.warm_up(kernels, dtype)
        return kernels

    def folder(self, dtype: torch.dtype) -> Path | None:
        """The folder for compiled kernels of one type, or None if we cannot write there or strangers can.

        What numba finds there it unpickles and runs.

        It is in ``NUMBA_CACHE_DIR``, if set, or else in the user's cache folder. Its name tells source code, numba and
        processor, so processes that share it write equal files: numba numbers its files, and two processes that compile
        different code at a time can give it the same number.
        """
        import llvmlite.binding
        import numba

        facts = [Path(importlib.import_module(name).__file__).read_bytes() for name in self.sources]
        processor = (llvmlite.binding.get_host_cpu_name(), llvmlite.binding.get_host_cpu_features().flatten())
        facts += [x.encode() for x in (self.module, sys.version, numba.__version__, *processor, str(dtype))]
        name = hashlib.sha256(b"\0".join(facts)).hexdigest()[:16]
        base = numba.config.CACHE_DIR or platformdirs.user_cache_dir("nnunetv2_smallseg")
        folder = Path(base) / "scan_kernels" / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for place in (folder, folder.parent):
                if strangers_can_write(place):
                    _logger.warning("Compiled scan kernels in %s are not used: other users can write there.", place)
                    return None
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except OSError:
            return None
