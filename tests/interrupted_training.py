"""A training in a process of its own, which tests may kill, and what it leaves.

Its trainer has everything at once that has to survive: curriculum, amplification, a frozen encoder, results of
iterations that nnU-Net does not know, checkpoints after every iteration. Processes are forked from one that has
imported everything, so that a start takes a fraction of a second.
"""

from __future__ import annotations

import copy
import multiprocessing
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from conftest import small_networks
from nnunetv2.run.run_training import maybe_load_checkpoint

from nnunetv2_smallseg.trainers import curriculum, nnUNetTrainerAHNet, stop_requests
from nnunetv2_smallseg.trainers.amplification import AmplificationMixin
from nnunetv2_smallseg.trainers.curriculum import CurriculumMixin

SCHEDULE = {"num_epochs": 3, "num_iterations_per_epoch": 4, "num_val_iterations_per_epoch": 2}
PATIENCE_SECONDS = 250


class EverythingAtOnce(CurriculumMixin, AmplificationMixin, nnUNetTrainerAHNet):
    """Seeded, and saved after every iteration."""

    seed = 11
    freeze_encoder_epochs = 1
    checkpoint_every_minutes = 1e-9

    def initialize(self) -> None:
        super().initialize()
        self.logger.plot_progress_png = lambda folder: None  # takes longer than the training
        self.logger.local_logger.my_fantastic_logging.setdefault("seen_by_subclass", [])

    def train_step(self, batch: dict) -> dict:
        """Returns more than nnU-Net does, as a subclass may."""
        return {**super().train_step(batch), "mean": float(batch["data"].mean())}

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        super().on_train_epoch_end(train_outputs)
        self.logger.log("seen_by_subclass", [output["mean"] for output in train_outputs], self.current_epoch)


def ask_to_stop(trainer: type, method: str, call: int, request: str) -> None:
    """Lets the process ask itself to stop during the given call, from 0, of a method of the trainer."""
    inner, calls = getattr(trainer, method), []

    def asking(self, *arguments):
        calls.append(method)
        if len(calls) == call + 1:
            if request == "STOP":
                Path(self.output_folder, "STOP").touch()
            else:
                os.kill(os.getpid(), getattr(signal, request))
        return inner(self, *arguments)

    setattr(trainer, method, asking)


def train(training: InterruptedTraining, resume: bool, request: tuple[str, int, str] | None) -> None:
    """What a child process does, as ``nnUNetv2_train`` would."""
    with open(training.folder / "log", "a") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    multiprocessing.set_start_method("fork", force=True)  # for workers, as in a command
    os.setsid()  # signals to the group reach this process and its workers only
    os.environ.update(training.workspace.environment)
    os.environ.update(nnUNet_results=str(training.folder), nnUNet_n_proc_DA=str(training.num_processes))
    torch.set_num_threads(1)
    curriculum.draw_mean_weights = lambda *arguments: None
    stop_requests.SECONDS_BETWEEN_LOOKS = 0
    if request:
        ask_to_stop(EverythingAtOnce, *request)
    trainer = make(training.workspace, resume)
    maybe_load_checkpoint(trainer, resume, False)
    trainer.run_training()


def make(workspace, resume: bool = False) -> EverythingAtOnce:
    """The trainer on small patches of the phantom."""
    plans = copy.deepcopy(workspace.plans())
    plans["continue_training"] = resume
    plans["configurations"]["2d"] |= {
        "patch_size": [32, 32], "batch_size": 2, "network_options": small_networks(), "training": SCHEDULE,
    }  # fmt: skip
    return EverythingAtOnce(plans, "2d", 0, workspace.dataset_json(), torch.device("cpu"))


@dataclass(frozen=True)
class InterruptedTraining:
    """One training in a folder of its own, in as many runs as it takes."""

    workspace: object
    folder: Path
    num_processes: int = 0

    @property
    def output(self) -> Path:
        """The folder of the checkpoints."""
        plans = self.workspace.plans_name
        return self.folder / self.workspace.dataset / f"{EverythingAtOnce.__name__}__{plans}__2d" / "fold_0"

    def start(self, resume: bool = True, request: tuple[str, int, str] | None = None) -> multiprocessing.Process:
        """Starts or goes on, in a new process; ``request`` as in ``ask_to_stop``."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["nnunetv2_smallseg.trainers", "nnunetv2.run.run_training"])
        self.folder.mkdir(exist_ok=True)
        process = context.Process(target=train, args=(self, resume, request))
        process.start()
        return process

    def finish(self, process: multiprocessing.Process | None = None) -> int:
        """Waits for the end; the exit status."""
        process = process or self.start()
        process.join(PATIENCE_SECONDS)
        assert process.exitcode is not None, f"still running\n{self.log()}"
        return process.exitcode

    def log(self) -> str:
        """What all runs printed."""
        return (self.folder / "log").read_text()

    def wait_for_checkpoints(self, number: int, process: multiprocessing.Process) -> None:
        """Waits until the process began to write that many checkpoints, or ended."""
        seen = set()
        end = time.monotonic() + PATIENCE_SECONDS
        while len(seen) < number and process.is_alive() and time.monotonic() < end:
            seen |= {file.name for file in self.output.glob(".checkpoint_*.part")}
            time.sleep(0.001)

    def kill(self, process: multiprocessing.Process) -> bool:
        """SIGKILL; whether it came in time."""
        process.kill()
        process.join()
        return process.exitcode == -9

    def final(self) -> dict:
        """The final checkpoint without what depends on the clock."""
        content = torch.load(self.output / "checkpoint_final.pth", weights_only=False)
        for name in ("epoch_start_timestamps", "epoch_end_timestamps"):
            assert len(content["logging"].pop(name)) == SCHEDULE["num_epochs"]
        return content


def differences(first: object, second: object, place: str = "") -> list[str]:
    """Where two checkpoints differ in any bit."""
    if isinstance(first, torch.Tensor):
        same = isinstance(second, torch.Tensor) and first.dtype == second.dtype and torch.equal(first, second)
        return [] if same else [place]
    if isinstance(first, dict):
        if first.keys() != second.keys():
            return [f"{place}: {sorted(map(str, first))} {sorted(map(str, second))}"]
        return [entry for key in first for entry in differences(first[key], second[key], f"{place}/{key}")]
    if isinstance(first, (list, tuple)):
        if len(first) != len(second):
            return [f"{place}: {len(first)} {len(second)}"]
        pairs = enumerate(zip(first, second, strict=True))
        return [entry for index, pair in pairs for entry in differences(*pair, f"{place}/{index}")]
    return [] if repr(first) == repr(second) else [f"{place}: {first!r} {second!r}"]
