"""The selective scan in compiled kernels on the CPU: the back end of the optional extra ``[cpu]`` (numba).

The kernels release the interpreter lock and run on threads of this module, as many as PyTorch uses. numba's own
parallel loops are never used: its work queue aborts when two threads enter it, and its OpenMP layer kills forked
children, and nnU-Net forks its data loaders. The threads belong to the process that started them, so a forked child
starts its own.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import logging
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import platformdirs
import torch
from torch import Tensor

from nnunetv2_smallseg.ops.arguments import ScanGradients, ScanInputs, state_shape

__all__ = ["backward", "cache_folder", "forward", "unavailable", "unsupported"]

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


def unsupported(inputs: ScanInputs) -> str | None:
    """None, or why the kernels cannot serve these tensors."""
    if inputs.u.device.type != "cpu":
        return f"the tensors are on {inputs.u.device}, and the kernels need them on the CPU"
    return None


def forward(inputs: ScanInputs, keep_states: bool) -> tuple[Tensor, Tensor]:
    """Output (batch, dim, L) and the states at the chunk boundaries, ``state_shape`` (no chunks unless kept)."""
    return _forward(_kernels(inputs.u.dtype), inputs, keep_states)


def backward(inputs: ScanInputs, states: Tensor, gradient: Tensor) -> ScanGradients:
    """Gradients from the gradient (batch, dim, L) of the output and the states kept by ``forward``."""
    return _backward(_kernels(inputs.u.dtype), inputs, states, gradient)


def _forward(kernels: _Kernels, inputs: ScanInputs, keep_states: bool) -> tuple[Tensor, Tensor]:
    batch, chunks, num_states, dim = state_shape(inputs)
    out = torch.empty_like(inputs.u)
    states = out.new_empty(batch, chunks if keep_states else 0, num_states, dim)
    arrays = (*_arrays(inputs), out.numpy(), states.numpy())
    _run(lambda row, first, count, _: kernels.forward(*arrays, row, first, count), _blocks(inputs, kernels.block))
    return out, states


def _backward(kernels: _Kernels, inputs: ScanInputs, states: Tensor, gradient: Tensor) -> ScanGradients:
    batch, dim, _ = inputs.u.shape
    parts = len(_parts(inputs, kernels.block))
    # Sums over the batch and over the blocks of a group are left for the end: no two threads write to one place.
    gradients = [
        torch.empty(shape, dtype=inputs.u.dtype)
        for shape in (
            inputs.u.shape,
            inputs.u.shape,
            (batch, *inputs.A.shape),
            (parts, *inputs.B.shape),
            (parts, *inputs.C.shape),
            (batch, dim),
            (batch, dim),
        )
    ]
    arrays = (*_arrays(inputs), gradient.numpy(), states.numpy(), tuple(x.numpy() for x in gradients))
    _run(lambda *block: kernels.backward(*arrays, *block), _blocks(inputs, kernels.block))
    u, delta, *summed = gradients
    A, B, C, D, bias = (x[0] if len(x) == 1 else x.sum(0) for x in summed)
    no_D, no_bias = inputs.D is None, inputs.delta_bias is None
    return ScanGradients(u, delta, A, B, C, None if no_D else D, None if no_bias else bias)


def _arrays(inputs: ScanInputs) -> tuple[Any, ...]:
    """The inputs as arrays, sharing memory; an empty array stands for None."""
    missing = inputs.u.new_empty(0)
    return (*((missing if x is None else x.detach()).numpy() for x in inputs[:-1]), inputs.delta_softplus)


def _parts(inputs: ScanInputs, block: int) -> list[tuple[int, int]]:
    """(first channel, number of channels) of the equal parts that a group is cut into."""
    width = inputs.u.shape[1] // inputs.B.shape[1]
    count = -(-width // -(-width // block))
    return [(first, min(count, width - first)) for first in range(0, width, count)]


def _blocks(inputs: ScanInputs, block: int) -> list[tuple[int, int, int, int]]:
    """(batch element, first channel, number of channels, part of its group) of all blocks."""
    batch, dim, _ = inputs.u.shape
    groups = inputs.B.shape[1]
    return [
        (row, group * (dim // groups) + first, count, part)
        for row in range(batch)
        for group in range(groups)
        for part, (first, count) in enumerate(_parts(inputs, block))
    ]


# Threads. The locks are renewed in a forked child: there, the thread that may hold one does not exist.


class _Locks:
    """The locks of this module."""

    def __init__(self) -> None:
        self.pools = threading.Lock()
        self.compilation = threading.Lock()


_locks = _Locks()
_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_locks.__init__)


def _pool(helpers: int) -> ThreadPoolExecutor:
    """The helper threads of this process; those inherited over a fork do not run and are never used."""
    key = (os.getpid(), helpers)
    with _locks.pools:
        if key not in _pools:
            _pools[key] = ThreadPoolExecutor(helpers, thread_name_prefix="smallseg-scan")
        return _pools[key]


def _run(kernel: Callable[..., None], blocks: list[tuple[int, int, int, int]]) -> None:
    """Calls the kernel for every block, on the calling thread and on as many helpers as PyTorch has threads left."""
    remaining = iter(blocks)
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                block = next(remaining, None)
            if block is None:
                return
            kernel(*block)

    threads = torch.get_num_threads()
    helpers = [_pool(threads - 1).submit(work) for _ in range(min(threads, len(blocks)) - 1)]
    try:
        work()
    finally:
        # Helpers that other callers keep busy have not begun, and have nothing left to do.
        started = [helper for helper in helpers if not helper.cancel()]
        for helper in started:
            helper.result()


# Compilation.


class _Kernels(NamedTuple):
    """The two kernels, compiled on their first call, and the largest block of channels they take."""

    forward: Callable[..., None]
    backward: Callable[..., None]
    block: int


_compiled: dict[torch.dtype, _Kernels] = {}


def _kernels(dtype: torch.dtype) -> _Kernels:
    """The compiled kernels for a type; they are compiled, or loaded from the disk, when first asked for."""
    with _locks.compilation:
        if dtype not in _compiled:
            _compiled[dtype] = _compile(dtype)
        return _compiled[dtype]


def _compile(dtype: torch.dtype) -> _Kernels:
    """Compiles the kernels, which takes some seconds, or loads them from ``cache_folder``, which takes far less."""
    folder = cache_folder(dtype)
    if folder is not None:
        try:
            return _warmed_up(_new_kernels(folder), dtype)
        except Exception as error:
            # A full disk, a damaged file: no fault of the cache may stop a scan, and any other fault shows up below.
            _logger.warning("Compiled scan kernels cannot be kept in %s (%s: %s).", folder, type(error).__name__, error)
    _logger.info(
        "The scan kernels for %s are compiled for this process only. To keep them, set NUMBA_CACHE_DIR to a folder "
        "that can be written.",
        dtype,
    )
    return _warmed_up(_new_kernels(None), dtype)


def _new_kernels(folder: Path | None) -> _Kernels:
    """Kernels that are not compiled yet, with their cache in ``folder``, or without one."""
    import numba

    from nnunetv2_smallseg.ops import cpu_kernels

    compilers = [numba.njit(**cpu_kernels.KERNEL_OPTIONS)(f) for f in (cpu_kernels.forward, cpu_kernels.backward)]
    if folder is not None:
        # numba reads this setting when caching is switched on for a function, and has no other way to be told.
        before = numba.config.CACHE_DIR
        numba.config.CACHE_DIR = str(folder)
        try:
            for compiler in compilers:
                compiler.enable_caching()
        finally:
            numba.config.CACHE_DIR = before
    return _Kernels(*compilers, cpu_kernels.BLOCK)


def _warmed_up(kernels: _Kernels, dtype: torch.dtype) -> _Kernels:
    """The kernels, after a scan of one step."""
    inputs = ScanInputs(*(torch.zeros(shape, dtype=dtype) for shape in _ONE_STEP), None, None, False)
    out, states = _forward(kernels, inputs, True)
    _backward(kernels, inputs, states, out)
    return kernels


_ONE_STEP = ((1, 1, 1), (1, 1, 1), (1, 1), (1, 1, 1, 1), (1, 1, 1, 1))


def cache_folder(dtype: torch.dtype) -> Path | None:
    """The folder for compiled kernels of one type, or None if it cannot be written.

    It is in ``NUMBA_CACHE_DIR``, if set, or else in the user's cache folder. Its name tells source code, numba and
    processor, so processes that share it write equal files: numba numbers its files, and two processes that compile
    different code at a time can give it the same number.
    """
    import llvmlite.binding
    import numba

    from nnunetv2_smallseg.ops import arguments, cpu_kernels

    facts = [Path(module.__file__).read_bytes() for module in (arguments, cpu_kernels)]
    processor = (llvmlite.binding.get_host_cpu_name(), llvmlite.binding.get_host_cpu_features().flatten())
    facts += [x.encode() for x in (sys.version, numba.__version__, *processor, str(dtype))]
    name = hashlib.sha256(b"\0".join(facts)).hexdigest()[:16]
    base = numba.config.CACHE_DIR or platformdirs.user_cache_dir("nnunetv2_smallseg")
    folder = Path(base) / "scan_kernels" / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return None
