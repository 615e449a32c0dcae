"""Predicts the memory that a training step takes, by rehearsing it on tensors without data.

The trainer's own ``train_step`` runs on PyTorch's fake tensors: forward, loss, backward, clipping and optimizer, with
the optimizer's state in place. Every storage that an operator returns is followed from birth to death, so views and
operations in place count once, and what the backward pass keeps counts for as long as it is kept. A scan allocates
inside one operator: there its back end runs, without the kernels.

What is not seen: workspaces of libraries (cuDNN, oneDNN), blocks that PyTorch's allocator holds in reserve, and the
context of the GPU's driver.
"""

from __future__ import annotations

import io
import os
import tempfile
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nnunetv2_smallseg.errors import SmallSegError
from nnunetv2_smallseg.ops import scan, ss2d  # noqa: F401 - they register the operators
from nnunetv2_smallseg.ops.arguments import ScanInputs
from nnunetv2_smallseg.ops.dispatch import (
    BACKENDS,
    ENVIRONMENT_VARIABLE,
    Backend,
    chosen_backend_name,
    requested_backend,
    run_backward,
    run_forward,
    run_ss2d_backward,
    run_ss2d_forward,
)
from nnunetv2_smallseg.ops.ss2d_arguments import SS2DInputs
from nnunetv2_smallseg.ops.tracing import standing_for
from nnunetv2_smallseg.plans.cuda_precision import CudaPrecision
from nnunetv2_smallseg.trainers.slabs import SlabTrainer

__all__ = ["TrainingMemory", "build_trainer", "prepare_trainer", "random_batch", "training_memory"]

# What CUDA's allocator rounds every block to.
CUDA_BLOCK = 512
DEVICE_TYPES = ("cuda", "cpu")


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes in use at the peak of a training step, by what they are for.

    Attributes:
        parameters: Parameters and buffers of the network.
        optimizer_state: What the optimizer keeps from step to step.
        batch: Images and targets.
        activations: What the network's forward pass made.
        loss: What the loss made.
        gradients: Gradients of the parameters.
        temporary: What backward pass and optimizer made and do not keep.
        moment: Where the peak is: "forward", "loss", "backward" or "optimizer".
    """

    parameters: int
    optimizer_state: int
    batch: int
    activations: int
    loss: int
    gradients: int
    temporary: int
    moment: str

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """Bytes by what they are for."""
        return {name: value for name, value in vars(self).items() if name != "moment"}


def training_memory(
    trainer_class: type[SlabTrainer],
    plans: Mapping[str, Any],
    configuration: str,
    dataset_json: Mapping[str, Any],
    *,
    device_type: str = "cuda",
    grad_checkpointing: bool = False,
) -> TrainingMemory:
    """Predicts the peak of the memory of a training step, without a GPU and without allocating any of it.

    On CUDA it is that of nnU-Net's mixed precision (float16) without ``torch.compile``.

    Args:
        trainer_class: The trainer.
        plans: Plans; the configuration's patch and batch size are those of the step.
        configuration: Name of the configuration.
        dataset_json: nnU-Net's description of the data set.
        device_type: "cuda" or "cpu".
        grad_checkpointing: Whether the network computes activations again in the backward pass.
    Raises:
        NotImplementedError: If the network cannot do so.
        SmallSegError: If the memory of the scans cannot be predicted (``scan_backend``).
        ValueError: If ``device_type`` is another, or the network cannot train on such a batch.
    """
    if device_type not in DEVICE_TYPES:
        raise ValueError(f"device_type is {device_type!r}, but must be one of {', '.join(DEVICE_TYPES)}")
    backend = scan_backend(device_type)
    trainer = build_trainer(trainer_class, plans, configuration, dataset_json)
    followed = _FollowedStorages(backend, CUDA_BLOCK if device_type == "cuda" else 1)
    with standing_for(device_type), FakeTensorMode(), _NumbersWithoutData(), followed:
        prepare_trainer(trainer)
        if grad_checkpointing:
            trainer.planar_network.set_grad_checkpointing()
        followed.phase = "optimizer_state"
        _all_at_once(trainer.optimizer, True)  # far fewer operators; what they leave behind is the same
        for parameter in trainer.network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad(set_to_none=True)
        # PyTorch's choice for parameters on CUDA, which makes temporary tensors for all of them at once.
        _all_at_once(trainer.optimizer, device_type == "cuda")
        followed.phase = "batch"
        batch = random_batch(trainer)
        followed.start()
        with _phases(trainer, followed, CudaPrecision() if device_type == "cuda" else None):
            trainer.train_step(batch)
    return followed.summary()


def _all_at_once(optimizer: torch.optim.Optimizer, enabled: bool) -> None:
    """Whether an optimizer's operators take all parameters together."""
    for group in optimizer.param_groups:
        group["foreach"] = enabled


def scan_backend(device_type: str) -> Backend:
    """The back end of the scans that a training on such a device would use: Triton's on a GPU that is not here.

    Raises:
        SmallSegError: If its memory cannot be predicted.
    """
    requested = requested_backend()
    if device_type == "cpu" or torch.cuda.is_available():
        name = chosen_backend_name(device_type, operator="ss2d")
    else:
        name = "triton" if requested == "auto" else requested
    if name in ("mamba_ssm", "reference"):
        raise SmallSegError(
            f"the memory of scans by the back end {name!r} cannot be predicted: unset {ENVIRONMENT_VARIABLE}, or set "
            "it to another back end, for planning"
        )
    return BACKENDS[name]


@contextmanager
def _results_elsewhere() -> Iterator[None]:
    """nnU-Net's trainers make their results folder, and may announce a run to a server, when they are constructed."""
    changes = {"nnUNet_wandb_enabled": "0"}
    with tempfile.TemporaryDirectory() as folder:
        changes["nnUNet_results"] = folder
        before = {name: os.environ.get(name) for name in changes}
        os.environ.update(changes)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def build_trainer(
    trainer_class: type[SlabTrainer], plans: Mapping, configuration: str, dataset_json: Mapping, device: str = "cpu"
) -> SlabTrainer:
    """A trainer that leaves no results folder and prints nothing; call ``prepare_trainer`` next.

    Args:
        trainer_class: The trainer.
        plans: Plans with the configuration.
        configuration: Its name.
        dataset_json: nnU-Net's description of the data set.
        device: Where to train.
    """
    rehearsed = type(trainer_class.__name__, (trainer_class,), {"needs_preprocessed_data": False})
    with _results_elsewhere(), redirect_stdout(io.StringIO()):
        content = {**deepcopy(dict(plans)), "continue_training": False}
        trainer = rehearsed(content, configuration, 0, dict(dataset_json), torch.device(device))
    trainer.print_to_log_file = lambda *_, **__: None  # its file is gone
    return trainer


def prepare_trainer(trainer: SlabTrainer) -> None:
    """What nnU-Net's ``initialize`` does, short of compiling and of looking at the preprocessed data."""
    trainer.num_input_channels = determine_num_input_channels(
        trainer.plans_manager, trainer.configuration_manager, trainer.dataset_json
    )
    trainer.network = trainer.build_network_architecture(
        trainer.plans_manager,
        trainer.configuration_manager,
        trainer.num_input_channels,
        trainer.label_manager.num_segmentation_heads,
        trainer.enable_deep_supervision,
    )
    if trainer.device.type != "cpu":
        trainer.network.to(trainer.device)
    trainer.optimizer, trainer.lr_scheduler = trainer.configure_optimizers()
    trainer.loss = trainer._build_loss()
    trainer.was_initialized = True
    trainer.prepare_rehearsal(["case"])


def random_batch(trainer: SlabTrainer) -> dict[str, Any]:
    """A batch as the data loader gives it: images (B, C, [S,] H, W) and labels, or regions, at every scale."""
    patch_size, batch_size = trainer.configuration_manager.patch_size, trainer.configuration_manager.batch_size
    labels = trainer.label_manager
    channels = 1
    if labels.has_regions:
        channels = len(labels.foreground_regions) + labels.has_ignore_label
    scales = trainer._get_deep_supervision_scales() if trainer.enable_deep_supervision else [[1] * len(patch_size)]
    targets = [
        torch.randint(
            0,
            2,
            (batch_size, channels, *(round(size * factor) for size, factor in zip(patch_size, scale, strict=True))),
            dtype=torch.bool if labels.has_regions else torch.int16,
        )
        for scale in scales
    ]
    return {
        "data": torch.randn(batch_size, trainer.num_input_channels, *patch_size),
        "target": targets if trainer.enable_deep_supervision else targets[0],
        "keys": ["case"] * batch_size,
    }


@contextmanager
def _phases(trainer: SlabTrainer, followed: _FollowedStorages, precision: CudaPrecision | None) -> Iterator[None]:
    """Tells the phases of the step, and switches mixed precision on from the network to the loss."""
    contexts = ExitStack()

    def enter(phase: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            followed.phase = phase
            if phase == "forward" and precision is not None:
                contexts.enter_context(precision)
            elif phase == "backward":
                contexts.close()
            elif phase == "optimizer":
                followed.note_gradients(trainer.network.parameters())

        return hook

    with contexts:
        trainer.network.register_forward_pre_hook(enter("forward"))
        trainer.network.register_forward_hook(enter("loss"))
        trainer.loss.register_forward_hook(enter("backward"))
        trainer.optimizer.register_step_pre_hook(enter("optimizer"))
        yield


class _NumbersWithoutData(TorchFunctionMode):
    """Gives zeros where a training step asks for the values of a tensor, as nnU-Net's does to log the loss."""

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Calls a function of PyTorch."""
        if func is Tensor.numpy:
            return np.zeros(args[0].shape)
        return func(*args, **(kwargs or {}))


@dataclass
class _Storage:
    """A storage: its size in bytes, the phase and the time of its birth, and the time of its death."""

    size: int
    phase: str
    born: int
    died: int | None = None


class _FollowedStorages(TorchDispatchMode):
    """Follows every storage that an operator returns until nothing refers to it any more.

    Args:
        backend: Runs the scans.
        block: Sizes are rounded up to multiples of this.

    Attributes:
        phase: What is going on: "parameters", "optimizer_state", "batch", "forward", "loss", "backward", "optimizer".
    """

    def __init__(self, backend: Backend, block: int) -> None:
        super().__init__()
        self.backend, self.block = backend, block
        self.phase = "parameters"
        self._storages: list[_Storage] = []
        self._alive: dict[int, tuple[weakref.ref, _Storage]] = {}
        self._clock = 0
        self._in_use = self._peak = self._peak_time = 0
        self._peak_phase = self.phase
        self._gradients: list[_Storage] = []
        operators = torch.ops.nnunetv2_smallseg
        self._scans = {
            operators.selective_scan.default: lambda *x: run_forward(self.backend, ScanInputs(*x[:8]), x[8]),
            operators.selective_scan_backward.default: self._scan_backward,
            operators.ss2d.default: lambda *x: run_ss2d_forward(self.backend, SS2DInputs(*x[:6]), x[6]),
            operators.ss2d_backward.default: self._ss2d_backward,
        }

    def _scan_backward(self, gradient: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
        gradients = run_backward(self.backend, ScanInputs(*inputs[:8]), inputs[8], gradient)
        return tuple(gradient.new_empty(0) if x is None else x for x in gradients)

    def _ss2d_backward(self, gradient: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
        return tuple(run_ss2d_backward(self.backend, SS2DInputs(*inputs[:6]), inputs[6], gradient))

    def __torch_dispatch__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Runs an operator and takes note of the storages of its results."""
        if func is torch.ops.aten._local_scalar_dense.default:
            # While a network is built, numbers are drawn again as long as any is out of bounds: none is. In a training
            # step, nnU-Net asks whether any pixel is not to be ignored: one is.
            value = self.phase != "parameters"
            return value if args[0].dtype == torch.bool else int(value)
        if func in self._scans:
            with self:
                result = self._scans[func](*args)
        else:
            result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._note(leaf)
        return result

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, -(-storage.nbytes() // self.block) * self.block
        if size == 0 or key in self._alive:
            return
        self._clock += 1
        entry = _Storage(size, self.phase, self._clock)
        self._storages.append(entry)
        self._alive[key] = weakref.ref(storage, lambda _: self._forget(key)), entry
        self._in_use += size
        if self._in_use > self._peak:
            self._take_as_peak()

    def _forget(self, key: int) -> None:
        self._clock += 1
        _, entry = self._alive.pop(key)
        entry.died = self._clock
        self._in_use -= entry.size

    def _take_as_peak(self) -> None:
        self._peak, self._peak_time, self._peak_phase = self._in_use, self._clock, self.phase

    def start(self) -> None:
        """From here on the peak is looked for."""
        self._take_as_peak()

    def note_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Remembers which storages are the gradients of parameters."""
        for parameter in parameters:
            if parameter.grad is not None:
                self._gradients.append(self._alive[parameter.grad.untyped_storage()._cdata][1])

    def summary(self) -> TrainingMemory:
        """What was alive at the peak."""
        gradients = set(map(id, self._gradients))
        sizes: Counter[str] = Counter()
        for entry in self._storages:
            if entry.born <= self._peak_time and (entry.died is None or entry.died > self._peak_time):
                sizes["gradients" if id(entry) in gradients else _PART_OF_PHASE[entry.phase]] += entry.size
        parts = ("parameters", "optimizer_state", "batch", "activations", "loss", "gradients", "temporary")
        return TrainingMemory(**{name: sizes[name] for name in parts}, moment=self._peak_phase)


_PART_OF_PHASE = {
    "parameters": "parameters",
    "optimizer_state": "optimizer_state",
    "batch": "batch",
    "forward": "activations",
    "loss": "loss",
    "backward": "temporary",
    "optimizer": "temporary",
}
