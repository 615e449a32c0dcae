"""The types that CUDA's autocast gives tensors, for tensors of the CPU that stand for CUDA's.

PyTorch lists the operators of both devices in its documentation ("Autocast Op Reference"). Convolutions and matrix
products take half precision on both; what takes float32 on CUDA alone is listed here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

__all__ = ["CudaPrecision"]

# By the names of the functions and methods. Losses, and products over axes, are in float32 on the CPU as well.
_IN_FLOAT32 = {
    *("exp", "expm1", "log", "log10", "log1p", "log2", "logsumexp", "reciprocal", "rsqrt"),
    *("pow", "__pow__", "__rpow__", "softplus", "layer_norm", "group_norm", "rms_norm", "cosine_similarity", "dist"),
    *("cdist", "norm", "interpolate", "l1_loss", "smooth_l1_loss", "huber_loss"),
}
# These read half precision and give float32, unless told otherwise.
_TO_FLOAT32 = {"softmax", "log_softmax", "sum", "cumsum", "cumprod"}


class CudaPrecision(TorchFunctionMode):
    """Within it, tensors of the CPU have the types that nnU-Net's autocast to float16 gives them on CUDA."""

    def __init__(self) -> None:
        super().__init__()
        self._contexts = ExitStack()

    def __enter__(self) -> CudaPrecision:
        self._contexts.enter_context(torch.autocast("cpu", torch.float16))
        return super().__enter__()

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        self._contexts.close()

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Calls a function of PyTorch with its arguments in the types CUDA would give them."""
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if torch.is_autocast_enabled("cpu"):
            if name in _IN_FLOAT32:
                args, kwargs = tree_map_only(Tensor, _widened, (args, kwargs))
            elif name in _TO_FLOAT32 and args and _is_half(args[0]) and kwargs.get("dtype") is None:
                kwargs["dtype"] = torch.float32
        return func(*args, **kwargs)


def _is_half(value: object) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if _is_half(tensor) else tensor
