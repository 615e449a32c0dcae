"""The fused SS2D on CUDA, without a GPU: in Triton's interpreter, and as machine code that is counted."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import types
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import triton_cases

from benchmarks import gpu
from nnunetv2_smallseg.doctor import version_numbers
from nnunetv2_smallseg.ops import backend_triton

ROOT = Path(__file__).resolve().parent.parent
HAS_TRITON = importlib.util.find_spec("triton") is not None
TOLERANCES = {"float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")

# The interpreter takes about a tenth of a second for a pixel: small maps, in short chunks of short tiles. Between them
# they have rows and columns that end inside a chunk and inside a tile, one row, one column, channels that do not fill a
# warp, need two blocks, and come two to a lane, and numbers of states that are no power of two.
GROUPS = {
    "chunks": [
        {"shape": [1, 5, 9, 5], "states": 3, "rank": 2, "dtype": "float32"},
        {"shape": [1, 5, 9, 5], "states": 3, "rank": 2, "dtype": "float32", "chunk": 8, "keep_states": False},
    ],
    "one row or column": [
        {"shape": [2, 1, 7, 40], "states": 1, "rank": 1, "dtype": "float32", "tile": 8},
        {"shape": [1, 3, 1, 3], "states": 2, "rank": 1, "dtype": "float32", "chunk": 4},
    ],
    "half precision": [
        {"shape": [1, 33, 2, 6], "states": 1, "rank": 2, "dtype": "float16", "chunk": 64, "tile": 8},
        {"shape": [1, 3, 4, 64], "states": 3, "rank": 3, "dtype": "bfloat16", "chunk": 8},
    ],
    "many states": [
        {"shape": [1, 3, 2, 5], "states": 16, "rank": 2, "dtype": "float32", "chunk": 4, "tile": 2},
        {"shape": [1, 1, 2, 3], "states": 64, "rank": 1, "dtype": "float32", "chunk": 1, "tile": 1},
    ],
}


def run_python(*arguments, **environment):
    """Runs Python in a new process that finds this package and the modules of the tests."""
    paths = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH"))))
    settings = {**os.environ, "PYTHONPATH": paths, **environment}
    return subprocess.run([sys.executable, *arguments], env=settings, capture_output=True, text=True, timeout=600)


@needs_triton
@pytest.mark.parametrize("group", GROUPS)
def test_interpreted(group):
    """Output and all gradients against the reference in float64."""
    cases = GROUPS[group]
    result = run_python(triton_cases.__file__, json.dumps(cases), TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    answers = json.loads(result.stdout)
    assert len(answers) == len(cases)
    for case, errors in zip(cases, answers, strict=True):
        assert ("x" in errors) == case.get("keep_states", True)
        for name, error in errors.items():
            assert error < TOLERANCES[case["dtype"]], (case, name, error)


@pytest.mark.parametrize(("height", "length"), [(2, 2), (3, 10000), (7, 4096), (1000, 1_000_000), (1289, 1289**2)])
def test_division_by_multiplication(height, length):
    """Exact below the bound that ``unsupported`` asks for."""
    magic = backend_triton._magic_number(height)
    assert length * (magic * height - 2**31) < 2**31
    position = torch.arange(length, dtype=torch.int64)
    assert torch.equal((2 * position * magic) >> 32, position // height)
    assert magic < 2**31


# What is missing, and what to do


def fake_inputs(device="cuda", dtype=torch.float16, shape=(2, 8, 8, 64), states=16, rank=4):
    """Inputs on a device that this machine may not have."""
    tensor = types.SimpleNamespace(device=torch.device(device), dtype=dtype, shape=shape)
    weight = types.SimpleNamespace(dtype=dtype, shape=(4, rank + 2 * states, shape[3]))

    class Inputs(tuple):
        x, x_proj_weight, num_states, rank = tensor, weight, None, None

    inputs = Inputs((tensor, weight))
    inputs.num_states, inputs.rank = states, rank
    return inputs


@needs_triton
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"dtype": torch.bfloat16, "states": 64, "rank": 128}, None),
        ({"device": "cpu"}, "the tensors are on cpu"),
        ({"dtype": torch.float64}, "a tensor is torch.float64"),
        ({"states": 65}, "N is 65, and the kernels allow at most 64"),
        ({"rank": 129}, "rank of the step sizes is 129"),
        ({"shape": (1, 8192, 8192, 64)}, "too large"),
        ({"shape": (20000, 8, 8, 64)}, "too large"),
    ],
)
def test_unsupported(monkeypatch, changes, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    answer = backend_triton.unsupported(fake_inputs(**changes))
    assert answer is None if reason is None else reason in answer


@needs_triton
def test_old_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "compute capability 7.5, and Triton needs at least 8.0" in backend_triton.unsupported(fake_inputs())


@pytest.fixture
def availability(monkeypatch):
    """``unavailable`` on a machine with everything, to take things away from."""
    if not HAS_TRITON:
        pytest.skip("Triton is not installed")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backend_triton.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(backend_triton.Path, "is_file", lambda path: True)
    monkeypatch.delenv("CC", raising=False)
    return backend_triton.unavailable.__wrapped__


def test_available(availability):
    assert availability() is None


def test_without_triton(availability, monkeypatch):
    monkeypatch.setattr(backend_triton.importlib.util, "find_spec", lambda name: None)
    assert "Triton is not installed" in availability()


def test_without_gpu(availability, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA GPU" in availability()
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in availability()


def test_without_compiler(availability, monkeypatch):
    monkeypatch.setattr(backend_triton.shutil, "which", lambda name: None)
    assert "needs a C compiler" in availability()
    monkeypatch.setenv("CC", "/opt/cc")
    assert availability() is None
    monkeypatch.setattr(backend_triton.Path, "is_file", lambda path: False)
    assert "install python3-dev" in availability()


def test_import_is_light():
    """Neither Triton nor nnU-Net is imported with the operators, and no nnU-Net with the program for a GPU."""
    script = "import sys, {}; print(sorted({{'triton', 'numba', 'nnunetv2'}} & set(sys.modules)))"
    for module in ("nnunetv2_smallseg.ops.backend_triton", "benchmarks.gpu"):
        result = run_python("-c", script.format(module))
        assert result.returncode == 0, result.stderr
        assert result.stdout.strip() == "[]"


# Machine code


@needs_triton
def test_compiled_for_sm_90():
    """Forward kernels keep everything in registers; the counts of docs/scans.md have not grown by more than a tenth."""
    pytest.importorskip("triton.backends.nvidia")
    from benchmarks import triton_compile

    recorded = json.loads((ROOT / "benchmarks" / "results" / "triton_sm90.json").read_text())
    case = {"dtype": "fp16", "states": 16, "rank": 6, "registers": 2}
    (expected,) = [result for result in recorded["results"] if result["case"] == case]
    measured = triton_compile.measure(case)
    assert measured["forward"]["stack_bytes"] == 0
    if version_numbers(version("triton")) < version_numbers(recorded["machine"]["versions"]["triton"]):
        return  # older versions of Triton need more instructions, docs/scans.md
    for name in ("forward", "backward"):
        for count in ("instructions_per_element", "stack_bytes"):
            assert measured[name][count] <= 1.1 * expected[name][count]


LAUNCH_SCRIPT = """
import json
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
import triton_cases
from nnunetv2_smallseg.ops import backend_triton, triton_kernels

class Driver:
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)
    get_current_device = lambda self: 0
    get_current_stream = lambda self, device: 0

driver.set_active(Driver())
launches = []

def launch(call, name, grid, *arguments, **sizes):
    kernel = getattr(triton_kernels, name).warmup(*arguments, grid=grid, **sizes, **backend_triton._LAUNCH)
    launches.append((name, grid, kernel.metadata.num_warps, "divisibility" in kernel.asm["ttir"]))

backend_triton._Call.launch = launch
inputs = triton_cases.make_inputs((2, 11, 12, 40), 2, 1, torch.float16)
out, states = backend_triton.ss2d_forward(inputs, True)
backend_triton.ss2d_backward(inputs, states, out)
print(json.dumps(launches))
"""


@needs_triton
def test_launches_as_on_a_gpu():
    """What the host side launches compiles as on an H100, which a stand-in for the driver reports; nothing runs."""
    pytest.importorskip("triton.backends.nvidia")
    result = run_python("-c", LAUNCH_SCRIPT)
    assert result.returncode == 0, result.stderr
    # 132 pixels are three chunks, 40 channels two blocks. No argument is told to be aligned: see ``_kernel``.
    rows_and_columns = [["write_outputs", [3, 2, 2], 1, False]] * 2
    carried = [["summarize_chunks", [2, 2, 8], 1, False], ["carry_states", [3, 8], 1, False]]
    gradients = [["write_gradients", [3, 2, 2], 1, False]] * 2
    assert json.loads(result.stdout) == [*carried, *rows_and_columns, *carried, *gradients]


# The program for a GPU, on the CPU


def test_gpu_benchmark_checks_every_path(tmp_path):
    """A section runs in a process of its own, on tiny maps; without Triton, only the composed path is there."""
    section = gpu.start_section("correctness", True, tmp_path / "gpu.json", 600)
    assert "failure" not in section
    results = section["results"]
    assert {result["path"] for result in results} >= ({"torch", "triton"} if HAS_TRITON else {"torch"})
    assert all(result["passed"] for result in results)
    assert list(tmp_path.iterdir()) == []


def test_gpu_benchmark_survives_a_section(tmp_path, monkeypatch):
    """A section that fails or hangs is named, and what it has written is kept."""
    (tmp_path / "gpu.speed.json").write_text("[1]")

    def stopped(command, timeout, **options):
        (tmp_path / "gpu.speed.json").write_text("[2]")
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(gpu.subprocess, "run", stopped)
    section = gpu.start_section("speed", True, tmp_path / "gpu.json", 7)
    assert section["failure"].startswith("stopped after 7 seconds")
    assert section["results"] == [2]
    failed = subprocess.CompletedProcess([], 1, "", "illegal memory access")
    monkeypatch.setattr(gpu.subprocess, "run", lambda *arguments, **options: failed)
    assert gpu.start_section("speed", True, tmp_path / "gpu.json", 7)["failure"].endswith("illegal memory access")


def test_gpu_benchmark_notes_failures():
    result = {}
    with gpu.recorded_failure(result):
        raise RuntimeError("out of memory")
    assert result["passed"] is False
    assert "out of memory" in result["failure"]
    assert gpu.ratios({"triton": {"median_ms": 2.0}, "torch": {"median_ms": 9.0}, "mamba_ssm": result}) == {
        "than torch": 4.5
    }
    assert gpu.ratios({"torch": {"median_ms": 9.0}}) == {}


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", [(2, 33, 17, 96), (1, 64, 64, 64), (1, 1, 7, 40)], ids=str)
@pytest.mark.parametrize("states", [1, 16])
def test_on_cuda(dtype, shape, states):
    if backend_triton.unavailable() is not None:
        pytest.skip(backend_triton.unavailable())
    inputs = triton_cases.make_inputs(shape, states, 3, getattr(torch, dtype), "cuda")
    errors = triton_cases.errors(backend_triton, inputs)
    assert all(error < TOLERANCES[dtype] for error in errors.values()), errors
