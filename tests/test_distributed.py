"""Two processes that train together on the CPU: every trainer of the registry, one pair of processes for all."""

from __future__ import annotations

import copy
import json
import os
import socket
import sys
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import shrink_networks
from torch import distributed, multiprocessing

from nnunetv2_smallseg import registry, trainers
from nnunetv2_smallseg.architectures.blocks.batch_norm import GuardedBatchNorm2d
from nnunetv2_smallseg.errors import CommandStopped
from nnunetv2_smallseg.trainers import base, several_processes

NUM_PROCESSES = 2


def flat(tensors) -> torch.Tensor:
    """All tensors in one, to compare them at once."""
    return torch.cat([tensor.detach().flatten().double() for tensor in tensors])


def equal_everywhere(tensor: torch.Tensor) -> bool:
    """Whether all processes hold the same."""
    others = [torch.empty_like(tensor) for _ in range(NUM_PROCESSES)]
    distributed.all_gather(others, tensor)
    return all(torch.equal(tensor, other) for other in others)


def quiet(network: torch.nn.Module) -> None:
    """Leaves out what is drawn at random in training or depends on the share of a batch."""
    for module in network.modules():
        if hasattr(module, "rate"):
            module.rate = 0.0
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if any(isinstance(module, torch.nn.BatchNorm2d) for module in network.modules()):
        network.eval()


def make(name: str, plans: dict, dataset_json: dict, configuration: str):
    plans = copy.deepcopy(plans)
    plans["continue_training"] = False
    return getattr(trainers, name)(plans, configuration, 0, dataset_json, torch.device("cpu"))


def train_and_compare(name: str, configuration: str, plans: dict, dataset_json: dict) -> dict:
    """Steps of a trainer, frozen and not, and one compared with that of one process with the whole batch."""
    rank = distributed.get_rank()
    torch.manual_seed(rank)  # the wrapper must make the processes agree
    np.random.seed(rank)  # noqa: NPY002 - what nnU-Net's data loader draws from
    trainer = make(name, plans, dataset_json, configuration)
    trainer.on_train_start()
    network = trainer.unwrapped_network
    facts = {
        "batch": trainer.batch_size,
        "device": str(trainer.device),
        "equal at start": equal_everywhere(flat(network.state_dict().values())),
    }
    encoder = list(trainer.planar_network.encoder_parameters()) if hasattr(trainer, "planar_network") else []
    frozen_epochs = getattr(trainer, "freeze_encoder_epochs", 0)
    images = []
    facts["epochs"] = []
    for epoch in (0, frozen_epochs) if frozen_epochs else (0,):
        before = flat(network.parameters()), flat(encoder) if encoder else None
        trainer.current_epoch = epoch
        for series in trainer.logger.local_logger.my_fantastic_logging.values():
            series.extend([float("nan")] * (epoch - len(series)))
        trainer.on_train_epoch_start()
        results = []
        for _ in range(2):  # unused parameters are noticed in the second iteration
            batch = next(trainer.dataloader_train)
            images.append(batch["data"])
            results.append(trainer.train_step(batch))
        trainer.on_train_epoch_end(results)
        after = flat(network.parameters())
        facts["epochs"].append(
            {
                "equal": equal_everywhere(after),
                "moved": not torch.equal(after, before[0]),
                "encoder moved": bool(encoder) and not torch.equal(flat(encoder), before[1]),
                "frozen": epoch < frozen_epochs,
            }
        )
    facts["same images"] = equal_everywhere(flat(images))

    alone = make(name, plans, dataset_json, configuration)
    alone.is_ddp = False
    alone.initialize()
    for buffer in network.buffers():  # of batch normalisations, on the CPU each process has its own
        distributed.broadcast(buffer, 0)
    alone.unwrapped_network.load_state_dict(network.state_dict())
    if hasattr(trainer, "curriculum"):
        alone.curriculum, alone._measured, alone._weight_table = trainer.curriculum, [], trainer._weight_table
        alone.loss.weights = None
    # In float64, because few values in a normalisation make rounding errors grow.
    trainer.network, alone.network = several_processes.wrap(network.double(), trainer.device), alone.network.double()
    for one in (trainer, alone):
        one.optimizer = torch.optim.SGD(one.network.parameters(), lr=0.0)
        one.network.train()
        quiet(one.network)
    cases = [str(key) for key in trainer.do_split()[0][:NUM_PROCESSES]]
    generator = torch.Generator().manual_seed(0)
    patch = trainer.configuration_manager.patch_size
    scales = trainer._get_deep_supervision_scales() or [[1.0] * len(patch)]
    image = torch.randn((NUM_PROCESSES, 1, *patch), generator=generator).double()
    targets = [
        torch.randint(0, 2, (NUM_PROCESSES, 1, *[round(n * s) for n, s in zip(patch, scale, strict=True)]),
                      generator=generator)
        for scale in scales
    ]  # fmt: skip

    def batch(share: slice) -> dict:
        shares = [target[share] for target in targets]
        labels = shares if trainer.enable_deep_supervision else shares[0]
        return {"data": image[share], "target": labels, "keys": cases[share]}

    trainer.train_step(batch(slice(rank, rank + 1)))
    alone.train_step(batch(slice(None)))
    pairs = [
        (own.grad, whole.grad)
        for own, whole in zip(network.parameters(), alone.unwrapped_network.parameters(), strict=True)
        if whole.grad is not None
    ]
    own, whole = (flat(gradients) for gradients in zip(*pairs, strict=True))
    facts["largest gradient"] = float(whole.abs().max())
    facts["difference"] = float((own - whole).abs().max())
    facts["gradients"] = len(pairs)
    return facts


class Nothing:
    """Stands for the report of loading weights where the file itself is not the point."""

    summary = staticmethod(lambda: "weights replaced by the test")


def one_process(rank: int, port: int, names: list[str], plans: dict, dataset_json: dict, folder: str) -> None:
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - for the life of the process
    torch.set_num_threads(1)
    base.load_pretrained = lambda *arguments, **options: Nothing
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=NUM_PROCESSES)
    for index, name in enumerate(names):
        configuration = ("2d", "2.5d")[index % 2]
        try:
            facts = train_and_compare(name, configuration, plans, dataset_json)
        except Exception:
            # The other process waits in vain from here on.
            Path(folder, f"{name}_{rank}.txt").write_text(traceback.format_exc())
            os._exit(1)
        Path(folder, f"{name}_{rank}.json").write_text(json.dumps(facts))
    distributed.barrier()  # gloo of PyTorch 2.7 may wait forever for a process that is gone
    distributed.destroy_process_group()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_every_trainer_in_two_processes(nnunet_folders, tmp_path):
    plans = nnunet_folders.plans()
    plans["configurations"]["2d"].update(batch_size=NUM_PROCESSES, patch_size=[32, 32])
    plans["configurations"]["2.5d"]["patch_size"] = [3, 32, 32]
    shrink_networks(plans)
    names = list(registry.trainers())
    try:
        multiprocessing.spawn(
            one_process,
            (free_port(), names, plans, nnunet_folders.dataset_json(), str(tmp_path)),
            nprocs=NUM_PROCESSES,
        )
    except multiprocessing.ProcessExitedException:
        pytest.fail("\n".join(file.read_text() for file in sorted(tmp_path.glob("*.txt"))))
    for name in names:
        first, second = (json.loads((tmp_path / f"{name}_{rank}.json").read_text()) for rank in range(NUM_PROCESSES))
        assert first == second, name
        assert first["batch"] == 1, name
        assert first["device"] == "cpu", name
        assert first["equal at start"], name
        assert not first["same images"], name
        for epoch in first["epochs"]:
            assert epoch["equal"], name
            assert epoch["moved"], name
            assert epoch["encoder moved"] is (registry.trainer(name).network is not None and not epoch["frozen"]), name
        assert not first["epochs"][-1]["frozen"], name
        # nnU-Net gives the lowest output of several processes the weight 1e-6 instead of 0.
        assert first["difference"] < 1e-4 * first["largest gradient"], (name, first)


def small_network(name: str) -> torch.nn.Module:
    import importlib

    entry = registry.network(name)
    torch.manual_seed(0)
    return getattr(importlib.import_module(entry.module), name)(1, 2, **entry.small)


@pytest.mark.parametrize("name", list(registry.networks()))
def test_batch_normalisations_become_synchronised_on_gpus(name, monkeypatch):
    """PyTorch synchronises on GPUs only; what can be shown here is that the same network comes out."""
    wrapped = {}
    monkeypatch.setattr(several_processes, "DistributedDataParallel", lambda network, **options: (network, options))
    monkeypatch.setattr(distributed, "get_world_size", lambda: wrapped["processes"])
    network = small_network(name).eval()
    image = torch.randn(1, 1, 32, 32)
    with torch.no_grad():
        expected = network(image)
    names = list(network.state_dict())
    normalisations = [key for key, module in network.named_modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for processes, device in ((1, torch.device("cuda", 3)), (2, torch.device("cpu"))):
        wrapped["processes"] = processes
        same, options = several_processes.wrap(network, device)
        assert same is network
        assert options == {"device_ids": [3] if device.type == "cuda" else None, "find_unused_parameters": True}
        assert not any(isinstance(module, torch.nn.SyncBatchNorm) for module in same.modules())
    wrapped["processes"] = 2
    converted, _ = several_processes.wrap(network, torch.device("cuda", 1))
    assert list(converted.state_dict()) == names
    modules = dict(converted.named_modules())
    assert all(type(modules[key]) is torch.nn.SyncBatchNorm for key in normalisations)
    assert not any(isinstance(module, GuardedBatchNorm2d) for module in modules.values())
    with torch.no_grad():
        torch.testing.assert_close(converted(image), expected)


@pytest.mark.parametrize(
    ("batch_size", "processes", "batch_dice", "message"),
    [
        (2, 3, False, r"batch size 2 for 3 processes.*at least as large: start 1 or 2 processes.*-batch_size 3"),
        (9, 2, True, r"a multiple of it: start 1 or 3 or 9 processes.*-batch_size 10"),
        (9, 2, False, None),
        (8, 4, True, None),
    ],
)
def test_batches_that_cannot_be_shared_are_refused(batch_size, processes, batch_dice, message):
    if message is None:
        several_processes.check_batch(batch_size, processes, batch_dice)
        return
    with pytest.raises(CommandStopped, match=message):
        several_processes.check_batch(batch_size, processes, batch_dice)
