"""Activation checkpointing of modules with batch normalisation."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

__all__ = ["checkpointed"]


def checkpointed(module: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
    """Runs ``module`` without keeping its activations; the backward pass computes them again.

    Random draws from torch's generators are the same both times. The second pass leaves running statistics of batch
    normalisations as they are, which otherwise would move twice a step. They do in compiled code: ``torch.compile``
    does not trace foreign context managers around the second pass.

    Args:
        module: Called with ``inputs``.
        inputs: Tensors.
    Returns:
        The output of ``module``.
    """
    if torch.compiler.is_compiling():
        return checkpoint(module, *inputs, use_reentrant=False)

    def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
        return nullcontext(), _statistics_left_alone(module)

    return checkpoint(module, *inputs, use_reentrant=False, context_fn=contexts)


@contextmanager
def _statistics_left_alone(module: nn.Module) -> Iterator[None]:
    """Batch normalisations in training mode use the batch's statistics without recording them.

    Momentum 0 does that with the same operator as in the first pass, which has to save the same tensors.
    """
    norms = [norm for norm in module.modules() if isinstance(norm, _BatchNorm) and norm.track_running_stats]
    kept = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm, _, counter in kept:
        norm.momentum, norm.num_batches_tracked = 0.0, counter.clone()
    try:
        yield
    finally:
        for norm, momentum, counter in kept:
            norm.momentum, norm.num_batches_tracked = momentum, counter
