"""Every network of the registry, one body: size, shapes, gradients, odd sizes, saving, compilation, precision."""

from __future__ import annotations

import copy
import importlib
import itertools
import os
import shutil

import pytest
import torch
from torch._inductor import config as inductor_config

from nnunetv2_smallseg import registry
from nnunetv2_smallseg.architectures.slab import SlabNetwork

NETWORKS = list(registry.networks().values())
every_network = pytest.mark.parametrize("entry", NETWORKS, ids=lambda entry: entry.name)
training_or_not = pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])


def build(entry: registry.Network, channels: int = 1, classes: int = 3, seed: int = 0, **options) -> torch.nn.Module:
    torch.manual_seed(seed)
    return getattr(importlib.import_module(entry.module), entry.name)(channels, classes, **options)


def expected_shapes(entry: registry.Network, size: tuple[int, int], batch: int = 1, classes: int = 3) -> list[tuple]:
    return [
        (batch, classes, round(size[0] / stride), round(size[1] / stride)) for stride in entry.deep_supervision_strides
    ]


def segmentation_of(output) -> torch.Tensor | list[torch.Tensor]:
    """The segmentation, where a network in training mode returns the pair of it and a reconstruction of the image."""
    return output[0] if isinstance(output, tuple) else output


def tensors_of(output) -> list[torch.Tensor]:
    """Everything a network returns: one tensor, a list with deep supervision, a pair with a reconstruction."""
    return [output] if isinstance(output, torch.Tensor) else [tensor for part in output for tensor in tensors_of(part)]


def without_random_draws(network: torch.nn.Module) -> torch.nn.Module:
    for module in network.modules():
        if hasattr(module, "rate"):
            module.rate = 0.0
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return network


@every_network
def test_number_of_parameters(entry):
    for (channels, classes), count in entry.parameters.items():
        with torch.device("meta"):
            network = build(entry, channels, classes, deep_supervision=entry.published_deep_supervision)
        assert sum(parameter.numel() for parameter in network.parameters()) == count


@every_network
def test_registry_tells_the_truth(entry):
    with torch.device("meta"):
        network = build(entry)
    assert network.stride == entry.stride
    assert network.deep_supervision_strides == entry.deep_supervision_strides


@every_network
def test_every_parameter_gets_a_finite_gradient(entry):
    network = without_random_draws(build(entry, channels=2))  # it would silence whole blocks
    outputs = tensors_of(network(torch.randn(1, 2, 64, 64)))
    sum(output.square().mean() for output in outputs).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    silent = {name for name, parameter in network.named_parameters() if not parameter.grad.any()}
    # An instance normalisation follows this bias and removes whatever it adds.
    assert silent <= {"stem.conv.bias"}


@every_network
@pytest.mark.parametrize("size", [(32, 32), (33, 70), (100, 40)])
@torch.no_grad()
def test_any_size_with_and_without_deep_supervision(entry, size):
    network = build(entry).eval()
    image = torch.randn(1, 1, *size)
    outputs = network(image)
    assert [tuple(output.shape) for output in outputs] == expected_shapes(entry, size)
    network.decoder.deep_supervision = False  # the switch nnU-Net uses
    torch.testing.assert_close(network(image), outputs[0])


@every_network
@torch.no_grad()
def test_sizes_below_the_stride(entry):
    network = build(entry, deep_supervision=False).eval()
    assert network(torch.randn(1, 1, 7, 12)).shape == (1, 3, 7, 12)


@every_network
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@torch.no_grad()
def test_one_to_four_channels(entry, channels):
    network = build(entry, channels, classes=2, deep_supervision=False).eval()
    assert network(torch.randn(1, channels, 32, 32)).shape == (1, 2, 32, 32)


@every_network
@torch.no_grad()
def test_samples_of_a_batch_are_independent_in_evaluation(entry):
    network = build(entry, deep_supervision=False).eval()
    images = torch.randn(2, 1, 32, 64)
    torch.testing.assert_close(network(images)[1:], network(images[1:]), rtol=1e-4, atol=1e-5)


@every_network
@torch.no_grad()
def test_save_and_load_give_equal_logits(entry, tmp_path):
    network = build(entry, deep_supervision=False).eval()
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    torch.manual_seed(1)
    other = copy.deepcopy(network)
    for parameter in other.parameters():
        parameter.normal_()
    other.load_state_dict(torch.load(tmp_path / "weights.pth", weights_only=True))
    image = torch.randn(1, 1, 64, 32)
    assert torch.equal(network(image), other(image))


@every_network
def test_wrong_inputs_name_what_was_wrong(entry):
    with pytest.raises(ValueError, match="input_channels is 0"):
        build(entry, channels=0)
    with torch.device("meta"):
        network = build(entry, channels=2)
        with pytest.raises(ValueError, match=r"\(1, 3, 32, 32\)"):
            network(torch.empty(1, 3, 32, 32))
        with pytest.raises(ValueError, match=r"\(2, 32, 32\)"):
            network(torch.empty(2, 32, 32))


def check_autocast(network_options: dict, entry: registry.Network, dtype: torch.dtype, seeds: range, device="cpu"):
    for seed, scale in itertools.product(seeds, (1e-3, 1.0, 1e3)):
        network = build(entry, seed=seed, **network_options).to(device)
        image = scale * torch.randn(1, 1, 32, 32)
        with torch.autocast(device, dtype=dtype):
            outputs = tensors_of(network(image.to(device)))
            loss = sum(output.float().square().mean() for output in outputs)
        loss.backward()
        assert all(output.isfinite().all() for output in outputs), (seed, scale)
        wrong = [name for name, parameter in network.named_parameters() if not parameter.grad.isfinite().all()]
        assert not wrong, (seed, scale, wrong)


half_precisions = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


@every_network
@half_precisions
def test_autocast_is_finite(entry, dtype):
    check_autocast(entry.small, entry, dtype, range(3))


@pytest.mark.slow
@every_network
@half_precisions
def test_autocast_of_the_whole_network_is_finite(entry, dtype):
    check_autocast({}, entry, dtype, range(2))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@every_network
@half_precisions
def test_autocast_on_cuda_is_finite(entry, dtype):
    check_autocast({}, entry, dtype, range(3), "cuda")


@every_network
def test_activation_checkpointing_changes_no_gradient(entry):
    network = build(entry, deep_supervision=False)
    image = torch.randn(1, 1, 32, 32)
    gradients = []
    for enabled in (False, True):
        network.set_grad_checkpointing(enabled)
        network.zero_grad()
        torch.manual_seed(3)  # stochastic depth must draw the same twice
        segmentation_of(network(image)).square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in network.encoder_parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)


@every_network
def test_weight_decay_spares_norms_biases_and_scan_parameters(entry):
    with torch.device("meta"):
        network = build(entry)
    exempt = network.no_weight_decay()
    parameters = dict(network.named_parameters())
    assert exempt <= parameters.keys()
    assert {name for name, parameter in parameters.items() if parameter.ndim == 1} <= exempt
    assert {name for name in parameters if name.endswith((".A_logs", ".Ds"))} <= exempt
    assert all(parameters[name].ndim <= 2 for name in exempt)


@every_network
def test_encoder_parameters_belong_to_the_network(entry):
    with torch.device("meta"):
        network = build(entry)
    own = {id(parameter) for parameter in network.parameters()}
    encoder = [id(parameter) for parameter in network.encoder_parameters()]
    assert encoder
    assert len(encoder) == len(set(encoder))
    assert set(encoder) < own


@every_network
@training_or_not
@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["small", "whole"])
def test_compiles_to_one_graph(entry, training, whole):
    torch._dynamo.reset()  # networks that share code count as recompilations, of which a process may do eight
    network = build(entry, **({} if whole else entry.small)).train(training)
    image = torch.randn(1, 1, 32, 32)
    # The back end "aot_eager" traces forward and backward without generating code, which would take minutes.
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    torch.manual_seed(1)
    outputs = tensors_of(compiled(image))
    torch.manual_seed(1)  # this back end draws what eager code draws
    expected = tensors_of(network(image))
    for output, reference in itertools.zip_longest(outputs, expected):
        torch.testing.assert_close(output, reference, rtol=1e-4, atol=1e-4)
    if training:
        sum(output.mean() for output in outputs).backward()
        assert all(parameter.grad is not None for parameter in network.parameters())


def check_compiled(
    entry: registry.Network, training: bool, deep_supervision: bool, device: str = "cpu", dtype=torch.float64
) -> None:
    """Compares a small network, compiled to code, with itself: outputs, and gradients in training.

    In float64, because normalisations of few values make rounding errors of float32 grow to percents of a gradient,
    compiled or not.
    """
    torch._dynamo.reset()
    network = without_random_draws(build(entry, deep_supervision=deep_supervision, **entry.small)).train(training)
    network = network.to(device, dtype)
    plain = copy.deepcopy(network)
    image = torch.randn(2, 1, 64, 64, device=device, dtype=dtype)  # enough for batch normalisation at stride 32
    results = []
    # Draws what eager code draws.
    with inductor_config.patch(fallback_random=True):
        for one in (torch.compile(network, fullgraph=True), plain):
            torch.manual_seed(1)
            outputs = tensors_of(one(image))
            if training:
                sum(output.square().mean() for output in outputs).backward()
            results.append(outputs)
    accurate = dtype == torch.float64
    for output, expected in zip(*results, strict=True):
        torch.testing.assert_close(output, expected, rtol=1e-7 if accurate else 1e-3, atol=1e-9 if accurate else 1e-3)
    if not training:
        return
    gradients = []
    for one in (network, plain):
        found = {name: parameter.grad for name, parameter in one.named_parameters() if parameter.grad is not None}
        gradients.append((list(found), torch.cat([gradient.flatten() for gradient in found.values()])))
    (names, gradient), (expected_names, expected) = gradients
    assert names == expected_names  # heads of deep supervision may be there without being used
    assert (gradient - expected).norm() < (1e-7 if accurate else 0.1) * expected.norm()


no_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None and shutil.which("clang++") is None,
    reason="no C++ compiler: torch.compile needs one on the CPU",
)
supervised_deeply_or_not = pytest.mark.parametrize("deep_supervision", [False, True], ids=["one output", "all outputs"])
QUICK_TO_COMPILE = registry.network("HUNet")


@no_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_compiles_to_equal_code(dtype):
    check_compiled(QUICK_TO_COMPILE, training=True, deep_supervision=True, dtype=dtype)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@no_compiler
@every_network
@training_or_not
@supervised_deeply_or_not
def test_every_network_compiles_to_equal_code(entry, training, deep_supervision):
    check_compiled(entry, training, deep_supervision)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@every_network
@training_or_not
@supervised_deeply_or_not
def test_every_network_compiles_to_equal_code_on_cuda(entry, training, deep_supervision):
    check_compiled(entry, training, deep_supervision, "cuda", torch.float32)  # Triton's kernels read no float64


@every_network
@torch.no_grad()
def test_slabs_fold_slices_into_channels(entry):
    network = build(entry, channels=2 * 3, classes=2 * 3)
    slab_network = SlabNetwork(network, 3).eval()
    slab = torch.randn(1, 2, 3, 32, 48)
    outputs = slab_network(slab)
    assert [tuple(output.shape) for output in outputs] == [
        (1, 2, 3, *shape[2:]) for shape in expected_shapes(entry, (32, 48))
    ]
    # Channel c of slice s is input channel 3c + s of the 2D network; classes likewise.
    flat = network(torch.stack([slab[:, c, s] for c in range(2) for s in range(3)], dim=1))
    for output, flat_output in zip(outputs, flat, strict=True):
        for k, s in itertools.product(range(2), range(3)):
            assert torch.equal(output[:, k, s], flat_output[:, 3 * k + s])
    assert slab_network.no_weight_decay() == {f"network.{name}" for name in network.no_weight_decay()}


@every_network
def test_slabs_refuse_other_shapes(entry):
    with torch.device("meta"):
        with pytest.raises(ValueError, match="multiple of 3 slices"):
            SlabNetwork(build(entry, channels=3, classes=2), 3)(torch.empty(1, 1, 3, 32, 32))
        slab_network = SlabNetwork(build(entry, channels=3), 3)
        with pytest.raises(ValueError, match=r"\(1, 1, 5, 32, 32\)"):
            slab_network(torch.empty(1, 1, 5, 32, 32))
