"""What the benchmarks share: facts about the machine, and timing in interleaved rounds."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

__all__ = ["interleaved_medians", "machine_facts"]


def machine_facts(device: str, packages: Sequence[str]) -> dict[str, object]:
    """Device, processor, load and versions, for the head of a results file."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "load_average_at_start": [round(x, 2) for x in os.getloadavg()],
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
    }


def processor_name() -> str:
    """Model name of the processor."""
    description = Path("/proc/cpuinfo")
    if description.exists():
        for line in description.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def interleaved_medians(
    functions: dict[str, Callable[[], object]], rounds: int, device: str = "cpu"
) -> dict[str, dict[str, float | int]]:
    """Times functions in turns, so that a busy or throttled moment of the machine strikes all of them.

    Args:
        functions: What to time, by name.
        rounds: How often each is called.
        device: Device to wait for after each call.
    Returns:
        Median, fastest and number of calls by name, and the median of the processor time of this process, in
        milliseconds.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    processor_times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start, processor_start = time.perf_counter(), time.process_time()
            function()
            if device == "cuda":
                torch.cuda.synchronize()
            times[name].append(1000 * (time.perf_counter() - start))
            processor_times[name].append(1000 * (time.process_time() - processor_start))
    return {
        name: {
            "median_ms": statistics.median(values),
            "fastest_ms": min(values),
            "median_cpu_ms": statistics.median(processor_times[name]),
            "calls": rounds,
        }
        for name, values in times.items()
    }
