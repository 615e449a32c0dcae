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


def _ss2d_operations(inputs: list, _outputs: list) -> int:
    """Scans of 4D channels, and their two projections, for x (B, H, W, D) and x_proj_weight (4, R + 2N, D)."""
    batch, height, width, dim = inputs[0].type().sizes()
    directions, projections, _ = inputs[1].type().sizes()
    rank, states = inputs[2].type().sizes()[2], inputs[4].type().sizes()[1]
    per_channel = 9 * states + 1 + projections + rank
    return batch * height * width * directions * dim * per_channel


def count_multiply_adds(network: torch.nn.Module, shape: tuple[int, ...]) -> int:
    """Multiply-adds of one forward pass; element-wise operations are not counted.

    Args:
        network: The network, evaluated with deep supervision as it is set.
        shape: Shape of the input.
    Returns:
        Sum over convolutions, linear layers, einsums, normalisations, selective scans and SS2D.
    """
    analysis = FlopCountAnalysis(network.eval(), torch.zeros(shape))
    analysis.set_op_handle("nnunetv2_smallseg::selective_scan", _scan_operations)
    analysis.set_op_handle("nnunetv2_smallseg::ss2d", _ss2d_operations)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    return math.floor(analysis.total())
