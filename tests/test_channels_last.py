"""Instance normalisation that keeps channels last, and the choice of the layout."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional

from nnunetv2_smallseg.architectures.blocks.channels_last import in_faster_layout, instance_norm
from nnunetv2_smallseg.architectures.swin_umamba import SwinUMamba

TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-12}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def is_channels_last(x: torch.Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("affine", [False, True], ids=["plain", "affine"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 6, 9, 7), (3, 5, 4, 8), (2, 1, 6, 6)], ids=str)
def test_norm_and_gradients(shape, layout, affine, dtype):
    generator = torch.Generator().manual_seed(0)
    values, gradient = (torch.randn(shape, generator=generator, dtype=dtype) for _ in range(2))
    parameters = [torch.rand(shape[1], generator=generator, dtype=dtype) for _ in range(2 * affine)]
    results = []
    for norm in (
        instance_norm,
        lambda x, weight=None, bias=None: functional.instance_norm(x, None, None, weight, bias),
    ):
        x = (3 + values).to(memory_format=LAYOUTS[layout]).requires_grad_()
        tensors = [x, *(parameter.clone().requires_grad_() for parameter in parameters)]
        out = norm(*tensors)
        results.append((out, *torch.autograd.grad(out, tensors, gradient)))
    if layout == "channels_last" and shape[1] > 1:
        assert is_channels_last(results[0][0])
    tolerance = TOLERANCES[dtype]
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_statistics_are_float32_inside_autocast(dtype):
    x = (1e3 * torch.randn(2, 4, 32, 32)).to(dtype).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=dtype):
        out = instance_norm(x)
    torch.testing.assert_close(out.float(), functional.instance_norm(x.float()), rtol=2e-2, atol=2e-2)


def test_one_value_is_refused():
    with pytest.raises(ValueError, match="more than 1"):
        instance_norm(torch.randn(2, 3, 1, 1))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("channels", "side", "channels_last"), [(1, 32, True), (3, 32, True), (3, 2, False)])
def test_layout_follows_the_size(channels, side, channels_last, layout):
    x = torch.randn(1, channels, side, side)
    out = in_faster_layout(x.to(memory_format=LAYOUTS[layout]))
    assert torch.equal(out, x)
    convolved = torch.nn.Conv2d(channels, 4, 3, padding=1)(out)
    assert is_channels_last(convolved) == channels_last


@torch.no_grad()
def test_network_keeps_the_layout_of_large_maps():
    network = SwinUMamba(1, 2, False, widths=(8, 16, 32, 64), depths=(1, 1, 1, 1)).eval()
    layouts = {}
    for name, module in itertools.chain(
        network.decoder.named_children(), network.decoder.skips.named_children(), [("stem", network.stem)]
    ):
        module.register_forward_hook(lambda _m, _i, out, name=name: layouts.update({name: is_channels_last(out)}))
    network(torch.randn(1, 1, 64, 64))
    assert layouts["stem"] and layouts["0"] and layouts["1"] and layouts["last"]
