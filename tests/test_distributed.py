"""Two processes that train together: freezing and unused heads neither fail nor let the processes drift apart."""

from __future__ import annotations

import socket

import torch
from torch import distributed, multiprocessing
from torch.nn.parallel import DistributedDataParallel

from nnunetv2_smallseg.architectures.swin_umamba import SwinUMambaD
from nnunetv2_smallseg.trainers.slabs import tolerate_unused_parameters

TINY = {"widths": (8, 16, 32, 64), "depths": (1, 1, 1, 1)}


def train_two_epochs(rank: int, port: int, folder: str) -> None:
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    torch.manual_seed(rank)  # the wrapper must make the processes agree
    network = SwinUMambaD(1, 2, deep_supervision=False, **TINY)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    wrapped = tolerate_unused_parameters(DistributedDataParallel(network))
    for epoch, frozen in enumerate((True, False)):
        for parameter in network.encoder_parameters():
            parameter.requires_grad_(not frozen)
        for _ in range(3):
            image = torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(10 * epoch + rank))
            optimizer.zero_grad(set_to_none=True)
            wrapped(image).square().mean().backward()
            optimizer.step()
        torch.save(network.state_dict(), f"{folder}/epoch{epoch}_rank{rank}.pth")
    distributed.destroy_process_group()


def test_freezing_under_distributed_training(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(train_two_epochs, (port, str(tmp_path)), nprocs=2)
    states = [
        [torch.load(tmp_path / f"epoch{epoch}_rank{rank}.pth", weights_only=True) for rank in range(2)]
        for epoch in range(2)
    ]
    for first, second in states:
        assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    name = "encoder.stages.0.blocks.0.ss2d.in_proj.weight"
    head = "decoder.seg_layers.3.weight"
    torch.manual_seed(0)
    initial = SwinUMambaD(1, 2, deep_supervision=False, **TINY).state_dict()
    assert torch.equal(states[0][0][name], initial[name])  # frozen in the first epoch
    assert not torch.equal(states[0][0][head], initial[head])
    assert not torch.equal(states[0][0][name], states[1][0][name])
