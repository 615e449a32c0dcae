"""Times the whole of SwinUMamba against itself without its scans and against nnU-Net's own network.

    python -m benchmarks.network -o benchmarks/results/network_cpu.json --docs docs/scans.md

On the CPU, in interleaved rounds of one run: inference, and a training step (forward with deep supervision, mean
squares of the outputs as loss, backward; no optimiser).

Two baselines. ``scan removed`` is SwinUMamba with ``ss2d`` replaced by a function that returns its first argument, so
all that is left of an SS2D is its convolution, gate and linear layers. ``PlainConvUNet`` is the network nnU-Net plans
for 2D patches of 256 x 256: 7 stages down to 4 x 4 with 32, 64, 128, 256 and three times 512 channels, two 3x3
convolutions a stage in encoder and decoder, instance norm, LeakyReLU.

Times are wall-clock and, because a busy machine stretches those, processor time of the process, summed over its
threads. Peak memory is that of one call in a process of its own, beyond network and input; that of a training step
includes the gradients of the parameters. The profile is of SwinUMamba with the back end ``cpu``, one call: elapsed time
of each operator without those it calls, so a busy machine stretches it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.machine import interleaved_medians, machine_facts
from benchmarks.scan import high_water_kib, ratio
from nnunetv2_smallseg.architectures.blocks import vss
from nnunetv2_smallseg.architectures.swin_umamba import SwinUMamba
from nnunetv2_smallseg.ops import ENVIRONMENT_VARIABLE

INFERENCE, TRAINING = "inference", "training step"
SCAN_REMOVED, PLAIN = "scan removed", "PlainConvUNet"
FUSED, CHUNKED = "cpu", "torch"
NAMES = (FUSED, CHUNKED, SCAN_REMOVED, PLAIN)
NUM_CLASSES = 2
PACKAGES = ("torch", "numba", "dynamic-network-architectures")
MARKERS = ("<!-- benchmarks/network.py writes from here -->", "<!-- network.py to here -->")

# Kinds of operators in the profile, by parts of their names; the first that fits counts.
KINDS = {
    "scan": ("ss2d",),
    "convolutions": ("conv",),
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm"),
    "norms": ("batch_norm", "instance_norm", "layer_norm"),
    "copies": ("aten::copy_", "aten::cat"),
    "activations, sums": ("leaky_relu", "silu", "aten::add", "aten::mul"),
}
REST = "rest"


def plain_unet() -> nn.Module:
    """nnU-Net's network for 2D patches of 256 x 256."""
    stages = 7
    return PlainConvUNet(
        input_channels=1,
        n_stages=stages,
        features_per_stage=[min(512, 32 * 2**stage) for stage in range(stages)],
        conv_op=nn.Conv2d,
        kernel_sizes=3,
        strides=[1] + [2] * (stages - 1),
        n_conv_per_stage=2,
        num_classes=NUM_CLASSES,
        n_conv_per_stage_decoder=2,
        conv_bias=True,
        norm_op=nn.InstanceNorm2d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        deep_supervision=True,
    )


@contextmanager
def scans_as(name: str) -> Iterator[None]:
    """Runs the scans of SwinUMamba with the back end ``name``, or removes them."""
    backend = name if name in (FUSED, CHUNKED) else "auto"
    with mock.patch.dict(os.environ, {ENVIRONMENT_VARIABLE: backend}):
        if name == SCAN_REMOVED:
            with mock.patch.object(vss, "ss2d", lambda x, *_: x):
                yield
        else:
            yield


def call(name: str, mode: str, network: nn.Module, image: Tensor) -> Callable[[], None]:
    """One inference or training step."""

    def run() -> None:
        training = mode == TRAINING
        network.train(training)
        if isinstance(network, SwinUMamba):
            network.deep_supervision = training
        else:
            network.decoder.deep_supervision = training
        with scans_as(name), torch.set_grad_enabled(training):
            outputs = network(image)
            if training:
                sum(output.square().mean() for output in outputs).backward()
        network.zero_grad(set_to_none=True)

    return run


def make_network(name: str) -> nn.Module:
    """The network behind a name of the results, with seeded weights."""
    torch.manual_seed(0)
    return plain_unet() if name == PLAIN else SwinUMamba(1, NUM_CLASSES)


def make_image(batch: int, side: int) -> Tensor:
    """A seeded image (B, 1, side, side)."""
    return torch.randn(batch, 1, side, side, generator=torch.Generator().manual_seed(0))


def measure_memory(name: str, mode: str, batch: int, side: int, threads: int) -> float:
    """Peak memory in MiB of one call in this process, beyond network and input."""
    torch.set_num_threads(threads)
    network, image = make_network(name), make_image(batch, side)
    # A small call first: what PyTorch imports and what compiling takes is not counted.
    call(name, mode, network, make_image(1, 128))()
    Path("/proc/self/clear_refs").write_text("5")
    before = high_water_kib()
    call(name, mode, network, image)()
    return (high_water_kib() - before) / 2**10


def peak_memory(**arguments: str | int) -> float:
    """``measure_memory`` in a new process."""
    command = [sys.executable, "-m", "benchmarks.network", "--measure-memory", json.dumps(arguments)]
    result = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    return float(result.stdout)


def operator_times(run: Callable[[], None]) -> dict[str, float]:
    """Elapsed milliseconds by kind of operator in one call."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    times = dict.fromkeys((*KINDS, REST), 0.0)
    for event in profiler.key_averages():
        kind = next((kind for kind, parts in KINDS.items() if any(part in event.key for part in parts)), REST)
        times[kind] += event.self_cpu_time_total / 1000
    return times


def run_mode(mode: str, threads: int, arguments: argparse.Namespace) -> dict[str, object]:
    """Times all networks in one mode and profiles the first."""
    torch.set_num_threads(threads)
    networks = {name: make_network(PLAIN if name == PLAIN else FUSED) for name in (FUSED, PLAIN)}
    image = make_image(arguments.batch, arguments.side)
    calls = {name: call(name, mode, networks[PLAIN if name == PLAIN else FUSED], image) for name in NAMES}
    for run in calls.values():
        run()
    results = interleaved_medians(calls, arguments.rounds)
    for name, result in results.items():
        for baseline in (SCAN_REMOVED, PLAIN):
            for time in ("median_ms", "median_cpu_ms"):
                result[f"{time}_over_{baseline}"] = result[time] / results[baseline][time]
        result["peak_mib"] = peak_memory(
            name=name, mode=mode, batch=arguments.batch, side=arguments.side, threads=threads
        )
    return {"mode": mode, "threads": threads, "results": results, "profile_ms": operator_times(calls[FUSED])}


def tables(measured: dict, before: dict | None) -> str:
    """The results as Markdown: times, then the profile, beside an earlier one if there is one."""
    lines = [*textwrap.wrap(introduction(measured), 118), ""]
    lines += [
        "| threads | what | network | ms | processor ms | / scan removed | / PlainConvUNet | peak MiB |",
        "|---" * 8 + "|",
    ]
    lines += [row(run, name, result) for run in measured["runs"] for name, result in run["results"].items()]
    if before is None:
        return "\n".join(lines)
    earlier = {(run["mode"], run["threads"]): run for run in before["runs"]}
    pairs = [(run, earlier[run["mode"], run["threads"]]) for run in measured["runs"]]
    lines += ["", "Before the layout was kept (`functional.instance_norm` everywhere):", ""]
    lines += ["| threads | what | | processor ms | / scan removed | / PlainConvUNet | peak MiB |", "|---" * 7 + "|"]
    for after_run, before_run in pairs:
        for label, run in (("before", before_run), ("after", after_run)):
            result = run["results"][FUSED]
            cells = [run["threads"], run["mode"], label, f"{result['median_cpu_ms']:.0f}"]
            cells += [f"{result[f'median_cpu_ms_over_{baseline}']:.2f}" for baseline in (SCAN_REMOVED, PLAIN)]
            lines.append(f"| {' | '.join(map(str, cells))} | {result['peak_mib']:.0f} |")
    lines += ["", "Where the time goes, in percent of the operators' time of one call:", ""]
    lines += [f"| threads | what | | {' | '.join((*KINDS, REST))} |", "|---" * (len(KINDS) + 4) + "|"]
    for after_run, before_run in pairs:
        for label, run in (("before", before_run), ("after", after_run)):
            total = sum(run["profile_ms"].values())
            shares = [f"{100 * run['profile_ms'][kind] / total:.0f}" for kind in (*KINDS, REST)]
            lines.append(f"| {run['threads']} | {run['mode']} | {label} | {' | '.join(shares)} |")
    return "\n".join(lines)


def introduction(measured: dict) -> str:
    """Where and how it was measured."""
    facts = measured["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version)
    return (
        f"Batch {measured['batch']}, one channel, {measured['side']} x {measured['side']}, float32. Measured on "
        f"{facts['processor']} ({facts['cores']} cores, load {facts['load_average_at_start'][0]} at the start), device "
        f"{facts['device']}, Python {facts['python']}, {versions}. Medians of {measured['rounds']} interleaved rounds; "
        "ratios are those of wall-clock time, and of processor time in brackets."
    )


def row(run: dict, name: str, result: dict) -> str:
    """One line of the table of times."""
    cells = [
        run["threads"],
        run["mode"],
        name if name in (SCAN_REMOVED, PLAIN) else f"SwinUMamba, `{name}`",
        f"{result['median_ms']:.0f}",
        f"{result['median_cpu_ms']:.0f}",
    ]
    for baseline in (SCAN_REMOVED, PLAIN):
        wall, processor = (result[f"{time}_over_{baseline}"] for time in ("median_ms", "median_cpu_ms"))
        cells.append("baseline" if name == baseline else f"{ratio_text(wall)} ({ratio_text(processor)})")
    return f"| {' | '.join(map(str, cells))} | {result['peak_mib']:.0f} |"


def ratio_text(value: float) -> str:
    """Two digits after the point below 10."""
    return f"{value:.2f}" if value < 10 else ratio(value)


def write_table(document: Path, table: str) -> None:
    """Replaces the part of the document between the markers."""
    text = document.read_text()
    if any(text.count(marker) != 1 for marker in MARKERS):
        raise SystemExit(f"{document} must hold each of these lines once: {MARKERS[0]} and {MARKERS[1]}")
    before, rest = text.split(MARKERS[0])
    document.write_text(f"{before}{MARKERS[0]}\n\n{table}\n\n{MARKERS[1]}{rest.split(MARKERS[1])[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("-batch", type=int, default=1)
    parser.add_argument("-side", type=int, default=256, help="height and width of the image, at least 128")
    parser.add_argument("-threads", type=int, nargs="+", default=[torch.get_num_threads()])
    parser.add_argument("-rounds", type=int, default=5)
    parser.add_argument("-modes", choices=(INFERENCE, TRAINING), nargs="+", default=[INFERENCE, TRAINING])
    parser.add_argument("-o", type=Path, required=True, help="results file (JSON); read, not written, with --table")
    parser.add_argument("-before", type=Path, help="earlier results, shown beside the new ones")
    parser.add_argument("--docs", type=Path, help="document whose tables are written from the results")
    parser.add_argument("--table", action="store_true", help="measure nothing, only write the tables")
    arguments = parser.parse_args()
    if not arguments.table:
        measured = {
            "machine": machine_facts("cpu", PACKAGES),
            "batch": arguments.batch,
            "side": arguments.side,
            "rounds": arguments.rounds,
            "runs": [run_mode(mode, threads, arguments) for threads in arguments.threads for mode in arguments.modes],
        }
        arguments.o.parent.mkdir(parents=True, exist_ok=True)
        arguments.o.write_text(json.dumps(measured, indent=2) + "\n")
    before = None if arguments.before is None else json.loads(arguments.before.read_text())
    table = tables(json.loads(arguments.o.read_text()), before)
    if arguments.docs is not None:
        write_table(arguments.docs, table)
    print(table)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure-memory"]:
        print(measure_memory(**json.loads(sys.argv[2])))
    else:
        main()
