"""``python -m nnunetv2_smallseg.run_distributed``: arguments of nnU-Net, and real runs under torchrun on the CPU."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, shrink_networks
from nnunetv2.run import run_training
from torch import distributed

from nnunetv2_smallseg import run_distributed, trainers
from nnunetv2_smallseg.errors import SmallSegError

PLANS_NAME = "nnUNetDistributedPlans"
PAGE = (ROOT / "docs" / "distributed.md").read_text()
# With batch normalisations.
TRAINER = "nnUNetTrainerSTSNetNoAmplification"


@pytest.fixture(autouse=True)
def without_torchrun(monkeypatch):
    for name in run_distributed.ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)


def test_arguments_are_those_of_nnunet(monkeypatch):
    class Found(Exception):
        pass

    def stop(parser, *_):
        raise Found(parser)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    with pytest.raises(Found) as found:
        run_training.run_training_entry()
    theirs, ours = (
        {
            action.dest: (action.option_strings, action.nargs, action.default, action.required)
            for action in parser._actions
            if action.dest != "num_gpus"  # not given is told apart from 1
        }
        for parser in (found.value.args[0], run_distributed.build_parser())
    )
    assert ours == theirs


REQUIRED = ["901", "2.5d", "0"]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, r"not started by torchrun \(RANK, .*\n  torchrun --standalone --nproc_per_node 2 -m nnunetv2_smallseg"),
        (["-num_gpus", "2"], 2, r"-num_gpus 2 has no meaning here.*--nproc_per_node"),
        (["--c", "--val"], 2, "--c and --val exclude each other"),
        (["--c", "-pretrained_weights", "x.pth"], 2, "--c and -pretrained_weights exclude each other"),
        (["--val_best", "--disable_checkpointing"], 2, "--val_best and --disable_checkpointing exclude each other"),
        (["-pretrained_weights", "no/such.pth"], 1, r"no file no/such\.pth"),
    ],
)
def test_wrong_calls(arguments, status, message, capsys):
    assert run_distributed.main([*REQUIRED, *arguments]) == status
    assert re.search(f"^error: .*{message}", capsys.readouterr().err, re.DOTALL)


@pytest.mark.parametrize("arguments", [["901", "2d", "first"], [*REQUIRED, "-device", "mps"], [*REQUIRED, "--vla"]])
def test_wrong_words(arguments):
    with pytest.raises(SystemExit) as stopped:
        run_distributed.main(arguments)
    assert stopped.value.code == 2


@pytest.mark.parametrize(
    ("available", "message"), [(0, "has no GPU that PyTorch can use"), (2, "finds 2 GPUs.*at most 2")]
)
def test_more_processes_than_gpus(available, message, monkeypatch):
    for name, value in zip(run_distributed.ENVIRONMENT, ("3", "4", "3", "127.0.0.1", "1"), strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: available)
    with pytest.raises(SmallSegError, match=message):
        run_distributed._join_processes("cuda")


def test_trainers_of_nnunet_are_refused():
    with pytest.raises(NotImplementedError, match=r"nnUNetTrainer under torchrun.*nnUNetv2_train -num_gpus"):
        run_distributed._check_trainer("nnUNetTrainer")


def test_a_folder_that_another_computer_does_not_see(monkeypatch, tmp_path):
    """Seen from the second process: the first one has written elsewhere."""
    monkeypatch.setattr(run_distributed, "SECONDS_UNTIL_SEEN", 0)
    monkeypatch.setattr(distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(distributed, "barrier", lambda: None)
    monkeypatch.setattr(distributed, "broadcast_object_list", lambda values, source: values.__setitem__(0, "a"))
    with pytest.raises(SmallSegError, match="nnUNet_results name a file system that all computers share"):
        run_distributed._check_folder_is_shared(tmp_path)
    (tmp_path / ".shared_a").touch()
    run_distributed._check_folder_is_shared(tmp_path)


def write_plans(workspace, num_epochs: int) -> dict:
    """Plans of a short training, one sample for each of two processes."""
    plans = {**workspace.plans(), "plans_name": PLANS_NAME}
    plans["configurations"]["2d"].update(
        batch_size=2,
        patch_size=[32, 32],
        training={"num_epochs": num_epochs, "num_iterations_per_epoch": 2, "num_val_iterations_per_epoch": 1},
    )
    plans["configurations"]["2.5d"]["patch_size"] = [3, 32, 32]
    shrink_networks(plans)
    (workspace.preprocessed / f"{PLANS_NAME}.json").write_text(json.dumps(plans))
    return plans


def run_documented(
    mark: str, workspace, tmp_path, status: int = 0, programs: Path | None = None, **changes: str
) -> str:
    """Runs a block of commands of the page in bash, with the words of ``changes`` replaced; returns what they print."""
    block = re.search(rf"<!-- commands: {mark} -->\n```bash\n(.*?)```", PAGE, re.DOTALL)[1]
    for written, replacement in {"901": str(workspace.number), "PLANS": PLANS_NAME, **changes}.items():
        assert written in block
        block = block.replace(written, replacement)
    folders = [str(programs)] if programs else []
    environment = {
        **workspace.environment,
        "PATH": os.pathsep.join([*folders, str(Path(sys.executable).parent), os.environ["PATH"]]),
        "nnUNet_results": str(tmp_path / "results"),
        "nnUNet_n_proc_DA": "0",
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.Popen(
        ["bash", "-ec", block],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate()
    finally:
        if process.poll() is None:  # the test ran out of time: torchrun ends its processes when it is told to end
            os.killpg(process.pid, signal.SIGTERM)
    assert (process.returncode == 0) is (status == 0), output[-8000:]
    return output


# Slurm, as far as the script asks for it: two nodes, each of which is this computer.
SLURM = {
    "scontrol": "echo 127.0.0.1\n",
    "srun": """\
export SLURM_NNODES=2 SLURM_GPUS_ON_NODE=1
SLURM_NODEID=0 "$@" & first=$!
SLURM_NODEID=1 "$@" > "$0.second" 2>&1 & second=$!
wait $first && wait $second
""",
}


@pytest.fixture
def given_weights(nnunet_workspace, tmp_path, monkeypatch) -> dict[str, torch.Tensor]:
    """Parameters of the checkpoint ``weights.pth``, which a single process has written."""
    plans = write_plans(nnunet_workspace, 1)
    for name, value in nnunet_workspace.environment.items():
        if name.startswith("nnUNet_"):
            monkeypatch.setenv(name, value)
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "elsewhere"))
    alone = getattr(trainers, TRAINER)(
        {**plans, "continue_training": False}, "2.5d", 0, nnunet_workspace.dataset_json(), torch.device("cpu")
    )
    alone.initialize()
    alone.save_checkpoint(str(tmp_path / "weights.pth"))
    return {name: parameter.detach() for name, parameter in alone.network.named_parameters()}


def fold_of(workspace, tmp_path: Path) -> Path:
    return tmp_path / "results" / workspace.dataset / f"{TRAINER}__{PLANS_NAME}__2.5d" / "fold_0"


def read(checkpoint: Path) -> dict:
    return torch.load(checkpoint, weights_only=False, map_location="cpu")


def test_two_computers_from_given_weights(nnunet_workspace, given_weights, tmp_path):
    """The Slurm script. The network has batch normalisations, and one of the processes has no case to validate."""
    for name, script in SLURM.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}")
        (tmp_path / name).chmod(0o755)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    options = f"{TRAINER} -device cpu --npz"
    changes = {"29500": port, "TRAINER": options, "--c": f"-pretrained_weights {tmp_path / 'weights.pth'}"}
    first = run_documented("slurm", nnunet_workspace, tmp_path, programs=tmp_path, **changes)
    second = (tmp_path / "srun.second").read_text()
    assert "worker 0 batch_size 1" in first
    assert "worker 1 batch_size 1" in second
    assert [printed.count("Mean Validation Dice") for printed in (first, second)] == [1, 0]  # by the first one only
    folder = fold_of(nnunet_workspace, tmp_path)
    assert len(list(folder.glob("training_log_*.txt"))) == 1
    assert len(list((folder / "validation").glob("*.npz"))) == 1
    assert not list(folder.glob(".shared_*"))
    final = read(folder / "checkpoint_final.pth")
    assert final["current_epoch"] == 1
    moves = [
        float((final["network_weights"][name] - parameter).abs().max())
        for name, parameter in given_weights.items()
        if ".seg_layers." not in name
    ]
    assert 0 < max(moves) < 0.02  # two steps away from the given weights, not from random ones


@pytest.mark.slow
def test_one_computer_goes_on(nnunet_workspace, given_weights, tmp_path):
    folder = fold_of(nnunet_workspace, tmp_path)
    for epochs, options in ((1, "--disable_checkpointing"), (1, "--c"), (2, "--c"), (2, "--val --val_best")):
        write_plans(nnunet_workspace, epochs)
        output = run_documented("one computer", nnunet_workspace, tmp_path, TRAINER=f"{TRAINER} -device cpu {options}")
        assert output.count("Mean Validation Dice") == 1
        assert [f"Epoch {epoch}" in output for epoch in (0, 1)] == [epochs == 1, options == "--c" and epochs == 2]
        assert (folder / "checkpoint_final.pth").exists() is (options != "--disable_checkpointing")
    assert read(folder / "checkpoint_final.pth")["current_epoch"] == 2


@pytest.mark.slow
def test_a_process_that_fails_ends_all(nnunet_workspace, tmp_path):
    """Only the first process reads the weights; the second waits for it."""
    write_plans(nnunet_workspace, 1)
    (tmp_path / "weights.pth").write_bytes(b"not a checkpoint")
    options = f"nnUNetTrainerHUNet -device cpu -pretrained_weights {tmp_path / 'weights.pth'}"
    output = run_documented("one computer", nnunet_workspace, tmp_path, status=1, TRAINER=options)
    assert "UnpicklingError" in output
    assert re.search(r"Root Cause.*rank *: 0", output, re.DOTALL)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_on_gpus(nnunet_workspace, tmp_path):
    write_plans(nnunet_workspace, 1)
    number = min(2, torch.cuda.device_count())
    changes = {"--nproc_per_node 2": f"--nproc_per_node {number}", "TRAINER": TRAINER}
    output = run_documented("one computer", nnunet_workspace, tmp_path, **changes)
    assert output.count("Mean Validation Dice") == 1
