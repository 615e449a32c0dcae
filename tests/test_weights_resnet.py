"""torchvision's ResNet-50 into the encoders of SvANet and LiteSvANet."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import pytest
import torch
from torch import nn
from torch.nn import functional

from nnunetv2_smallseg.architectures.svanet import LiteSvANet, SvANet, to_official
from nnunetv2_smallseg.errors import WeightsError
from nnunetv2_smallseg.pretrained import entries, store
from nnunetv2_smallseg.pretrained.load import load_pretrained
from nnunetv2_smallseg.pretrained.resnet import load_resnet50

NAME = "resnet50_imagenet_v2"
NUM_ENTRIES = {SvANet: 318, LiteSvANet: 258}
both_networks = pytest.mark.parametrize("network_class", [SvANet, LiteSvANet])


def torchvision_layout() -> dict[str, tuple[int, ...]]:
    """Names and shapes of torchvision's resnet50, written out without torchvision."""
    shapes: dict[str, tuple[int, ...]] = {}

    def convolution(name: str, *shape: int) -> None:
        shapes[f"{name}.weight"] = shape

    def norm(name: str, channels: int) -> None:
        for entry in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.{entry}"] = (channels,)
        shapes[f"{name}.num_batches_tracked"] = ()

    convolution("conv1", 64, 3, 7, 7)
    norm("bn1", 64)
    before = 64
    for layer, depth in enumerate((3, 4, 6, 3), start=1):
        width = 32 * 2**layer
        for block in range(depth):
            name = f"layer{layer}.{block}"
            for number, shape in enumerate(((width, before, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)), 1):
                convolution(f"{name}.conv{number}", *shape)
                norm(f"{name}.bn{number}", shape[0])
            if block == 0:
                convolution(f"{name}.downsample.0", 4 * width, before, 1, 1)
                norm(f"{name}.downsample.1", 4 * width)
            before = 4 * width
    shapes["fc.weight"], shapes["fc.bias"] = (1000, 2048), (1000,)
    return shapes


@pytest.fixture(scope="module")
def resnet50() -> dict[str, torch.Tensor]:
    """A checkpoint in torchvision's layout with made-up values. Not to be changed in place."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.tensor(7) if name.endswith("tracked") else torch.rand(shape, generator=generator)
        for name, shape in torchvision_layout().items()
    }


def build(network_class: type[nn.Module], channels: int = 3) -> nn.Module:
    """A network of full size of which only the encoder has values."""
    with torch.device("meta"):
        network = network_class(channels, 2, False)
    torch.manual_seed(0)
    network.encoder = type(network.encoder)(channels, depths=(3, 4, 6, 3)[: network.num_guided_stages])
    return network


def state_of(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in network.encoder.state_dict().items()}


def test_layout_is_that_of_torchvision():
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        state = models.resnet50(weights=None).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == torchvision_layout()


@both_networks
@pytest.mark.parametrize("channels", [1, 3])
def test_every_tensor_arrives(network_class, channels, resnet50):
    network = build(network_class, channels)
    report = load_resnet50(network, resnet50)
    adapted = () if channels == 3 else ("encoder.conv1.weight",)
    assert report.adapted == adapted
    assert len(report.matched) == NUM_ENTRIES[network_class] - len(adapted)
    assert report.missing == ()
    unused = {name for name in resnet50 if name.startswith("fc.")}
    if network_class is LiteSvANet:
        unused |= {name for name in resnet50 if name.startswith("layer4.")}
    assert set(report.unused) == unused
    for name, tensor in state_of(network).items():
        if f"encoder.{name}" not in adapted:
            assert torch.equal(tensor, resnet50[name]), name


def test_names_go_where_the_reference_says(shared):
    manifest = json.loads((shared / "reference" / "svanet" / "manifest.json").read_text())
    mapping = manifest["torchvision_to_reference"]
    ours = {f"encoder.{name}": torch.empty(0) for name in torchvision_layout() if not name.startswith("fc.")}
    assert {
        name.removeprefix("encoder."): official for name, official in zip(ours, to_official(ours), strict=True)
    } == {name: official for name, official in mapping.items() if not name.startswith("fc.")}


def test_features_are_those_of_torchvision(resnet50):
    """The same weights and epsilon give the same maps."""
    models = pytest.importorskip("torchvision.models")
    theirs = models.resnet50(weights=None).eval()
    state = {name: torch.randn_like(t) * 0.05 if t.ndim > 1 else t for name, t in theirs.state_dict().items()}
    theirs.load_state_dict(state)
    network = build(SvANet)  # the encoder of ``build`` has torchvision's epsilon
    load_resnet50(network, state)
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        x = theirs.relu(theirs.bn1(theirs.conv1(image)))
        expected = [x]
        x = theirs.maxpool(x)
        for layer in (theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4):
            x = layer(x)
            expected.append(x)
        found = network.encoder.eval()(image)
    for ours, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("channels", [1, 2, 6])
def test_first_convolution_is_adapted(channels, resnet50):
    network = build(LiteSvANet, channels)
    load_resnet50(network, resnet50)
    kernel = network.encoder.conv1.weight.detach()
    assert kernel.shape == (64, channels, 7, 7)
    if channels != 2:  # every colour equally often: a grey image gives what it gave in RGB
        grey = torch.rand(1, 1, 16, 16)
        torch.testing.assert_close(
            functional.conv2d(grey.expand(1, channels, 16, 16), kernel),
            functional.conv2d(grey.expand(1, 3, 16, 16), resnet50["conv1.weight"]),
            rtol=1e-4,
            atol=1e-4,
        )


def test_first_convolution_can_keep_its_own_values(resnet50):
    network = build(LiteSvANet, 2)
    before = state_of(network)
    report = load_resnet50(network, resnet50, adapt_input_channels=False)
    assert report.missing == ("encoder.conv1.weight",)
    assert torch.equal(network.encoder.conv1.weight, before["conv1.weight"])


@both_networks
def test_what_is_frozen_got_values_of_the_file(network_class, resnet50):
    for channels in (1, 3):
        network = build(network_class, channels)
        report = load_resnet50(network, resnet50)
        encoder = {id(parameter) for parameter in network.encoder_parameters()}
        frozen = {name for name, parameter in network.named_parameters() if id(parameter) in encoder}
        assert frozen == {name for name in report.matched if name in dict(network.named_parameters())}


def test_counters_may_be_absent(resnet50):
    network = build(LiteSvANet)
    report = load_resnet50(network, {n: t for n, t in resnet50.items() if not n.endswith("tracked")})
    assert report.missing == ()
    assert not [name for name in report.matched if name.endswith("num_batches_tracked")]


MUTATIONS = {
    "missing": (lambda c: {n: t for n, t in c.items() if n != "layer2.1.bn2.bias"}, r"layer2\.1\.bn2\.bias is missing"),
    "another shape": (
        lambda c: {**c, "layer1.0.conv2.weight": torch.zeros(128, 64, 3, 3)},
        r"layer1\.0\.conv2\.weight has shape \(128, 64, 3, 3\), the network needs \(64, 64, 3, 3\)",
    ),
    "a deeper network": (
        lambda c: {**c, "layer3.6.conv1.weight": torch.zeros(256, 1024, 1, 1)},
        r"layer3\.6\.conv1\.weight is not part of the network",
    ),
    "another stem": (
        lambda c: {**c, "conv1.weight": torch.zeros(64, 3, 3, 3)},
        r"conv1\.weight has shape \(64, 3, 3, 3\), the network needs \(64, 3, 7, 7\)",
    ),
    "another network": (lambda c: {"patch_embed.proj.weight": torch.zeros(96, 3, 4, 4)}, "is missing"),
}


@both_networks
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_anything_else_is_refused_and_changes_nothing(network_class, mutation, resnet50):
    change, message = MUTATIONS[mutation]
    network = build(network_class)
    before = state_of(network)
    with pytest.raises(WeightsError, match=rf"(?s)nothing was loaded.*{message}.*fetch {NAME}"):
        load_resnet50(network, change(resnet50))
    assert all(torch.equal(tensor, before[name]) for name, tensor in state_of(network).items())


def test_network_without_resnet(resnet50):
    with pytest.raises(TypeError, match="Linear has no ResNet-50"):
        load_resnet50(nn.Linear(1, 1), resnet50)


def test_load_pretrained_from_a_given_file(tmp_path, resnet50):
    torch.save(resnet50, tmp_path / "own.pth")
    report = load_pretrained(build(LiteSvANet, 1), NAME, file=tmp_path / "own.pth")
    assert (len(report.matched), len(report.adapted)) == (257, 1)
    assert "layer4.0.conv1.weight" in report.summary()


def test_size_fits_one_copy_of_the_layout():
    values = sum(torch.Size(shape).numel() for shape in torchvision_layout().values())
    assert 0 < entries.entry(NAME).size_bytes - 4 * values < 150_000  # names and padding


def test_checksum_is_compared_as_far_as_it_is_known(tmp_path, monkeypatch):
    """The file name states 8 digits; a file with other ones is refused."""
    published = entries.entry(NAME)
    assert published.file_name == f"resnet50-{published.sha256}.pth"
    content = b"weights"
    digest = hashlib.sha256(content).hexdigest()
    monkeypatch.setenv("SMALLSEG_WEIGHTS", str(tmp_path))
    (tmp_path / published.file_name).write_bytes(content)
    for known, good in ((digest[:8], True), (digest, True), ("00000000", False)):
        changed = dataclasses.replace(published, size_bytes=len(content), sha256=known)
        monkeypatch.setattr(entries, "ENTRIES", (changed,))
        if good:
            assert store.verify(NAME) == tmp_path / published.file_name
        else:
            with pytest.raises(WeightsError, match=rf"sha256 is {digest} and should be 00000000\.\.\. \(stated by"):
                store.verify(NAME)
