"""Training in several processes, one for each GPU, on one computer or many: what nnU-Net's trainer leaves open.

nnU-Net (2.8) trains on the GPUs of one computer (``nnUNetv2_train -num_gpus``). Its ``local_rank`` is the rank among
all processes of all computers: right for who writes files, wrong as the number of a GPU. It wraps networks in a way
that fails on the CPU and with parameters that get no gradient, and predicts the validation cases with that wrapper,
which waits for the other processes wherever a network has buffers. All of this is changed here through nnU-Net's
methods, for ``nnUNetv2_train -num_gpus`` as for ``python -m nnunetv2_smallseg.run_distributed``.
"""

from __future__ import annotations

import torch
from torch import distributed, nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel

from nnunetv2_smallseg.errors import CommandStopped

__all__ = ["SeveralProcesses", "check_batch", "wrap"]


def wrap(network: nn.Module, device: torch.device) -> DistributedDataParallel:
    """The network with gradients averaged over all processes, which then hold the weights of the first one.

    Parameters without gradient are no error: frozen ones, and heads whose output the loss does not see. On GPUs batch
    normalisations take their statistics from the batches of all processes, as in nnU-Net. On the CPU, where PyTorch
    cannot do that, they take them from the process's own batch.

    Args:
        network: On ``device``, compiled or not.
        device: Where this process computes.
    """
    on_gpu = device.type == "cuda"
    # A single process has nothing to synchronise, and GuardedBatchNorm2d accepts batches that SyncBatchNorm refuses.
    if on_gpu and distributed.get_world_size() > 1:
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    return DistributedDataParallel(network, device_ids=[device.index] if on_gpu else None, find_unused_parameters=True)


def check_batch(batch_size: int, num_processes: int, batch_dice: bool) -> None:
    """Stops a training whose batch cannot be shared between the processes.

    Args:
        batch_size: Samples of a batch, over all processes.
        num_processes: Processes that share it.
        batch_dice: Whether the loss is a Dice over the whole batch. nnU-Net then gathers one tensor from every process,
            which must be equally large.

    Raises:
        CommandStopped: If there are fewer samples than processes, or their shares differ where they must not.
    """
    if batch_size >= num_processes and (batch_size % num_processes == 0 or not batch_dice):
        return
    needed = "a multiple of it" if batch_dice else "at least as large"
    larger = -(-batch_size // num_processes) * num_processes
    fitting = [number for number in range(1, batch_size + 1) if batch_size % number == 0 or not batch_dice]
    raise CommandStopped(
        f"error: the plans have batch size {batch_size} for {num_processes} processes, but it must be {needed}: start "
        f"{' or '.join(map(str, fitting[-3:]))} processes, or plan with `smallseg plan ... -batch_size {larger}`"
    )


class SeveralProcesses:
    """Makes nnU-Net's trainer run wherever PyTorch's processes do; goes right before it among the bases."""

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 - nnU-Net's signature
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        if self.is_ddp and device.type == "cuda":
            # What starts the process chooses the GPU; nnU-Net takes the rank among all computers for its number.
            self.device = torch.device("cuda", torch.cuda.current_device())
        elif self.is_ddp:
            self.device = device
            self.grad_scaler = None  # as nnU-Net has it without GPU

    @property
    def unwrapped_network(self) -> nn.Module:
        """The network without the wrappers of distributed training and compilation."""
        network = self.network
        if isinstance(network, DistributedDataParallel):
            network = network.module
        return network._orig_mod if isinstance(network, OptimizedModule) else network

    def initialize(self) -> None:
        """Builds network, optimizer and loss; shares the batch between the processes.

        Raises:
            CommandStopped: See ``check_batch``.
        """
        if not self.is_ddp:
            super().initialize()
            return
        configuration = self.configuration_manager
        check_batch(configuration.batch_size, distributed.get_world_size(), configuration.batch_dice)
        # As one process, for nnU-Net's way of wrapping is not ours; then what else depends on their number.
        self.is_ddp = False
        try:
            super().initialize()
        finally:
            self.is_ddp = True
        self._set_batch_size_and_oversample()
        self.network = wrap(self.network, self.device)
        self.loss = self._build_loss()

    def on_train_start(self) -> None:
        """Starts the data loaders, with the folds that one process has written."""
        if self.is_ddp:
            if self.local_rank == 0:
                self.do_split()
            distributed.barrier()
        super().on_train_start()

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """Switches deep supervision."""
        self.unwrapped_network.decoder.deep_supervision = enabled

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """nnU-Net's final validation, each process on its own share of the cases.

        Cases differ in size, so processes call the network differently often. Distributed training's wrapper would
        wait for the others in each call, to give them the buffers of batch normalisations.
        """
        network = self.network
        if self.is_ddp:
            self.network = network.module
        try:
            super().perform_actual_validation(save_probabilities)
        finally:
            self.network = network
