"""Reading checkpoint files and loading them into the networks."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pickle
import re
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from nnunetv2_smallseg import registry
from nnunetv2_smallseg.architectures.swin_umamba import SwinUMamba, SwinUMambaD, from_official, to_official
from nnunetv2_smallseg.errors import WeightsError
from nnunetv2_smallseg.pretrained import entries
from nnunetv2_smallseg.pretrained.agreement import adapt_input_channels_of
from nnunetv2_smallseg.pretrained.checkpoint import read_checkpoint
from nnunetv2_smallseg.pretrained.load import LOADERS, load_pretrained
from nnunetv2_smallseg.pretrained.vmamba import load_vmamba_tiny

NEWER = ("vssm_tiny_0230", "vssm1_tiny_0230s")
SMALL = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}


@pytest.fixture(scope="module")
def reference(shared: Path) -> Path:
    return shared / "reference" / "swin_umamba"


@pytest.fixture(scope="module")
def layouts(reference: Path) -> dict[str, dict]:
    """Checkpoint layout -> entry -> shape."""
    checkpoints = json.loads((reference / "manifest.json").read_text())["checkpoints"]
    return {
        layout: {name: tuple(shape) for name, (shape, _) in checkpoint["entries"].items()}
        for layout, checkpoint in checkpoints.items()
    }


@pytest.fixture(scope="module")
def mapping(reference: Path) -> dict[str, dict]:
    return json.loads((reference / "key_mapping.json").read_text())


@pytest.fixture(scope="module")
def vmamba(layouts, deterministic_weights) -> dict[str, torch.Tensor]:
    """VMamba-Tiny's checkpoint in its published layout, with made-up values. Not to be changed in place."""
    return deterministic_weights.fill_state_dict(
        {name: torch.empty(shape) for name, shape in layouts["vmamba_tiny_v0"].items()}, "ckpt"
    )


@pytest.fixture(scope="module")
def build() -> Callable[..., torch.nn.Module]:
    """Function that gives a network with 2 classes whose every weight is 0.5; built once, as that takes a second."""
    built = {}

    def make(network_class: type, channels: int) -> torch.nn.Module:
        if (network_class, channels) not in built:
            built[network_class, channels] = network_class(channels, 2)
        network = built[network_class, channels]
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.fill_(0.5)
        return network

    return make


def state_of(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the network's weights under official names."""
    return to_official({name: tensor.clone() for name, tensor in network.state_dict().items()})


def assert_unchanged(network: torch.nn.Module, before: dict[str, torch.Tensor]) -> None:
    for name, tensor in state_of(network).items():
        assert torch.equal(tensor, before[name]), name


# ---------------------------------------------------------------------------------------------- reading checkpoints


def assert_small(tensors: dict[str, torch.Tensor]) -> None:
    assert list(tensors) == list(SMALL)
    assert all(torch.equal(tensors[name], SMALL[name]) for name in SMALL)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("key", [None, "model", "state_dict", "network_weights"])
def test_containers_and_prefixes(tmp_path, key, prefix):
    content = {prefix + name: tensor for name, tensor in SMALL.items()}
    torch.save({key: content, "epoch": 3} if key else content, tmp_path / "a.pth")
    assert_small(read_checkpoint(tmp_path / "a.pth"))


def test_legacy_format_and_parameters(tmp_path):
    content = {name: torch.nn.Parameter(tensor) for name, tensor in SMALL.items()}
    torch.save({"model": content}, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    assert_small(read_checkpoint(tmp_path / "a.pth"))


def test_prefix_of_some_entries_stays(tmp_path):
    torch.save({"module.a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "a.pth")
    assert list(read_checkpoint(tmp_path / "a.pth")) == ["module.a", "b"]


def yacs_stand_in(monkeypatch) -> type:
    """A class that pickles like yacs' CfgNode: a dict subclass with attributes."""

    class CfgNode(dict):
        def __init__(self, content: dict) -> None:
            super().__init__({k: CfgNode(v) if isinstance(v, dict) else v for k, v in content.items()})
            self.__dict__["__immutable__"] = False

    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    module = types.ModuleType("yacs.config")
    module.CfgNode = CfgNode
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", module)
    return CfgNode


@pytest.mark.parametrize("real_yacs", [False, True])
def test_config_of_january_2024_is_read_past(tmp_path, monkeypatch, real_yacs):
    node = pytest.importorskip("yacs.config").CfgNode if real_yacs else yacs_stand_in(monkeypatch)
    config = node({"MODEL": {"TYPE": "vssm", "DEPTHS": [2, 2, 9, 2], "DROP": 0.1}, "TAG": "vssm1_tiny", "AMP": True})
    torch.save({"model": SMALL, "config": config}, tmp_path / "a.pth")
    with pytest.raises(pickle.UnpicklingError, match=r"CfgNode"):  # why the stand-in exists
        torch.load(tmp_path / "a.pth", weights_only=True)
    assert_small(read_checkpoint(tmp_path / "a.pth"))


def test_yacs_is_not_imported(tmp_path, monkeypatch):
    node = yacs_stand_in(monkeypatch)
    torch.save({"model": SMALL, "config": node({"TAG": "x"})}, tmp_path / "a.pth")
    program = (
        "import sys; from nnunetv2_smallseg.pretrained.checkpoint import read_checkpoint; "
        f"read_checkpoint({str(tmp_path / 'a.pth')!r}); sys.exit('yacs' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parent.parent)


def nnunet_checkpoint(number: object) -> dict:
    """The layout that nnU-Net 2.1 to 2.8 save, with ``number`` where numpy numbers stand."""
    return {
        "network_weights": SMALL,
        "optimizer_state": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]},
        "grad_scaler_state": {"scale": 65536.0, "_growth_tracker": 0},
        "logging": {"mean_fg_dice": [number], "dice_per_class_or_region": [[number, number]], "lrs": [1e-4]},
        "_best_ema": number,
        "current_epoch": 250,
        "init_args": {"plans": {"a": [1, 2]}, "configuration": "2d", "fold": "all", "device": torch.device("cuda:0")},
        "trainer_name": "nnUNetTrainerSwinUMamba",
        "inference_allowed_mirroring_axes": (0, 1),
    }


@pytest.mark.parametrize("number", [np.float64(0.5), np.float32(0.5), np.arange(3.0), np.array([])])
def test_nnunet_checkpoint(tmp_path, number):
    torch.save(nnunet_checkpoint(number), tmp_path / "a.pth")
    with pytest.raises(pickle.UnpicklingError, match="numpy"):
        torch.load(tmp_path / "a.pth", weights_only=True)
    assert_small(read_checkpoint(tmp_path / "a.pth"))


@pytest.mark.parametrize("module_name", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_nnunet_checkpoint_of_either_numpy(tmp_path, monkeypatch, module_name):
    def scalar(dtype: np.dtype, content: bytes) -> np.generic:
        return np.frombuffer(content, dtype)[0]

    class Number:
        def __reduce__(self):
            return scalar, (np.dtype("float64"), np.float64(0.5).tobytes())

    scalar.__module__, scalar.__qualname__ = module_name, "scalar"
    module = types.ModuleType(module_name)
    module.scalar = scalar
    monkeypatch.setitem(sys.modules, module_name, module)
    torch.save(nnunet_checkpoint(Number()), tmp_path / "a.pth")
    assert module_name.encode() in (tmp_path / "a.pth").read_bytes()
    assert_small(read_checkpoint(tmp_path / "a.pth"))


class Malicious:
    """Creates a file when unpickled."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.reduced = (function, arguments)

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(("function", "name"), [(os.mkdir, "mkdir"), (eval, "eval"), (Path, "Path")])
def test_malicious_pickle_is_refused(tmp_path, function, name, legacy):
    trap, path = tmp_path / "trap", tmp_path / "evil.pth"
    argument = f"__import__('os').mkdir({str(trap)!r})" if function is eval else str(trap)
    torch.save(
        {"model": SMALL, "config": Malicious(function, argument)}, path, _use_new_zipfile_serialization=not legacy
    )
    with pytest.raises(WeightsError, match=rf"evil\.pth was not loaded: besides weights it holds '\S*{name}'"):
        read_checkpoint(path)
    assert not trap.exists()


def test_stand_ins_are_only_allowed_while_reading(tmp_path):
    before = set(torch.serialization.get_safe_globals())
    torch.save(SMALL, tmp_path / "a.pth")
    read_checkpoint(tmp_path / "a.pth")
    (tmp_path / "a.pth").write_bytes(b"damaged")
    with pytest.raises(WeightsError):
        read_checkpoint(tmp_path / "a.pth")
    assert set(torch.serialization.get_safe_globals()) == before


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("share", [0.2, 0.6, 0.99])
def test_truncated_file(tmp_path, share, legacy):
    path = tmp_path / "a.pth"
    torch.save({"model": {"a": torch.rand(1000)}}, path, _use_new_zipfile_serialization=not legacy)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(WeightsError, match=r"a\.pth \(\d+ bytes\) is damaged or incomplete.*again"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a PyTorch checkpoint"),
        (b"hello", "is not a PyTorch checkpoint"),
        (b"\n<!DOCTYPE html><html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (pickle.dumps([1, 2]), "damaged or incomplete"),
        (bytes(range(256)) * 20, "is not a PyTorch checkpoint"),
    ],
)
def test_other_files(tmp_path, content, message):
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(WeightsError, match=message):
        read_checkpoint(tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(1)], "holds a list"),
        (torch.ones(1), "holds a Tensor"),
        ({}, "it is empty"),
        ({"model": {}}, "it is empty"),
        ({"epoch": 3}, r"no tensors \(epoch\)"),
        ({"a": torch.ones(1), "epoch": 3}, r"no tensors \(epoch\)"),
        ({0: torch.ones(1)}, "no state dict"),
    ],
)
def test_no_state_dict(tmp_path, content, message):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match=message):
        read_checkpoint(tmp_path / "a.pth")


def test_absent_file_and_folder(tmp_path):
    for path in (tmp_path / "absent.pth", tmp_path):
        with pytest.raises(WeightsError, match=f"cannot read checkpoint {path}.*Check path"):
            read_checkpoint(path)


# ------------------------------------------------------------------------------------------- loading into networks

CASES = [
    # network, channels, options, case of key_mapping.json, tensors loaded unchanged, adapted
    (SwinUMamba, 1, {}, None, 204, 0),
    (SwinUMamba, 1, {"load_stray_norm_bias": True}, "SwinUMamba (any number of input channels)", 205, 0),
    (SwinUMamba, 3, {"load_stray_norm_bias": True}, "SwinUMamba (any number of input channels)", 205, 0),
    (SwinUMambaD, 3, {}, "SwinUMambaD, 3 input channels", 208, 0),
    (SwinUMambaD, 3, {"adapt_input_channels": False}, "SwinUMambaD, 3 input channels", 208, 0),
    (SwinUMambaD, 1, {"adapt_input_channels": False}, "SwinUMambaD, other than 3 input channels", 204, 0),
    (
        SwinUMambaD,
        2,
        {"adapt_input_channels": False, "load_stray_norm_bias": True},
        "SwinUMambaD, other than 3 input channels",
        204,
        0,
    ),
    (SwinUMambaD, 1, {}, None, 207, 1),
    (SwinUMambaD, 2, {}, None, 207, 1),
]


@pytest.mark.parametrize(("network_class", "channels", "options", "case", "matched", "adapted"), CASES)
def test_every_tensor_arrives(build, vmamba, mapping, network_class, channels, options, case, matched, adapted):
    network = build(network_class, channels)
    before = state_of(network)
    report = load_vmamba_tiny(network, vmamba, **options)
    after = state_of(network)

    assert (len(report.matched), len(report.adapted)) == (matched, adapted)
    encoder_size = sum(name.startswith("encoder.") for name in network.state_dict())
    assert len(report.missing) == encoder_size - matched - adapted
    assert len(report.unused) == len(vmamba) - matched - adapted
    official = {name: next(iter(to_official({name: 0}))) for name in (*report.matched, *report.adapted)}
    if case:
        loaded = mapping[case]["loaded"]
        assert set(official.values()) == set(loaded.values())
        assert set(report.unused) == set(vmamba) - set(loaded)
        for old, new in loaded.items():
            assert torch.equal(after[new], vmamba[old]), new
    untouched = set(before) - set(official.values())
    assert all(torch.equal(after[name], before[name]) for name in untouched)
    changed = {name for name in before if not torch.equal(after[name], before[name])}
    assert changed == set(official.values())


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
def test_adapted_patch_embedding(build, vmamba, channels):
    network = build(SwinUMambaD, channels)
    report = load_vmamba_tiny(network, vmamba)
    assert report.adapted == ("encoder.patch_embed.proj.weight",)
    projection = network.encoder.patch_embed.proj
    original = vmamba["patch_embed.proj.weight"]
    assert torch.equal(projection.bias, vmamba["patch_embed.proj.bias"])
    for channel in range(channels if channels > 1 else 0):
        torch.testing.assert_close(projection.weight[:, channel].detach(), original[:, channel % 3] * 3 / channels)
    # A grey image gives what the same image gives in RGB, exactly if every colour is repeated equally often.
    grey = torch.rand(1, 1, 8, 8)
    if channels == 1:
        expected = torch.nn.functional.conv2d(grey.expand(1, 3, 8, 8), original, projection.bias, stride=4)
        torch.testing.assert_close(projection(grey), expected)


def test_adaptation_keeps_the_response_to_grey_images(vmamba):
    kernel = vmamba["patch_embed.proj.weight"]
    for channels in (1, 3, 6):
        adapted = adapt_input_channels_of(kernel, channels)
        assert adapted.shape == (96, channels, 4, 4)
        torch.testing.assert_close(adapted.sum(dim=1), kernel.sum(dim=1))


def test_new_names_of_the_same_network(vmamba, mapping):
    renamed = {mapping["vmamba_tiny_v0 -> vmamba_tiny_v0_new_names"][old]: value for old, value in vmamba.items()}
    assert not set(vmamba) & {name for name in renamed if "downsample" not in name}
    networks = [SwinUMambaD(3, 2) for _ in range(2)]
    reports = [load_vmamba_tiny(*pair) for pair in zip(networks, (vmamba, renamed), strict=True)]
    assert len(reports[1].matched) == 208
    assert reports[0].matched == reports[1].matched
    for ours, theirs in zip(*(network.encoder.state_dict().values() for network in networks), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", NEWER)
@pytest.mark.parametrize("network_class", [SwinUMamba, SwinUMambaD])
def test_newer_architectures_are_refused_by_name(build, layouts, network_class, name):
    network = build(network_class, 3)
    before = state_of(network)
    with pytest.raises(
        WeightsError, match=rf"the checkpoint is {name} \(depths 2-2-.*nothing was loaded.*weights fetch"
    ):
        load_vmamba_tiny(network, {entry: torch.zeros(shape) for entry, shape in layouts[name].items()})
    assert_unchanged(network, before)


def small_sibling(vmamba: dict) -> dict:
    """VMamba-S: a third stage of 27 blocks, whose first nine have the shapes of VMamba-T's."""
    more = {
        name.replace("blocks.8.", f"blocks.{block}."): tensor
        for block in range(9, 27)
        for name, tensor in vmamba.items()
        if name.startswith("layers.2.blocks.8.")
    }
    return {**vmamba, **more}


MUTATIONS = {
    "one tensor missing": (
        lambda c: {k: v for k, v in c.items() if k != "layers.2.blocks.8.self_attention.A_logs"},
        r"1 of 208 tensors.*stages\.2\.blocks\.8\.ss2d\.A_logs is missing",
    ),
    "downsampling missing": (
        lambda c: {k: v for k, v in c.items() if "downsample" not in k},
        r"9 of 208 tensors.*downsamples\.0\.\S+ is missing.*and 4 more",
    ),
    "patch embedding missing": (
        lambda c: {k: v for k, v in c.items() if k != "patch_embed.proj.weight"},
        r"patch_embed\.proj\.weight is missing",
    ),
    "another shape": (
        lambda c: {**c, "layers.0.blocks.0.ln_1.bias": torch.zeros(1)},
        r"stages\.0\.blocks\.0\.norm\.bias has shape \(1,\), the network needs \(96,\)",
    ),
    "patch embedding of another width": (
        lambda c: {**c, "patch_embed.proj.bias": torch.zeros(1)},
        r"patch_embed\.proj\.bias has shape \(1,\)",
    ),
    "VMamba-S": (small_sibling, r"stages\.2\.blocks\.9\.\S+ is not part of the network"),
    "another network": (lambda c: {"layer1.0.conv1.weight": torch.zeros(64, 64, 1, 1)}, r"208 of 208 tensors"),
    "official Swin-UMamba": (
        lambda c: {f"vssm_encoder.{k}": v for k, v in c.items()},
        r"208 of 208 tensors.*import-official",
    ),
    "empty": (lambda c: {}, r"208 of 208 tensors"),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_anything_else_is_refused_and_changes_nothing(build, vmamba, mutation):
    change, message = MUTATIONS[mutation]
    network = build(SwinUMambaD, 1)
    before = state_of(network)
    with pytest.raises(WeightsError, match=rf"(?s)nothing was loaded.*{message}"):
        load_vmamba_tiny(network, change(vmamba))
    assert_unchanged(network, before)


def test_network_without_encoder(vmamba):
    with pytest.raises(TypeError, match="Linear has no 'encoder'"):
        load_vmamba_tiny(torch.nn.Linear(1, 1), vmamba)


def test_gradients_still_reach_loaded_parameters(build, vmamba):
    network = build(SwinUMambaD, 3)
    parameters = dict(network.named_parameters())
    report = load_vmamba_tiny(network, vmamba)
    assert all(parameters[name].requires_grad for name in (*report.matched, *report.adapted))
    assert all(parameter is parameters[name] for name, parameter in network.named_parameters())


def test_summary(build, vmamba):
    lines = load_vmamba_tiny(build(SwinUMambaD, 1), vmamba).summary().splitlines()
    assert lines == [
        "SwinUMambaD: 207 tensors loaded from VMamba-Tiny (ImageNet-1K), 1 adapted, 0 of the pretrained part left at "
        "their own initialisation",
        "  adapted to the input channels: encoder.patch_embed.proj.weight",
        "  unused in the checkpoint: norm.weight, norm.bias, head.weight, head.bias",
    ]
    assert (
        "own initialisation: encoder.patch_embed.proj.weight"
        in load_vmamba_tiny(build(SwinUMamba, 1), vmamba).summary()
    )


@pytest.mark.parametrize(
    ("network_class", "channels", "file"),
    [
        (SwinUMamba, 1, "ref_pretrained_swin_umamba_c1_k3_b1_64x64.npz"),
        (SwinUMambaD, 3, "ref_pretrained_swin_umamba_d_c3_k3_b1_64x64.npz"),
    ],
)
def test_outputs_equal_the_authors_loader(reference, deterministic_weights, vmamba, network_class, channels, file):
    network = network_class(channels, 3).eval()
    network.load_state_dict(from_official(deterministic_weights.fill_state_dict(to_official(network.state_dict()))))
    load_vmamba_tiny(network, vmamba, load_stray_norm_bias=True)
    image = torch.from_numpy(deterministic_weights.input_array((1, channels, 64, 64)))
    with torch.inference_mode():
        outputs = network(image)
    expected = np.load(reference / file)
    assert len(outputs) == 4
    for level, output in enumerate(outputs):
        np.testing.assert_allclose(output.numpy(), expected[f"out{level}"], rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------- load_pretrained


def test_load_pretrained_from_a_given_file(build, tmp_path, vmamba):
    torch.save({"model": vmamba}, tmp_path / "own.pth")
    network = build(SwinUMambaD, 2)
    report = load_pretrained(network, "vmamba_tiny_imagenet", file=tmp_path / "own.pth")
    assert (len(report.matched), len(report.adapted)) == (207, 1)
    report = load_pretrained(network, "vmamba_tiny_imagenet", adapt_input_channels=False, file=tmp_path / "own.pth")
    assert (len(report.matched), len(report.adapted)) == (204, 0)


def test_load_pretrained_from_the_weights_folder(build, tmp_path, monkeypatch, vmamba):
    published = entries.entry("vmamba_tiny_imagenet")
    file = tmp_path / published.file_name
    torch.save({"model": vmamba}, file)
    content = file.read_bytes()
    assert abs(len(content) - published.size_bytes) < 50_000  # the published size fits one copy of this layout
    changed = dataclasses.replace(published, size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(entries, "ENTRIES", (changed,))
    monkeypatch.setenv("SMALLSEG_WEIGHTS", str(tmp_path))
    monkeypatch.delenv(published.variable, raising=False)
    assert len(load_pretrained(build(SwinUMambaD, 3), published.name).matched) == 208
    file.write_bytes(content[:-1])
    with pytest.raises(WeightsError, match="is not the published file"):
        load_pretrained(build(SwinUMambaD, 3), published.name)


def test_load_pretrained_names_the_file_in_errors(build, tmp_path):
    torch.save({"model": SMALL}, tmp_path / "own.pth")
    with pytest.raises(WeightsError, match=r"own\.pth: the checkpoint is not the VMamba-Tiny"):
        load_pretrained(build(SwinUMambaD, 2), "vmamba_tiny_imagenet", file=tmp_path / "own.pth")


def test_registry_and_entries_agree():
    for weights in entries.ENTRIES:
        assert weights.layout in LOADERS
        assert set(weights.fits) <= set(registry.networks())
        assert re.fullmatch(r"[0-9a-f]{8}([0-9a-f]{56})?", weights.sha256)
        assert all(url.startswith("https://") for url in weights.urls)
    for trainer in registry.trainers().values():
        if trainer.weights:
            assert trainer.network in entries.entry(trainer.weights).fits


def test_entry_equals_the_reference(reference):
    facts = json.loads((reference / "manifest.json").read_text())["checkpoints"]["vmamba_tiny_v0"]
    weights = entries.entry("vmamba_tiny_imagenet")
    assert (weights.size_bytes, weights.sha256) == (facts["size_bytes_third_party"], facts["sha256_third_party"])
    assert [*weights.urls, weights.manual_url] == facts["urls"]
    assert list(weights.file_names) == facts["file_names"]


def test_entries_import_without_torch():
    program = "import sys, nnunetv2_smallseg.pretrained.entries; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parent.parent)
