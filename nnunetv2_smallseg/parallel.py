"""Runs a function on many arguments in several processes, with progress on stderr."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from tqdm import tqdm

from nnunetv2_smallseg.errors import SmallSegError

__all__ = ["default_num_processes", "run_in_processes"]

Argument = TypeVar("Argument")
Result = TypeVar("Result")


def default_num_processes() -> int:
    """Number of cores, 8 at most."""
    return min(8, os.cpu_count() or 1)


def run_in_processes(
    function: Callable[[Argument], Result], arguments: Iterable[Argument], num_processes: int | None, what: str
) -> Iterator[tuple[int, Result]]:
    """Gives the results as they come.

    Args:
        function: Importable by name, as the processes are spawned.
        arguments: What it is called with.
        num_processes: 1 runs it in this process; None for ``default_num_processes``.
        what: What is counted by the progress bar, such as ``cases``.
    Yields:
        Position of the argument and result.
    Raises:
        SmallSegError: If a process was ended from outside.
    """
    arguments = list(arguments)
    progress = {"total": len(arguments), "desc": what, "disable": None}  # silent unless stderr is a terminal
    num_processes = min(num_processes or default_num_processes(), len(arguments))
    if num_processes <= 1:
        for position, argument in enumerate(tqdm(arguments, **progress)):
            yield position, function(argument)
        return
    # Not forked: libraries that were loaded already may hold threads and locks.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_processes, context) as pool:
        futures = {pool.submit(function, argument): position for position, argument in enumerate(arguments)}
        try:
            for future in tqdm(as_completed(futures), **progress):
                # Forgotten at once, so that memory does not grow with results nobody keeps.
                yield futures.pop(future), future.result()
        except BrokenProcessPool as error:
            raise SmallSegError(
                "a process was ended from outside, probably for lack of memory: use fewer processes (-np)"
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
