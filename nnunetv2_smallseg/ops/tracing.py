"""Tensors without data, with which a training step is rehearsed to see what memory it takes.

The rehearsal works on tensors of the CPU, because PyTorch cannot differentiate tensors of a device that is not there.
``standing_for`` says which device they stand for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

__all__ = ["has_no_data", "runs_on_cpu", "standing_for"]

_device_type: ContextVar[str] = ContextVar("device_type", default="cpu")


@contextmanager
def standing_for(device_type: str) -> Iterator[None]:
    """Within it, tensors of the CPU stand for those of another device, such as "cuda"."""
    token = _device_type.set(device_type)
    try:
        yield
    finally:
        _device_type.reset(token)


def runs_on_cpu(tensor: Tensor) -> bool:
    """Whether a tensor is on the CPU and does not stand for one of another device."""
    return tensor.device.type == "cpu" and _device_type.get() == "cpu"


def has_no_data(tensor: Tensor) -> bool:
    """Whether a tensor has shape, type and device only: a kernel that is given it has nothing to do."""
    return isinstance(tensor, FakeTensor) or tensor.is_meta
