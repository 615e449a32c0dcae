"""Swin-UMamba and SwinUMambaD against the reference outputs of the authors' own networks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.flops import count_multiply_adds
from nnunetv2_smallseg.architectures import swin_umamba
from nnunetv2_smallseg.architectures.blocks import vss
from nnunetv2_smallseg.architectures.swin_umamba import SwinUMamba, SwinUMambaD, from_official, to_official

NETWORKS = {"SwinUMamba": SwinUMamba, "SwinUMambaD": SwinUMambaD}


@pytest.fixture(scope="module")
def reference(shared) -> Path:
    return shared / "reference" / "swin_umamba"


@pytest.fixture(scope="module")
def manifest(reference) -> dict:
    return json.loads((reference / "manifest.json").read_text())


def official_weights(deterministic_weights, entries: dict, salt: str = "", strong_scan: bool = False) -> dict:
    """Reference weights under official names; ``strong_scan`` makes the recurrence matter (SPEC, section 12)."""
    state = {}
    for name, (shape, _) in entries.items():
        values = torch.from_numpy(deterministic_weights.values_for(name, tuple(shape), salt).copy())
        if strong_scan and name.endswith("x_proj_weight"):
            values *= 8
        if strong_scan and name.endswith("dt_projs_bias"):
            values *= 0.5
        state[name] = values
    return state


def network_cases() -> list[dict]:
    """Cases of the reference folder without pretrained weights, which test_weights.py covers."""
    sizes = {
        "c1_k3_b1_64x64": (1, 3, 1, 64, 64),
        "c1_k3_b2_64x96": (1, 3, 2, 64, 96),
        "c3_k2_b1_96x64": (3, 2, 1, 96, 64),
    }
    cases = []
    for prefix, name in (("swin_umamba", "SwinUMamba"), ("swin_umamba_d", "SwinUMambaD")):
        for strong in (False, True):
            for size, numbers in sizes.items():
                if strong and size != "c1_k3_b1_64x64":
                    continue
                cases.append(
                    {
                        "file": f"ref_{'strong_' * strong}{prefix}_{size}",
                        "network": name,
                        "strong": strong,
                        "numbers": numbers,
                    }
                )
    return cases


def build_reference_network(case: dict, manifest: dict, deterministic_weights) -> torch.nn.Module:
    channels, classes = case["numbers"][:2]
    network = NETWORKS[case["network"]](channels, classes)
    entries = {name: (tuple(tensor.shape), None) for name, tensor in to_official(network.state_dict()).items()}
    if (channels, classes) == (1, 3):
        expected = {
            name: (tuple(shape), None) for name, (shape, _) in manifest["networks"][case["network"]]["entries"].items()
        }
        assert entries == expected
    weights = official_weights(deterministic_weights, entries, strong_scan=case["strong"])
    network.load_state_dict(from_official(weights))
    return network.eval()


every_case = pytest.mark.parametrize("case", network_cases(), ids=lambda case: case["file"])


@every_case
@torch.no_grad()
def test_outputs(case, reference, manifest, deterministic_weights):
    network = build_reference_network(case, manifest, deterministic_weights)
    channels, _, batch, height, width = case["numbers"]
    image = torch.from_numpy(deterministic_weights.input_array((batch, channels, height, width)))
    outputs = network(image)
    expected = np.load(reference / f"{case['file']}.npz")
    assert len(outputs) == 4
    for level, output in enumerate(outputs):
        np.testing.assert_allclose(output.numpy(), expected[f"out{level}"], rtol=1e-4, atol=1e-4)
    network.deep_supervision = False
    np.testing.assert_allclose(network(image).numpy(), expected["out0"], rtol=1e-4, atol=1e-4)


@every_case
@torch.no_grad()
def test_encoder_levels(case, reference, manifest, deterministic_weights):
    expected = np.load(reference / f"{case['file']}.npz")
    network = build_reference_network(case, manifest, deterministic_weights)
    channels, _, batch, height, width = case["numbers"]
    image = torch.from_numpy(deterministic_weights.input_array((batch, channels, height, width)))
    features = network.forward_features(image)
    if case["network"] == "SwinUMambaD":
        features = [image, *(feature.permute(0, 3, 1, 2) for feature in features)]
    checked = 0
    for level, feature in enumerate(features):
        values = feature.numpy()
        statistics = [values.mean(), values.std(), values.min(), values.max()]
        np.testing.assert_allclose(statistics, expected[f"enc{level}_stats"], rtol=1e-4, atol=1e-4)
        if f"enc{level}" in expected:
            np.testing.assert_allclose(values, expected[f"enc{level}"], rtol=1e-4, atol=1e-4)
        checked += 1
    assert checked == 5


FEATURE_CASES = [case for case in network_cases() if not case["strong"] and case["file"].endswith("c1_k3_b1_64x64")]


def feature_modules(network: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Modules by the names of the reference's inner features."""
    modules = {"patch_embed": network.encoder.patch_embed}
    for stage, module in enumerate(network.encoder.stages):
        modules |= {f"enc_l{stage}_b{block}": submodule for block, submodule in enumerate(module.blocks)}
    decoder = network.decoder
    if isinstance(network, SwinUMamba):
        modules["stem"] = network.stem
        modules |= {f"encoder{i + 1}": skip for i, skip in enumerate(decoder.skips)}
        modules |= {f"decoder{6 - i}": up for i, up in enumerate(decoder.ups)}
        modules["decoder1"] = decoder.last
    else:
        modules |= {f"dec_expand{i}": expand for i, expand in enumerate(decoder.expand_layers[:3])}
        modules |= {f"dec_concat{i}": fuse for i, fuse in enumerate(decoder.concat_back_dim)}
        modules |= {f"dec_stage{i}": stage for i, stage in enumerate(decoder.stages)}
        modules["dec_final_expand"] = decoder.expand_layers[3]
    return modules


@pytest.mark.parametrize("case", FEATURE_CASES, ids=lambda case: case["file"])
@torch.no_grad()
def test_inner_features(case, reference, manifest, deterministic_weights):
    network = build_reference_network(case, manifest, deterministic_weights)
    outputs = {}
    for name, module in feature_modules(network).items():
        module.register_forward_hook(lambda _module, _inputs, output, name=name: outputs.update({name: output}))
    network(torch.from_numpy(deterministic_weights.input_array((1, 1, 64, 64))))
    expected = np.load(reference / f"{case['file']}_features.npz")
    assert set(expected.files) == set(outputs)
    for name in expected.files:
        channel_last = name == "patch_embed" or name.startswith(("enc_", "dec_"))
        every = 16 if name == "dec_final_expand" else 8
        output = outputs[name][..., ::every] if channel_last else outputs[name][:, ::every]
        np.testing.assert_allclose(output.numpy(), expected[name], rtol=1e-4, atol=1e-4, err_msg=name)


GRADIENT_CASES = [case for case in network_cases() if case["file"].endswith("c1_k3_b1_64x64")]


@pytest.mark.parametrize("case", GRADIENT_CASES, ids=lambda case: case["file"])
def test_gradients(case, reference, manifest, deterministic_weights):
    network = build_reference_network(case, manifest, deterministic_weights).double()
    image = torch.from_numpy(deterministic_weights.input_array((1, 1, 64, 64))).double().requires_grad_()
    loss = 0
    for output in network(image):
        cotangent = deterministic_weights.input_array(tuple(output.shape), "cot")
        loss = loss + (output * torch.from_numpy(cotangent)).mean()
    loss.backward()
    expected = np.load(reference / f"{case['file']}_grads.npz")
    gradients = to_official({name: parameter.grad for name, parameter in network.named_parameters()})
    names = [str(name) for name in expected["names"]]
    assert set(names) == set(gradients)
    np.testing.assert_allclose(loss.item(), expected["loss"], rtol=1e-6)
    for name, norm, total in zip(names, expected["grad_l2"], expected["grad_sum"], strict=True):
        if name == "stem.0.bias":  # zero in exact arithmetic
            continue
        assert gradients[name].norm().item() == pytest.approx(norm, rel=1e-6), name
        assert gradients[name].sum().item() == pytest.approx(total, rel=1e-5, abs=1e-7 * gradients[name].numel()), name
    np.testing.assert_allclose(image.grad.numpy(), expected["grad_input"], rtol=1e-5, atol=1e-8)


MODULE_NAMES = (("ln_1.", "norm."), ("self_attention.", "ss2d."))


def load_module(module: torch.nn.Module, weights: dict, renamings=MODULE_NAMES) -> torch.nn.Module:
    """Loads reference weights with the given parts of names replaced."""
    renamed = {}
    for name, tensor in weights.items():
        for official, ours in renamings:
            name = name.replace(official, ours)
        renamed[name] = tensor
    module.load_state_dict(renamed)
    return module.eval()


SCAN_MODULES = (
    "ref_ss2d_d16_8x12",
    "ref_ss2d_d40_5x9",
    "ref_ss2d_d16_small_input",
    "ref_strong_ss2d_d16_8x12",
    "ref_vss_block_d32_7x10",
    "ref_vss_block_d32_small_input",
    "ref_strong_vss_block_d32_7x10",
)


@pytest.mark.parametrize("name", SCAN_MODULES)
def test_ss2d_and_vss_block_with_gradients(name, reference, manifest, deterministic_weights):
    entry = manifest["single_modules"]["files"][f"{name}.npz"]
    weights = official_weights(deterministic_weights, entry["entries"], entry["salt"], entry.get("strong_scan", False))
    module = load_module(getattr(vss, entry["module"])(entry["d_model"]), weights).double()
    image = entry["input_scale"] * deterministic_weights.input_array(tuple(entry["input_shape"]), entry["salt"])
    image = torch.from_numpy(image).double().requires_grad_()
    output = module(image)
    output.backward(torch.from_numpy(deterministic_weights.input_array(tuple(output.shape), entry["salt"] + "cot")))
    expected = np.load(reference / f"{name}.npz")

    def compare(actual: torch.Tensor, key: str) -> None:
        # Relative to the size of the whole array: the small inputs would pass any absolute tolerance.
        scale = np.abs(expected[key]).max()
        np.testing.assert_allclose(actual.detach().numpy(), expected[key], rtol=1e-5, atol=1e-6 * scale, err_msg=key)

    compare(output, "out")
    compare(image.grad, "grad_input")
    gradients = dict(module.named_parameters())
    for official in entry["entries"]:
        ours = official.replace("ln_1.", "norm.").replace("self_attention.", "ss2d.")
        compare(gradients[ours].grad, f"grad.{official}")


CONVOLUTIONS = (("layer.", ""), ("conv1.conv.", "conv1."), ("conv2.conv.", "conv2."), ("conv3.conv.", "shortcut."))
UP_BLOCK = (("transp_conv.conv.", "upsample."), ("conv_block.", "block."), *CONVOLUTIONS)
STEM = (("0.", "conv."), ("1.", "norm."))
SINGLE_MODULES = {
    "patch_embed_p2": (lambda: vss.PatchEmbedding(8, 16, 2), ()),
    "patch_embed_p4": (lambda: vss.PatchEmbedding(3, 8, 4), ()),
    "patch_merging_even": (lambda: vss.PatchMerging(8), ()),
    "patch_merging_odd": (lambda: vss.PatchMerging(8), ()),
    "patch_expand_x2": (lambda: vss.PatchExpanding(16, 8, 2), ()),
    "final_patch_expand_x4": (lambda: vss.PatchExpanding(8, 8, 4), ()),
    "res_block_change": (lambda: swin_umamba.ResidualBlock(8, 12), CONVOLUTIONS),
    "res_block_same": (lambda: swin_umamba.ResidualBlock(8, 8), CONVOLUTIONS),
    "res_block_small_input": (lambda: swin_umamba.ResidualBlock(8, 12), CONVOLUTIONS),
    "up_block": (lambda: swin_umamba.UpBlock(16, 8), UP_BLOCK),
    "stem": (lambda: swin_umamba.Stem(2, 8), STEM),
}


@pytest.mark.parametrize("name", SINGLE_MODULES)
@torch.no_grad()
def test_single_modules(name, reference, manifest, deterministic_weights):
    entry = manifest["single_modules"]["ref_modules.npz"][name]
    build, renamings = SINGLE_MODULES[name]
    salt = entry.get("salt", "")
    module = load_module(build(), official_weights(deterministic_weights, entry["entries"], salt), renamings)
    image = entry["input_scale"] * deterministic_weights.input_array(tuple(entry["input_shape"]), salt)
    inputs = [torch.from_numpy(image)]
    if "expand" in name:
        inputs = [inputs[0].permute(0, 2, 3, 1)]  # the official modules take channel-first maps
    if "second_input_shape" in entry:
        skip = deterministic_weights.input_array(tuple(entry["second_input_shape"]), salt + "skip")
        inputs.append(torch.from_numpy(skip))
    expected = np.load(reference / "ref_modules.npz")[f"{name}.out"]
    np.testing.assert_allclose(module(*inputs).numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_official_names_round_trip(name, manifest):
    entries = manifest["networks"][name]["entries"]
    with torch.device("meta"):
        network = NETWORKS[name](1, 3)
    ours = network.state_dict()
    official = to_official(ours)
    assert {key: list(tensor.shape) for key, tensor in official.items()} == {
        key: shape for key, (shape, _) in entries.items()
    }
    assert list(from_official(official)) == list(ours)


@pytest.mark.parametrize("name", NETWORKS)
def test_initial_values_follow_the_specification(name, reference):
    """Standard deviation of every entry as in one draw of the authors' initialisation."""
    statistics = json.loads((reference / "init_stats.json").read_text())
    statistics = statistics[name]
    torch.manual_seed(0)
    state = to_official(NETWORKS[name](1, 3).state_dict())
    compared = 0
    for entry, tensor in state.items():
        expected_mean, expected_std = statistics[entry][:2]
        std = tensor.std(correction=0).item()
        # A sample of n values knows its standard deviation to about 1 / sqrt(2n).
        tolerance = 6 / (2 * tensor.numel()) ** 0.5
        assert std == pytest.approx(expected_std, rel=2 * tolerance + 0.02, abs=1e-7), entry
        assert tensor.mean().item() == pytest.approx(expected_mean, abs=6 * expected_std / tensor.numel() ** 0.5 + 1e-6)
        compared += 1
    assert compared == len(statistics)


def drop_path_rates(network: torch.nn.Module) -> dict[str, float]:
    return {
        name.removesuffix(".drop_path"): module.rate
        for name, module in network.named_modules()
        if isinstance(module, vss.DropPath)
    }


@pytest.mark.parametrize("name", NETWORKS)
def test_stochastic_depth_rises_towards_the_bottleneck(name, reference):
    expected = json.loads((reference / "training_facts.json").read_text())["drop_path"][name]
    with torch.device("meta"):
        rates = drop_path_rates(NETWORKS[name](1, 3))
    assert {key.replace("encoder.stages", "vssm_encoder.layers"): rate for key, rate in rates.items()} == pytest.approx(
        expected, abs=1e-6
    )


@pytest.mark.parametrize(("name", "channels"), [("SwinUMamba", 1), ("SwinUMamba", 3), ("SwinUMambaD", 1)])
def test_frozen_parameters_are_the_official_ones(name, channels, reference):
    expected = json.loads((reference / "training_facts.json").read_text())["frozen_in_warmup"][name]
    with torch.device("meta"):
        network = NETWORKS[name](channels, 3)
    frozen = {id(parameter) for parameter in network.encoder_parameters()}
    names = to_official({name: parameter for name, parameter in network.named_parameters() if id(parameter) in frozen})
    assert sorted(names) == sorted(expected)


def test_patch_embedding_is_frozen_where_imagenet_weights_fill_it():
    with torch.device("meta"):
        network = SwinUMambaD(3, 2)
    encoder = {id(parameter) for parameter in network.encoder_parameters()}
    assert {id(parameter) for parameter in network.encoder.patch_embed.parameters()} <= encoder
    assert len(encoder) == 208


@pytest.mark.parametrize("options", [{"widths": (96, 192, 384)}, {"widths": (96, 190, 384, 768)}])
def test_impossible_sizes_are_refused(options):
    with pytest.raises(ValueError, match="widths"):
        SwinUMamba(1, 2, **options)


@pytest.mark.parametrize(("name", "flops"), [("SwinUMamba", 67.998e9), ("SwinUMambaD", 18.914e9)])
@torch.no_grad()
def test_multiply_adds_at_320(name, flops):
    assert count_multiply_adds(NETWORKS[name](1, 14), (1, 1, 320, 320)) == pytest.approx(flops, abs=0.5e6)
