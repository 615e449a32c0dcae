"""Activation checkpointing for modules with batch normalisation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

__all__ = ["checkpoint_module"]


@contextmanager
def running_statistics_kept(module: nn.Module) -> Iterator[None]:
    """Lets batch normalisation use the statistics of its batch without updating the running ones."""
    norms = [norm for norm in module.modules() if isinstance(norm, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def checkpoint_module(module: nn.Module, *inputs: torch.Tensor | None) -> torch.Tensor:
    """Calls ``module``, keeping only its inputs; what lies between is computed again in the backward pass.

    ``torch.utils.checkpoint`` alone would update running statistics twice in every step.

    Args:
        module: Any module.
        inputs: What it is called with.
    Returns:
        What it returns.
    """
    return checkpoint(
        module, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), running_statistics_kept(module))
    )
