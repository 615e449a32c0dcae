"""One training of the study: any trainer, from a seed, until its budget is used up; then the held-out cases."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from benchmarks.small_lesions.arms import Arm, base_trainer, missing
from nnunetv2_smallseg.errors import SmallSegError

__all__ = ["BudgetedTraining", "predict", "seed_everything", "study_trainer"]


def seed_everything(seed: int) -> None:
    """Seeds every generator that nnU-Net draws from in this process."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - what nnU-Net's data loader draws from
    torch.manual_seed(seed)


def _tensors(outputs: object) -> list[torch.Tensor]:
    """All tensors of nested lists and tuples."""
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    return [tensor for part in outputs for tensor in _tensors(part)] if isinstance(outputs, list | tuple) else []


class BudgetedTraining:
    """Goes before a trainer of nnU-Net: one training from a seed that ends when its budget is used up.

    The epochs of the trainer are equal shares of the budget, be it iterations or seconds: learning rate, curriculum and
    frozen encoders follow the share that is used. An epoch that passes within one iteration is left out. There is no
    validation after an epoch and no checkpoint: the weights of the end count.

    Time is that of all threads of the process on a CPU, which hardly depends on what else the machine does, and that of
    the clock on a GPU. It counts drawing and augmenting the patches, training steps and the ends of epochs, not the
    preparation: reading tables of lesions, building the network, compiling.

    Attributes:
        study_seed: Of the initial weights, patches and augmentation (where patches are drawn in the same process).
        max_iterations: Budget, or None.
        max_seconds: Budget, or None; one of both is given.
        iterations: Iterations of the training.
        seconds: Time of the training.
        last_losses: Losses of the last epoch.
    """

    study_seed: int
    max_iterations: int | None = None
    max_seconds: float | None = None
    iterations: int = 0
    seconds: float = 0.0
    last_losses: list[float]

    def initialize(self) -> None:
        """Seeded initial weights; nothing is written but the log."""
        seed_everything(self.study_seed)
        super().initialize()
        self.disable_checkpointing = True

    def now(self) -> float:
        """Time in seconds, see the class."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def _share_used(self, start: float) -> float:
        """Share of the budget that is used."""
        self.seconds = self.now() - start
        return self.iterations / self.max_iterations if self.max_seconds is None else self.seconds / self.max_seconds

    def _compile(self) -> None:
        """One pass forth and back that changes nothing, so that kernels compiled on first use are not timed."""
        self.network.eval()
        patch = torch.zeros(2, self.num_input_channels, *self.configuration_manager.patch_size, device=self.device)
        sum(output.sum() for output in _tensors(self.network(patch))).backward()
        self.optimizer.zero_grad(set_to_none=True)

    def run_training(self) -> None:
        """Trains until the budget is used up."""
        self.on_train_start()
        self._compile()
        share, start = 0.0, self.now()
        for epoch in range(self.num_epochs):
            self.current_epoch, end, outputs = epoch, (epoch + 1) / self.num_epochs, []
            if share >= end:
                continue
            # Arms see the same patches: what else an arm draws moves the generators no further than to here.
            seed_everything(self.study_seed * 100_000 + epoch)
            self.on_train_epoch_start()
            while share < end:
                outputs.append(self.train_step(next(self.dataloader_train)))
                self.iterations += 1
                share = self._share_used(start)
            self.on_train_epoch_end(outputs)
            self.last_losses = [float(output["loss"]) for output in outputs]
        self._share_used(start)
        self.current_epoch = self.num_epochs
        self.on_train_end()


def study_trainer(
    arm: Arm, seed: int, *, max_iterations: int | None = None, max_seconds: float | None = None
) -> type[BudgetedTraining]:
    """The trainer class of a run.

    Raises:
        SmallSegError: If this version of the package cannot train the arm.
        ValueError: Unless exactly one budget is given.
    """
    if (max_iterations is None) == (max_seconds is None):
        raise ValueError(f"max_iterations is {max_iterations} and max_seconds {max_seconds}: give one of both")
    reason = missing(arm)
    if reason is not None:
        raise SmallSegError(f"the arm {arm.name} cannot be trained: {reason}")
    budget = {"study_seed": seed, "max_iterations": max_iterations, "max_seconds": max_seconds}
    base = base_trainer(arm)
    return type(f"{base.__name__}Study", (BudgetedTraining, base), {**arm.attributes, **budget})


def predict(trainer: BudgetedTraining, cases: Iterable[str], folder: Path) -> None:
    """Segments preprocessed cases with nnU-Net's sliding window, without mirroring, in this process."""
    from nnunetv2.inference.export_prediction import export_prediction_from_logits
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    trainer.set_deep_supervision_enabled(False)
    trainer.network.eval()
    predictor = nnUNetPredictor(tile_step_size=0.5, use_mirroring=False, device=trainer.device, allow_tqdm=False)
    predictor.manual_initialization(
        trainer.network, trainer.plans_manager, trainer.configuration_manager, None, trainer.dataset_json,
        type(trainer).__name__, None,
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    dataset = trainer.dataset_class(trainer.preprocessed_dataset_folder, list(cases))
    for case in dataset.identifiers:
        data, _, _, properties = dataset.load_case(case)
        logits = predictor.predict_sliding_window_return_logits(torch.from_numpy(np.array(data[:]))).cpu()
        export_prediction_from_logits(
            logits, properties, trainer.configuration_manager, trainer.plans_manager, trainer.dataset_json,
            str(folder / case), num_threads_torch=1,
        )  # fmt: skip
