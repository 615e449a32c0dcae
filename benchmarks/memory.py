"""Predicted against measured memory of a training step, for every trainer; writes ``benchmarks/results/memory_*.json``.

On the CPU, the measured peak is the running sum of the allocations and releases that PyTorch's profiler reports
(``profile_memory``): they come from the allocator itself and know nothing of operators, graphs and storages, which the
prediction is made of. The resident size of the process would not do: the C library keeps and shares pages, which is
noise of the size of a small network. On a GPU it is ``torch.cuda.max_memory_allocated``.

Run: python -m benchmarks.memory [-device cpu|cuda] [-tr TRAINER ...] [-c 2d|2.5d ...] [-patch_size 256] [-batch_size 2]
Results of earlier runs are kept, trainer by trainer.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import multiprocessing
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.machine import machine_facts
from nnunetv2_smallseg import registry, trainers
from nnunetv2_smallseg.files import write_json
from nnunetv2_smallseg.plans.configurations import resolve
from nnunetv2_smallseg.plans.memory import build_trainer, prepare_trainer, random_batch, training_memory

RESULTS = Path(__file__).parent / "results"
NUM_CLASSES = 2


def example_plans(patch_size: int, batch_size: int, num_slices: int = 3) -> tuple[dict, dict]:
    """Plans with ``2d`` and ``2.5d`` for one channel and two classes, as nnU-Net makes them, and dataset.json."""
    num_stages = max(2, min(8, (patch_size // 4).bit_length()))
    architecture = {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {
            "n_stages": num_stages,
            "features_per_stage": [min(512, 32 * 2**stage) for stage in range(num_stages)],
            "conv_op": "torch.nn.modules.conv.Conv2d",
            "kernel_sizes": [[3, 3]] * num_stages,
            "strides": [[1, 1]] + [[2, 2]] * (num_stages - 1),
            "n_conv_per_stage": [2] * num_stages,
            "n_conv_per_stage_decoder": [2] * (num_stages - 1),
            "conv_bias": True,
            "norm_op": "torch.nn.modules.instancenorm.InstanceNorm2d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }
    planar = {
        "data_identifier": "plans_2d",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": batch_size,
        "patch_size": [patch_size, patch_size],
        "spacing": [1.0, 1.0],
        "batch_dice": True,
        "architecture": architecture,
    }
    slab = {"inherits_from": "2d", "patch_size": [num_slices, patch_size, patch_size]}
    plans = {
        "dataset_name": "Dataset001_Memory",
        "plans_name": "plans",
        "label_manager": "LabelManager",
        "configurations": {"2d": planar, "2.5d": slab},
    }
    return plans, {"channel_names": {"0": "CT"}, "labels": {"background": 0, "lesion": 1}}


def measured_peak(
    name: str, plans: Mapping[str, Any], configuration: str, dataset_json: Mapping[str, Any], device: str = "cpu"
) -> int:
    """Bytes in use at the peak of a real training step, with the optimizer's state in place."""
    trainer = build_trainer(getattr(trainers, name), plans, configuration, dataset_json, device)

    def step() -> None:
        prepare_trainer(trainer)
        for parameter in trainer.network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        trainer.optimizer.step()
        trainer.train_step(random_batch(trainer))

    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    in_use = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        in_use += event.nbytes()
        peak = max(peak, in_use)
    return peak


def compare(
    name: str, plans: Mapping[str, Any], configuration: str, dataset_json: Mapping[str, Any], device: str = "cpu"
) -> dict:
    """Prediction and measurement of one trainer."""
    start = time.process_time()
    predicted = training_memory(getattr(trainers, name), plans, configuration, dataset_json, device_type=device)
    seconds = time.process_time() - start
    measured = measured_peak(name, plans, configuration, dataset_json, device)
    planned = resolve(plans, configuration)
    return {
        "trainer": name,
        "configuration": configuration,
        "patch_size": planned["patch_size"],
        "batch_size": planned["batch_size"],
        "predicted_bytes": predicted.total,
        "predicted_parts": predicted.parts(),
        "peak_in": predicted.moment,
        "measured_bytes": measured,
        "error": round(predicted.total / measured - 1, 4),
        "prediction_cpu_seconds": round(seconds, 2),
    }


def main() -> None:
    """Compares, each trainer in a process of its own, writing after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("-tr", nargs="+", choices=list(registry.trainers()), default=list(registry.trainers()))
    parser.add_argument("-c", nargs="+", choices=("2d", "2.5d"), default=["2d"])
    parser.add_argument("-patch_size", type=int, default=256)
    parser.add_argument("-batch_size", type=int, default=2)
    arguments = parser.parse_args()
    plans, dataset_json = example_plans(arguments.patch_size, arguments.batch_size)
    target = RESULTS / f"memory_{arguments.device}.json"
    runs = json.loads(target.read_text())["runs"] if target.is_file() else []
    spawned = multiprocessing.get_context("spawn")
    # What one training leaves in the C library's heap is not to add up.
    with ProcessPoolExecutor(1, mp_context=spawned, max_tasks_per_child=1) as processes:
        for configuration, name in itertools.product(arguments.c, arguments.tr):
            run = processes.submit(compare, name, plans, configuration, dataset_json, arguments.device).result()
            runs = [old for old in runs if (old["trainer"], old["configuration"]) != (name, configuration)] + [run]
            machine = machine_facts(arguments.device, ("torch", "nnunetv2", "numba", "triton"))
            write_json({"machine": machine, "num_classes": NUM_CLASSES, "runs": runs}, target)
            print(f"{name} {configuration}: {run['measured_bytes'] / 2**20:.0f} MiB, error {100 * run['error']:+.1f} %")


if __name__ == "__main__":
    main()
