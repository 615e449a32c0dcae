"""S³-Mamba: size, blocks, tensor attention against the equations written out, weights, recipe.

No reference outputs exist: the authors released no code. The attention is compared with a direct summation of the
paper's equations, everything else with facts of the specification.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from nnunetv2_smallseg import registry
from nnunetv2_smallseg.architectures.blocks.vss import SS2D, DropPath, VSSBlock
from nnunetv2_smallseg.architectures.s3_mamba import EnCFBlock, EnVSSBlock, S3Mamba, S3MambaSmall
from nnunetv2_smallseg.architectures.tcma import InputPyramid, SobelMagnitude, TCMALevel, TensorAttention
from nnunetv2_smallseg.errors import WeightsError
from nnunetv2_smallseg.pretrained import entries
from nnunetv2_smallseg.pretrained.vmamba import VMAMBA_SMALL_DEPTHS, load_vmamba_small

SMALL = dict(registry.network("S3Mamba").small)


def small_network(channels: int = 1, classes: int = 2, **options) -> S3Mamba:
    torch.manual_seed(0)
    return S3Mamba(channels, classes, **{**SMALL, **options})


def randomise_back(network: nn.Module) -> None:
    """Gives the zero-initialised projections values, as training does."""
    for module in network.modules():
        if isinstance(module, TCMALevel):
            nn.init.normal_(module.back.weight, std=0.1)


# ------------------------------------------------------------------------------------------------------------- size


def number_of_parameters(*arguments, **options) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in S3Mamba(*arguments, **options).parameters())


@pytest.mark.parametrize(
    ("channels", "classes", "options", "count"),
    [
        (3, 2, {}, 27_582_650),
        (3, 2, {"deep_supervision": False}, 27_582_650),
        (3, 2, {"use_tcma": False}, 27_521_386),
        (3, 2, {"preset": "s3mamba_small"}, 4_648_346),
        (3, 2, {"preset": "s3mamba_small", "use_tcma": False}, 4_593_802),
        (
            3,
            1,
            {"use_encf": False, "use_tcma": False, "use_dwconv": True},
            27_427_561,
        ),  # VM-UNet, counted with its code
    ],
)
def test_parameters_of_the_variants(channels, classes, options, count):
    assert number_of_parameters(channels, classes, **options) == count


def test_without_additions_it_has_the_tensors_of_vm_unet():
    """Names and shapes of VM-UNet's public code (VSSM with depths 2-2-2-2 / 2-2-2-1), stage by stage."""
    with torch.device("meta"):
        state = S3Mamba(3, 1, use_encf=False, use_tcma=False, use_dwconv=True).state_dict()
    block = {
        "norm.weight": (96,),
        "norm.bias": (96,),
        "ss2d.x_proj_weight": (4, 38, 192),
        "ss2d.dt_projs_weight": (4, 192, 6),
        "ss2d.dt_projs_bias": (4, 192),
        "ss2d.A_logs": (768, 16),
        "ss2d.Ds": (768,),
        "ss2d.in_proj.weight": (384, 96),
        "ss2d.conv2d.weight": (192, 1, 3, 3),
        "ss2d.conv2d.bias": (192,),
        "ss2d.out_norm.weight": (192,),
        "ss2d.out_norm.bias": (192,),
        "ss2d.out_proj.weight": (96, 192),
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for stage in ("encoder.stages.0.blocks.1.", "decoder.stages.3.blocks.0."):
        assert {name.removeprefix(stage): shape for name, shape in shapes.items() if name.startswith(stage)} == block
    expanding = {name: shape for name, shape in shapes.items() if "expand" in name}
    expected = {
        "decoder.final_expand.expand.weight": (384, 96),
        "decoder.final_expand.norm.weight": (24,),
        "decoder.final_expand.norm.bias": (24,),
    }
    for number, width in enumerate((768, 384, 192)):
        expected[f"decoder.expand_layers.{number}.expand.weight"] = (2 * width, width)
        expected |= {f"decoder.expand_layers.{number}.norm.{part}": (width // 2,) for part in ("weight", "bias")}
    assert expanding == expected
    assert shapes["decoder.seg_layers.0.weight"] == (1, 24, 1, 1)
    blocks = [len(stage.blocks) for stage in S3Mamba(1, 1, **SMALL, preset="s3mamba_small").decoder.stages]
    assert blocks == list(SMALL["decoder_depths"])


def test_small_preset_is_the_other_class():
    with torch.device("meta"):
        shapes = [
            {name: tensor.shape for name, tensor in network.state_dict().items()}
            for network in (S3MambaSmall(1, 2), S3Mamba(1, 2, preset="s3mamba_small"))
        ]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "s3mamba_large"}, "no preset 's3mamba_large'; presets are s3mamba, s3mamba_small"),
        ({"widths": (18, 36, 72, 144)}, "first width is 18"),
        ({"widths": (16, 32, 64, 96)}, "doubles"),
        ({"widths": (16, 32, 64)}, "four values"),
        ({"decoder_depths": (1, 1)}, "four values"),
        ({"depths": (1, 1)}, "one value for each stage"),
    ],
)
def test_impossible_sizes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        small_network(**options)


# ----------------------------------------------------------------------------------------------------------- blocks


def test_channel_attention_is_what_the_specification_says():
    torch.manual_seed(0)
    block = EnCFBlock(96)
    assert block.reduce.out_features == 8
    assert EnCFBlock(768).reduce.out_features == 24
    x = torch.randn(2, 5, 7, 96)
    hidden = functional.relu(x.mean((1, 2)) @ block.reduce.weight.T + block.reduce.bias)
    weights = torch.sigmoid(hidden @ block.restore.weight.T + block.restore.bias)
    torch.testing.assert_close(block(x), x + x * weights[:, None, None])


def test_no_channel_attention_is_silent_at_the_start():
    """A hidden layer whose units are all below zero would learn nothing from that image."""
    network = small_network(**dict.fromkeys(SMALL), preset="s3mamba_small").eval()
    hidden = []
    for module in network.modules():
        if isinstance(module, EnCFBlock):
            module.reduce.register_forward_hook(lambda _module, _inputs, output: hidden.append(output))
    with torch.no_grad():
        network(torch.randn(1, 1, 64, 64))
    assert len(hidden) == 21
    assert all((values > 0).any() for values in hidden)


def test_enhanced_block_is_a_residual_around_attention_around_the_scan():
    torch.manual_seed(0)
    block = EnVSSBlock(16).eval()
    x = torch.randn(2, 4, 6, 16)
    scanned = block.ss2d(block.norm(x))
    torch.testing.assert_close(block(x), x + block.encf(scanned))
    plain = EnVSSBlock(16, use_dwconv=True, use_encf=False).eval()
    vss = VSSBlock(16).eval()
    vss.load_state_dict(plain.state_dict())
    assert torch.equal(plain(x), vss(x))


def test_residual_stream_stays_of_order_one():
    """Attention around the whole stream would multiply its standard deviation by more than 1000 (specification)."""
    torch.manual_seed(0)
    x = torch.randn(1, 8, 8, 32)
    with torch.no_grad():
        for _ in range(21):
            x = EnVSSBlock(32).eval()(x)
    assert 1 < x.std() < 3


def test_scan_without_convolution_keeps_its_activation():
    torch.manual_seed(0)
    with_convolution, without = SS2D(8), SS2D(8, use_dwconv=False)
    state = with_convolution.state_dict()
    assert [name for name in state if name not in without.state_dict()] == ["conv2d.weight", "conv2d.bias"]
    without.load_state_dict({name: value for name, value in state.items() if "conv2d" not in name})
    nn.init.dirac_(with_convolution.conv2d.weight, groups=with_convolution.conv2d.groups)
    nn.init.zeros_(with_convolution.conv2d.bias)
    x = torch.randn(1, 4, 5, 8)
    torch.testing.assert_close(without(x), with_convolution(x))


def test_stochastic_depth_rises_to_the_bottleneck_and_falls_again():
    with torch.device("meta"):
        network = S3Mamba(1, 2)
    rates = [module.rate for module in network.modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx([0.1 * i / 7 for i in range(8)] + [0.1 * (1 - i / 6) for i in range(7)])


# ------------------------------------------------------------------------------------------------------------- TCMA


def naive_attention(attention: TensorAttention, image, probabilities, edges) -> torch.Tensor:
    """Equations 2 to 4 pixel by pixel and patch by patch, with the product of all three factors written out."""
    height, width = image.shape[-2:]
    pairs = image.shape[1] * edges.shape[1]
    features = torch.cat((image, probabilities, edges), dim=1)
    total = torch.zeros_like(probabilities)
    for size, perceptron in zip(attention.patch_sizes, attention.weights, strict=True):
        weights = perceptron(features).unflatten(1, (image.shape[1], edges.shape[1]))  # (B, C, E, h, w)
        for top in range(0, height, size):
            for left in range(0, width, size):
                rows, columns = slice(top, top + size), slice(left, left + size)
                product = (
                    probabilities[:, :, None, None, rows, columns]
                    * image[:, None, :, None, rows, columns]
                    * edges[:, None, None, :, rows, columns]
                )  # (B, K, C, E, d, d)
                base = product.sum((-2, -1)) / size**2
                weighted = base[..., None, None] * weights[:, None, :, :, rows, columns]
                total[..., rows, columns] += weighted.sum((2, 3)) / pairs
    return total


@pytest.mark.parametrize("size", [(16, 16), (8, 24), (13, 10), (2, 2), (1, 3)])
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_factorised_attention_equals_the_equations(size, training):
    torch.manual_seed(0)
    attention = TensorAttention(3, image_width=4, edge_width=5, hidden_width=6).double().train(training)
    image, edges = torch.rand(2, 4, *size).double(), torch.rand(2, 5, *size).double()
    probabilities = torch.rand(2, 3, *size).double()
    inputs = [image, probabilities, edges]
    gradients = []
    outputs = []
    for function in (attention, lambda *arguments: naive_attention(attention, *arguments)):
        leaves = [value.clone().requires_grad_() for value in inputs]
        outputs.append(function(*leaves))
        (outputs[-1] * torch.arange(outputs[-1].numel()).view_as(outputs[-1])).sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-12, atol=1e-14)
    for ours, naive in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, naive, rtol=1e-9, atol=1e-9)
    assert (outputs[0] >= 0).all()


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest result of any operation."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_the_big_tensors_never_exist():
    """No tensor, forwards or backwards, is larger than O x E, and what is kept hardly grows with the classes."""
    size, kept = 16, {}
    for classes in (2, 14):
        attention = TensorAttention(classes)
        image, edges = torch.rand(1, 8, size, size), torch.rand(1, 8, size, size)
        probabilities = torch.rand(1, classes, size, size, requires_grad=True)
        saved = kept[classes] = []
        with (
            LargestTensor() as largest,
            torch.autograd.graph.saved_tensors_hooks(
                lambda x, saved=saved: (saved.append(x.numel()), x)[1], lambda x: x
            ),
        ):
            attention(image, probabilities, edges).sum().backward()
        # The product of all three factors has as many times more values as there are classes.
        assert largest.elements <= 64 * size**2
    assert sum(kept[14]) < 1.1 * sum(kept[2])


def test_attention_changes_nothing_at_the_start():
    network = small_network(deep_supervision=False).train()
    plain = small_network(deep_supervision=False, use_tcma=False).train()
    missing, unexpected = plain.load_state_dict(network.state_dict(), strict=False)
    assert not missing
    assert all(".tcma." in name for name in unexpected)
    image = torch.randn(2, 1, 64, 96)
    outputs = []
    for model in (network, plain):
        torch.manual_seed(1)  # stochastic depth
        outputs.append(model(image))
    assert torch.equal(*outputs)
    randomise_back(network)
    torch.manual_seed(1)
    assert not torch.allclose(network(image), outputs[0])


def test_auxiliary_outputs_are_class_maps_modulated_by_the_attention():
    network = small_network().eval()
    maps = {}
    for level, module in enumerate(network.decoder.tcma.seg_layers):
        for name in ("decoder_classes", "attention"):
            getattr(module, name).register_forward_hook(
                lambda _module, _inputs, output, key=(level, name): maps.update({key: output})
            )
    with torch.no_grad():
        outputs = network(torch.randn(1, 1, 64, 96))
    for level, output in enumerate(outputs[1:]):
        attention = maps[level, "attention"]
        assert (attention >= 0).all()
        assert attention.any()
        torch.testing.assert_close(output, (1 + attention) * maps[level, "decoder_classes"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_attention_is_finite_and_float32_for_large_inputs_under_autocast(dtype, training):
    network = small_network().train(training)
    randomise_back(network)
    seen = []
    for module in network.modules():
        if isinstance(module, TensorAttention):
            module.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    with torch.autocast("cpu", dtype=dtype):
        outputs = network(100 * torch.randn(1, 1, 64, 64))
        assert torch.get_autocast_dtype("cpu") == dtype
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == dtype  # autocast is back on
    assert len(seen) == 4
    for attention in seen:
        assert attention.dtype == torch.float32
        assert attention.isfinite().all()
        assert (attention >= 0).all()
    assert all(output.isfinite().all() for output in outputs)


def test_edges_do_not_see_the_border_of_the_image():
    sobel = SobelMagnitude()
    flat = torch.full((1, 2, 5, 6), 7.0)
    torch.testing.assert_close(sobel(flat), torch.full_like(flat, 1e-3))
    step = torch.zeros(1, 1, 6, 6)
    step[..., 3:] = 2.0
    edges = sobel(step)
    expected = torch.tensor([0.0, 0.0, 8.0, 8.0, 0.0, 0.0]).expand(1, 1, 6, 6)
    torch.testing.assert_close(edges, expected, atol=1e-2, rtol=0)
    torch.testing.assert_close(sobel(step.transpose(2, 3)), edges.transpose(2, 3))
    assert "sobel.kernels" not in InputPyramid(1, 2, 2, (4, 8)).state_dict()


def test_pyramid_holds_means_of_the_full_resolution():
    torch.manual_seed(0)
    pyramid = InputPyramid(2, 3, 5, (4, 8, 16, 32)).eval()
    image = torch.randn(1, 2, 64, 96)
    full = pyramid.image_embedding(image)
    for (image_features, edge_features), stride in zip(pyramid(image), (4, 8, 16, 32), strict=True):
        torch.testing.assert_close(image_features, functional.avg_pool2d(full, stride))
        assert edge_features.shape == (1, 5, 64 // stride, 96 // stride)
        assert (image_features >= 0).all()
        assert (edge_features >= 0).all()


def test_patch_sizes_must_fit_into_each_other():
    with pytest.raises(ValueError, match=r"patch_sizes are \(2, 3, 8\)"):
        TensorAttention(2, patch_sizes=(2, 3, 8))


# ---------------------------------------------------------------------------------------------------------- network


@pytest.mark.parametrize("size", [(1, 1), (7, 12), (64, 33)])
def test_training_at_batch_size_one_and_any_size(size):
    network = small_network().train()
    outputs = network(torch.randn(1, 1, *size))
    assert outputs[0].shape == (1, 2, *size)
    sum(output.square().mean() for output in outputs).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_inputs_are_padded_to_64():
    network = small_network(deep_supervision=False).eval()
    image = torch.randn(1, 1, 20, 40)
    padded = functional.pad(image, (0, 24, 0, 44))
    with torch.no_grad():
        torch.testing.assert_close(network(image), network(padded)[..., :20, :40])


def test_without_tcma_there_is_one_output():
    network = small_network(use_tcma=False).eval()
    assert network.deep_supervision_strides == (1,)
    assert S3Mamba.deep_supervision_strides == (1, 4, 8, 16, 32)
    with torch.no_grad():
        outputs = network(torch.randn(1, 1, 40, 33))
    assert [tuple(output.shape) for output in outputs] == [(1, 2, 40, 33)]


@pytest.mark.parametrize("deep_supervision", [False, True])
def test_every_parameter_takes_part_in_the_loss(deep_supervision):
    """As distributed training needs it; with deep supervision nnU-Net gives the lowest output no weight."""
    network = small_network(deep_supervision=deep_supervision, drop_path_rate=0.0).train()
    outputs = network(torch.randn(2, 1, 64, 64))
    loss = sum(output.square().mean() for output in outputs[:-1]) if deep_supervision else outputs.square().mean()
    loss.backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_only_class_dependent_tensors_are_left_out_of_a_transfer():
    """nnU-Net's -pretrained_weights copies everything but names with ``.seg_layers.`` and needs equal shapes there."""
    with torch.device("meta"):
        two, five = (S3Mamba(1, classes, **SMALL).state_dict() for classes in (2, 5))
    differing = {name for name in two if two[name].shape != five[name].shape}
    assert differing
    assert all(".seg_layers." in name for name in differing)


# ---------------------------------------------------------------------------------------------------------- weights


@pytest.fixture(scope="module")
def vmamba_small() -> dict[str, torch.Tensor]:
    """A checkpoint in the layout of VMamba-S's file with made-up values. Not to be changed in place."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "patch_embed.proj.weight": (96, 3, 4, 4),
        "patch_embed.proj.bias": (96,),
        "patch_embed.norm.weight": (96,),
        "patch_embed.norm.bias": (96,),
    }
    for stage, (width, depth) in enumerate(zip((96, 192, 384, 768), VMAMBA_SMALL_DEPTHS, strict=True)):
        inner, rank = 2 * width, width // 16
        for block in range(depth):
            prefix = f"layers.{stage}.blocks.{block}."
            shapes |= {f"{prefix}ln_1.{part}": (width,) for part in ("weight", "bias")}
            shapes |= {
                f"{prefix}self_attention.{name}": shape
                for name, shape in {
                    "x_proj_weight": (4, rank + 32, inner),
                    "dt_projs_weight": (4, inner, rank),
                    "dt_projs_bias": (4, inner),
                    "A_logs": (4 * inner, 16),
                    "Ds": (4 * inner,),
                    "in_proj.weight": (2 * inner, width),
                    "conv2d.weight": (inner, 1, 3, 3),
                    "conv2d.bias": (inner,),
                    "out_norm.weight": (inner,),
                    "out_norm.bias": (inner,),
                    "out_proj.weight": (width, inner),
                }.items()
            }
        if stage < 3:
            shapes[f"layers.{stage}.downsample.reduction.weight"] = (2 * width, 4 * width)
            shapes |= {f"layers.{stage}.downsample.norm.{part}": (4 * width,) for part in ("weight", "bias")}
    shapes |= {"norm.weight": (768,), "norm.bias": (768,), "head.weight": (1000, 768), "head.bias": (1000,)}
    return {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}


def test_layout_has_the_size_of_the_published_file(vmamba_small):
    weight_bytes = sum(4 * tensor.numel() for tensor in vmamba_small.values())
    published = entries.entry("vmamba_small_imagenet").size_bytes
    # Names and pickled structure: about 200 bytes a tensor.
    assert 0 < published - weight_bytes < 400 * len(vmamba_small)


@pytest.fixture(scope="module")
def network_of_halves() -> S3Mamba:
    """The default network for three channels; every parameter is 0.5 before each use through ``reset``."""
    return S3Mamba(3, 2)


def reset(network: nn.Module) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(0.5)
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def expected_source(name: str) -> str:
    """The checkpoint's name of a tensor of the network."""
    if name.startswith("decoder.stages."):
        stage, rest = name.removeprefix("decoder.stages.").split(".", 1)
        name = f"encoder.stages.{3 - int(stage)}.{rest}"
    for ours, theirs in (
        ("encoder.stages.", "layers."),
        (".ss2d.", ".self_attention."),
        (".norm.", ".ln_1." if ".blocks." in name else ".norm."),
        ("encoder.patch_embed", "patch_embed"),
    ):
        name = name.replace(ours, theirs)
    if name.startswith("encoder.downsamples."):
        stage, rest = name.removeprefix("encoder.downsamples.").split(".", 1)
        name = f"layers.{stage}.downsample.{rest}"
    return name


def test_weights_fill_encoder_and_mirrored_decoder(network_of_halves, vmamba_small):
    network = network_of_halves
    before = reset(network)
    report = load_vmamba_small(network, vmamba_small)
    after = network.state_dict()
    # 11 tensors a block without convolution: 8 blocks in the encoder, 7 in the decoder; 3 mergings, 1 embedding.
    assert len(report.matched) == 11 * (8 + 7) + 9 + 4
    assert not report.adapted
    for name in report.matched:
        assert torch.equal(after[name], vmamba_small[expected_source(name)]), name
    changed = {name for name in before if not torch.equal(after[name], before[name])}
    assert changed == set(report.matched)
    assert report.missing
    assert all(".encf." in name for name in report.missing)
    used = {expected_source(name) for name in report.matched}
    assert set(report.unused) == set(vmamba_small) - used
    assert {"layers.0.blocks.0.self_attention.conv2d.weight", "layers.2.blocks.2.ln_1.weight", "head.bias"} <= set(
        report.unused
    )
    filled = {id(parameter) for parameter in network.encoder_parameters()}
    assert filled == {id(parameter) for name, parameter in network.named_parameters() if name in report.matched}


def test_vm_unet_takes_the_convolutions_too(vmamba_small):
    network = S3Mamba(3, 1, use_encf=False, use_tcma=False, use_dwconv=True)
    report = load_vmamba_small(network, vmamba_small)
    assert len(report.matched) == 13 * (8 + 7) + 9 + 4
    assert not report.missing


def test_patch_embedding_adapts_to_the_channels(vmamba_small):
    network = S3Mamba(1, 2)
    kernel = network.encoder.patch_embed.proj.weight.clone()
    report = load_vmamba_small(network, vmamba_small, adapt_input_channels=False)
    assert "encoder.patch_embed.proj.weight" in report.missing
    assert torch.equal(network.encoder.patch_embed.proj.weight, kernel)
    report = load_vmamba_small(network, vmamba_small)
    assert report.adapted == ("encoder.patch_embed.proj.weight",)
    expected = vmamba_small["patch_embed.proj.weight"].sum(1, keepdim=True)
    torch.testing.assert_close(network.encoder.patch_embed.proj.weight.detach(), expected)


MUTATIONS = {
    "one tensor missing": (
        lambda c: {k: v for k, v in c.items() if k != "layers.2.blocks.1.self_attention.A_logs"},
        r"2 of 178 tensors.*encoder\.stages\.2\.blocks\.1\.ss2d\.A_logs is missing",
    ),
    "patch embedding missing": (
        lambda c: {k: v for k, v in c.items() if k != "patch_embed.proj.weight"},
        r"patch_embed\.proj\.weight is missing",
    ),
    "another shape": (
        lambda c: {**c, "layers.0.blocks.0.ln_1.bias": torch.zeros(1)},
        r"encoder\.stages\.0\.blocks\.0\.norm\.bias has shape \(1,\), the network needs \(96,\)",
    ),
    "another patch size": (
        lambda c: {**c, "patch_embed.proj.weight": torch.zeros(96, 3, 2, 2)},
        r"patch_embed\.proj\.weight has shape \(96, 3, 2, 2\)",
    ),
    "VMamba-Tiny": (
        lambda c: {k: v for k, v in c.items() if not (k.startswith("layers.2.blocks.") and int(k.split(".")[3]) > 8)},
        r"stages have 2-2-9-2 blocks",
    ),
    "newer VMamba": (
        lambda c: {**c, "layers.0.blocks.0.mlp.fc1.weight": torch.zeros(1)},
        r"newer VMamba architecture.*does not fit S³-Mamba.*fetch vmamba_small_imagenet",
    ),
    "another network": (lambda c: {"layer1.0.conv1.weight": torch.zeros(64, 64, 1, 1)}, "stages have no blocks"),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_anything_else_is_refused_and_changes_nothing(network_of_halves, vmamba_small, mutation):
    change, message = MUTATIONS[mutation]
    before = reset(network_of_halves)
    with pytest.raises(WeightsError, match=rf"(?s){message}") as error:
        load_vmamba_small(network_of_halves, change(vmamba_small))
    assert "nothing was loaded" in str(error.value)
    after = network_of_halves.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_small_network_has_no_weights(vmamba_small):
    with pytest.raises(
        WeightsError, match=r"96 channels in its first stage, but this S3MambaSmall has 32.*random start"
    ):
        load_vmamba_small(S3MambaSmall(3, 2), vmamba_small)
    with pytest.raises(TypeError, match="Linear has no encoder and decoder"):
        load_vmamba_small(nn.Linear(1, 1), vmamba_small)
