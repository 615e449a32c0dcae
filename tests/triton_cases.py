"""Runs the kernels of the fused SS2D in Triton's interpreter and compares them with a reference in float64.

A script, not a test module: the interpreter must be asked for before Triton is imported. ``test_triton.py`` runs it
with cases as JSON and reads what it prints: by case, the largest relative errors of the output and of all gradients.
"""

from __future__ import annotations

import json
import os
import sys

import torch

from nnunetv2_smallseg.ops import selective_scan_reference
from nnunetv2_smallseg.ops.ss2d_arguments import SS2DInputs


def reference(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds):
    """SS2D as four scans one after the other, each of a sequence written out."""
    channels = x.shape[3]
    rank, states = dt_projs_weight.shape[2], A_logs.shape[1]
    out = torch.zeros_like(x)
    for k in range(4):
        transposed, backwards = k in (1, 3), k in (2, 3)
        image = x.transpose(1, 2) if transposed else x
        sequence = image.flatten(1, 2).flip(1) if backwards else image.flatten(1, 2)
        dt, B, C = (sequence @ x_proj_weight[k].t()).split((rank, states, states), dim=-1)
        dt = dt @ dt_projs_weight[k].t()
        own = slice(k * channels, (k + 1) * channels)
        arguments = (sequence.transpose(1, 2), dt.transpose(1, 2), -A_logs[own].exp(), B.transpose(1, 2))
        y = selective_scan_reference(*arguments, C.transpose(1, 2), Ds[own], dt_projs_bias[k], True).transpose(1, 2)
        y = (y.flip(1) if backwards else y).reshape(image.shape)
        out = out + (y.transpose(1, 2) if transposed else y)
    return out


def make_inputs(shape, states, rank, dtype, device="cpu", parameter_dtype=torch.float32):
    """Seeded inputs; decays and step sizes are such that a state lives for some and for many steps."""
    generator = torch.Generator().manual_seed(sum(shape) + states)
    channels = shape[-1]

    def draw(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    parameters = (
        draw(4, rank + 2 * states, channels) * channels**-0.5,
        draw(4, channels, rank) * rank**-0.5,
        draw(4, channels) - 1.5,
        0.5 * draw(4 * channels, states),
        draw(4 * channels),
    )
    x = draw(*shape).to(device, dtype)
    return SS2DInputs(x, *(parameter.to(device, parameter_dtype) for parameter in parameters))


def relative_error(value, target):
    return ((value.double() - target.double()).abs().max() / target.double().abs().max()).item()


def errors(backend, inputs, keep_states=True):
    """Errors of a back end by tensor, relative to the largest value of each; without states only that of the output."""
    leaves = [tensor.double().requires_grad_() for tensor in inputs]
    expected = reference(*leaves)
    out, states = backend.ss2d_forward(inputs, keep_states)
    assert out.dtype == inputs.x.dtype
    assert out.shape == inputs.x.shape
    result = {"out": relative_error(out, expected.detach())}
    if not keep_states:
        return result
    assert states.shape == backend.ss2d_state_shape(inputs)
    gradient = torch.cos(torch.arange(out.numel(), dtype=torch.float64)).view(out.shape).to(out)
    gradients = backend.ss2d_backward(inputs, states, gradient)
    targets = torch.autograd.grad(expected, leaves, gradient.double())
    for name, value, target in zip(inputs._fields, gradients, targets, strict=True):
        assert value.shape == target.shape, name
        result[name] = relative_error(value, target)
    return result


def main() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    from nnunetv2_smallseg.ops import backend_triton

    assert backend_triton.unavailable() is None
    answers = []
    for case in json.loads(sys.argv[1]):
        # Short chunks and tiles: a small map has several of them.
        backend_triton.CHUNK_STEPS = case.get("chunk", 16)
        backend_triton._TILE = case.get("tile", 4)
        dtype = getattr(torch, case["dtype"])
        inputs = make_inputs(case["shape"], case["states"], case["rank"], dtype)
        assert backend_triton.unsupported(inputs) is None
        answers.append(errors(backend_triton, inputs, case.get("keep_states", True)))
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
