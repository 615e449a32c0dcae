"""Times the back ends of the selective scan against a step-by-step loop, in interleaved rounds of one run.

    python -m benchmarks.scan -o benchmarks/results/scan_cpu.json --docs docs/scans.md

Two baselines. Forward: ``step loop``, the algorithm of mamba-ssm's ``selective_scan_ref`` (decays and inputs of all
steps first, then one indexed step after the other). Its backward pass is quadratic in L, since autograd fills a
full-size gradient for every indexed step, so forward and backward together are compared with ``unbind loop``, the
package's own differentiated reference, which splits the steps once.

Peak memory is that of one call in a process of its own, beyond what the inputs take.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.machine import interleaved_medians, machine_facts
from nnunetv2_smallseg.ops import BACKENDS, ENVIRONMENT_VARIABLE, selective_scan, selective_scan_reference

FORWARD, BOTH = "forward", "forward+backward"
BASELINES = {FORWARD: "step loop", BOTH: "unbind loop"}
MARKERS = ("<!-- benchmarks/scan.py writes from here -->", "<!-- to here -->")


def step_loop(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor, delta_softplus: bool
) -> Tensor:
    """The scan as mamba-ssm's reference computes it."""
    per_group = u.shape[1] // B.shape[1]
    delta = torch.nn.functional.softplus(delta + delta_bias[:, None]) if delta_softplus else delta + delta_bias[:, None]
    # (batch, dim, L, N)
    decay = torch.exp(delta[..., None] * A[:, None])
    drive = (delta * u)[..., None] * B.repeat_interleave(per_group, dim=1).transpose(2, 3)
    C = C.repeat_interleave(per_group, dim=1)
    state = u.new_zeros(*A.shape)
    outputs = []
    for t in range(u.shape[2]):
        state = decay[:, :, t] * state + drive[:, :, t]
        outputs.append(torch.einsum("bdn,bdn->bd", state, C[..., t]))
    return torch.stack(outputs, dim=2) + D[:, None] * u


def make_inputs(case: dict[str, int], device: str, requires_grad: bool) -> list[Tensor]:
    """Seeded inputs like those of a network: A and dt as Mamba initialises them."""
    generator = torch.Generator().manual_seed(0)
    batch, dim, groups, num_states, length = (case[name] for name in ("batch", "dim", "groups", "states", "length"))

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    # A = -1 .. -N; biases whose softplus lies between 0.001 and 0.1.
    A = -torch.arange(1.0, num_states + 1).repeat(dim, 1)
    dt = torch.exp(torch.empty(dim).uniform_(-6.9, -2.3, generator=generator))
    tensors = [
        draw(batch, dim, length),
        0.5 * draw(batch, dim, length),
        A,
        draw(batch, groups, num_states, length),
        draw(batch, groups, num_states, length),
        torch.ones(dim),
        dt + torch.log(-torch.expm1(-dt)),
    ]
    return [x.to(device).requires_grad_(requires_grad) for x in tensors]


def implementation(name: str) -> Callable[..., Tensor]:
    """The function behind a name of the results: a baseline or a back end."""
    if name == "step loop":
        return step_loop
    if name == "unbind loop":
        return selective_scan_reference

    def scan(*arguments: object) -> Tensor:
        os.environ[ENVIRONMENT_VARIABLE] = name
        return selective_scan(*arguments)

    return scan


def call(name: str, mode: str, tensors: list[Tensor]) -> Callable[[], object]:
    """One call of an implementation, with or without its backward pass."""
    function = implementation(name)
    if mode == FORWARD:
        return lambda: function(*tensors, True)
    gradient = torch.ones_like(tensors[0])
    return lambda: torch.autograd.grad(function(*tensors, True), tensors, gradient)


def peak_memory(name: str, mode: str, case: dict[str, int], device: str, threads: int) -> float:
    """Peak memory in MiB of one call in a new process, beyond the inputs."""
    arguments = json.dumps({"name": name, "mode": mode, "case": case, "device": device, "threads": threads})
    command = [sys.executable, "-m", "benchmarks.scan", "--measure-memory", arguments]
    result = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    return float(result.stdout)


def measure_memory(name: str, mode: str, case: dict[str, int], device: str, threads: int) -> float:
    """What ``peak_memory`` runs."""
    torch.set_num_threads(threads)
    # A small call first: what PyTorch imports and what compiling takes is not counted.
    call(name, mode, make_inputs({**case, "length": 2}, device, mode == BOTH))()
    tensors = make_inputs(case, device, mode == BOTH)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call(name, mode, tensors)()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    # The high-water mark of the process begins at what it holds now; it counts what a call touches beyond.
    Path("/proc/self/clear_refs").write_text("5")
    before = high_water_kib()
    call(name, mode, tensors)()
    return (high_water_kib() - before) / 2**10


def high_water_kib() -> int:
    """Largest resident size of this process since it was last reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def run_case(case: dict[str, int], mode: str, device: str, threads: int, rounds: int) -> dict[str, object]:
    """Times all back ends and the baseline for one size."""
    torch.set_num_threads(threads)
    backends = [
        name
        for name, backend in BACKENDS.items()
        if backend.unavailable() is None
        and name != "reference"
        and (not backend.device_types or device in backend.device_types)
    ]
    tensors = make_inputs(case, device, mode == BOTH)
    calls = {name: call(name, mode, tensors) for name in (BASELINES[mode], *backends)}
    for name in backends:
        calls[name]()
    results = interleaved_medians(calls, rounds, device)
    baseline = results[BASELINES[mode]]["median_ms"]
    expected = implementation(BASELINES[mode])(*tensors, True)
    for name, result in results.items():
        result["speedup"] = baseline / result["median_ms"]
        result["peak_mib"] = peak_memory(name, mode, case, device, threads)
        error = (implementation(name)(*tensors, True) - expected).abs().max() / expected.abs().max()
        result["output_difference"] = error.item()
    return {"case": case, "mode": mode, "threads": threads, "baseline": BASELINES[mode], "results": results}


def table(measured: dict) -> str:
    """The results as Markdown."""
    facts = measured["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version)
    introduction = (
        f"Measured on {facts['processor']} ({facts['cores']} cores, load {facts['load_average_at_start'][0]} at the "
        f"start), device {facts['device']}, float32, Python {facts['python']}, {versions}. Medians of "
        f"{measured['rounds']} interleaved rounds; memory beyond the inputs."
    )
    lines = [
        *textwrap.wrap(introduction, 118),
        "",
        "| batch x channels, groups | L | N | threads | what | scan | ms | times faster | peak MiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for run in measured["runs"]:
        case = run["case"]
        for name, result in run["results"].items():
            is_baseline = name == run["baseline"]
            lines.append(
                f"| {case['batch']} x {case['dim']}, {case['groups']} | {case['length']} | {case['states']} "
                f"| {run['threads']} | {run['mode']} | {name if is_baseline else f'`{name}`'} "
                f"| {result['median_ms']:.{0 if result['median_ms'] >= 100 else 1}f} "
                f"| {'baseline' if is_baseline else format(result['speedup'], '.0f')} | {result['peak_mib']:.0f} |"
            )
    return "\n".join(lines)


def write_table(document: Path, measured: dict) -> None:
    """Replaces the part of the document between the markers."""
    text = document.read_text()
    if any(text.count(marker) != 1 for marker in MARKERS):
        raise SystemExit(f"{document} must hold each of these lines once: {MARKERS[0]} and {MARKERS[1]}")
    before, rest = text.split(MARKERS[0])
    after = rest.split(MARKERS[1])[1]
    document.write_text(f"{before}{MARKERS[0]}\n\n{table(measured)}\n\n{MARKERS[1]}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("-device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("-lengths", type=int, nargs="+", default=[4096], help="steps L")
    parser.add_argument("-states", type=int, nargs="+", default=[16, 1], help="states N per channel")
    parser.add_argument("-batch", type=int, default=2)
    parser.add_argument("-dim", type=int, default=768, help="channels of all groups together")
    parser.add_argument("-groups", type=int, default=4)
    parser.add_argument("-threads", type=int, nargs="+", default=[torch.get_num_threads()])
    parser.add_argument("-rounds", type=int, default=5)
    parser.add_argument("-o", type=Path, required=True, help="results file (JSON); read, not written, with --table")
    parser.add_argument("--docs", type=Path, help="document whose table is written from the results")
    parser.add_argument("--table", action="store_true", help="measure nothing, only write the table")
    arguments = parser.parse_args()
    if not arguments.table:
        measured = {
            "machine": machine_facts(arguments.device, ("torch", "numba", "mamba-ssm")),
            "rounds": arguments.rounds,
            "runs": [],
        }
        for threads in arguments.threads:
            for length in arguments.lengths:
                for states in arguments.states:
                    case = {
                        "batch": arguments.batch,
                        "dim": arguments.dim,
                        "groups": arguments.groups,
                        "states": states,
                        "length": length,
                    }
                    for mode in (FORWARD, BOTH):
                        measured["runs"].append(run_case(case, mode, arguments.device, threads, arguments.rounds))
        arguments.o.parent.mkdir(parents=True, exist_ok=True)
        arguments.o.write_text(json.dumps(measured, indent=2) + "\n")
    measured = json.loads(arguments.o.read_text())
    if arguments.docs is not None:
        write_table(arguments.docs, measured)
    print(table(measured))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure-memory"]:
        print(measure_memory(**json.loads(sys.argv[2])))
    else:
        main()
