"""Trains under ``torchrun``, on the GPUs of one or several computers: ``python -m nnunetv2_smallseg.run_distributed``.

Takes the arguments of ``nnUNetv2_train``, but for ``-num_gpus``: ``torchrun`` starts the processes. Everything else is
done by nnU-Net's own functions and by the trainer. ``docs/distributed.md`` has examples.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import uuid
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from io import BytesIO
from multiprocessing import get_context
from pathlib import Path
from time import monotonic, sleep

import torch
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from torch import distributed, nn
from torch.backends import cudnn
from torch.distributed.elastic.multiprocessing.errors import record

from nnunetv2_smallseg.errors import CommandStopped, SmallSegError, UsageError
from nnunetv2_smallseg.trainers.several_processes import SeveralProcesses

__all__ = ["build_parser", "main"]

ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
TORCHRUN = "torchrun --standalone --nproc_per_node 2 -m nnunetv2_smallseg.run_distributed 901 2d 0 -tr TRAINER -p PLANS"
# How long a process waits for the others: the first one may prepare data meanwhile, or export a large case.
TIMEOUT = timedelta(hours=2)
# How long a new file may take to be seen by other computers.
SECONDS_UNTIL_SEEN = 60


def build_parser() -> argparse.ArgumentParser:
    """The arguments of ``nnUNetv2_train``."""
    parser = argparse.ArgumentParser(prog="python -m nnunetv2_smallseg.run_distributed", description=__doc__)
    parser.add_argument("dataset_name_or_id", help="name or number of the data set")
    parser.add_argument("configuration", help="configuration of the plans: 2d, 2.5d, ...")
    parser.add_argument("fold", type=_fold, help="0 to 4, or all")
    parser.add_argument("-tr", default="nnUNetTrainer", help="trainer, see `smallseg trainers`")
    parser.add_argument("-p", default="nnUNetPlans", help="name of the plans (default: %(default)s)")
    parser.add_argument("-pretrained_weights", help="nnU-Net checkpoint to start from")
    parser.add_argument("-num_gpus", type=int, help="refused: torchrun says how many processes there are")
    parser.add_argument("--npz", action="store_true", help="save the probabilities of the final validation, too")
    parser.add_argument("--c", action="store_true", help="go on from the latest checkpoint")
    parser.add_argument("--val", action="store_true", help="run the final validation only")
    parser.add_argument("--val_best", action="store_true", help="validate checkpoint_best instead of checkpoint_final")
    parser.add_argument("--disable_checkpointing", action="store_true", help="write no checkpoints")
    parser.add_argument("-device", default="cuda", choices=("cuda", "cpu"), help="default: %(default)s")
    return parser


def _fold(text: str) -> int | str:
    if text == "all":
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor 'all'") from None


def _check(arguments: argparse.Namespace) -> None:
    """Refuses what does not fit together.

    Raises:
        UsageError: Naming the arguments.
    """
    if arguments.num_gpus is not None:
        raise UsageError(
            f"-num_gpus {arguments.num_gpus} has no meaning here: leave it out, and say how many processes each "
            "computer runs by torchrun's --nproc_per_node"
        )
    excluded = (("--c", "--val"), ("--c", "-pretrained_weights"), ("--val_best", "--disable_checkpointing"))
    for pair in excluded:
        if all(getattr(arguments, name.lstrip("-")) for name in pair):
            raise UsageError(f"{pair[0]} and {pair[1]} exclude each other: leave out one of them")
    weights = arguments.pretrained_weights
    if weights is not None and not Path(weights).is_file():
        raise SmallSegError(f"-pretrained_weights: there is no file {weights} on {socket.gethostname()}")


def _join_processes(device_type: str) -> torch.device:
    """Joins the processes that torchrun started.

    Args:
        device_type: "cuda" or "cpu".
    Returns:
        Where this process computes.
    Raises:
        UsageError: If torchrun did not start this process.
        SmallSegError: If there is no GPU for it.
    """
    missing = [name for name in ENVIRONMENT if name not in os.environ]
    if missing:
        raise UsageError(
            f"not started by torchrun ({', '.join(missing)} not set). Start it so, with the number of GPUs of this "
            f"computer:\n  {TORCHRUN}\nFor a single process use nnUNetv2_train."
        )
    if device_type == "cpu":
        distributed.init_process_group("gloo", timeout=TIMEOUT)
        return torch.device("cpu")
    local_rank, available = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local_rank >= available:
        raise SmallSegError(
            f"process {local_rank} (counted from 0) of {socket.gethostname()} finds {available} GPUs there: start "
            f"at most {available} by --nproc_per_node, or none with -device cpu"
            if available
            else f"{socket.gethostname()} has no GPU that PyTorch can use (nvidia-smi, CUDA_VISIBLE_DEVICES): mend "
            "that, or add -device cpu"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    # Threads of PyTorch do not help nnU-Net on a GPU, and nnUNetv2_train sets both likewise.
    torch.set_num_threads(1)
    cudnn.benchmark = True
    distributed.init_process_group("nccl", timeout=TIMEOUT, device_id=device)
    return device


def _check_trainer(name: str) -> None:
    """Refuses trainers that nnU-Net's own limits to one computer.

    Raises:
        NotImplementedError: If the trainer is not built on this package.
    """
    trainer = recursive_find_trainer_class_by_name(name)
    if not issubclass(trainer, SeveralProcesses):
        raise NotImplementedError(
            f"{name} under torchrun: nnU-Net's own trainers take the rank among all computers for the number of a GPU. "
            "Choose one of `smallseg trainers`, or on one computer nnUNetv2_train -num_gpus"
        )


def _check_folder_is_shared(folder: Path) -> None:
    """Stops if a computer does not see what the first process writes to ``folder``.

    Raises:
        SmallSegError: On the processes that do not see it.
    """
    first = distributed.get_rank() == 0
    token = [uuid.uuid4().hex if first else None, socket.gethostname()]
    distributed.broadcast_object_list(token, 0)
    file = folder / f".shared_{token[0]}"
    if first:
        file.touch()
    distributed.barrier()
    deadline = monotonic() + SECONDS_UNTIL_SEEN
    while not (seen := file.exists()) and monotonic() < deadline:
        sleep(0.5)
    distributed.barrier()
    if first:
        file.unlink()
    if not seen:
        raise SmallSegError(
            f"{folder} on {socket.gethostname()} is not the folder of that name on {token[1]}, where checkpoints are "
            "written: let nnUNet_results name a file system that all computers share"
        )


class _Weights:
    """A state dict in place of a network: what nnU-Net's transfer of weights asks of one."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        self.state = state

    def state_dict(self) -> dict[str, torch.Tensor]:
        return dict(self.state)

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.state = state


def _as_bytes(state: dict[str, torch.Tensor]) -> bytes:
    file = BytesIO()
    torch.save(state, file)
    return file.getvalue()


def _from_bytes(content: bytes) -> dict[str, torch.Tensor]:
    return torch.load(BytesIO(content), map_location="cpu", weights_only=True)


def _transferred(state: bytes, file: str) -> bytes:
    """The state dict after nnU-Net's transfer of the weights in ``file``."""
    weights = _Weights(_from_bytes(state))
    load_pretrained_weights(weights, file, verbose=True)
    return _as_bytes(weights.state)


def _load_pretrained_weights(network: nn.Module, file: str) -> None:
    """Gives all processes the weights of a checkpoint, read by the first one.

    Among several processes nnU-Net's function reads the file to the GPU that has the rank for its number. There may be
    none, so it runs in a process of its own, which belongs to no group.
    """
    state = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
    if distributed.get_rank() == 0:
        with ProcessPoolExecutor(1, get_context("spawn")) as alone:
            transferred = _from_bytes(alone.submit(_transferred, _as_bytes(state), file).result())
        for name, tensor in state.items():
            tensor.copy_(transferred[name])
    for tensor in state.values():
        distributed.broadcast(tensor, 0)
    network.load_state_dict(state)


def _train(options: argparse.Namespace, device: torch.device) -> None:
    """Trains and validates, as ``nnUNetv2_train`` does with these arguments."""
    _check_trainer(options.tr)
    trainer = get_trainer_from_args(
        options.dataset_name_or_id, options.configuration, options.fold, options.tr, options.p, options.c, device
    )
    _check_folder_is_shared(Path(trainer.output_folder))
    trainer.disable_checkpointing = options.disable_checkpointing
    if options.pretrained_weights is None or options.val:
        maybe_load_checkpoint(trainer, options.c, options.val)
    else:
        trainer.initialize()
        _load_pretrained_weights(trainer.unwrapped_network, options.pretrained_weights)
    if not options.val:
        trainer.run_training()
    if options.val_best:
        trainer.load_checkpoint(str(Path(trainer.output_folder, "checkpoint_best.pth")))
    trainer.perform_actual_validation(options.npz)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one of the processes that torchrun started.

    Args:
        arguments: Command line; None for that of the process.
    Returns:
        Exit status: 0, or 1 and 2 as for ``smallseg``. torchrun ends all processes when one fails.
    """
    try:
        options = build_parser().parse_args(arguments)
        _check(options)
        _train(options, _join_processes(options.device))
    except CommandStopped:
        raise
    except SmallSegError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    if distributed.get_backend() == "gloo":
        distributed.barrier()  # in PyTorch 2.7 gloo may wait forever for a process that is gone
    distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(record(main)())  # torchrun reports the error of the process that failed first
