"""The memory of a training step: predicted without data, measured by PyTorch's own allocator."""

from __future__ import annotations

import functools
import importlib
from contextlib import ExitStack

import pytest
import torch
from conftest import small_networks
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from benchmarks.memory import compare, example_plans
from nnunetv2_smallseg import registry, trainers
from nnunetv2_smallseg.errors import SmallSegError
from nnunetv2_smallseg.ops.tracing import standing_for
from nnunetv2_smallseg.plans.cuda_precision import CudaPrecision
from nnunetv2_smallseg.plans.memory import training_memory

# The share of the measured peak that a prediction may be off.
LARGEST_ERROR = 0.15


def small_plans(patch_size: int = 64, batch_size: int = 2) -> tuple[dict, dict]:
    """Plans with the small version of every network."""
    plans, dataset_json = example_plans(patch_size, batch_size)
    plans["configurations"]["2d"]["network_options"] = small_networks()
    # A small version of nnU-Net's network, too.
    settings = plans["configurations"]["2d"]["architecture"]["arch_kwargs"]
    settings["features_per_stage"] = [min(32, features // 4) for features in settings["features_per_stage"]]
    return plans, dataset_json


def what_decides(name: str) -> tuple:
    """All that memory can depend on in a trainer: two with the same are one, measured once."""
    trainer = getattr(trainers, name)
    methods = ("train_step", "_build_loss", "configure_optimizers", "prepare_rehearsal", "_get_deep_supervision_scales")
    network = registry.trainer(name).network
    return network, getattr(trainer, "supervise_deeply", None), *(getattr(trainer, method) for method in methods)


@functools.cache
def comparison(name: str, configuration: str) -> dict:
    return compare(name, small_plans()[0], configuration, small_plans()[1])


@pytest.mark.parametrize("name", list(registry.trainers()))
def test_every_trainers_memory_is_predicted(name):
    first = next(other for other in registry.trainers() if what_decides(other) == what_decides(name))
    result = comparison(first, "2d")
    assert abs(result["error"]) <= LARGEST_ERROR, result
    # The parts make sense: AdamW keeps two values a parameter, SGD with momentum one; batch norms have buffers.
    parts = result["predicted_parts"]
    kept = 1 if registry.trainer(name).network is None else 2
    assert 0.9 * kept <= parts["optimizer_state"] / parts["parameters"] <= 1.01 * kept
    assert parts["activations"] + parts["temporary"] > 0


@pytest.mark.parametrize("name", ["nnUNetTrainerSwinUMambaD", "nnUNetTrainerCurriculum"])
def test_slabs(name):
    assert abs(comparison(name, "2.5d")["error"]) <= LARGEST_ERROR


def test_regions_ignore_label_and_channels():
    plans, dataset_json = small_plans()
    dataset_json = {
        "channel_names": {"0": "T1", "1": "T2"},
        "labels": {"background": 0, "lesion": [1, 2], "core": 2, "ignore": 3},
        "regions_class_order": [1, 2],
    }
    assert abs(compare("nnUNetTrainerHUNet", plans, "2d", dataset_json)["error"]) <= LARGEST_ERROR
    # nnU-Net's loss asks whether anything is not ignored, which tensors without data do not know.
    dataset_json["labels"] = {"background": 0, "lesion": 1, "ignore": 2}
    assert abs(compare("nnUNetTrainerHUNet", plans, "2d", dataset_json)["error"]) <= LARGEST_ERROR


def test_memory_grows_with_batch_and_patch_and_shrinks_with_half_precision_and_checkpointing():
    def total(patch_size: int, batch_size: int, **options: object) -> int:
        plans, dataset_json = small_plans(patch_size, batch_size)
        return training_memory(trainers.nnUNetTrainerHUNet, plans, "2d", dataset_json, **options).total

    small, double, fourfold = total(64, 4), total(64, 8), total(128, 4)
    assert fourfold - small == pytest.approx(3 * (double - small), rel=0.05)  # affine in pixels
    assert total(128, 4) < 0.75 * total(128, 4, device_type="cpu")
    assert total(128, 4, grad_checkpointing=True) < 0.8 * fourfold


def test_scans_count_as_their_back_end_allocates(monkeypatch):
    plans, dataset_json = small_plans()

    def total(backend: str) -> int:
        monkeypatch.setenv("SMALLSEG_SCAN_BACKEND", backend)
        return training_memory(trainers.nnUNetTrainerSwinUMambaDScratch, plans, "2d", dataset_json).total

    assert total("auto") < 0.9 * total("torch")  # Triton's, which is what a GPU would use
    with pytest.raises(SmallSegError, match="'mamba_ssm' cannot be predicted: unset SMALLSEG_SCAN_BACKEND"):
        total("mamba_ssm")


def types_of_outputs(entry: registry.Network, device: str) -> list[tuple[str, list[str]]]:
    """The types of the outputs of all modules, in order: under CUDA's own autocast, or as planned for it."""
    found = []
    network = getattr(importlib.import_module(entry.module), entry.name)(1, 2, True, **entry.small)
    with FakeTensorMode(), ExitStack() as contexts:
        for name, module in network.named_modules():
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[key] = nn.Parameter(torch.empty(parameter.shape, device=device))
            for key, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[key] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)

            def note(_, __, output, name=name):
                found.append((name, [str(leaf.dtype) for leaf in tree_leaves(output) if torch.is_tensor(leaf)]))

            module.register_forward_hook(note)
        if device == "cuda":
            # torch.autocast would refuse where there is no GPU.
            contexts.callback(torch.clear_autocast_cache)
            contexts.callback(torch.set_autocast_enabled, "cuda", torch.is_autocast_enabled("cuda"))
            torch.set_autocast_enabled("cuda", True)
        else:
            contexts.enter_context(standing_for("cuda"))
            contexts.enter_context(CudaPrecision())
        network(torch.empty(2, 1, 64, 64, device=device))
    return found


@pytest.mark.skipif(
    torch.__version__ < torch.torch_version.TorchVersion("2.9"),
    reason="convolutions of fake CUDA tensors end the process in PyTorch up to 2.8",
)
@pytest.mark.parametrize("name", [system.networks[-1].name for system in registry.SYSTEMS if system.networks])
def test_types_are_those_of_cudas_autocast(name):
    entry = registry.network(name)
    expected = types_of_outputs(entry, "cuda")
    assert {"torch.float16", "torch.float32"} <= {dtype for _, dtypes in expected for dtype in dtypes}
    assert types_of_outputs(entry, "cpu") == expected
