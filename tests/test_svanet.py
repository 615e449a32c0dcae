"""SvANet and LiteSvANet against the reference outputs of the authors' own code, and what was mended in them."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from nnunetv2_smallseg.architectures.blocks.drop_path import DropPath
from nnunetv2_smallseg.architectures.blocks.resnet import Bottleneck
from nnunetv2_smallseg.architectures.svanet import LiteSvANet, SvANet, from_official, to_official
from nnunetv2_smallseg.architectures.svanet_blocks import (
    ASPP,
    UNIT_NORM_EPSILON,
    AssemFormer,
    ConvUnit,
    GuidanceBranch,
    MonteCarloAttention,
    Neck,
    UpLink,
)

NETWORKS = {"SvANet": SvANet, "LiteSvANet": LiteSvANet}
FUSIONS = {"paper": "grouped", "released": "dense"}  # names of the reference folder
SMALL = {"width": 8, "depths": (1, 1, 1, 1)}
both_networks = pytest.mark.parametrize("network_class", [SvANet, LiteSvANet])


@pytest.fixture(scope="module")
def reference(shared) -> Path:
    return shared / "reference" / "svanet"


@pytest.fixture(scope="module")
def manifest(reference) -> dict:
    return json.loads((reference / "manifest.json").read_text())


def official_entries(manifest: dict, name: str, variant: str) -> dict[str, tuple]:
    entries = dict(manifest["networks"][name]["released"])
    if variant == "paper":
        entries |= manifest["networks"][name]["paper_overrides"]
    return {entry: tuple(shape) for entry, (shape, _) in entries.items()}


def fill(module: nn.Module, weights: dict) -> None:
    """Loads reference weights; the cells' scales are not among them."""
    missing, unexpected = module.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all(name.endswith("cell_scales") for name in missing)


def build_reference_network(name: str, variant: str, design_size: int, deterministic_weights) -> nn.Module:
    network = NETWORKS[name](3, 3, False, fusion=FUSIONS[variant], design_size=design_size)
    official = {
        entry: tensor
        for entry, tensor in to_official(network.state_dict()).items()
        if not entry.endswith("cell_scales")
    }
    fill(network, from_official(deterministic_weights.fill_state_dict(official)))
    return network


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("variant", FUSIONS)
def test_names_and_shapes_are_the_official_ones(name, variant, manifest):
    with torch.device("meta"):
        network = NETWORKS[name](3, 3, False, fusion=FUSIONS[variant])
    ours = network.state_dict()
    official = to_official(ours)
    assert {entry: tuple(tensor.shape) for entry, tensor in official.items()} == official_entries(
        manifest, name, variant
    )
    assert list(from_official(official)) == list(ours)
    count = sum(parameter.numel() for parameter in network.parameters())
    assert count == manifest["networks"][name][f"parameters_{variant}"]


@pytest.mark.parametrize(
    ("network_class", "fusion", "count"),
    [
        (SvANet, "grouped", 177_635_576),
        (SvANet, "dense", 202_448_504),
        (LiteSvANet, "grouped", 53_040_372),
        (LiteSvANet, "dense", 58_997_364),
    ],
)
def test_parameters_of_the_paper_and_of_the_released_code(network_class, fusion, count):
    with torch.device("meta"):
        network = network_class(3, 8, False, fusion=fusion)
    assert sum(parameter.numel() for parameter in network.parameters()) == count


EVALUATION_FILES = [
    f"net_{name}_{variant}_{size}"
    for name in ("svanet", "litesvanet")
    for variant in FUSIONS
    for size in ("64x64", "96x128")
] + ["net_litesvanet_released_48x80"]


def watched_modules(network: nn.Module) -> dict[str, nn.Module]:
    """Modules by the names of the reference's intermediates."""
    modules = {f"mcbottleneck{index + 1}": neck for index, neck in enumerate(network.necks)}
    modules |= {f"guide_{name}": branch for name, branch in network.guidance.items()}
    modules["aspp"] = network.aspp
    for index, step in enumerate(network.decoder.steps, start=1):
        modules |= {f"decoder_up{index}": step.up, f"decoder_fuse{index}": step.fuse, f"decoder_out{index}": step}
    return modules


@pytest.mark.parametrize("file", EVALUATION_FILES)
@torch.no_grad()
def test_evaluation(file, reference, deterministic_weights, monkeypatch):
    expected = np.load(reference / f"{file}.npz")
    facts = json.loads(str(expected["meta"]))
    network = build_reference_network(
        facts["network"], file.split("_")[2], facts["design_size_S"], deterministic_weights
    ).eval()
    found = {}
    for name, module in watched_modules(network).items():
        module.register_forward_hook(lambda _module, _inputs, output, name=name: found.update({name: output}))
    network.encoder.register_forward_hook(
        lambda _module, _inputs, output: found.update({f"encoder_stage{i}": x for i, x in enumerate(output, 1)})
    )
    guide, classify = network.guide, network.decoder.classify

    def recorded_guide(maps):
        guided = guide(maps)
        found.update({f"guided{i}": x for i, x in enumerate(guided, 1)})
        return guided

    monkeypatch.setattr(network, "guide", recorded_guide)
    monkeypatch.setattr(network.decoder, "classify", lambda maps: found.setdefault("logits_lowres", classify(maps)))
    image = torch.from_numpy(deterministic_weights.input_array(tuple(facts["input_shape"])))
    found["output"] = network(image)
    assert set(found) == set(facts["order"])
    for name, tensor in found.items():
        values = tensor.numpy()
        statistics = [values.mean(), values.std(), values.min(), values.max()]
        np.testing.assert_allclose(statistics, expected[f"{name}__stats"], rtol=1e-4, atol=1e-4, err_msg=name)
        step = int(expected[f"{name}__step"])
        values = values.ravel()[::step].reshape(expected[name].shape) if step else values
        np.testing.assert_allclose(values, expected[name], rtol=1e-4, atol=1e-4, err_msg=name)


def fix_random_choices(network: nn.Module) -> None:
    """The choices of the reference: k = 1, scale of a cell = index modulo the number of scales, nothing dropped."""
    for module in network.modules():
        if isinstance(module, MonteCarloAttention):
            module.draw = lambda pixels, device: (torch.tensor(1), torch.tensor(0), torch.arange(pixels))
        if isinstance(module, GuidanceBranch):
            scales = len(module.squeezes)
            module.draw_cell_scales = lambda grid, device, scales=scales: (
                torch.arange(grid[0] * grid[1]).unflatten(0, grid) % scales
            )
        if isinstance(module, DropPath):
            module.rate = 0.0
        if isinstance(module, nn.Dropout2d):
            module.p = 0.0


TRAINING_FILES = ["train_litesvanet_paper_64x64", "train_litesvanet_released_64x64", "train_svanet_released_64x96"]


@pytest.mark.parametrize("file", TRAINING_FILES)
def test_training_step(file, reference, deterministic_weights):
    expected = np.load(reference / f"{file}.npz")
    facts = json.loads(str(expected["meta"]))
    network = build_reference_network(facts["network"], facts["fusion"], facts["design_size_S"], deterministic_weights)
    fix_random_choices(network)
    network.double().train()
    batch, _, height, width = facts["input_shape"]
    image = torch.from_numpy(deterministic_weights.input_array(tuple(facts["input_shape"]))).double()
    sample, row, column = torch.meshgrid(*(torch.arange(n) for n in (batch, height, width)), indexing="ij")
    target = (row // 8 + column // 8 + sample) % 3
    target[:, :4] = 255
    output = network(image)
    loss = functional.cross_entropy(output, target, ignore_index=255)
    loss.backward()
    assert loss.item() == pytest.approx(expected["loss_float64"].item(), abs=1e-6)
    assert loss.item() == pytest.approx(expected["loss"].item(), abs=1e-4)
    step = int(expected["output__step"])
    values = output.detach().numpy()
    values = values.ravel()[::step].reshape(expected["output"].shape) if step else values
    np.testing.assert_allclose(values, expected["output"], atol=2e-3)

    gradients = to_official({name: parameter.grad for name, parameter in network.named_parameters()})
    assert set(gradients) == set(expected["grad_names"])
    zeros = 0
    for name, norm in zip(expected["grad_names"], expected["grad_norms_float64"], strict=True):
        # A bias whose shift a normalisation removes has no gradient in exact arithmetic.
        zeros += norm < 1e-8
        assert gradients[name].norm().item() == pytest.approx(norm, rel=1e-5, abs=1e-8), name
    assert zeros == (40 if facts["network"] == "SvANet" else 30)

    state = to_official(network.state_dict())
    after = [entry for entry in expected.files if entry.startswith("after/")]
    assert after
    for entry in after:
        np.testing.assert_allclose(
            state[entry.removeprefix("after/")].numpy(), expected[entry], rtol=1e-4, atol=1e-5, err_msg=entry
        )


CONV_UNIT = ((".Conv.", ".conv."), (".Bn.", ".norm."))
ASSEM_FORMER = (
    ("LocalRep.0.", "local."),
    ("LocalRep.2.Conv.", "reduce."),
    ("GlobalRep.2.", "norm."),
    ("GlobalRep.", "blocks."),
    ("PreNormAttn.0.", "attention_norm."),
    ("PreNormAttn.1.qkv_proj.Conv.", "score_key_value."),
    ("PreNormAttn.1.out_proj.Conv.", "attention_out."),
    ("PreNormFfn.0.", "feed_forward_norm."),
    ("PreNormFfn.1.Conv.", "feed_forward_in."),
    ("PreNormFfn.3.Conv.", "feed_forward_out."),
    ("ConvProj.", "project."),
)
MC_ATTENTION = (("SELayer.0.Conv.", "squeeze."), ("SELayer.1.Conv.", "excite."))
RESNET_BLOCK = (
    ("Downsample.Conv.", "downsample.0."),
    ("Downsample.Bn.", "downsample.1."),
    *((f"Conv{i}.Conv.", f"conv{i}.") for i in (1, 2, 3)),
    *((f"Conv{i}.Bn.", f"bn{i}.") for i in (1, 2, 3)),
)
GUIDANCE = tuple(
    pair
    for i in range(1, 5)
    for pair in ((f"Conv{i}.Conv.", f"steps.{i - 1}."), (f"Squeeze{i}.Conv.", f"squeezes.{i - 1}."))
)


def load_block(block: nn.Module, shapes: dict, renamings: tuple, deterministic_weights) -> nn.Module:
    """Fills a block under the reference's names and loads it under ours."""
    weights = {}
    for official, shape in shapes.items():
        if official.endswith("num_batches_tracked"):
            continue
        name = official
        for theirs, ours in renamings:
            name = name.replace(theirs, ours)
        weights[name] = torch.from_numpy(deterministic_weights.values_for(official, tuple(shape)).copy())
    missing, unexpected = block.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all(name.endswith(("num_batches_tracked", "cell_scales")) for name in missing)
    return block


BLOCKS = {
    "block_aspp eval": (
        lambda: ASPP(48, 24),
        (
            ("Convs.4.AsppPool.conv_1x1.", "pooled_branch."),
            ("Convs.", "branches."),
            ("Project.", "project."),
            *CONV_UNIT,
        ),
    ),
    "block_assemformer even_eval": (lambda: AssemFormer(32), ASSEM_FORMER + CONV_UNIT),
    "block_assemformer even_train": (lambda: AssemFormer(32), ASSEM_FORMER + CONV_UNIT),
    "block_assemformer odd_eval": (lambda: AssemFormer(32), ASSEM_FORMER + CONV_UNIT),
    "block_decoder uplink_eval": (
        lambda: UpLink(64, 32),
        (
            ("TPConv.0.", "reduce."),
            ("TPConv.2.", "restore."),
            ("TPConv.1.Conv.", "upsample."),
            ("TPConv.1.Bn.", "norm."),
            *CONV_UNIT,
        ),
    ),
    "block_decoder fuse_full_eval": (
        lambda: nn.Sequential(ConvUnit(64, 32, 3), ConvUnit(32, 32, 1)),
        (("Conv.0.", "0."), ("Conv.1.", "1."), *CONV_UNIT),
    ),
    "block_decoder fuse_grouped_eval": (
        lambda: nn.Sequential(ConvUnit(64, 32, 3, groups=32), ConvUnit(32, 32, 1)),
        (("Conv.0.", "0."), ("Conv.1.", "1."), *CONV_UNIT),
    ),
    "block_mcattn eval_c96": (lambda: MonteCarloAttention(96), MC_ATTENTION),
    "block_mcattn eval_c256": (lambda: MonteCarloAttention(256), MC_ATTENTION),
    "block_mcattn train_c256_k1": (lambda: MonteCarloAttention(256), MC_ATTENTION),
    "block_mcattn train_c256_k2": (lambda: MonteCarloAttention(256), MC_ATTENTION),
    "block_mcattn train_c256_k3": (lambda: MonteCarloAttention(256), MC_ATTENTION),
    "block_mcbottleneck eval": (
        lambda: Neck(32),
        (("Bottleneck.", "bottleneck."), ("ViTLayer.", "former."), *MC_ATTENTION, *ASSEM_FORMER, *CONV_UNIT),
    ),
    "block_mcbottleneck train_k2": (
        lambda: Neck(32),
        (("Bottleneck.", "bottleneck."), ("ViTLayer.", "former."), *MC_ATTENTION, *ASSEM_FORMER, *CONV_UNIT),
    ),
    "block_resnet_bottleneck eval": (
        lambda: Bottleneck(32, 16, stride=2, norm_epsilon=UNIT_NORM_EPSILON),
        RESNET_BLOCK,
    ),
    "block_svattn_guidance s1_t3_eval": (lambda: GuidanceBranch(16, 48, 1, 3, 256, 0.0), GUIDANCE + CONV_UNIT),
    "block_svattn_guidance s1_t3_train": (lambda: GuidanceBranch(16, 48, 1, 3, 256, 0.0), GUIDANCE + CONV_UNIT),
    "block_svattn_guidance s2_t3_eval": (lambda: GuidanceBranch(24, 32, 2, 3, 64, 0.0), GUIDANCE + CONV_UNIT),
    "block_svattn_guidance s2_t3_train": (lambda: GuidanceBranch(24, 32, 2, 3, 64, 0.0), GUIDANCE + CONV_UNIT),
    "block_svattn_guidance s1_t4_eval": (lambda: GuidanceBranch(8, 40, 1, 4, 128, 0.0), GUIDANCE + CONV_UNIT),
    "block_svattn_guidance s1_t4_train": (lambda: GuidanceBranch(8, 40, 1, 4, 128, 0.0), GUIDANCE + CONV_UNIT),
}


@pytest.mark.parametrize("name", BLOCKS)
@torch.no_grad()
def test_blocks(name, reference, deterministic_weights):
    file, case = name.split()
    build, renamings = BLOCKS[name]
    expected = np.load(reference / f"{file}.npz")
    facts = json.loads(str(expected["meta"]))
    # A training case has the weights of the evaluation case before it.
    cases = list(facts["cases"])
    weighted = next(c for c in reversed(cases[: cases.index(case) + 1]) if facts["state_dict"][c] is not None)
    block = load_block(build(), facts["state_dict"][weighted], renamings, deterministic_weights)
    block.train("train" in case)
    for module in block.modules():
        if isinstance(module, MonteCarloAttention) and f"{case}/k" in expected:
            choices = tuple(torch.from_numpy(expected[f"{case}/{part}"]) for part in ("k", "cell", "perm"))
            module.draw = lambda pixels, device, choices=choices: choices
    if f"{case}/masks" in expected:
        cell_scales = torch.from_numpy(expected[f"{case}/masks"]).long().argmax(dim=0)
        block.draw_cell_scales = lambda grid, device: cell_scales
    shape = facts["cases"][weighted]["input_shape"]
    image = torch.from_numpy(deterministic_weights.input_array(tuple(shape)))
    output = block(image).numpy()
    np.testing.assert_allclose(output, expected[f"{case}/out"], rtol=1e-4, atol=1e-4 if "eval" in case else 2e-3)
    if f"{case}/bn_running_mean_after" in expected:
        norm = block.steps[-1][1].norm
        for statistic in ("mean", "var"):
            np.testing.assert_allclose(
                getattr(norm, f"running_{statistic}").numpy(),
                expected[f"{case}/bn_running_{statistic}_after"],
                rtol=1e-4,
                atol=1e-5,
            )


@torch.no_grad()
def test_bottleneck_of_the_neck_without_its_former(reference, deterministic_weights):
    expected = np.load(reference / "block_mcbottleneck.npz")
    facts = json.loads(str(expected["meta"]))
    neck = load_block(
        Neck(32), facts["state_dict"]["eval"], BLOCKS["block_mcbottleneck eval"][1], deterministic_weights
    ).eval()
    neck.former = nn.Identity()
    image = torch.from_numpy(deterministic_weights.input_array((2, 32, 12, 10)))
    np.testing.assert_allclose(neck(image).numpy(), expected["eval_no_former/out"], rtol=1e-4, atol=1e-4)


def test_draws_of_monte_carlo_attention():
    """All grids and cells with equal chances; the weighted mean is the pooled cell of the shuffled map."""
    attention = MonteCarloAttention(8)
    torch.manual_seed(0)
    counts = {}
    for _ in range(3000):
        grid, cell, permutation = attention.draw(4, torch.device("cpu"))
        assert sorted(permutation.tolist()) == [0, 1, 2, 3]
        counts[grid.item(), cell.item()] = counts.get((grid.item(), cell.item()), 0) + 1
    assert set(counts) == {(k, cell) for k in (1, 2, 3) for cell in range(k * k)}
    for (k, _), count in counts.items():
        assert count == pytest.approx(1000 / k**2, abs=5 * (1000 / k**2) ** 0.5)

    image = torch.randn(1, 1, 5, 7)
    for k in (1, 2, 3):
        for cell in range(k * k):
            permutation = torch.randperm(35)
            choices = (torch.tensor(k), torch.tensor(cell), permutation)
            attention.draw = lambda *_, choices=choices: choices
            weights = attention.pixel_weights(5, 7, torch.device("cpu")).float()
            shuffled = image.flatten(2)[..., permutation].unflatten(2, (5, 7))
            pooled = functional.adaptive_avg_pool2d(shuffled, k).flatten()[cell]
            torch.testing.assert_close((image * weights).sum() / weights.sum(), pooled)


@pytest.mark.parametrize("design_size", [None, 64])
def test_the_gates_of_training_have_the_evaluations_expectation(design_size):
    torch.manual_seed(0)
    branch = GuidanceBranch(4, 6, 1, 3, design_size, 0.0)
    scales = [torch.randn(1, c, s, s) for c, s in ((4, 32), (4, 16), (6, 8))]
    with torch.no_grad():
        expected = branch.eval().gate(scales).logit()
        gates = torch.stack([branch.train().gate(scales).logit() for _ in range(800)])
    error = gates.std(dim=0) / 800**0.5
    assert ((gates.mean(dim=0) - expected).abs() < 5 * error + 0.02 * expected.abs().max()).all()
    assert gates.std(dim=0).min() > 0


def test_cell_scales_are_part_of_the_model():
    network = SvANet(1, 2, False, design_size=128, **SMALL)
    names = [name for name in network.state_dict() if name.endswith("cell_scales")]
    assert len(names) == 6
    assert network.guidance["1to2"].cell_scales.shape == (8, 8)  # 128 / 2^2 / 4
    assert network.guidance["3to4"].cell_scales.shape == (4, 4)
    assert network.guidance["1to4"].cell_scales.unique().tolist() == [0, 1, 2, 3]
    assert all(buffer.is_meta for name, buffer in network.to("meta").named_buffers() if name in names)
    without = SvANet(1, 2, False, **SMALL)
    assert not [name for name in without.state_dict() if name.endswith("cell_scales")]


@torch.no_grad()
def test_the_grid_follows_the_map_or_the_design_size():
    """A grid that divides the map changes nothing in evaluation; one that does not weighs pixels unevenly."""
    torch.manual_seed(0)
    scales = [torch.randn(1, 4, 24, 40), torch.randn(1, 6, 12, 20)]
    gates = {}
    for size in (None, 32, 160):
        torch.manual_seed(1)
        gates[size] = GuidanceBranch(4, 6, 1, 2, size, 0.0).eval().gate(scales)
    torch.testing.assert_close(gates[None], gates[32])  # 4 x 5 cells and 4 x 4 cells
    assert (gates[160] - gates[None]).abs().max() > 1e-4  # 10 x 10 cells of 12 x 20 pixels


@both_networks
@pytest.mark.parametrize("design_size", [None, 64])
def test_training_repeats_with_a_seed_and_evaluation_needs_none(network_class, design_size):
    network = network_class(1, 2, design_size=design_size, **SMALL)
    image = torch.randn(2, 1, 64, 64)

    def outputs(seed: int) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        with torch.no_grad():
            return network(image)

    first, again, other = outputs(5), outputs(5), outputs(6)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    network.eval()
    assert torch.equal(outputs(5)[0], outputs(6)[0])


@both_networks
@pytest.mark.parametrize("size", [(16, 16), (32, 32), (50, 70)])
def test_one_image_trains(network_class, size):
    network = network_class(1, 2, False, **SMALL)
    network(torch.randn(1, 1, *size)).square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())


@pytest.mark.parametrize(("scale", "seed"), [(1e-3, 5), (1e-3, 9), (1e3, 1)])
def test_float16_gradients_are_finite_at_full_depth(scale, seed):
    """With the layers of the encoder in float16, each of these draws overflows."""
    torch.manual_seed(seed)
    network = SvANet(1, 3, width=8)
    image = scale * torch.randn(1, 1, 32, 32)
    with torch.autocast("cpu", dtype=torch.float16):
        outputs = network(image)
        stages = network.encoder(image)
        loss = sum(output.float().square().mean() for output in outputs)
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())
    assert {stage.dtype for stage in stages} == {torch.float16}
    assert {stage.dtype for stage in network.encoder(image)} == {torch.float32}


@both_networks
@torch.no_grad()
def test_whole_network_in_another_precision(network_class):
    for dtype in (torch.bfloat16, torch.float64):
        network = network_class(1, 2, False, design_size=64, **SMALL).to(dtype)
        for training in (True, False):
            assert network.train(training)(torch.randn(1, 1, 32, 32, dtype=dtype)).dtype == dtype


@both_networks
def test_heads_of_deep_supervision_exist_only_with_it(network_class):
    image = torch.randn(1, 1, 32, 48)
    with_heads, without = (network_class(1, 3, enabled, **SMALL).eval() for enabled in (True, False))
    assert len(with_heads.decoder.seg_layers) == len(network_class.deep_supervision_strides)
    assert len(without.decoder.seg_layers) == 1
    state = with_heads.state_dict()
    without.load_state_dict({name: state[name] for name in without.state_dict()})
    with torch.no_grad():
        outputs = with_heads(image)
        with_heads.decoder.deep_supervision = False
        assert torch.equal(with_heads(image), outputs[0])
        assert torch.equal(without(image), outputs[0])


@both_networks
def test_activation_checkpointing_repeats_draws_and_counts_statistics_once(network_class):
    torch.manual_seed(0)
    network = network_class(1, 2, False, design_size=64, **SMALL)
    other = copy.deepcopy(network)
    other.set_grad_checkpointing()
    image = torch.randn(2, 1, 64, 64)
    for model in (network, other):
        torch.manual_seed(3)
        model(image).square().mean().backward()
    for (name, expected), actual in zip(network.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, msg=name)
    for (name, expected), actual in zip(network.named_buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(actual, expected, msg=name)
    assert all(norm.momentum == 0.1 for norm in other.modules() if isinstance(norm, nn.BatchNorm2d))


@both_networks
def test_stochastic_depth_rises_with_the_source(network_class):
    network = network_class(1, 2, **SMALL)
    rates = {name: branch.drop_path.rate for name, branch in network.guidance.items()}
    guided = network_class.num_guided_stages
    assert rates == {f"{s}to{t}": 0.2 * (s - 1) / guided for s in range(1, guided) for t in range(s + 1, guided + 1)}


@both_networks
def test_initial_values_follow_the_specification(network_class):
    """Convolutions uniform within 1 / sqrt(fan-in), normalisations 1 and 0."""
    torch.manual_seed(0)
    for name, module in network_class(1, 2, **SMALL).named_modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            bound = module.weight[0].numel() ** -0.5
            for tensor in (module.weight, module.bias):
                if tensor is not None:
                    assert tensor.abs().max() <= bound, name
            if module.weight.numel() > 1000:
                assert module.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1), name
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()


@pytest.mark.parametrize(("channels", "frozen"), [(3, 159), (1, 158)])
def test_encoder_parameters_are_those_with_imagenet_values(channels, frozen, manifest):
    with torch.device("meta"):
        network = SvANet(channels, 3)
    encoder = {id(parameter) for parameter in network.encoder_parameters()}
    names = to_official({name: p for name, p in network.named_parameters() if id(p) in encoder})
    expected = [name for name in manifest["frozen_first_phase"] if channels == 3 or name != "Encoder.Conv1.Conv.weight"]
    assert sorted(names) == sorted(expected)
    assert len(names) == frozen


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fusion": "full"}, "fusion is 'full'"),
        ({"design_size": 0}, "design_size is 0"),
        ({"width": 7}, "width is 7"),
        ({"depths": (3, 4, 6)}, r"depths are \(3, 4, 6\)"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SvANet(1, 2, **options)


@pytest.mark.parametrize("network_class", [SvANet, LiteSvANet])
def test_weights_trained_with_deep_supervision_fit_a_network_without(network_class):
    """nnU-Net predicts with a network built without deep supervision."""
    trained = network_class(1, 2, True, width=8, depths=(1, 1, 1, 1)).eval()
    predicting = network_class(1, 2, False, width=8, depths=(1, 1, 1, 1)).eval()
    assert len(trained.decoder.seg_layers) > len(predicting.decoder.seg_layers) == 1
    predicting.load_state_dict(trained.state_dict())
    image = torch.randn(1, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(predicting(image), trained(image)[0])
    with pytest.raises(RuntimeError, match="nonsense"):
        predicting.load_state_dict({**trained.state_dict(), "decoder.nonsense": torch.zeros(1)})
