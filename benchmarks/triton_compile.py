"""Compiles the Triton kernels of SS2D for an H100 or H200 (sm_90) without a GPU, and counts what they execute.

    python -m benchmarks.triton_compile -o benchmarks/results/triton_sm90.json --docs docs/scans.md

Registers and stack come from the assembler. Instructions are counted in the machine code: every instruction is weighted
with how often its loops run in one full chunk, and the sum divided by the state elements (pixel, direction, channel,
state) of that chunk, for each lane. Counts are not times: nothing here ran on a GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import tempfile
import textwrap
from pathlib import Path
from typing import NamedTuple

from benchmarks.machine import machine_facts

MARKERS = ("<!-- benchmarks/triton_compile.py writes from here -->", "<!-- to here -->")
CHUNK, TILE, LANES, SLOTS = 64, 8, 32, 16
CASES = [
    {"dtype": dtype, "states": states, "rank": rank, "registers": registers}
    for dtype, states, rank, registers in (
        ("fp16", 16, 6, 2),
        ("fp32", 16, 6, 2),
        ("fp16", 16, 24, 2),
        ("fp16", 1, 6, 2),
        ("fp32", 64, 6, 1),
    )
]
"""Rank 6 belongs to 192 channels (D of Swin-UMamba's first stage), rank 24 to 768."""

FORWARD = (("summarize_chunks", {"ADJOINT": 0}), ("write_outputs", {"COLUMNS": 1}))
BACKWARD = (("summarize_chunks", {"ADJOINT": 1}), ("write_gradients", {"COLUMNS": 1}))


class Loop(NamedTuple):
    """A loop of the machine code: its first and last instruction."""

    first: int
    last: int


def compile_kernel(name: str, case: dict, **options: int) -> dict[str, object]:
    """Compiles one kernel and counts.

    Returns:
        ``registers`` of a lane, ``stack_bytes`` and ``spill_instructions`` (zero without spills) and
        ``instructions_per_element``.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from nnunetv2_smallseg.ops import triton_kernels

    kernel = getattr(triton_kernels, name)
    constants = {
        "RANK": case["rank"],
        "RANKS": 1 << (case["rank"] - 1).bit_length(),
        "NUM_STATES": case["states"],
        "STATES": 1 << (case["states"] - 1).bit_length(),
        "CHUNK": CHUNK,
        "TILE": TILE,
        "SLOTS": SLOTS,
        "REGISTERS": case["registers"],
        "LANES": LANES,
        **options,
    }
    signature = {}
    for parameter in kernel.params:
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
        elif parameter.name in triton_kernels.INTEGERS:
            signature[parameter.name] = "i32"
        else:
            in_type_of_x = parameter.name in ("source", "gradient", "projected", "out")
            signature[parameter.name] = f"*{case['dtype'] if in_type_of_x else 'fp32'}"
    constants = {key: value for key, value in constants.items() if signature.get(key) == "constexpr"}
    source = ASTSource(kernel, signature, constexprs=constants)
    compiled = triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 1, "enable_fp_fusion": True}
    )
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        usage = tool("cuobjdump", "-res-usage", str(cubin))
        code = tool("nvdisasm", "-c", str(cubin))
    instructions, loops = parse(code)
    innermost = [x for x in loops if not any(x != y and x.first <= y.first and y.last <= x.last for y in loops)]
    bodies = [instructions[loop.first : loop.last + 1] for loop in innermost]
    return {
        "registers": int(re.search(r"REG:(\d+)", usage).group(1)),
        "stack_bytes": int(re.search(r"STACK:(\d+)", usage).group(1)),
        "spill_instructions": spills(instructions),
        "spill_instructions_in_loop_over_states": max(
            (spills(body) for body in bodies if has(body, "SHFL") and has(body, "MUFU")), default=0
        ),
        "instructions": len(instructions),
        "instructions_per_element": per_element(name, case, instructions, loops),
    }


def spills(instructions: list[str]) -> int:
    """Instructions that move registers to and from memory."""
    return sum(has([x], "(LDL|STL)") for x in instructions)


def has(instructions: list[str], pattern: str) -> bool:
    """Whether an operation is among the instructions."""
    return any(re.search(rf"\b{pattern}\b", x) for x in instructions)


def tool(name: str, *arguments: str) -> str:
    """Runs a CUDA tool that Triton brings."""
    import triton

    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([program, *arguments], check=True, capture_output=True, text=True).stdout


def parse(code: str) -> tuple[list[str], list[Loop]]:
    """Instructions of a disassembly, and its loops: what lies between a backward branch and its target."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in code.splitlines():
        if match := re.match(r"\s*(\.L_x_\d+):", line):
            labels[match.group(1)] = len(instructions)
        elif match := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?);", line):
            instructions.append(match.group(1))
    loops = {}
    for i, instruction in enumerate(instructions):
        match = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", instruction)
        # A branch to itself ends every kernel.
        if match and labels[match.group(1)] < i:
            loops[labels[match.group(1)]] = Loop(labels[match.group(1)], i)
    return instructions, sorted(loops.values())


def trips(name: str, case: dict, loop: Loop, instructions: list[str], loops: list[Loop]) -> int:
    """How often a loop runs in a full chunk of one block of channels and one direction, inside the loops around it."""

    def count(pattern: str) -> int:
        return sum(bool(re.search(rf"\b{pattern}\b", x)) for x in instructions[loop.first : loop.last + 1])

    inner = [other for other in loops if loop.first <= other.first and other.last <= loop.last and other != loop]
    depth = sum(other.first <= loop.first and loop.last <= other.last and other != loop for other in loops)
    if name != "write_gradients":
        return CHUNK if not inner else 1
    # Around everything: directions and blocks of channels.
    if depth < 2:
        return 1
    if inner or (depth == 2 and case["states"] == 1 and count("SHFL")):
        return CHUNK // TILE
    if count("SHFL"):
        return case["states"] if count("MUFU") else case["rank"]
    if count("MUFU"):
        return TILE
    return max(1, round(case["rank"] * TILE * case["registers"] / count("FFMA")))


def per_element(name: str, case: dict, instructions: list[str], loops: list[Loop]) -> float:
    """Instructions of a lane for each state element in the loops of a full chunk."""
    runs = {loop: trips(name, case, loop, instructions, loops) for loop in loops}
    total = 0
    for i in range(len(instructions)):
        around = [loop for loop in loops if loop.first <= i <= loop.last]
        # What is outside of all loops runs once in a program, which also serves other directions or blocks.
        total += math.prod(runs[loop] for loop in around) if around else 0
    return total / (CHUNK * case["registers"] * case["states"])


def measure(case: dict) -> dict:
    """Both passes of one case."""
    result: dict[str, object] = {"case": case}
    for name, kernels in (("forward", FORWARD), ("backward", BACKWARD)):
        counted = {kernel: compile_kernel(kernel, case, **options) for kernel, options in kernels}
        result[name] = {
            "kernels": counted,
            "registers": max(x["registers"] for x in counted.values()),
            "stack_bytes": max(x["stack_bytes"] for x in counted.values()),
            "instructions_per_element": sum(x["instructions_per_element"] for x in counted.values()),
        }
    result["bytes_per_pixel_and_channel"] = forward_bytes(case)
    return result


def forward_bytes(case: dict, channels: int = 192) -> float:
    """Memory traffic of the forward pass without kept states, by calculation, in bytes per pixel and channel.

    Counted: x in every pass and pair of directions, the features, the states of chunks, and the sums in float32. What a
    program reads twice in a row, and what neighbouring blocks of channels share, is taken to come from the cache.
    """
    size = 2 if case["dtype"] == "fp16" else 4
    features = 4 * (case["rank"] + 2 * case["states"])
    x = 2 * 2 * size
    # Written by the matrix product, read by both passes.
    projected = 3 * features * size / channels
    # Written, carried (read and written) and read.
    states = 4 * 4 * case["states"] * 4 / 256
    sums = 4 + 4 + size
    # The matrix product reads x once.
    return size + x + projected + states + sums


def table(measured: dict) -> str:
    """The results as Markdown."""
    versions = measured["machine"]["versions"]
    lines = [
        *textwrap.wrap(
            f"Compiled for sm_90 with Triton {versions['triton']}; not run on a GPU. Instructions are those of a lane "
            "for each pixel, direction, channel and state, over all kernels of a pass; bytes are those of the forward "
            "pass at 192 channels without kept states, by calculation.",
            118,
        ),
        "",
        "| type of x | N | rank | pass | registers | stack bytes | instructions / element | bytes / (pixel, channel) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in measured["results"]:
        case = result["case"]
        for name in ("forward", "backward"):
            counted = result[name]
            traffic = f"{result['bytes_per_pixel_and_channel']:.0f}" if name == "forward" else "-"
            lines.append(
                f"| {case['dtype']} | {case['states']} | {case['rank']} | {name} | {counted['registers']} | "
                f"{counted['stack_bytes']} | {counted['instructions_per_element']:.1f} | {traffic} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", type=Path, required=True, help="results file to write (JSON)")
    parser.add_argument("--docs", type=Path, help="Markdown file whose marked section takes the table")
    arguments = parser.parse_args()
    facts = machine_facts("cpu", ("torch", "triton"))
    measured = {
        "machine": {"target": "sm_90", "python": facts["python"], "versions": facts["versions"]},
        "chunk": CHUNK,
        "tile": TILE,
        "results": [measure(case) for case in CASES],
    }
    arguments.o.write_text(json.dumps(measured, indent=1) + "\n")
    if arguments.docs is not None:
        text = arguments.docs.read_text()
        before, rest = text.split(MARKERS[0], 1)
        after = rest.split(MARKERS[1], 1)[1]
        arguments.docs.write_text(f"{before}{MARKERS[0]}\n\n{table(measured)}\n\n{MARKERS[1]}{after}")


if __name__ == "__main__":
    main()
