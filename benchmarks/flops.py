"""Multiply-adds of a network, counted as in the papers: fvcore, and the scan by mamba-ssm's formula."""

from __future__ import annotations

import math

import torch
from fvcore.nn import FlopCountAnalysis

__all__ = ["count_multiply_adds"]


def _scan_operations(inputs: list, _outputs: list) -> int:
    """9 B L D N + B L D (state-spaces/mamba, issue 110), for u (B, D, L) and A (D, N)."""
    batch, dim, length = inputs[0].type().sizes()
    states = inputs[2].type().sizes()[1]
    return 9 * batch * length * dim * states + batch * dim * length


def count_multiply_adds(network: torch.nn.Module, shape: tuple[int, ...]) -> int:
    """Multiply-adds of one forward pass; element-wise operations are not counted.

    Args:
        network: The network, evaluated with deep supervision as it is set.
        shape: Shape of the input.
    Returns:
        Sum over convolutions, linear layers, einsums, normalisations and selective scans.
    """
    analysis = FlopCountAnalysis(network.eval(), torch.zeros(shape))
    analysis.set_op_handle("nnunetv2_smallseg::selective_scan", _scan_operations)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    return math.floor(analysis.total())
