"""HUNet, AHNet and Mamba-AHNet: what the paper states, our choices, the reconstruction branch and its training."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from fvcore.nn import FlopCountAnalysis
from test_trainers import make, random_batch
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from nnunetv2_smallseg import registry
from nnunetv2_smallseg.architectures import mamba_ahnet
from nnunetv2_smallseg.architectures.mamba_ahnet import (
    AHNet,
    AHNetRecon,
    HUNet,
    MambaAHNet,
    MambaAHNetRecon,
    VMLayer,
)
from nnunetv2_smallseg.architectures.slab import SlabNetwork
from nnunetv2_smallseg.losses.reconstruction import SegmentationAndReconstructionLoss, reconstruction_error

ROWS = {
    HUNet: {"gate": False, "residual": False, "mamba": False},
    AHNet: {"mamba": False},
    AHNetRecon: {"mamba": False, "reconstruction": True},
    MambaAHNet: {},
    MambaAHNetRecon: {"reconstruction": True},
}
SMALL = {"base_channels": 8, "state_size": 4}
every_row = pytest.mark.parametrize("network_class", ROWS, ids=lambda network_class: network_class.__name__)
RECONSTRUCTING = [AHNetRecon, MambaAHNetRecon]
every_reconstructing_row = pytest.mark.parametrize(
    "network_class", RECONSTRUCTING, ids=lambda network_class: network_class.__name__
)
every_reconstructing_trainer = pytest.mark.parametrize(
    "name", [f"nnUNetTrainer{network_class.__name__}" for network_class in RECONSTRUCTING]
)


def number_of_parameters(network_class=MambaAHNet, channels: int = 1, classes: int = 2, **options) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in network_class(channels, classes, **options).parameters())


def build(network_class, channels: int = 1, classes: int = 2, **options) -> nn.Module:
    torch.manual_seed(0)
    return network_class(channels, classes, **{**SMALL, **options})


# Size


@every_row
def test_rows_are_switches_of_one_network(network_class):
    expected = registry.network(network_class.__name__).parameters[1, 2]
    assert number_of_parameters(network_class) == number_of_parameters(**ROWS[network_class]) == expected


@every_row
def test_increments_of_parameters(network_class):
    base = number_of_parameters(network_class)
    reconstructs = network_class in RECONSTRUCTING
    assert number_of_parameters(network_class, channels=3) - base == (866 if reconstructs else 576)
    assert number_of_parameters(network_class, classes=3) - base == 484
    mamba = ROWS[network_class].get("mamba", True)
    assert number_of_parameters(network_class, vm_full_resolution=mamba, mamba=mamba) - base == 21_952 * mamba


@pytest.mark.parametrize(
    ("network_class", "expected"), [(HUNet, 9.70), (AHNet, 14.86), (AHNetRecon, 17.88)], ids=["HUNet", "AHNet", "Recon"]
)
def test_multiply_adds_in_training_mode(network_class, expected):
    """As counted on the prototype of the specification: 256 x 256, one image of one channel, two classes."""
    analysis = FlopCountAnalysis(network_class(1, 2), torch.zeros(1, 1, 256, 256))
    assert analysis.unsupported_ops_warnings(False).total() / 1e9 == pytest.approx(expected, abs=0.006)


@pytest.mark.parametrize("options", [{"base_channels": 7}, {"base_channels": 0}, {"reconstruction_weight": -0.1}])
def test_impossible_options(options):
    [(name, value)] = options.items()
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        MambaAHNet(1, 2, **options)


# Attention gates


@torch.no_grad()
def test_gate_weights_pixels_between_0_and_1():
    gate = mamba_ahnet.AttentionGate(8, 6)
    x, context = 10 * torch.randn(2, 8, 5, 7), 10 * torch.randn(2, 6, 5, 7)
    rate = gate.attention(x, context)
    assert rate.shape == (2, 1, 5, 7)
    assert 0 < rate.min() < rate.max() < 1
    fresh = copy.deepcopy(gate)  # batch statistics do not depend on running ones
    torch.testing.assert_close(fresh(x, context), x * rate)


@torch.no_grad()
def test_the_gated_map_is_what_is_concatenated():
    level = mamba_ahnet.DecoderLevel(12, 6, 8, gate=True, residual=False).eval()
    x, skip = torch.randn(1, 12, 4, 4), torch.randn(1, 6, 8, 8)
    seen = {}
    level.gate.register_forward_hook(lambda _module, inputs, output: seen.update(gate=inputs, gated=output))
    level.fuse.register_forward_hook(lambda _module, inputs, _output: seen.update(fused=inputs[0]))
    output = level(x, skip)
    upsampled, context = seen["gate"]
    assert upsampled.shape == (1, 8, 8, 8)
    assert torch.equal(context, skip)
    assert torch.equal(seen["fused"], torch.cat((seen["gated"], skip), dim=1))
    level.gate.psi[1].bias.fill_(-1e4)  # closes the gate
    assert not torch.equal(level(x, skip), output)
    assert not seen["fused"][:, :8].any()
    assert torch.equal(seen["fused"][:, 8:], skip)


@torch.no_grad()
def test_residual_block_adds_its_input():
    block = mamba_ahnet.ResidualBlock(4).eval()
    block.conv2[1].weight.zero_()
    x = torch.randn(1, 4, 6, 6)
    assert torch.equal(block(x), x.relu())


# VM layer


def scan_by_hand(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Four selective scans of (D, H, W), one step after the other: A_bar = exp(dt A), B_bar u = dt B u."""
    channels, height, width = x.shape
    rows = [(i, j) for i in range(height) for j in range(width)]
    columns = [(i, j) for j in range(width) for i in range(height)]
    decay = -module.A_logs.exp().view(4, channels, -1)
    skip = module.Ds.view(4, channels)
    result = torch.zeros_like(x)
    for direction, path in enumerate((rows, columns, rows[::-1], columns[::-1])):
        state = torch.zeros(channels, module.state_size)
        for i, j in path:
            u = x[:, i, j]
            projected = module.x_proj_weight[direction] @ u
            rank, size = module.rank, module.state_size
            dt, state_in, state_out = projected[:rank], projected[rank : rank + size], projected[rank + size :]
            dt = functional.softplus(module.dt_projs_weight[direction] @ dt + module.dt_projs_bias[direction])
            state = (dt[:, None] * decay[direction]).exp() * state + (dt * u)[:, None] * state_in
            result[:, i, j] += state @ state_out + skip[direction] * u
    return result


@torch.no_grad()
def test_vm_layer_equals_equations_5_to_7_composed_by_hand():
    torch.manual_seed(0)
    layer = VMLayer(4, state_size=3)
    for parameter in layer.parameters():  # norms and factors too must matter
        parameter.add_(0.3 * torch.randn_like(parameter))
    image = torch.randn(2, 4, 3, 5)
    vss = layer.ss2d
    expected = []
    for m in image.permute(0, 2, 3, 1):  # (H, W, C)
        normed = functional.layer_norm(m, (4,), layer.norm.weight, layer.norm.bias)
        first, second = functional.linear(normed, vss.in_proj.weight).split(8, dim=-1)
        first = functional.conv2d(first.permute(2, 0, 1)[None], vss.conv2d.weight, vss.conv2d.bias, padding=1, groups=8)
        first = scan_by_hand(vss, functional.silu(first[0])).permute(1, 2, 0)
        first = functional.layer_norm(first, (8,), vss.out_norm.weight, vss.out_norm.bias)
        product = first * functional.silu(second)
        m1 = product @ vss.out_proj.weight.T + layer.shortcut_scale * m
        m1 = functional.layer_norm(m1, (4,), layer.projection_norm.weight, layer.projection_norm.bias)
        expected.append(m1 @ layer.projection.weight.T + layer.projection.bias)
    torch.testing.assert_close(layer(image), torch.stack(expected).permute(0, 3, 1, 2), rtol=1e-4, atol=1e-5)


def test_vm_layers_stand_at_strides_2_4_8_unless_asked():
    def levels_with_vm_layer(**options):
        return [level.vm_layer is not None for level in build(MambaAHNet, **options).decoder.levels]

    assert levels_with_vm_layer() == [True, True, True, False]
    assert levels_with_vm_layer(vm_full_resolution=True) == [True, True, True, True]
    assert not any(level.vm_layer for level in build(MambaAHNetRecon).reconstruction.levels)
    assert torch.equal(VMLayer(4).shortcut_scale, torch.ones(4))


def test_scan_parameters_and_shortcut_factors_have_no_weight_decay():
    exempt = build(MambaAHNet).no_weight_decay()
    layer = "decoder.levels.0.vm_layer."
    names = ("shortcut_scale", "ss2d.A_logs", "ss2d.Ds", "ss2d.dt_projs_bias", "norm.weight", "projection.bias")
    assert {layer + name for name in names} <= exempt
    assert f"{layer}projection.weight" not in exempt


# Reconstruction branch


@every_reconstructing_row
@pytest.mark.parametrize("size", [(64, 64), (33, 70), (7, 12)])
@pytest.mark.parametrize("channels", [1, 3])
@torch.no_grad()
def test_reconstruction_in_training_mode_only(network_class, size, channels):
    network = build(network_class, channels, classes=4)
    image = torch.randn(1, channels, *size)
    segmentation, reconstruction = network(image)
    assert reconstruction.shape == image.shape
    shapes = [(1, 4, max(1, round(size[0] / s)), max(1, round(size[1] / s))) for s in (1, 2, 4, 8)]
    assert [tuple(output.shape) for output in segmentation] == shapes
    network.decoder.deep_supervision = False
    assert network(image)[0].shape == (1, 4, *size)
    network.eval()
    logits = network(image)
    for parameter in network.reconstruction.parameters():
        parameter.normal_()
    assert torch.equal(network(image), logits)


@every_reconstructing_row
@torch.no_grad()
def test_the_branch_leaves_the_segmentation_alone(network_class):
    network = build(network_class)
    without = build(network_class, reconstruction_weight=0)
    without.load_state_dict(network.state_dict(), strict=False)
    image = torch.randn(2, 1, 32, 32)
    for output, expected in zip(network(image)[0], without(image), strict=True):
        assert torch.equal(output, expected)


@every_reconstructing_row
def test_weight_0_builds_no_branch(network_class):
    network = build(network_class, reconstruction_weight=0)
    assert network.reconstruction is None
    assert not [name for name in network.state_dict() if name.startswith("reconstruction")]
    assert isinstance(network(torch.randn(1, 1, 32, 32)), list)


def test_full_resolution_level_of_the_reconstruction_has_no_skip():
    levels = build(AHNetRecon).reconstruction.levels
    assert [level.gate is not None for level in levels] == [True, True, True, False]
    # Channels of the upsampled map and of the encoder's skip.
    assert [level.fuse[0].in_channels for level in levels] == [32 + 64, 16 + 32, 8 + 16, 4]


@every_row
@pytest.mark.parametrize("classes", [1, 4])
def test_all_parameters_get_gradients_from_one_image(network_class, classes):
    network = build(network_class, channels=3, classes=classes)
    output = network(torch.randn(1, 3, 48, 33))
    segmentation, reconstruction = output if isinstance(output, tuple) else (output, torch.zeros(()))
    (sum(level.square().mean() for level in segmentation) + reconstruction.square().mean()).backward()
    assert [name for name, parameter in network.named_parameters() if not parameter.grad.any()] == []


@torch.no_grad()
def test_reconstruction_of_a_slab_has_the_slabs_axes():
    network = build(AHNetRecon, channels=2 * 3, classes=2 * 3)
    slab = torch.randn(1, 2, 3, 32, 48)
    segmentation, reconstruction = SlabNetwork(network, 3)(slab)
    assert [tuple(output.shape[:3]) for output in segmentation] == [(1, 2, 3)] * 4
    assert reconstruction.shape == slab.shape
    assert torch.equal(reconstruction.flatten(1, 2), network(slab.flatten(1, 2))[1])


def test_slabs_compile_in_both_modes():
    torch._dynamo.reset()
    network = SlabNetwork(build(MambaAHNetRecon, channels=3, classes=6), 3)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    slab = torch.randn(1, 1, 3, 32, 32)
    segmentation, reconstruction = compiled(slab)
    expected = network(slab)
    torch.testing.assert_close(segmentation[0], expected[0][0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(reconstruction, expected[1], rtol=1e-4, atol=1e-4)
    network.eval()
    torch.testing.assert_close(compiled(slab), network(slab), rtol=1e-4, atol=1e-4)


def test_activation_checkpointing_updates_running_statistics_once():
    networks = [build(MambaAHNetRecon) for _ in range(2)]
    networks[1].set_grad_checkpointing()
    image = torch.randn(2, 1, 32, 32)
    for network in networks:
        segmentation, reconstruction = network(image)
        (segmentation[0].square().mean() + reconstruction.square().mean()).backward()
    plain, checkpointed = (dict(network.named_buffers()) for network in networks)
    for name, statistics in plain.items():
        if not name.endswith("num_batches_tracked"):  # counted twice, used by nothing
            torch.testing.assert_close(checkpointed[name], statistics, msg=name)
    assert {module.momentum for module in networks[1].modules() if isinstance(module, nn.BatchNorm2d)} == {0.1}
    for parameter, other in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
        if parameter.grad is not None:
            torch.testing.assert_close(other.grad, parameter.grad)


# Loss


def test_reconstruction_error_by_hand():
    image = torch.tensor([[[[0.0, 2.0], [-9.0, 7.0]]]])
    reconstruction = torch.tensor([[[[1.0, 2.0], [-5.0, 8.0]]]])
    assert reconstruction_error(reconstruction, image).item() == (1 + 0 + 0 + 9) / 4
    half = reconstruction_error(300 * torch.ones(1, 1, 2, 2, dtype=torch.float16), torch.zeros(1, 1, 2, 2))
    assert half.dtype == torch.float32
    assert half.item() == 90_000  # infinite in float16
    with pytest.raises(ValueError, match=r"\(1, 1, 2, 2\).*\(1, 1, 2, 3\)"):
        reconstruction_error(reconstruction, torch.zeros(1, 1, 2, 3))


def test_loss_takes_segmentations_and_pairs():
    loss = SegmentationAndReconstructionLoss(lambda output, target: (output[0] - target).abs().mean(), weight=0.1)
    segmentation, image = [torch.tensor(3.0)], torch.zeros(1, 1, 2, 2)
    assert loss(segmentation, torch.tensor(1.0)).item() == 2
    assert loss.last_reconstruction_error is None
    with loss.for_image(image):
        total = loss((segmentation, image + 2), torch.tensor(1.0))
    assert total.item() == pytest.approx(2 + 0.1 * 4)
    assert loss.last_reconstruction_error.item() == 4
    with pytest.raises(RuntimeError, match="for_image"):
        loss((segmentation, image), torch.tensor(1.0))


@every_row
def test_distributed_training_finds_no_unused_parameter(network_class, tmp_path):
    """DistributedDataParallel fails in the second iteration if a parameter got no gradient in the first."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(build(network_class))
        for _ in range(2):
            output = wrapped(torch.randn(1, 1, 32, 32))
            segmentation, reconstruction = output if isinstance(output, tuple) else (output, torch.zeros(()))
            (sum(level.square().mean() for level in segmentation) + reconstruction.square().mean()).backward()
    finally:
        torch.distributed.destroy_process_group()


# Trainers


@pytest.mark.parametrize("name", [f"nnUNetTrainer{network_class.__name__}" for network_class in ROWS])
def test_recipe(name, nnunet_folders):
    trainer = make(name, nnunet_folders)
    trainer.initialize()
    decayed, exempt = trainer.optimizer.param_groups
    assert isinstance(trainer.optimizer, torch.optim.AdamW)
    assert (decayed["lr"], decayed["weight_decay"], exempt["weight_decay"]) == (1e-4, 0.01, 0)
    trainer.lr_scheduler.step(1)  # of two epochs
    assert decayed["lr"] == exempt["lr"] == pytest.approx(1e-4 * 0.5**0.9)
    assert trainer._get_deep_supervision_scales() == [[1 / s, 1 / s] for s in (1, 2, 4, 8)]


@every_reconstructing_trainer
@pytest.mark.parametrize("configuration", ["2d", "2.5d"])
def test_training_step_with_reconstruction(name, configuration, nnunet_folders):
    torch.manual_seed(0)
    trainer = make(name, nnunet_folders, configuration)
    trainer.initialize()
    assert trainer.network.training
    batch = random_batch(trainer)
    before = copy.deepcopy(trainer.network)
    outputs = before(batch["data"])
    result = trainer.train_step(batch)
    error = reconstruction_error(outputs[1], batch["data"]).item()
    assert result["reconstruction_error"] == pytest.approx(error, rel=1e-4)
    segmentation_loss = trainer.loss.segmentation_loss(outputs[0], batch["target"]).item()
    assert float(result["loss"]) == pytest.approx(segmentation_loss + 0.1 * error, rel=1e-4)
    moved = {
        key
        for key, parameter in before.named_parameters()
        if not torch.equal(parameter, trainer.network.get_parameter(key))
    }
    lowest_head = {key for key, _ in before.named_parameters() if ".seg_layers.3." in f".{key}"}
    assert {key for key, _ in before.named_parameters()} - moved <= lowest_head  # no weight in nnU-Net's loss
    trainer.network.eval()
    with torch.no_grad():
        assert np.isfinite(trainer.validation_step(batch)["loss"])


@every_reconstructing_trainer
def test_weight_0_in_the_plans_trains_without_the_branch(name, nnunet_folders):
    trainer = make(name, nnunet_folders)
    options = trainer.configuration_manager.configuration["network_options"]
    network = name.removeprefix("nnUNetTrainer")
    options[network] = {**options[network], "reconstruction_weight": 0}
    trainer.initialize()
    assert trainer.planar_network.reconstruction is None
    assert set(trainer.train_step(random_batch(trainer))) == {"loss"}


def test_reconstruction_error_is_logged_and_survives_resuming(nnunet_folders):
    name = "nnUNetTrainerAHNetRecon"
    key = "train_reconstruction_errors"
    trainer = make(name, nnunet_folders)
    trainer.run_training()
    errors = trainer.logger.get_value(key, step=None)
    assert len(errors) == len(trainer.logger.get_value("train_losses", step=None)) == 2
    assert np.isfinite(errors).all()
    with open(trainer.log_file) as file:
        assert file.read().count("reconstruction error") == 2
    resumed = make(name, nnunet_folders)
    resumed.load_checkpoint(f"{trainer.output_folder}/checkpoint_final.pth")
    resumed.on_train_start()
    assert resumed.logger.get_value(key, step=None) == errors
    resumed.on_train_epoch_end([{"loss": np.array(1.0), "reconstruction_error": value} for value in (0.5, 1.5)])
    assert resumed.logger.get_value(key, step=-1) == 1.0
