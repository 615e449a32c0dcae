"""Parameters and multiply-adds of every network of the registry; writes ``benchmarks/results/network_size.json``.

Run: python -m benchmarks.network_size
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import torch

from benchmarks.flops import count_multiply_adds
from benchmarks.machine import machine_facts
from nnunetv2_smallseg import registry

RESULTS = Path(__file__).parent / "results" / "network_size.json"
INPUT_SHAPE = (1, 1, 320, 320)
NUM_CLASSES = 14


@torch.no_grad()
def measure() -> dict:
    """Counts for one input channel and 14 classes at 320 x 320, with deep supervision where the paper has it."""
    sizes = {}
    for name, entry in registry.networks().items():
        network_class = getattr(importlib.import_module(entry.module), name)
        network = network_class(INPUT_SHAPE[1], NUM_CLASSES, entry.published_deep_supervision)
        sizes[name] = {
            "parameters": sum(parameter.numel() for parameter in network.parameters()),
            "multiply_adds": count_multiply_adds(network, INPUT_SHAPE),
        }
    return {
        "machine": machine_facts("cpu", ("torch", "fvcore")),
        "input_shape": INPUT_SHAPE,
        "num_classes": NUM_CLASSES,
        "networks": sizes,
    }


if __name__ == "__main__":
    RESULTS.write_text(json.dumps(measure(), indent=2) + "\n")
