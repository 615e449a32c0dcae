"""Trainings that are killed, stopped, and run out of disk: nothing is lost, and what goes on goes on exactly."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from interrupted_training import PATIENCE_SECONDS, SCHEDULE, InterruptedTraining, differences, make
from nnunetv2.run.run_training import maybe_load_checkpoint
from torch import distributed

from nnunetv2_smallseg.errors import CommandStopped, TrainingStopped
from nnunetv2_smallseg.pretrained.checkpoint import read_checkpoint
from nnunetv2_smallseg.trainers import crash_safety, curriculum
from nnunetv2_smallseg.trainers.checkpoint_files import damage
from nnunetv2_smallseg.trainers.crash_safety import CrashSafety
from nnunetv2_smallseg.trainers.stop_requests import StopRequests


@pytest.fixture(scope="module")
def uninterrupted(nnunet_workspace, tmp_path_factory) -> dict:
    """The final checkpoint of a training that nobody disturbed."""
    training = InterruptedTraining(nnunet_workspace, tmp_path_factory.mktemp("whole") / "results")
    assert training.finish(training.start(resume=False)) == 0, training.log()
    return training.final()


@pytest.fixture
def small(nnunet_folders, monkeypatch):
    """Makes trainers in this process; their figures are left out."""
    monkeypatch.setattr(curriculum, "draw_mean_weights", lambda *arguments: None)
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield lambda resume=False: make(nnunet_folders, resume)
    torch.set_num_threads(torch_threads)


def log_of(trainer) -> str:
    return Path(trainer.log_file).read_text()


def unfinished_iterations(file: Path) -> int:
    """How many iterations of its epoch a checkpoint has."""
    content = torch.load(file, weights_only=False)
    return len(content["optimizer_state"]["smallseg"]["unfinished_epoch"][0])


# Killed


def kill_and_go_on(training: InterruptedTraining, kills: int, generator: random.Random) -> int:
    """Kills a training up to ``kills`` times and lets it finish; returns how often it was killed.

    The moments are random, some of them before the first checkpoint, and many while one is written.
    """
    for killed in range(kills):
        process = training.start(resume=killed > 0)
        training.wait_for_checkpoints(generator.randint(0, 3), process)
        time.sleep(generator.choice([0, generator.uniform(0, 0.02), generator.uniform(0, 0.5)]))
        if not training.kill(process):
            assert training.finish(process) == 0, training.log()
            return killed
    assert training.finish(training.start()) == 0, training.log()
    return kills


def test_killed_trainings_end_as_if_they_had_not_been(nnunet_workspace, uninterrupted, tmp_path):
    training = InterruptedTraining(nnunet_workspace, tmp_path / "results")
    assert kill_and_go_on(training, 4, random.Random(1)) >= 3
    assert differences(uninterrupted, training.final()) == []
    assert "Going on after iteration" in training.log()
    assert "damaged" not in training.log()
    assert not list(training.output.glob(".*")), "leftovers"


@pytest.mark.slow
def test_thirty_kills(nnunet_workspace, uninterrupted, tmp_path, capsys):
    """As above, in as many trainings as thirty kills take: ``pytest -m slow -k thirty``."""
    generator, kills, trainings, within_writing = random.Random(time.time_ns()), 0, 0, 0
    while kills < 30:
        training = InterruptedTraining(nnunet_workspace, tmp_path / f"results_{trainings}")
        kills += kill_and_go_on(training, min(generator.randint(2, 6), 30 - kills), generator)
        trainings += 1
        within_writing += training.log().count("which a training left when it was killed")
        assert differences(uninterrupted, training.final()) == []
        assert "damaged" not in training.log()
        assert not list(training.output.glob(".*"))
        shutil.rmtree(training.folder)
    with capsys.disabled():
        print(f"\n{kills} kills in {trainings} trainings, {within_writing} of them while a checkpoint was written")


# Asked to stop


def test_stopped_trainings_end_as_if_they_had_not_been(nnunet_workspace, uninterrupted, tmp_path):
    training = InterruptedTraining(nnunet_workspace, tmp_path / "results")
    latest = training.output / "checkpoint_latest.pth"

    def run(*request: object, resume: bool = True) -> int:
        return training.finish(training.start(resume, request))

    assert run("on_train_start", 0, "SIGUSR1", resume=False) == 128 + signal.SIGUSR1
    assert "before the first iteration" in training.log()
    assert not list(training.output.glob("*.pth"))

    training.output.joinpath("STOP").touch()  # older than the training: not meant for it
    assert run("train_step", 1, "SIGTERM", resume=False) == 128 + signal.SIGTERM
    assert "older than this training" in training.log()
    assert "SIGTERM: epoch 0, after iteration 2 of 4. The same command with --c goes on from there." in training.log()
    assert unfinished_iterations(latest) == 2
    assert read_checkpoint(latest)  # its weights can be used without trusting the rest

    assert run("validation_step", 0, "STOP") == 0
    assert "the file STOP: epoch 0, after iteration 4 of 4." in training.log()
    assert not training.output.joinpath("STOP").exists()

    assert run("on_epoch_end", 1, "SIGUSR1") == 128 + signal.SIGUSR1
    assert "SIGUSR1: epoch 2. The same command" in training.log()

    assert run("on_epoch_end", 0, "SIGTERM") == 128 + signal.SIGTERM
    assert "SIGTERM: the training is finished. The same command with --c validates it." in training.log()
    assert differences(uninterrupted, training.final()) == []
    assert training.finish() == 0  # nothing is left to do
    assert differences(uninterrupted, training.final()) == []


def workers_of(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds processes in Linux's /proc")
def test_a_signal_to_all_processes_ends_them_in_order(nnunet_workspace, tmp_path):
    """As batch systems send it: the data loader's workers go on until the checkpoint is written."""
    training = InterruptedTraining(nnunet_workspace, tmp_path / "results", num_processes=2)
    process = training.start(resume=False)
    training.wait_for_checkpoints(1, process)
    workers = workers_of(process.pid)
    assert len(workers) == 3  # two for training and one for validation
    os.killpg(process.pid, signal.SIGTERM)
    assert training.finish(process) == 128 + signal.SIGTERM, training.log()
    assert "The same command with --c goes on from there." in training.log()
    assert "no longer alive" not in training.log()
    assert "seed 11 fixes the first weights only" in training.log()
    assert [worker for worker in workers if Path(f"/proc/{worker}").exists()] == []
    assert damage(training.output / "checkpoint_latest.pth") is None


def test_signal_handlers_are_put_back(tmp_path):
    former = signal.signal(signal.SIGUSR1, lambda *arguments: None)
    try:
        ours = signal.getsignal(signal.SIGUSR1)
        with StopRequests(tmp_path / "STOP", ["SIGUSR1", "SIGNOTHING"]) as requests:
            with pytest.raises(TrainingStopped) as stopped:
                signal.raise_signal(signal.SIGUSR1)
            assert stopped.value.code == 128 + signal.SIGUSR1
            requests.wait_for_iteration()
            assert requests.code == 0
            signal.raise_signal(signal.SIGUSR1)
            assert requests.code == signal.SIGUSR1
        assert signal.getsignal(signal.SIGUSR1) is ours
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        with StopRequests(tmp_path / "STOP", ["SIGUSR1"]):
            assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGUSR1, former)

    def elsewhere() -> None:
        with StopRequests(tmp_path / "STOP", ["SIGTERM"]) as requests:
            (tmp_path / "STOP").touch()
            seen.append(requests.code)

    seen = []
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [1]


# Now and then


def test_checkpoints_every_few_minutes(small, monkeypatch):
    """Iterations of four minutes: every third, counted from the last checkpoint of any kind."""
    clock = [0.0]
    monkeypatch.setattr(crash_safety, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    trainer = small()
    trainer.checkpoint_every_minutes = 10
    step, save, saved = trainer.train_step, trainer.save_checkpoint, []

    def slow_step(batch):
        clock[0] += 4 * 60
        return step(batch)

    def recorded(filename):
        saved.append((Path(filename).name, trainer.current_epoch, len(trainer._epoch_outputs)))
        save(filename)

    monkeypatch.setattr(trainer, "train_step", slow_step)
    monkeypatch.setattr(trainer, "save_checkpoint", recorded)
    monkeypatch.setattr(trainer, "_best_ema", 2.0)  # never reached
    trainer.run_training()
    # The epoch nnU-Net stores is the next one; of an unfinished epoch this is the epoch itself.
    timed = [
        ("checkpoint_latest.pth", 0 - 1, 3),
        ("checkpoint_latest.pth", 1 - 1, 2),
        ("checkpoint_latest.pth", 2 - 1, 1),
    ]
    assert saved == [*timed, ("checkpoint_latest.pth", 2 - 1, 4), ("checkpoint_final.pth", 2, 0)]
    assert not Path(trainer.output_folder, "checkpoint_latest.pth").exists()

    saved.clear()
    monkeypatch.setattr(trainer, "checkpoint_every_minutes", None)
    trainer.current_epoch = 2
    for series in trainer.logger.get_checkpoint().values():
        del series[2:]
    trainer.run_training()
    assert saved == [("checkpoint_final.pth", 2, 0)]


# Damaged


def damaged(file: Path, kind: str) -> None:
    content = bytearray(file.read_bytes())
    if kind == "truncated":
        content = content[: len(content) // 2]
    elif kind == "empty":
        content = b""
    elif kind == "garbage":
        content = random.Random(0).randbytes(len(content))
    else:  # a single bit, which PyTorch does not notice
        content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.fixture
def three_checkpoints(small):
    """best of epoch 1, latest of epoch 2, final of epoch 3, written in this order; and the way to load them."""
    trainer = small()
    trainer.initialize()
    folder = Path(trainer.output_folder)
    for epoch, name in enumerate(("best", "latest", "final")):
        trainer.current_epoch = epoch
        for values in trainer.logger.get_checkpoint().values():
            values.append(0.0)
        trainer.save_checkpoint(str(folder / f"checkpoint_{name}.pth"))
        os.utime(folder / f"checkpoint_{name}.pth", (1e9 + epoch, 1e9 + epoch))

    def load(*arguments):
        loaded = small(resume=arguments[0])
        maybe_load_checkpoint(loaded, *arguments)
        return loaded

    return folder, load


@pytest.mark.parametrize("kind", ["truncated", "empty", "garbage", "one bit"])
def test_damaged_checkpoints_are_named_and_passed_over(kind, three_checkpoints):
    folder, load = three_checkpoints
    assert load(True, False).current_epoch == 3
    damaged(folder / "checkpoint_final.pth", kind)
    trainer = load(True, False)
    assert trainer.current_epoch == 2
    assert f"WARNING: {folder / 'checkpoint_final.pth'} is damaged and will not be used: " in log_of(trainer)
    assert "Going on from checkpoint_latest.pth of 2001-09-09" in log_of(trainer)
    assert {len(values) for values in trainer.logger.get_checkpoint().values()} == {2}
    # Validation is of the final model or of none.
    with pytest.raises(CommandStopped, match=r"damaged: checkpoint_final\.pth\..*--c instead of --val"):
        load(False, True)
    damaged(folder / "checkpoint_latest.pth", kind)
    assert load(True, False).current_epoch == 1
    damaged(folder / "checkpoint_best.pth", kind)
    with pytest.raises(CommandStopped, match=r"no checkpoint in .* can be used.*train anew without --c") as stopped:
        load(True, False)
    assert all(file.name in str(stopped.value) for file in folder.glob("*.pth"))


def test_the_newest_checkpoint_counts(three_checkpoints):
    """nnU-Net would take the final one of the training before."""
    folder, load = three_checkpoints
    os.utime(folder / "checkpoint_latest.pth")
    assert load(True, False).current_epoch == 2
    assert load(False, True).current_epoch == 3


def test_a_new_training_says_what_it_replaces(three_checkpoints, small, monkeypatch):
    def stop() -> None:
        raise TrainingStopped("this test", 0)

    trainer = small()
    monkeypatch.setattr(trainer, "on_train_start", stop)
    with pytest.raises(TrainingStopped):
        trainer.run_training()
    assert "checkpoint_final.pth of 2001-09-09" in log_of(trainer)
    assert "stop now and add --c" in log_of(trainer)


# No room


class LimitedFiles:
    """Files cannot grow beyond a megabyte while it is on: writes fail as on a full disk."""

    def __init__(self) -> None:
        self.former = resource.getrlimit(resource.RLIMIT_FSIZE)

    def switch(self, on: bool) -> None:
        limit = 2**20 if on else self.former[0]
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, self.former[1]))


@pytest.fixture
def limited_files():
    files = LimitedFiles()
    yield files
    files.switch(False)


def test_a_full_disk_does_not_end_training_while_an_older_checkpoint_stands(small, limited_files, monkeypatch):
    trainer = small()
    folder = Path(trainer.output_folder)
    step, steps, states = trainer.train_step, [], []

    def on_a_disk_that_fills(batch):
        states.append([torch.load(file, weights_only=False)["current_epoch"] for file in folder.glob("*latest.pth")])
        assert not list(folder.glob(".*"))
        steps.append(batch)
        limited_files.switch(2 <= len(steps) < 6)
        trainer.logger.plot_progress_png = picture if len(steps) < 6 else lambda folder: None
        return step(batch)

    def picture(folder: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(trainer, "train_step", on_a_disk_that_fills)
    trainer.run_training()
    assert len(steps) == SCHEDULE["num_epochs"] * SCHEDULE["num_iterations_per_epoch"]
    # Of epoch 0 until there was room again, in the second iteration of epoch 1.
    assert states == [[], *[[0]] * 5, *[[1]] * 2, *[[2]] * 4]
    assert log_of(trainer).count("checkpoint_latest.pth was not written") == 3 + 2 + 1 + 1
    assert log_of(trainer).count("checkpoint_best.pth was not written") == 1
    assert "training can be continued from checkpoint_latest.pth of 2" in log_of(trainer)
    assert "the figures of epoch 0 were not written: [Errno 28]" in log_of(trainer)
    best = torch.load(folder / "checkpoint_best.pth", weights_only=False)
    assert best["current_epoch"] == 2  # the one that was lost was made up for


def test_a_full_disk_at_the_end_keeps_the_older_checkpoint(small, limited_files, monkeypatch):
    trainer = small()
    trainer.num_epochs = 1
    folder = Path(trainer.output_folder)
    monkeypatch.setattr(
        trainer, "on_train_end", lambda: (limited_files.switch(True), type(trainer).on_train_end(trainer))
    )
    with pytest.raises(CommandStopped, match=r"checkpoint_final.pth was not written: .*--c then goes on from"):
        trainer.run_training()
    limited_files.switch(False)
    assert {file.name for file in folder.glob("*.pth")} == {"checkpoint_latest.pth", "checkpoint_best.pth"}
    assert not list(folder.glob(".*"))


def test_a_full_disk_from_the_start_ends_training(small, limited_files, monkeypatch):
    trainer = small()
    step = trainer.train_step
    monkeypatch.setattr(trainer, "train_step", lambda batch: (step(batch), limited_files.switch(True))[0])
    with pytest.raises(CommandStopped, match=r"checkpoint_latest.pth was not written: .*then start again"):
        trainer.run_training()
    # Who saves a checkpoint outside of a training is told in the way Python has for it.
    with pytest.raises(RuntimeError):
        trainer.save_checkpoint(str(Path(trainer.output_folder, "checkpoint_best.pth")))
    assert list(Path(trainer.output_folder).glob("*.pth")) == []


def test_weights_that_are_no_numbers_replace_nothing(small, monkeypatch):
    trainer = small()
    folder = Path(trainer.output_folder)
    step, steps = trainer.train_step, []

    def poisoned(batch):
        steps.append(batch)
        output = step(batch)
        if len(steps) == 3:
            next(trainer.network.parameters()).data.fill_(float("nan"))
        return output

    monkeypatch.setattr(trainer, "train_step", poisoned)
    with pytest.raises(CommandStopped, match="weights of the network are no longer finite"):
        trainer.run_training()
    assert unfinished_iterations(folder / "checkpoint_latest.pth") == 2
    assert "checkpoint_latest.pth was not written: the weights of the network are no longer finite" in log_of(trainer)


# Several processes


class Loop:
    """The least that ``CrashSafety`` needs of nnU-Net's trainer: the loop, without a network."""

    device, disable_checkpointing, dataloader_train, dataloader_val = torch.device("cpu"), False, None, None
    num_epochs, num_iterations_per_epoch, current_epoch, _best_ema, is_ddp = 2, 3, 0, None, True
    unwrapped_network = torch.nn.Identity()

    def __init__(self, folder: str, rank: int) -> None:
        self.output_folder, self.local_rank, self.logger, self.calls = folder, rank, SimpleNamespace(resume=False), []

    def run_training(self) -> None:
        for _ in range(self.num_epochs):
            self.on_train_epoch_start()
            outputs = [self.train_step({}) for _ in range(self.num_iterations_per_epoch)]
            self.on_train_epoch_end(outputs)
            self.on_validation_epoch_start()
            self.validation_step({})
            self.on_epoch_end()

    def train_step(self, batch: dict) -> dict:
        self.calls.append("step")
        if len(self.calls) == 5 and self.local_rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return {"loss": np.float32(10 * self.local_rank + len(self.calls))}

    def nothing(self, *arguments: object) -> None:
        pass

    on_train_epoch_start = on_train_epoch_end = on_validation_epoch_start = validation_step = nothing
    print_to_log_file = nothing

    def on_epoch_end(self) -> None:
        self.current_epoch += 1

    def save_checkpoint(self, filename: str) -> None:
        if self.local_rank == 0:
            time.sleep(0.2)  # the other process must wait for it
            torch.save({"epoch": self.current_epoch + 1, **self.checkpoint_state()}, filename)


class SafeLoop(CrashSafety, Loop):
    """With the behaviour under test."""


def run_loop(rank: int, port: int, folder: str) -> None:
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    trainer = SafeLoop(folder, rank)
    try:
        trainer.run_training()
    finally:
        content = torch.load(Path(folder, "checkpoint_latest.pth"), weights_only=False)
        Path(folder, f"{rank}.txt").write_text(repr((trainer.calls, content)))


def test_processes_stop_together(tmp_path):
    """A signal to one of two ends both after the same iteration, and the checkpoint has the results of both."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    processes = [context.Process(target=run_loop, args=(rank, port, str(tmp_path))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE_SECONDS)
    assert [process.exitcode for process in processes] == [128 + signal.SIGUSR1] * 2
    first, second = ((tmp_path / f"{rank}.txt").read_text() for rank in range(2))
    assert first == second
    assert "(['step', 'step', 'step', 'step', 'step']" in first
    assert "'epoch': 1" in first
    content = torch.load(tmp_path / "checkpoint_latest.pth", weights_only=False)
    losses = [[float(output["loss"]) for output in part] for part in content["unfinished_epoch"]]
    assert losses == [[4, 5], [14, 15]]
