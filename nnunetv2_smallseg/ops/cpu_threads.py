"""Threads for compiled kernels that release the interpreter lock.

numba's own parallel loops are never used: its work queue aborts when two threads enter it, and its OpenMP layer kills
forked children, and nnU-Net forks its data loaders. The threads here belong to the process that started them, so a
forked child starts its own.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

__all__ = ["run"]

_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}
_pools_lock = threading.Lock()


def _renew_lock() -> None:
    """In a forked child, the thread that may hold the lock does not exist."""
    global _pools_lock
    _pools_lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


def _pool(helpers: int) -> ThreadPoolExecutor:
    """The helper threads of this process; those inherited over a fork do not run and are never used."""
    key = (os.getpid(), helpers)
    with _pools_lock:
        if key not in _pools:
            _pools[key] = ThreadPoolExecutor(helpers, thread_name_prefix="smallseg-scan")
        return _pools[key]


def run(kernel: Callable[..., None], tasks: Sequence[tuple[int, ...]]) -> None:
    """Calls ``kernel(*task)`` for every task, on the calling thread and on as many helpers as PyTorch has threads."""
    remaining = iter(tasks)
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                task = next(remaining, None)
            if task is None:
                return
            kernel(*task)

    threads = torch.get_num_threads()
    helpers = [_pool(threads - 1).submit(work) for _ in range(min(threads, len(tasks)) - 1)]
    try:
        work()
    finally:
        # Helpers that other callers keep busy have not begun, and have nothing left to do.
        started = [helper for helper in helpers if not helper.cancel()]
        for helper in started:
            helper.result()
