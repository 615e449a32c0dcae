"""Times the back ends of the selective scan and of SS2D against plain loops, in interleaved rounds of one run.

    python -m benchmarks.scan -operators selective_scan -o benchmarks/results/scan_cpu.json --docs docs/scans.md
    python -m benchmarks.scan -operators ss2d -o benchmarks/results/ss2d_cpu.json --docs docs/scans.md

Two baselines. Forward: ``step loop``, the algorithm of mamba-ssm's ``selective_scan_ref`` (decays and inputs of all
steps first, then one indexed step after the other). Its backward pass is quadratic in L, since autograd fills a
full-size gradient for every indexed step, so forward and backward together are compared with ``unbind loop``, the
package's own differentiated reference, which splits the steps once.

SS2D is timed whole: the baselines with the sequences of the four directions written out, projected, scanned and summed.
``unfused cpu`` is the same around the scan of the back end ``cpu``, and ``mambapy`` around that of mambapy (if
installed).

Peak memory is that of one call in a process of its own, beyond what the inputs take.
"""

from __future__ import annotations

import argparse
import importlib.util
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
from nnunetv2_smallseg.ops import (
    BACKENDS,
    ENVIRONMENT_VARIABLE,
    selective_scan,
    selective_scan_reference,
    ss2d,
    ss2d_reference,
)
from nnunetv2_smallseg.ops.ss2d_arguments import NUM_DIRECTIONS, SS2DInputs
from nnunetv2_smallseg.ops.ss2d_composed import composed_of

Case = dict[str, int | str]

SCAN, SS2D = "selective_scan", "ss2d"
FORWARD, BOTH = "forward", "forward+backward"
BASELINES = {FORWARD: "step loop", BOTH: "unbind loop"}
UNFUSED = "unfused cpu"


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


def mambapy_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor, delta_softplus: bool
) -> Tensor:
    """The scan with mambapy's parallel scan, as its Mamba block calls it; sequences of (batch, L, dim, N)."""
    from mambapy.pscan import pscan

    per_group = u.shape[1] // B.shape[1]
    delta = torch.nn.functional.softplus(delta + delta_bias[:, None]) if delta_softplus else delta + delta_bias[:, None]
    B, C = (x.repeat_interleave(per_group, dim=1).permute(0, 3, 1, 2) for x in (B, C))
    delta, inputs = delta.transpose(1, 2), u.transpose(1, 2)
    states = pscan(torch.exp(delta[..., None] * A), (delta * inputs)[..., None] * B)
    return (states * C).sum(-1).transpose(1, 2) + D[:, None] * u


def make_inputs(case: Case, device: str, requires_grad: bool) -> list[Tensor]:
    """Seeded inputs like those of a network: A and dt as Mamba initialises them."""
    make = make_scan_inputs if case["operator"] == SCAN else make_ss2d_inputs
    return [x.to(device).requires_grad_(requires_grad) for x in make(case, torch.Generator().manual_seed(0))]


def make_scan_inputs(case: Case, generator: torch.Generator) -> list[Tensor]:
    """The tensors of ``selective_scan``."""
    batch, dim, groups, num_states, length = (case[name] for name in ("batch", "dim", "groups", "states", "length"))

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return [
        draw(batch, dim, length),
        0.5 * draw(batch, dim, length),
        -initial_rates(dim, num_states),
        draw(batch, groups, num_states, length),
        draw(batch, groups, num_states, length),
        torch.ones(dim),
        initial_bias(generator, dim),
    ]


def make_ss2d_inputs(case: Case, generator: torch.Generator) -> list[Tensor]:
    """The tensors of ``ss2d``; the rank is that of a block of half the channels."""
    batch, side, channels, num_states = (case[name] for name in ("batch", "side", "channels", "states"))
    rank = -(-channels // 32)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return [
        draw(batch, side, side, channels),
        channels**-0.5 * draw(NUM_DIRECTIONS, rank + 2 * num_states, channels),
        rank**-0.5 * draw(NUM_DIRECTIONS, channels, rank),
        initial_bias(generator, NUM_DIRECTIONS, channels),
        initial_rates(NUM_DIRECTIONS * channels, num_states).log(),
        torch.ones(NUM_DIRECTIONS * channels),
    ]


def initial_rates(dim: int, num_states: int) -> Tensor:
    """-A = 1 .. N in every channel."""
    return torch.arange(1.0, num_states + 1).repeat(dim, 1)


def initial_bias(generator: torch.Generator, *shape: int) -> Tensor:
    """Biases whose softplus lies between 0.001 and 0.1."""
    dt = torch.exp(torch.empty(*shape).uniform_(-6.9, -2.3, generator=generator))
    return dt + torch.log(-torch.expm1(-dt))


def implementation(operator: str, name: str) -> Callable[..., Tensor]:
    """The function behind a name of the results: a baseline or a back end. It takes the tensors of the operator."""
    if name in BACKENDS:
        function = selective_scan if operator == SCAN else ss2d
    elif name == "unbind loop":
        function = selective_scan_reference if operator == SCAN else ss2d_reference
    else:
        scan = {"step loop": step_loop, "mambapy": mambapy_scan, UNFUSED: selective_scan}[name]
        function = scan if operator == SCAN else lambda *tensors: composed_of(scan, SS2DInputs(*tensors))

    def run(*tensors: Tensor) -> Tensor:
        os.environ[ENVIRONMENT_VARIABLE] = name if name in BACKENDS else "cpu" if name == UNFUSED else "auto"
        return function(*tensors, True) if operator == SCAN else function(*tensors)

    return run


def names_to_time(operator: str, mode: str, device: str) -> list[str]:
    """What is timed, the baseline first."""
    backends = [
        name
        for name, backend in BACKENDS.items()
        if backend.unavailable() is None
        and name != "reference"
        and (operator == SS2D or backend.module is not None)
        and (not backend.device_types or device in backend.device_types)
    ]
    names = [BASELINES[mode], *backends]
    if operator == SS2D:
        names += [UNFUSED] if "cpu" in backends else []
        names += [BASELINES[BOTH]] if mode == FORWARD else []
        names += ["mambapy"] if importlib.util.find_spec("mambapy") else []
    return names


def call(operator: str, name: str, mode: str, tensors: list[Tensor]) -> Callable[[], object]:
    """One call of an implementation, with or without its backward pass."""
    function = implementation(operator, name)
    if mode == FORWARD:
        return lambda: function(*tensors)
    gradient = torch.ones_like(tensors[0])
    return lambda: torch.autograd.grad(function(*tensors), tensors, gradient)


def peak_memory(name: str, mode: str, case: Case, device: str, threads: int) -> float:
    """Peak memory in MiB of one call in a new process, beyond the inputs."""
    arguments = json.dumps({"name": name, "mode": mode, "case": case, "device": device, "threads": threads})
    command = [sys.executable, "-m", "benchmarks.scan", "--measure-memory", arguments]
    result = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    return float(result.stdout)


def measure_memory(name: str, mode: str, case: Case, device: str, threads: int) -> float:
    """What ``peak_memory`` runs."""
    torch.set_num_threads(threads)
    # A small call first: what PyTorch imports and what compiling takes is not counted.
    operator = case["operator"]
    call(operator, name, mode, make_inputs({**case, "length": 2, "side": 2}, device, mode == BOTH))()
    tensors = make_inputs(case, device, mode == BOTH)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call(operator, name, mode, tensors)()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    # The high-water mark of the process begins at what it holds now; it counts what a call touches beyond.
    Path("/proc/self/clear_refs").write_text("5")
    before = high_water_kib()
    call(operator, name, mode, tensors)()
    return (high_water_kib() - before) / 2**10


def high_water_kib() -> int:
    """Largest resident size of this process since it was last reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def run_case(case: Case, mode: str, device: str, threads: int, rounds: int) -> dict[str, object]:
    """Times all back ends and the baselines for one size."""
    torch.set_num_threads(threads)
    operator, baseline = case["operator"], BASELINES[mode]
    names = names_to_time(operator, mode, device)
    tensors = make_inputs(case, device, mode == BOTH)
    calls = {name: call(operator, name, mode, tensors) for name in names}
    for name in names:
        if name in BACKENDS or name == UNFUSED:
            calls[name]()
    results = interleaved_medians(calls, rounds, device)
    with torch.no_grad():
        expected = implementation(operator, baseline)(*tensors)
        for name, result in results.items():
            result["speedup"] = results[baseline]["median_ms"] / result["median_ms"]
            if UNFUSED in results:
                result["speedup_over_unfused"] = results[UNFUSED]["median_ms"] / result["median_ms"]
            result["peak_mib"] = peak_memory(name, mode, case, device, threads)
            error = (implementation(operator, name)(*tensors) - expected).abs().max() / expected.abs().max()
            result["output_difference"] = error.item()
    return {"case": case, "mode": mode, "threads": threads, "baseline": baseline, "results": results}


def tables(measured: dict) -> str:
    """The results as Markdown, a table for each operator."""
    facts = measured["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version)
    introduction = (
        f"Measured on {facts['processor']} ({facts['cores']} cores, load {facts['load_average_at_start'][0]} at the "
        f"start), device {facts['device']}, float32, Python {facts['python']}, {versions}. Medians of "
        f"{measured['rounds']} interleaved rounds; memory beyond the inputs."
    )
    lines = textwrap.wrap(introduction, 118)
    heads = {
        SCAN: "| batch x channels, groups | L | N | threads | what | scan | ms | times faster | peak MiB |",
        SS2D: "| batch x map x channels | N | threads | what | SS2D | ms | times faster | than unfused | peak MiB |",
    }
    for operator, head in heads.items():
        runs = [run for run in measured["runs"] if run["case"]["operator"] == operator]
        if runs:
            lines += ["", head, "|---" * 9 + "|"]
            lines += [row(run, name) for run in runs for name in run["results"]]
    return "\n".join(lines)


def row(run: dict, name: str) -> str:
    """One line of a table."""
    case, result = run["case"], run["results"][name]
    if case["operator"] == SCAN:
        size = f"{case['batch']} x {case['dim']}, {case['groups']} | {case['length']}"
    else:
        size = f"{case['batch']} x {case['side']} x {case['side']} x {case['channels']}"
    cells = [
        size,
        case["states"],
        run["threads"],
        run["mode"],
        f"`{name}`" if name in BACKENDS else name,
        f"{result['median_ms']:.{0 if result['median_ms'] >= 100 else 1}f}",
        "baseline" if name == run["baseline"] else ratio(result["speedup"]),
    ]
    if case["operator"] == SS2D:
        cells.append(ratio(result["speedup_over_unfused"]) if "speedup_over_unfused" in result else "")
    return f"| {' | '.join(map(str, cells))} | {result['peak_mib']:.0f} |"


def ratio(value: float) -> str:
    """A ratio with two or more digits."""
    return f"{value:.{0 if value >= 10 else 1 if value >= 1 else 2}f}"


def write_table(document: Path, measured: dict, name: str) -> None:
    """Replaces the part of the document between the markers of the results file called ``name``."""
    start, end = f"<!-- benchmarks/scan.py writes {name} from here -->", f"<!-- end of {name} -->"
    text = document.read_text()
    if text.count(start) != 1 or text.count(end) != 1:
        raise SystemExit(f"{document} must hold each of these lines once: {start} and {end}")
    before, rest = text.split(start)
    after = rest.split(end)[1]
    document.write_text(f"{before}{start}\n\n{tables(measured)}\n\n{end}{after}")


def cases(arguments: argparse.Namespace) -> list[Case]:
    """All sizes to time."""
    scans = [
        {
            "operator": SCAN,
            "batch": arguments.batch,
            "dim": arguments.dim,
            "groups": arguments.groups,
            "states": states,
            "length": length,
        }
        for length in arguments.lengths
        for states in arguments.states
    ]
    maps = [
        {
            "operator": SS2D,
            "batch": arguments.batch,
            "channels": arguments.channels,
            "states": states,
            "side": side,
        }
        for side in arguments.sides
        for states in arguments.states
    ]
    return [case for case in (*scans, *maps) if case["operator"] in arguments.operators]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("-device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("-operators", choices=(SCAN, SS2D), nargs="+", default=[SCAN, SS2D])
    parser.add_argument("-lengths", type=int, nargs="+", default=[4096], help="steps L of the scan")
    parser.add_argument("-sides", type=int, nargs="+", default=[64], help="height and width of the map of SS2D")
    parser.add_argument("-states", type=int, nargs="+", default=[16, 1], help="states N per channel")
    parser.add_argument("-batch", type=int, default=2)
    parser.add_argument("-dim", type=int, default=768, help="channels of all groups of the scan together")
    parser.add_argument("-groups", type=int, default=4)
    parser.add_argument("-channels", type=int, default=192, help="channels of the map of SS2D")
    parser.add_argument("-threads", type=int, nargs="+", default=[torch.get_num_threads()])
    parser.add_argument("-rounds", type=int, default=5)
    parser.add_argument("-o", type=Path, required=True, help="results file (JSON); read, not written, with --table")
    parser.add_argument("--docs", type=Path, help="document whose tables are written from the results")
    parser.add_argument("--table", action="store_true", help="measure nothing, only write the tables")
    arguments = parser.parse_args()
    if not arguments.table:
        measured = {
            "machine": machine_facts(arguments.device, ("torch", "triton", "numba", "mamba-ssm", "mambapy")),
            "rounds": arguments.rounds,
            "runs": [
                run_case(case, mode, arguments.device, threads, arguments.rounds)
                for threads in arguments.threads
                for case in cases(arguments)
                for mode in (FORWARD, BOTH)
            ],
        }
        arguments.o.parent.mkdir(parents=True, exist_ok=True)
        arguments.o.write_text(json.dumps(measured, indent=2) + "\n")
    measured = json.loads(arguments.o.read_text())
    if arguments.docs is not None:
        write_table(arguments.docs, measured, arguments.o.name)
    print(tables(measured))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure-memory"]:
        print(measure_memory(**json.loads(sys.argv[2])))
    else:
        main()
