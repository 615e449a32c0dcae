"""Trainings that can be stopped and killed: whole checkpoints, often enough, from which training goes on exactly.

What is promised and what is not: ``docs/long_trainings.md``.

nnU-Net's ``run_training`` has no hook between two iterations that sees the work of all subclasses. For the time of a
training, the methods it calls are therefore wrapped on this one object, around the overrides of every subclass
(``_watched``); nothing of nnU-Net is copied or changed.
"""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from torch import distributed

from nnunetv2_smallseg.errors import CommandStopped, TrainingStopped
from nnunetv2_smallseg.files import replacing
from nnunetv2_smallseg.trainers.checkpoint_files import CHECKPOINTS, damage, newest_first, remove_leftovers
from nnunetv2_smallseg.trainers.checkpoint_state import CheckpointState
from nnunetv2_smallseg.trainers.finite_loss import all_finite
from nnunetv2_smallseg.trainers.stop_requests import StopRequests, describe, exit_status

__all__ = ["CrashSafety"]

FINAL, LATEST, BEST = CHECKPOINTS
STOP_FILE = "STOP"
UNFINISHED_EPOCH = "unfinished_epoch"
# What random numbers are drawn for, so that no two uses share a seed.
FOR_WEIGHTS, FOR_START, FOR_TRAINING, FOR_VALIDATION = range(4)
# PyTorch turns a failure to write into a RuntimeError of its ZIP writer.
WRITER_MESSAGES = ("inline_container", "PytorchStreamWriter")


class CrashSafety(CheckpointState):
    """Whole checkpoints every few minutes, requests to stop, and going on within an epoch; for trainers of nnU-Net.

    Attributes:
        checkpoint_every_minutes: Longest time without a checkpoint, above 0; None leaves it to nnU-Net's 50 epochs.
        seed: Makes weights, data order and augmentation of each iteration a function of this number; None leaves them
            to chance. Data order and augmentation only without worker processes (``nnUNet_n_proc_DA=0``).
    """

    checkpoint_every_minutes: float | None = 10
    seed: int | None = None

    _requests: StopRequests | None = None  # not None while training
    _last_checkpoint: float = 0.0
    _not_written: frozenset[str] = frozenset()  # checkpoints that failed in this epoch
    _epoch_outputs: list[dict] = []  # noqa: RUF012 - replaced, never changed, before the first epoch
    _unfinished_epoch: list[list[dict]] | None = None  # outputs of each process, for a checkpoint about to be written
    _restored_epoch: list[list[dict]] | None = None
    _num_iterations: int = 0

    # Training

    def initialize(self) -> None:
        """Builds network, optimizer and loss, with random weights from ``seed`` if there is one."""
        self._draw_anew(FOR_WEIGHTS)
        super().initialize()

    def on_train_start(self) -> None:
        """Starts the data loaders; says so if ``seed`` has no power over them."""
        self._draw_anew(FOR_START, self.current_epoch)
        super().on_train_start()
        if self.seed is not None and not isinstance(self.dataloader_train, SingleThreadedAugmenter):
            self.print_to_log_file(
                f"WARNING: seed {self.seed} fixes the first weights only: nnU-Net's data loader has worker processes, "
                "which draw as they please. Export nnUNet_n_proc_DA=0 to fix data order and augmentation, too."
            )

    def run_training(self) -> None:
        """nnU-Net's training, interruptible.

        Raises:
            TrainingStopped: If it was asked to stop. The message says how to go on.
        """
        self._tidy_output_folder()
        # If the process that started several ones ends, PyTorch sends them SIGINT.
        signals = ["SIGTERM", "SIGUSR1", *(["SIGINT"] if self.is_ddp else [])]
        self._last_checkpoint = time.monotonic()
        try:
            with StopRequests(Path(self.output_folder, STOP_FILE), signals) as self._requests, self._watched():
                super().run_training()
                [code] = self._agreed(self._requests.code)
                if code:
                    self._stop(code, "the training is finished. The same command with --c validates it.")
        except TrainingStopped as stopped:
            if self.local_rank == 0:
                self.print_to_log_file(f"Stopped by {stopped.message}")
            self._end_workers()
            raise
        finally:
            self._requests = None

    def _tidy_output_folder(self) -> None:
        """Removes what a killed training left, and says what a new one will replace."""
        if self.local_rank != 0:
            return
        folder = Path(self.output_folder)
        for file in remove_leftovers(folder):
            self.print_to_log_file(f"Removed {file.name}, which a training left when it was killed.")
        if (folder / STOP_FILE).exists():
            (folder / STOP_FILE).unlink()
            self.print_to_log_file(f"Removed {folder / STOP_FILE}, which is older than this training.")
        old = newest_first(folder)
        if old and self.current_epoch == 0 and not self.logger.resume and not self.disable_checkpointing:
            self.print_to_log_file(
                f"WARNING: {folder} holds checkpoints of an earlier training ({_described(old)}), which this new one "
                "will replace. To go on with the earlier one, stop now and add --c."
            )

    def _end_workers(self) -> None:
        """Ends the processes of the data loaders, as nnU-Net does after the last epoch."""
        for loader in (self.dataloader_train, self.dataloader_val):
            if hasattr(loader, "_finish"):
                loader._finish()

    # Between iterations

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Lets the methods of the training loop pass through ours, around the overrides of all subclasses."""
        wrappers = {
            "on_train_epoch_start": self._around_train_epoch_start,
            "train_step": self._around_train_step,
            "on_train_epoch_end": self._around_train_epoch_end,
            "on_validation_epoch_start": self._around_validation_epoch_start,
            "validation_step": self._around_validation_step,
            "on_epoch_end": self._around_epoch_end,
        }
        former = {name: vars(self)[name] for name in wrappers if name in vars(self)}
        for name, wrapper in wrappers.items():
            setattr(self, name, partial(wrapper, getattr(self, name)))
        try:
            yield
        finally:
            for name in wrappers:
                delattr(self, name)
            vars(self).update(former)

    def _around_train_epoch_start(self, on_train_epoch_start: Callable[[], None]) -> None:
        on_train_epoch_start()
        self._epoch_outputs = []
        self._num_iterations = self.num_iterations_per_epoch
        if self._restored_epoch is not None:
            # With another number of processes than before some parts are left out or taken twice.
            self._epoch_outputs = list(self._restored_epoch[self.local_rank % len(self._restored_epoch)])
            self._restored_epoch = None
            # nnU-Net reads this number next, and counts from 0.
            self.num_iterations_per_epoch = max(0, self._num_iterations - len(self._epoch_outputs))
            self.print_to_log_file(
                f"Going on after iteration {len(self._epoch_outputs)} of {self._num_iterations} of this epoch."
            )
        self._draw_anew(FOR_TRAINING, self.current_epoch, len(self._epoch_outputs))

    def _around_train_step(self, train_step: Callable[[dict], dict], batch: dict) -> dict:
        self._requests.wait_for_iteration()
        output = train_step(batch)
        self._epoch_outputs.append(output)
        self._draw_anew(FOR_TRAINING, self.current_epoch, len(self._epoch_outputs))
        self._stop_or_save()
        return output

    def _around_train_epoch_end(self, on_train_epoch_end: Callable[[list[dict]], None], outputs: list[dict]) -> None:
        self.num_iterations_per_epoch = self._num_iterations
        # Validation changes no weights: a checkpoint written in it is one from before the epoch's losses were taken in.
        self._unfinished_epoch = self._of_all_processes(self._epoch_outputs)
        self.frozen_checkpoint_state = self.checkpoint_state()
        self._unfinished_epoch = None
        on_train_epoch_end(self._epoch_outputs)

    def _around_validation_epoch_start(self, on_validation_epoch_start: Callable[[], None]) -> None:
        on_validation_epoch_start()
        self._draw_anew(FOR_VALIDATION, self.current_epoch)

    def _around_validation_step(self, validation_step: Callable[[dict], dict], batch: dict) -> dict:
        output = validation_step(batch)
        self._stop_or_save()
        return output

    def _around_epoch_end(self, on_epoch_end: Callable[[], None]) -> None:
        epoch, best = self.current_epoch, self._best_ema
        self.frozen_checkpoint_state = None
        self._epoch_outputs = []
        self._not_written = frozenset()
        try:
            on_epoch_end()
        except OSError as error:  # of progress.png; save_checkpoint handles its own
            self.print_to_log_file(f"WARNING: the figures of epoch {epoch} were not written: {error}")
            self.current_epoch = epoch + 1
        if BEST in self._not_written:
            self._best_ema = best  # what the file holds: the next better epoch is saved again
        if self.current_epoch < self.num_epochs:
            self._stop_or_save()

    def _stop_or_save(self) -> None:
        """Writes a checkpoint if it is time, and ends the training if somebody asked for it."""
        code, is_due = self._agreed(self._requests.code, int(self._is_due()))
        if not code and not is_due:
            return
        self._not_written -= {LATEST}
        # nnU-Net stores the number behind this one, which is where training goes on.
        self.current_epoch -= 1
        try:
            if self.frozen_checkpoint_state is None and self._epoch_outputs:
                self._unfinished_epoch = self._of_all_processes(self._epoch_outputs)
            self.save_checkpoint(str(Path(self.output_folder, LATEST)))
        finally:
            self._unfinished_epoch = None
            self.current_epoch += 1
        self._last_checkpoint = time.monotonic()  # also after a failure, which is not tried in every iteration
        if not code:
            return
        place = f"epoch {self.current_epoch}"
        if self._epoch_outputs:
            place += f", after iteration {len(self._epoch_outputs)} of {self._num_iterations}"
        if self.disable_checkpointing:
            self._stop(code, f"{place}: no checkpoint was written, because checkpointing is disabled.")
        if LATEST in self._not_written:
            self._stop(code, f"{place}, without a checkpoint of it. With --c training goes on from the older one.", 1)
        self._stop(code, f"{place}. The same command with --c goes on from there.")

    def _stop(self, code: int, message: str, status: int | None = None) -> NoReturn:
        """Ends the training on all processes, once the first of them has written its checkpoint."""
        if self.is_ddp:
            distributed.barrier()
        if self.local_rank == 0:
            self._requests.file.unlink(missing_ok=True)  # or it would stop the next training, too
        raise TrainingStopped(f"{describe(code)}: {message}", exit_status(code) if status is None else status)

    def _is_due(self) -> bool:
        """Whether the process that writes checkpoints has gone too long without one."""
        if self.local_rank != 0 or self.disable_checkpointing or self.checkpoint_every_minutes is None:
            return False
        return time.monotonic() - self._last_checkpoint >= 60 * self.checkpoint_every_minutes

    def _agreed(self, *values: int) -> list[int]:
        """The largest of each value among all processes."""
        if not self.is_ddp:
            return list(values)
        device = torch.device("cpu") if distributed.get_backend() == "gloo" else self.device
        largest = torch.tensor(values, device=device)
        distributed.all_reduce(largest, distributed.ReduceOp.MAX)
        return largest.tolist()

    def _of_all_processes(self, value: object) -> list:
        """The value of every process, in order."""
        if not self.is_ddp:
            return [value]
        values = [None] * distributed.get_world_size()
        distributed.all_gather_object(values, value)
        return values

    def _draw_anew(self, *purpose: int) -> None:
        """Seeds every generator that networks and data loaders of nnU-Net draw from; nothing without ``seed``."""
        if self.seed is None:
            return
        words = np.random.SeedSequence([self.seed, self.local_rank, *purpose]).generate_state(4)
        random.seed(words.tobytes())
        np.random.seed(words)  # noqa: NPY002 - what nnU-Net draws from
        torch.manual_seed(int(words[0]) << 32 | int(words[1]))

    # Checkpoints

    def checkpoint_state(self) -> dict:
        """Within an epoch also the results of its iterations so far, which nnU-Net averages at its end."""
        state = super().checkpoint_state()
        return state if self._unfinished_epoch is None else {**state, UNFINISHED_EPOCH: self._unfinished_epoch}

    def restore_checkpoint_state(self, state: dict) -> None:
        """Remembers the results of an unfinished epoch."""
        super().restore_checkpoint_state(state)
        self._restored_epoch = state.get(UNFINISHED_EPOCH)

    def save_checkpoint(self, filename: str) -> None:
        """nnU-Net's checkpoint, whole or not at all.

        If it cannot be written while training, say because the disk is full, training goes on as long as there is an
        older checkpoint; only the final one must not fail. Weights that are no numbers never replace older ones.

        Raises:
            OSError, RuntimeError: If it cannot be written, and no training of this trainer is running.
            CommandStopped: If it was not written, and the training must not go on.
        """
        if self.local_rank != 0 or self.disable_checkpointing:
            super().save_checkpoint(filename)
            return
        file = Path(filename)
        if self._requests is not None and not all_finite(self.unwrapped_network.state_dict().values()):
            self._go_on_without(
                file, "the weights of the network are no longer finite", "Look at the losses in the log"
            )
            return
        try:
            with replacing(file) as temporary:
                super().save_checkpoint(str(temporary))
        except (OSError, RuntimeError) as error:
            of_writing = isinstance(error, OSError) or any(part in str(error) for part in WRITER_MESSAGES)
            if self._requests is None or not of_writing:
                raise
            free = shutil.disk_usage(file.parent).free / 1e9
            reason = f"{error} ({free:.1f} GB are free there)"
            self._go_on_without(file, reason, "Make room there, or check quota and permissions")
        else:
            self._last_checkpoint = time.monotonic()

    def _go_on_without(self, file: Path, reason: str, advice: str) -> None:
        """Says that a checkpoint is missing; ends the training if it would be lost."""
        self._not_written |= {file.name}
        older = newest_first(file.parent)
        if file.name == FINAL or not older:
            rest = f"the same command with --c then goes on from {older[0].name}" if older else "then start again"
            raise CommandStopped(f"error: {file} was not written: {reason}. {advice}; {rest}.")
        self.print_to_log_file(
            f"WARNING: {file} was not written: {reason}. {advice}. Until a checkpoint is written, training can be "
            f"continued from {_described(older[:1])} only."
        )

    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        """nnU-Net's; with ``--c`` from the newest checkpoint that is whole.

        Raises:
            CommandStopped: If the file, or with ``--c`` every checkpoint, is damaged.
        """
        if isinstance(filename_or_checkpoint, str):
            filename_or_checkpoint = str(self._whole_checkpoint(Path(filename_or_checkpoint)))
        super().load_checkpoint(filename_or_checkpoint)
        # Of an epoch that is done again from its beginning, or from its middle, values are logged once more.
        for series in self.logger.get_checkpoint().values():
            del series[self.current_epoch :]

    def _whole_checkpoint(self, asked_for: Path) -> Path:
        """The checkpoint to load where nnU-Net asks for one."""
        folder = Path(self.output_folder)
        goes_on = self.logger.resume and self.dataloader_train is None and asked_for.parent == folder
        candidates = newest_first(folder) if goes_on else [asked_for]
        for file in candidates:
            problem = damage(file)
            if problem is None:
                if goes_on:
                    self.print_to_log_file(f"Going on from {_described([file])}.")
                return file
            self.print_to_log_file(f"WARNING: {file} is damaged and will not be used: {problem}.")
        names = ", ".join(file.name for file in candidates)
        raise CommandStopped(
            f"error: no checkpoint in {asked_for.parent} can be used; damaged: {names}. Copy them from a backup, or "
            + (
                "remove them and train anew without --c."
                if goes_on
                else "go on with the training: --c instead of --val."
            )
        )


def _described(files: list[Path]) -> str:
    """Checkpoints with the times they were written."""
    times = [datetime.fromtimestamp(file.stat().st_mtime).strftime("%Y-%m-%d %H:%M:%S") for file in files]
    return ", ".join(f"{file.name} of {time}" for file, time in zip(files, times, strict=True))
