"""Checks and times the selective scans of SS2D on one CUDA GPU, in at most eight minutes.

    python -m benchmarks.gpu -o benchmarks/results/gpu.json

Needs PyTorch, Triton and this package, not nnU-Net; mamba-ssm's ``selective_scan_cuda`` is timed too if it can be
imported. Three paths: ``triton`` (fused SS2D), and the four sequences written out and scanned by ``mamba_ssm`` or by
``torch`` (chunks in plain PyTorch).

Every section runs in a process of its own, so a fault of the GPU ends one section and not the run, and results are
written after every case. ``--dry-run`` does everything on the CPU, in Triton's interpreter, with tiny sizes.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nnunetv2_smallseg.ops import ENVIRONMENT_VARIABLE, backend_triton, selective_scan, selective_scan_reference
from nnunetv2_smallseg.ops import backend_mamba_ssm as mamba
from nnunetv2_smallseg.ops.ss2d_arguments import SS2DInputs

MINUTES = 7.5
"""All sections together; what does not fit is left out and named."""

FORWARD, BOTH = "forward", "forward+backward"
TOLERANCES = {torch.float32: 5e-5, torch.float16: 6e-3, torch.bfloat16: 4e-2}

# (shape, states, rank): rank 6 belongs to 192 channels. Cases that share types, states and rank share compiled kernels.
CHECKS = {
    torch.float32: [
        ((2, 33, 17, 192), 16, 6),
        ((1, 1, 7, 192), 16, 6),
        ((2, 33, 17, 192), 1, 6),
        ((1, 5, 9, 40), 3, 2),
        ((1, 61, 2, 40), 3, 2),
        ((1, 9, 19, 32), 64, 1),
        ((1, 16, 16, 768), 16, 24),
    ],
    torch.float16: [((2, 33, 17, 192), 16, 6), ((2, 64, 40, 192), 1, 6)],
    torch.bfloat16: [((2, 33, 17, 192), 16, 6)],
}
TIMED = [
    ((8, 128, 128, 192), 16, 6, torch.float16),
    ((8, 128, 128, 192), 1, 6, torch.float16),
    ((8, 128, 128, 192), 16, 6, torch.float32),
    ((8, 64, 64, 384), 16, 12, torch.float16),
    ((8, 16, 16, 1536), 16, 48, torch.float16),
]
DRY_CHECKS = {torch.float32: [((1, 2, 3, 4), 2, 1)], torch.float16: [((1, 3, 1, 4), 1, 1)]}
DRY_TIMED = [((1, 2, 2, 4), 1, 1, torch.float16)]

VARIANTS = [
    {},
    {"_TILE": 4},
    {"_TILE": 16},
    {"CHUNK_STEPS": 32},
    {"CHUNK_STEPS": 128},
    {"_PROGRAMS": 2048},
    {"_PROGRAMS": 8192},
    {"_LAUNCH": {"num_warps": 1, "enable_fp_fusion": True, "maxnreg": 168}},
    {"_LAUNCH": {"num_warps": 1, "enable_fp_fusion": True, "maxnreg": 128}},
]
"""Constants of the back end to try; the first is as it is."""


def composed(scan: Callable[..., Tensor], dtype: torch.dtype | None = None) -> Callable[..., Tensor]:
    """SS2D that writes four sequences out, scans them, in ``dtype`` or in that of x, and sums them."""

    def run(x: Tensor, x_proj: Tensor, dt_projs: Tensor, dt_bias: Tensor, A_logs: Tensor, Ds: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        rank, states = dt_projs.shape[2], A_logs.shape[1]
        image = x.permute(0, 3, 1, 2)
        sequences = torch.stack((image.flatten(2), image.transpose(2, 3).flatten(2)), dim=1)
        sequences = torch.cat((sequences, sequences.flip(-1)), dim=1)  # (B, 4, D, L)
        features = torch.einsum("bkdl,kcd->bkcl", sequences, x_proj.to(x.dtype))
        dt, B, C = features.split((rank, states, states), dim=2)
        dt = torch.einsum("bkrl,kdr->bkdl", dt, dt_projs.to(x.dtype))
        A, bias = -A_logs.exp(), dt_bias.flatten()
        own = dtype or x.dtype
        u, dt = sequences.flatten(1, 2).to(own), dt.flatten(1, 2).to(own)
        y = scan(u, dt, A, B.to(own), C.to(own), Ds, bias, True)
        y = y.view(batch, 4, channels, -1)
        y = y[:, :2] + y[:, 2:].flip(-1)
        columns = y[:, 1].view(batch, channels, width, height).transpose(2, 3).flatten(2)
        return (y[:, 0] + columns).to(x.dtype).transpose(1, 2).reshape(x.shape)

    return run


class FusedSS2D(torch.autograd.Function):
    """The Triton back end, without the dispatch around it."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        """Output (B, H, W, D) of the fields of ``SS2DInputs``."""
        out, states = backend_triton.ss2d_forward(SS2DInputs(*tensors), True)
        ctx.save_for_backward(*tensors, states)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        """Gradients of all inputs."""
        *tensors, states = ctx.saved_tensors
        return tuple(backend_triton.ss2d_backward(SS2DInputs(*tensors), states, gradient))


def fused(*tensors: Tensor) -> Tensor:
    """SS2D by the Triton back end; without gradients it keeps no states."""
    if torch.is_grad_enabled():
        return FusedSS2D.apply(*tensors)
    return backend_triton.ss2d_forward(SS2DInputs(*tensors), False)[0]


def named_scan(name: str) -> Callable[..., Tensor]:
    """``selective_scan`` with one back end."""

    def scan(*arguments: object) -> Tensor:
        os.environ[ENVIRONMENT_VARIABLE] = name
        return selective_scan(*arguments)

    return scan


def paths() -> dict[str, Callable[..., Tensor]]:
    """SS2D by name, as far as available; the scans by others get the types that their networks give them."""
    found = {}
    if backend_triton.unavailable() is None:
        found["triton"] = fused
    if mamba.unavailable() is None:
        found["mamba_ssm"] = composed(named_scan("mamba_ssm"), torch.float32)
    found["torch"] = composed(named_scan("torch"), torch.float32)
    return found


def make_inputs(shape: tuple[int, ...], states: int, rank: int, dtype: torch.dtype, device: str) -> SS2DInputs:
    """Seeded inputs; the map in ``dtype``, parameters in float32 and as Mamba initialises them, spread somewhat."""
    generator = torch.Generator().manual_seed(0)
    channels = shape[-1]

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    dt = torch.exp(torch.empty(4, channels).uniform_(-5, -1.5, generator=generator))
    tensors = (
        draw(*shape).to(dtype),
        draw(4, rank + 2 * states, channels) * channels**-0.5,
        draw(4, channels, rank) * rank**-0.5,
        dt + torch.log(-torch.expm1(-dt)),
        torch.arange(1.0, states + 1).log().repeat(4 * channels, 1) + 0.1 * draw(4 * channels, states),
        1 + 0.1 * draw(4 * channels),
    )
    return SS2DInputs(*(tensor.to(device).requires_grad_() for tensor in tensors))


def run_once(function: Callable[..., Tensor], inputs: SS2DInputs, mode: str, gradient: Tensor) -> tuple[Tensor, ...]:
    """Output, and in the mode ``BOTH`` all gradients."""
    if mode == FORWARD:
        with torch.no_grad():
            return (function(*inputs),)
    out = function(*inputs)
    return (out.detach(), *torch.autograd.grad(out, inputs, gradient))


def describe(shape: tuple[int, ...], states: int, rank: int, dtype: torch.dtype) -> dict[str, object]:
    """A case for the results."""
    return {"shape": list(shape), "states": states, "rank": rank, "dtype": str(dtype).removeprefix("torch.")}


# Sections: each yields its results so far.


def section_correctness(device: str, dry: bool) -> Iterator[object]:
    """Output and gradients of every path against the step-by-step reference in float64; two runs give the same bits."""
    results = []
    for dtype, cases in (DRY_CHECKS if dry else CHECKS).items():
        for shape, states, rank in cases:
            inputs = make_inputs(shape, states, rank, dtype, device)
            exact = SS2DInputs(*(tensor.detach().double().requires_grad_() for tensor in inputs))
            # Computed on the host: drawn numbers are equal on every device.
            gradient = torch.cos(torch.arange(math.prod(shape), dtype=torch.float64)).view(shape).to(device, dtype)
            targets = run_once(composed(selective_scan_reference), exact, BOTH, gradient.double())
            for name, function in paths().items():
                result: dict[str, Any] = {"path": name, **describe(shape, states, rank, dtype)}
                with recorded_failure(result):
                    values = run_once(function, inputs, BOTH, gradient)
                    result["errors"] = dict(
                        zip(("out", *inputs._fields), map(relative_error, values, targets), strict=True)
                    )
                    result["passed"] = all(error < TOLERANCES[dtype] for error in result["errors"].values())
                    (alone,) = run_once(function, inputs, FORWARD, gradient)
                    result["without_states"] = relative_error(alone, targets[0])
                    result["passed"] &= result["without_states"] < TOLERANCES[dtype]
                    again = run_once(function, inputs, BOTH, gradient)
                    result["same_bits_twice"] = all(map(torch.equal, values, again))
                results.append(result)
                yield results


def relative_error(value: Tensor, target: Tensor) -> float:
    """Largest difference relative to the largest target; NaN if there is one."""
    return ((value.double() - target).abs().max() / target.abs().max()).item()


@contextlib.contextmanager
def recorded_failure(result: dict[str, Any]) -> Iterator[None]:
    """Notes an exception in a result instead of raising it."""
    try:
        yield
    except Exception:
        result["passed"] = False
        result["failure"] = traceback.format_exc()[-3000:]


def section_bandwidth(device: str, dry: bool) -> Iterator[object]:
    """Bytes read and written per second by a copy, the most that memory gives."""
    size = 2**10 if dry else 2**28
    source, target = torch.zeros(size, device=device), torch.zeros(size, device=device)
    times = interleaved({"copy": lambda: target.copy_(source)}, 1 if dry else 20, device)["copy"]
    yield {"gigabytes_per_second": 8 * size / statistics.median(times) / 1e6, "size_bytes": 4 * size}


def section_speed(device: str, dry: bool) -> Iterator[object]:
    """Times of all paths in interleaved rounds, and their peak memory."""
    results = []
    for shape, states, rank, dtype in DRY_TIMED if dry else TIMED:
        inputs = make_inputs(shape, states, rank, dtype, device)
        gradient = torch.ones_like(inputs.x)
        for mode in (FORWARD, BOTH):
            result: dict[str, Any] = {"mode": mode, **describe(shape, states, rank, dtype), "paths": {}}
            calls = {}
            for name, function in paths().items():
                entry = result["paths"][name] = {}
                with recorded_failure(entry):
                    call = caller(function, inputs, mode, gradient)
                    entry["first_call_seconds"] = seconds(call, device)
                    entry["peak_mib"] = peak_memory(call, device)
                    calls[name] = call
            for name, times in interleaved(calls, 1 if dry else 11, device).items():
                result["paths"][name] |= {"median_ms": statistics.median(times), "fastest_ms": min(times)}
            result["times_faster"] = ratios(result["paths"])
            with recorded_failure(result):
                result["largest_difference"] = differences(calls)
            results.append(result)
            yield results


def ratios(measured: dict[str, dict[str, float]]) -> dict[str, float]:
    """How many times faster the Triton path is than the others."""
    medians = {name: entry["median_ms"] for name, entry in measured.items() if "median_ms" in entry}
    own = medians.pop("triton", None)
    return {} if own is None else {f"than {name}": other / own for name, other in medians.items()}


def differences(calls: dict[str, Callable[[], tuple[Tensor, ...]]]) -> dict[str, float]:
    """Largest relative difference of all tensors of each path to those of the last one."""
    *others, last = calls
    targets = calls[last]()
    return {f"{name} to {last}": max(map(relative_error, calls[name](), targets)) for name in others}


def section_kernels(device: str, dry: bool) -> Iterator[object]:
    """Time of every kernel within one forward and backward pass, by PyTorch's profiler."""
    shape, states, rank, dtype = (DRY_TIMED if dry else TIMED)[0]
    results = []
    for number in (states, 1):
        inputs = make_inputs(shape, number, rank, dtype, device)
        call = caller(fused, inputs, BOTH, torch.ones_like(inputs.x))
        call()
        activities = [torch.profiler.ProfilerActivity.CPU]
        if device == "cuda":
            torch.cuda.synchronize()
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=activities) as profile:
            call()
            if device == "cuda":
                torch.cuda.synchronize()
        measure = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
        events = sorted(profile.key_averages(), key=lambda event: -getattr(event, measure))
        times = {event.key: [getattr(event, measure) / 1000, event.count] for event in events[:20]}
        results.append({**describe(shape, number, rank, dtype), "milliseconds_and_calls": times})
        yield results


def section_variants(device: str, dry: bool) -> Iterator[object]:
    """Times with other constants of the back end, in interleaved rounds with the present ones."""
    present = {name: getattr(backend_triton, name) for variant in VARIANTS for name in variant}
    results: dict[str, dict[str, Any]] = {}

    def with_constants(variant: dict[str, Any], mode: str, inputs: SS2DInputs) -> Callable[[], object]:
        call = caller(fused, inputs, mode, torch.ones_like(inputs.x))

        def run() -> object:
            for name, value in (present | variant).items():
                setattr(backend_triton, name, value)
            return call()

        return run

    # The first two differ in the number of states.
    cases = [(case, make_inputs(*case, device)) for case in (DRY_TIMED if dry else TIMED)[:2]]
    calls = {}
    for variant in VARIANTS[:2] if dry else VARIANTS:
        for (_, states, _, _), inputs in cases:
            for mode in (FORWARD, BOTH):
                name = f"N={states} {mode} {json.dumps(variant)}"
                results[name] = {}
                with recorded_failure(results[name]):
                    call = with_constants(variant, mode, inputs)
                    call()
                    calls[name] = call
        for key, times in interleaved(calls, 1 if dry else 5, device).items():
            results[key] = {"median_ms": statistics.median(times)}
        yield results


SECTIONS = {
    "bandwidth": (section_bandwidth, 60),
    "correctness": (section_correctness, 200),
    "speed": (section_speed, 180),
    "kernels": (section_kernels, 40),
    "variants": (section_variants, 200),
}
"""Sections in their order, with the most seconds of each."""


def caller(function: Callable[..., Tensor], inputs: SS2DInputs, mode: str, gradient: Tensor) -> Callable[[], object]:
    """One call of a path."""
    return lambda: run_once(function, inputs, mode, gradient)


def seconds(call: Callable[[], object], device: str) -> float:
    """Duration of a single call, compilation included."""
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_memory(call: Callable[[], object], device: str) -> float | None:
    """Peak memory of a call in MiB beyond what is there before."""
    if device != "cuda":
        call()
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def interleaved(calls: dict[str, Callable[[], object]], rounds: int, device: str) -> dict[str, list[float]]:
    """Milliseconds of each call, in turns; on the GPU by its own clock, after two calls that are not counted."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 2):
        for name, call in calls.items():
            if device == "cuda":
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                torch.cuda.synchronize()
                start.record()
                call()
                end.record()
                torch.cuda.synchronize()
                elapsed = start.elapsed_time(end)
            else:
                elapsed = 1000 * seconds(call, device)
            if turn >= 2:
                times[name].append(elapsed)
    return times


def machine(device: str) -> dict[str, object]:
    """Device and versions."""
    versions = {}
    for name in ("torch", "triton", "mamba-ssm"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    facts: dict[str, object] = {"device": "cpu", "python": platform.python_version(), "versions": versions}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "device": properties.name,
            "capability": [properties.major, properties.minor],
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": properties.total_memory / 2**30,
            "cuda": torch.version.cuda,
        }
    facts["triton_back_end"] = backend_triton.unavailable() or "available"
    facts["mamba_ssm_back_end"] = mamba.unavailable() or "available"
    return facts


def section_machine(device: str, dry: bool) -> Iterator[object]:
    """What the results were measured on."""
    yield machine(device)


def run_section(name: str, device: str, dry: bool, path: Path) -> None:
    """What the process of a section does: writes its results so far after every case."""
    torch.set_float32_matmul_precision("highest")
    function = section_machine if name == "machine" else SECTIONS[name][0]
    for results in function(device, dry):
        temporary = path.with_suffix(".part")
        temporary.write_text(json.dumps(results))
        temporary.replace(path)


def start_section(name: str, dry: bool, path: Path, limit: float) -> dict[str, object]:
    """Runs a section in a process of its own and returns its results, whatever became of it."""
    section_path = path.with_name(f"{path.stem}.{name}.json")
    section_path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu", "-o", str(section_path.absolute()), "--section", name]
    environment = {**os.environ, "TRITON_INTERPRET": "1"} if dry else os.environ
    section: dict[str, object] = {}
    start = time.monotonic()
    try:
        done = subprocess.run(
            [*command, *(["--dry-run"] if dry else [])],
            env=environment,
            cwd=Path(__file__).parent.parent,
            capture_output=True,
            text=True,
            timeout=max(limit, 1),
        )
        if done.returncode != 0:
            section["failure"] = f"exit status {done.returncode}: {done.stderr[-3000:]}"
    except subprocess.TimeoutExpired:
        section["failure"] = f"stopped after {limit:.0f} seconds; the results so far are kept"
    section["seconds"] = round(time.monotonic() - start, 1)
    if section_path.is_file():
        section["results"] = json.loads(section_path.read_text())
        section_path.unlink()
    return section


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", type=Path, required=True, help="results file to write (JSON)")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU, to test this program")
    parser.add_argument("--section", choices=("machine", *SECTIONS), help="run one section in this process")
    arguments = parser.parse_args()
    device = "cpu" if arguments.dry_run else "cuda"
    if arguments.section is not None:
        run_section(arguments.section, device, arguments.dry_run, arguments.o)
        return 0
    end = time.monotonic() + 60 * MINUTES
    measured: dict[str, object] = {"dry_run": arguments.dry_run}
    for name, limit in {"machine": 60, **{name: limit for name, (_, limit) in SECTIONS.items()}}.items():
        # A dry run tests the program, however slow the machine.
        left = 3600 if arguments.dry_run else min(limit, end - time.monotonic())
        measured[name] = {"failure": "no time left"}
        if left > 5:
            measured[name] = start_section(name, arguments.dry_run, arguments.o, left)
        arguments.o.write_text(json.dumps(measured, indent=1) + "\n")
        sys.stderr.write(f"{name}: {measured[name].get('failure', 'done')}\n")
    checks = measured["correctness"].get("results", [])
    return 0 if checks and all(check.get("passed") for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
