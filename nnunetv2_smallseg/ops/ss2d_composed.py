"""SS2D put together from a selective scan: for the back ends that have no fused one, and the reference.

The map is written out as four sequences, projected, scanned in one call and summed. This is the definition of SS2D
(VMamba, arXiv 2401.10166, section 4.2), and takes several times the memory of the map.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nnunetv2_smallseg.ops.arguments import ScanGradients, ScanInputs, compute_dtype
from nnunetv2_smallseg.ops.backend_reference import selective_scan_reference
from nnunetv2_smallseg.ops.ss2d_arguments import NUM_DIRECTIONS, SS2DGradients, SS2DInputs, canonical_ss2d_inputs

__all__ = ["backward", "composed_of", "cross_merge", "cross_scan", "forward", "ss2d_reference"]


def cross_scan(x: Tensor) -> Tensor:
    """(B, H, W, D) -> (B, 4, D, L): rows, columns, and both backwards. The adjoint of ``cross_merge``."""
    maps = x.permute(0, 3, 1, 2)
    forwards = torch.stack((maps.flatten(2), maps.transpose(2, 3).flatten(2)), dim=1)
    return torch.cat((forwards, forwards.flip(-1)), dim=1)


def cross_merge(sequences: Tensor, height: int, width: int) -> Tensor:
    """(B, 4, D, L) -> (B, H, W, D): the sum of the four sequences, each put back in its place."""
    both_ways = sequences[:, :2] + sequences[:, 2:].flip(-1)
    rows = both_ways[:, 0].unflatten(-1, (height, width))
    columns = both_ways[:, 1].unflatten(-1, (width, height)).transpose(2, 3)
    return (rows + columns).permute(0, 2, 3, 1)


def ss2d_reference(
    x: Tensor,
    x_proj_weight: Tensor,
    dt_projs_weight: Tensor,
    dt_projs_bias: Tensor,
    A_logs: Tensor,
    Ds: Tensor,
) -> Tensor:
    """SS2D as a loop over time, differentiated by autograd; arguments and result as in ``ss2d``.

    It never goes through a registered operator: what every back end must agree with.
    """
    given = canonical_ss2d_inputs(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds)
    with torch.autocast(x.device.type, enabled=False):
        return composed_of(selective_scan_reference, given.to(compute_dtype(*given))).to(x.dtype)


def composed_of(scan: Callable[..., Tensor], inputs: SS2DInputs) -> Tensor:
    """SS2D (B, H, W, D) of any function with the arguments of ``selective_scan``, which autograd may differentiate."""
    return _merged(inputs, scan(*_scan_inputs(inputs, *_projected(inputs))))


def forward(
    scan: Callable[[ScanInputs, bool], tuple[Tensor, Tensor]], inputs: SS2DInputs, keep_states: bool
) -> tuple[Tensor, Tensor]:
    """Output (B, H, W, D) and the states that the back end's ``scan`` keeps."""
    out, states = scan(_scan_inputs(inputs, *_projected(inputs)), keep_states)
    return _merged(inputs, out), states


def backward(
    scan_backward: Callable[[ScanInputs, Tensor, Tensor], ScanGradients],
    inputs: SS2DInputs,
    states: Tensor,
    gradient: Tensor,
) -> SS2DGradients:
    """Gradients from the gradient (B, H, W, D) of the output; sequences and projections are computed again."""
    batch, height, width, channels = inputs.x.shape
    sequences, projected = _projected(inputs)
    scan = _scan_inputs(inputs, sequences, projected)
    gradients = scan_backward(scan, states, cross_scan(gradient).flatten(1, 2))

    delta = gradients.delta.view(batch, NUM_DIRECTIONS, channels, -1)
    low_rank = torch.einsum("bkdl,kdr->bkrl", delta, inputs.dt_projs_weight)
    projected_gradient = torch.cat((low_rank, gradients.B, gradients.C), dim=2)
    u = gradients.u.view_as(delta) + torch.einsum("bkcl,kcd->bkdl", projected_gradient, inputs.x_proj_weight)
    return SS2DGradients(
        cross_merge(u, height, width),
        torch.einsum("bkcl,bkdl->kcd", projected_gradient, sequences),
        torch.einsum("bkdl,bkrl->kdr", delta, projected[:, :, : inputs.rank]),
        gradients.delta_bias.view_as(inputs.dt_projs_bias),
        gradients.A * scan.A,
        gradients.D,
    )


def _projected(inputs: SS2DInputs) -> tuple[Tensor, Tensor]:
    """The sequences (B, 4, D, L) and their projections (B, 4, R + 2N, L)."""
    sequences = cross_scan(inputs.x)
    return sequences, torch.einsum("bkdl,kcd->bkcl", sequences, inputs.x_proj_weight)


def _scan_inputs(inputs: SS2DInputs, sequences: Tensor, projected: Tensor) -> ScanInputs:
    """One scan of 4D channels in four groups."""
    low_rank, B, C = projected.split((inputs.rank, inputs.num_states, inputs.num_states), dim=2)
    delta = torch.einsum("bkrl,kdr->bkdl", low_rank, inputs.dt_projs_weight)
    return ScanInputs(
        sequences.flatten(1, 2),
        delta.flatten(1, 2).contiguous(),
        -inputs.A_logs.exp(),
        B.contiguous(),
        C.contiguous(),
        inputs.Ds,
        inputs.dt_projs_bias.flatten(),
        True,
    )


def _merged(inputs: SS2DInputs, out: Tensor) -> Tensor:
    """The output (B, 4D, L) of the scan as a map (B, H, W, D)."""
    _, height, width, channels = inputs.x.shape
    return cross_merge(out.unflatten(1, (NUM_DIRECTIONS, channels)), height, width)
