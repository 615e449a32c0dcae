"""``python -m nnunetv2_smallseg.run_distributed``: arguments of nnU-Net, and real runs under torchrun on the CPU."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, shrink_networks
from nnunetv2.run import run_training
from torch import distributed

from nnunetv2_smallseg import run_distributed
from nnunetv2_smallseg.errors import SmallSegError

PLANS_NAME = "nnUNetDistributedPlans"
PAGE = (ROOT / "docs" / "distributed.md").read_text()
TORCHRUN = str(Path(sys.executable).with_name("torchrun"))


def documented(mark: str) -> list[list[str]]:
    """The commands below a mark of the page, as words."""
    block = re.search(rf"<!-- commands: {mark} -->\n```bash\n(.*?)```", PAGE, re.DOTALL)[1]
    lines = block.replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


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
        ([], 2, r"not started by torchrun \(RANK, .*\n  torchrun --nproc_per_node 2 -m nnunetv2_smallseg"),
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


def write_plans(workspace, num_epochs: int) -> None:
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


def start(workspace, words: list[str], tmp_path, trainer: str, **replacements: str) -> subprocess.Popen:
    """Starts a command of the page with the workspace's data, on the CPU."""
    values = {"torchrun": TORCHRUN, "901": str(workspace.number), "TRAINER": trainer, "PLANS": PLANS_NAME}
    values |= replacements
    environment = {
        **workspace.environment,
        "nnUNet_results": str(tmp_path / "results"),
        "nnUNet_n_proc_DA": "0",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [*(values.get(word, word) for word in words), "-device", "cpu"],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen, status: int = 0) -> str:
    output, _ = process.communicate(timeout=500)
    assert (process.returncode == 0) is (status == 0), output[-8000:]
    return output


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def test_one_computer_then_two(nnunet_workspace, tmp_path):
    """The page's commands: two processes on one computer, then weights of that on two computers with one each.

    The network has batch normalisations, and one of the processes has no case to validate.
    """
    trainer = "nnUNetTrainerSTSNetNoAmplification"
    folder = tmp_path / "results" / nnunet_workspace.dataset / f"{trainer}__{PLANS_NAME}__2.5d"
    [one_computer] = documented("one computer")
    write_plans(nnunet_workspace, 1)
    output = finish(start(nnunet_workspace, one_computer, tmp_path, trainer))
    for rank in (0, 1):
        assert f"worker {rank} batch_size 1" in output
    assert output.count("Validation complete") == 1  # by the first process only
    assert len(list((folder / "fold_0").glob("training_log_*.txt"))) == 1
    assert (folder / "fold_0" / "validation" / "summary.json").is_file()
    first = torch.load(folder / "fold_0" / "checkpoint_final.pth", weights_only=False, map_location="cpu")
    assert first["current_epoch"] == 1

    port = free_port()
    weights = tmp_path / "weights.pth"
    (folder / "fold_0" / "checkpoint_final.pth").rename(weights)
    [words] = documented("several computers")
    options = ["-pretrained_weights", str(weights), "--npz"]
    processes = [
        start(
            nnunet_workspace, [*words, *options], tmp_path, trainer,
            **{"2": "1", "$NODE": str(node), "$FIRST": "127.0.0.1", "29500": port, "$NODES": "2"},
        )
        for node in (0, 1)
    ]  # fmt: skip
    outputs = [finish(process) for process in processes]
    assert "worker 0 batch_size 1" in outputs[0]
    assert "worker 1 batch_size 1" in outputs[1]
    assert [output.count("Validation complete") for output in outputs] == [1, 0]
    assert len(list((folder / "fold_0").glob("training_log_*.txt"))) == 2
    assert list((folder / "fold_0" / "validation").glob("*.npz"))
    assert not list((folder / "fold_0").glob(".shared_*"))
    second = torch.load(folder / "fold_0" / "checkpoint_final.pth", weights_only=False, map_location="cpu")
    start_of_second, end_of_first = second["network_weights"], first["network_weights"]
    moved = 0.0
    for name, tensor in end_of_first.items():
        if ".seg_layers." not in name and tensor.is_floating_point() and "running" not in name:
            moved = max(moved, float((start_of_second[name] - tensor).abs().max()))
    assert 0 < moved < 0.05  # two steps away from the given weights, not from random ones


def test_a_process_that_fails_ends_all(nnunet_workspace, tmp_path):
    """Only the first process reads the weights; the second waits for it."""
    write_plans(nnunet_workspace, 1)
    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"not a checkpoint")
    [words] = documented("one computer")
    options = ["-pretrained_weights", str(weights)]
    output = finish(start(nnunet_workspace, [*words, *options], tmp_path, "nnUNetTrainerHUNet"), status=1)
    assert "UnpicklingError" in output or "could not read" in output
    assert re.search(r"rank *: 0", output)  # torchrun's report: who failed first


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_on_gpus(nnunet_workspace, tmp_path):
    number = min(2, torch.cuda.device_count())
    write_plans(nnunet_workspace, 1)
    [words] = documented("one computer")
    words = [str(number) if word == "2" else word for word in words]
    trainer = "nnUNetTrainerSTSNetNoAmplification"
    output = finish(start(nnunet_workspace, [*words, "-device", "cuda"], tmp_path, trainer))
    assert output.count("Validation complete") == 1
