"""STS-Net against its paper: size, multiply-adds, kernels; batch normalisation with one value and when checkpointed."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import subprocess
import sys

import pytest
import torch
from torch import nn

from nnunetv2_smallseg import registry
from nnunetv2_smallseg.architectures.blocks.esca import ESCA, channel_kernel_size
from nnunetv2_smallseg.architectures.sts_net import STSNet
from nnunetv2_smallseg.errors import WeightsError
from nnunetv2_smallseg.pretrained import entries, store
from nnunetv2_smallseg.pretrained.load import load_pretrained
from nnunetv2_smallseg.pretrained.resnet import load_resnext50
from nnunetv2_smallseg.pretrained.vmamba import adapt_input_channels_of

SMALL = registry.network("STSNet").small


def small(channels: int = 1, classes: int = 2, **options) -> STSNet:
    torch.manual_seed(0)
    return STSNet(channels, classes, **SMALL, **options)


@pytest.mark.parametrize(("channels", "classes"), [(3, 2), (1, 2), (3, 1), (9, 6)])
def test_number_of_parameters(channels, classes):
    with torch.device("meta"):
        network = STSNet(channels, classes)
    expected = 39_105_908 + 3136 * (channels - 3) + 257 * (classes - 2)
    assert sum(parameter.numel() for parameter in network.parameters()) == expected


@pytest.mark.slow
def test_multiply_adds_are_those_of_the_paper():
    """Table 1: 571.35 G for the training batch, 2 classes, in training mode."""
    analysis = pytest.importorskip("fvcore.nn").FlopCountAnalysis
    with torch.no_grad():
        count = analysis(STSNet(3, 2, deep_supervision=False).train(), torch.zeros(4, 3, 480, 480))
        count.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        assert count.total() == 571_353_739_776


def test_kernels_of_the_attention():
    assert [channel_kernel_size(width) for width in (64, 256, 512, 1024, 2048)] == [3, 5, 5, 5, 7]
    assert [channel_kernel_size(width) for width in (1, 2, 16)] == [3, 3, 3]
    with torch.device("meta"):
        attention = STSNet(1, 2).attention
    assert [(level.conv1.kernel_size, level.conv2.kernel_size) for level in attention] == [
        ((size,), (size,)) for size in (3, 5, 5, 5, 7)
    ]
    with pytest.raises(ValueError, match="channels is 0"):
        ESCA(0)


def test_attention_by_hand():
    """Kernels that pick the channel itself leave sigmoid(mean) as the gate of each channel."""
    attention = ESCA(16)
    for convolution in (attention.conv1, attention.conv2):
        convolution.weight.data = torch.tensor([[[0.0, 1.0, 0.0]]])
    x = torch.randn(2, 16, 5, 4)
    torch.testing.assert_close(attention(x), x * torch.sigmoid(x.mean(dim=(2, 3), keepdim=True)))
    attention.conv2.weight.data = torch.tensor([[[1.0, 0.0, 0.0]]])  # the gate of the channel before
    gate = torch.sigmoid(torch.cat((torch.zeros(2, 1), x.mean(dim=(2, 3))[:, :-1]), dim=1))
    torch.testing.assert_close(attention(x), x * gate[..., None, None])


def test_encoder_has_output_stride_8_and_the_layout_of_torchvision():
    with torch.device("meta"):
        network = STSNet(3, 2)
        shapes = [tuple(feature.shape[1:]) for feature in network.forward_features(torch.empty(1, 3, 64, 64))]
    assert shapes == [(64, 32, 32), (256, 16, 16), (512, 8, 8), (1024, 8, 8), (2048, 8, 8)]
    assert all(block.conv2.dilation == (2, 2) for block in network.encoder.layer3)
    assert all(block.conv2.dilation == (4, 4) for block in network.encoder.layer4)


def test_every_level_is_weighed_in_line():
    """Closing the first gate silences all maps after it."""
    network = small().eval()
    image = torch.randn(1, 1, 32, 32)
    before = network.forward_features(image)
    network.attention[0].conv2.weight.data += 1.0
    after = network.forward_features(image)
    assert not any(torch.equal(old, new) for old, new in zip(before, after, strict=True))


@pytest.mark.parametrize("size", [(65, 100), (8, 8), (1, 1)])
def test_training_with_a_batch_of_one(size):
    network = small(deep_supervision=False).train()
    logits = network(torch.randn(1, 1, *size))
    assert logits.shape == (1, 2, *size)
    logits.square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())


def test_checkpointing_counts_a_batch_once():
    networks = [small(dropout=0.0).train()]
    networks.append(copy.deepcopy(networks[0]))
    networks[1].set_grad_checkpointing()
    image = torch.randn(2, 1, 32, 32)
    for network in networks:
        network(image)[0].sum().backward()
    plain, checkpointed = ([m for m in n.modules() if isinstance(m, nn.BatchNorm2d)] for n in networks)
    for one, other in zip(plain, checkpointed, strict=True):
        assert torch.equal(one.running_mean, other.running_mean)
        assert torch.equal(one.running_var, other.running_var)
        assert one.momentum == other.momentum


def test_unknown_encoder():
    with pytest.raises(ValueError, match=r"'vgg16', but must be one of .*resnext50_32x4d"):
        STSNet(1, 2, encoder_name="vgg16")


def test_library_is_imported_when_the_network_is_built():
    code = (
        "import sys, nnunetv2_smallseg.architectures.sts_net; assert 'segmentation_models_pytorch' not in sys.modules"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


# -------------------------------------------------------------------------------------------------- ImageNet weights


@pytest.fixture(scope="module")
def checkpoint() -> dict[str, torch.Tensor]:
    """A state dict in torchvision's layout, with made-up values."""
    from torchvision.models import resnext50_32x4d

    with torch.device("meta"):
        layout = resnext50_32x4d().state_dict()
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.rand(tensor.shape, generator=generator) if tensor.is_floating_point() else torch.tensor(7)
        for name, tensor in layout.items()
    }


@pytest.mark.parametrize("counters", [True, False])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_imagenet_weights_arrive_completely(checkpoint, channels, counters):
    if not counters:  # files of early versions of PyTorch
        checkpoint = {name: tensor for name, tensor in checkpoint.items() if "num_batches" not in name}
    network = STSNet(channels, 2)
    untouched = {name: tensor.clone() for name, tensor in network.state_dict().items() if "encoder" not in name}
    report = load_resnext50(network, checkpoint)
    loaded = network.encoder.state_dict()
    for name, tensor in checkpoint.items():
        if name not in ("conv1.weight", "fc.weight", "fc.bias") and "num_batches" not in name:
            assert torch.equal(loaded[name], tensor), name
    assert torch.equal(loaded["conv1.weight"], adapt_input_channels_of(checkpoint["conv1.weight"], channels))
    assert report.missing == ()
    assert report.adapted == (() if channels == 3 else ("encoder.conv1.weight",))
    assert len(report.matched) + len(report.adapted) == len(checkpoint) - 2  # all but the classifier
    assert set(report.unused) >= {"fc.weight", "fc.bias"}
    assert all(torch.equal(network.state_dict()[name], tensor) for name, tensor in untouched.items())


def test_first_convolution_stays_random_on_demand(checkpoint):
    network = STSNet(1, 2)
    before = network.encoder.conv1.weight.clone()
    report = load_resnext50(network, checkpoint, adapt_input_channels=False)
    assert torch.equal(network.encoder.conv1.weight, before)
    assert report.missing == ("encoder.conv1.weight",)


@pytest.mark.parametrize("damage", ["missing", "extra", "shape"])
def test_other_checkpoints_change_nothing(checkpoint, damage):
    checkpoint = dict(checkpoint)
    if damage == "missing":
        del checkpoint["layer4.2.bn3.weight"]
    elif damage == "extra":
        checkpoint["layer4.3.bn3.weight"] = torch.ones(2048)
    else:
        checkpoint["layer1.0.conv2.weight"] = torch.ones(64, 64, 3, 3)
    network = STSNet(3, 2)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(WeightsError, match="nothing was loaded"):
        load_resnext50(network, checkpoint)
    assert all(torch.equal(network.state_dict()[name], tensor) for name, tensor in before.items())


def test_small_encoders_are_refused(checkpoint):
    with pytest.raises(WeightsError, match="default encoder"):
        load_resnext50(small(), checkpoint)
    with pytest.raises(TypeError, match="Linear"):
        load_resnext50(nn.Linear(1, 1), checkpoint)


def test_loading_by_name(checkpoint, tmp_path):
    torch.save(checkpoint, tmp_path / "resnext.pth")
    network = STSNet(3, 2)
    report = load_pretrained(network, "resnext50_imagenet_v1", file=tmp_path / "resnext.pth")
    assert "ResNeXt50-32x4d" in report.summary()
    assert torch.equal(network.encoder.layer1[0].conv1.weight, checkpoint["layer1.0.conv1.weight"])


def test_published_checksum_is_a_prefix(monkeypatch, tmp_path):
    content = b"weights"
    (tmp_path / "file").write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    entry = dataclasses.replace(entries.entry("resnext50_imagenet_v1"), size_bytes=len(content), sha256=digest[:8])
    assert store.check_file(tmp_path / "file", entry) is None
    other = dataclasses.replace(entry, sha256="00000000")
    assert "should be 00000000" in store.check_file(tmp_path / "file", other)


def test_missing_weights_name_the_trainers_that_need_none(monkeypatch, tmp_path):
    monkeypatch.setenv("SMALLSEG_WEIGHTS", str(tmp_path))
    with pytest.raises(WeightsError, match=r"random start: nnUNetTrainerSTSNet, nnUNetTrainerSTSNetNoAmplification$"):
        store.resolve("resnext50_imagenet_v1")
