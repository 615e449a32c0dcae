"""Compiled kernels of the selective scan for the CPU; the only module that imports numba.

One call works on one batch element and at most ``BLOCK`` channels of one group. The block is taken through time in
chunks of ``CHUNK_STEPS`` steps, whose data is transposed into scratch rows of ``BLOCK`` channels that stay in the cache.
The innermost loops run over channels, which do not depend on each other, so the compiler turns them into vector
instructions whatever the number of states is. Channels that a block does not have are computed on zeros.

All scratch rows live in one array with a constant shape: only then can the compiler prove that rows do not overlap, and
vectorise loops that touch ten of them.

Decays are powers of two, with A multiplied by log2(e) beforehand: exp(dt * A) = 2 ** (dt * A * log2(e)).
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit, types
from numba.extending import overload

from nnunetv2_smallseg.ops.arguments import CHUNK_STEPS, SOFTPLUS_THRESHOLD

__all__ = ["BLOCK", "backward_block", "forward_block"]

BLOCK = 64
"""Channels of a block. Fewer make the sums over channels in the backward pass slow (measured)."""

_ROWS = CHUNK_STEPS + 1
_LOG2_E = math.log2(math.e)

# Multiply and add may be contracted; NaN and infinity keep their meaning.
_HELPER = {"nogil": True, "fastmath": {"contract"}, "error_model": "numpy"}
# Sums over channels may also be reordered: otherwise they cannot run in vector registers.
_KERNEL = {"nogil": True, "fastmath": {"contract", "reassoc", "nsz"}, "error_model": "numpy"}

# 2 ** f for f in [-0.5, 0.5]: Chebyshev interpolation of degree 6, relative error 2.6e-9 before rounding.
_P0, _P1, _P2, _P3, _P4, _P5, _P6 = (
    np.float32(x)
    for x in (1.0, 6.93147207e-01, 2.40226509e-01, 5.55032723e-02, 9.61805668e-03, 1.34004282e-03, 1.54614447e-04)
)
# 2 * atanh(s) / s in powers of s ** 2, s in [0, 1 / 3]: Chebyshev interpolation of degree 4, relative error 4.1e-9.
_Q0, _Q1, _Q2, _Q3, _Q4 = (np.float32(x) for x in (2.0, 0.66666322, 0.40024595, 0.27965158, 0.28157778))

_ONE = np.float32(1.0)
_TWO = np.float32(2.0)
_ZERO = np.float32(0.0)
_LOWEST_POWER = np.float32(-126.0)
_HIGHEST_POWER = np.float32(128.0)
_ROUNDER = np.float32(1.5 * 2**23)
"""Added to a float32 below 2 ** 22, rounds it to an integer, which is then in the low bits of the sum."""
_EXPONENT_SHIFT = np.int32(127 - np.float32(1.5 * 2**23).view(np.int32))


def power_of_two(x):
    """2 ** x for a float32 or float64.

    float32: relative error 2e-7; zero below 2 ** -126, so that no denormal numbers slow the scan; infinity above
    2 ** 127.5; NaN stays NaN.
    """
    raise NotImplementedError("only for compiled code")


def log1p_of_fraction(z):
    """log(1 + z) for z in [0, 1], float32 (relative error 3e-7) or float64."""
    raise NotImplementedError("only for compiled code")


@overload(power_of_two, jit_options=_HELPER)
def _power_of_two(x):
    if x == types.float64:
        return lambda x: np.exp2(x)

    def single(x):
        clipped = _LOWEST_POWER if x < _LOWEST_POWER else x
        clipped = _HIGHEST_POWER if clipped > _HIGHEST_POWER else clipped
        shifted = np.float32(clipped + _ROUNDER)
        f = clipped - (shifted - _ROUNDER)
        mantissa = _P0 + f * (_P1 + f * (_P2 + f * (_P3 + f * (_P4 + f * (_P5 + f * _P6)))))
        exponent = np.int32(np.int32(shifted.view(np.int32) + _EXPONENT_SHIFT) << np.int32(23))
        return _ZERO if x < _LOWEST_POWER else mantissa * exponent.view(np.float32)

    return single


@overload(log1p_of_fraction, jit_options=_HELPER)
def _log1p_of_fraction(z):
    if z == types.float64:
        return lambda z: np.log1p(z)

    def single(z):
        # log(1 + z) = 2 * atanh(z / (2 + z)), whose series has no cancellation for small z.
        s = z / (_TWO + z)
        w = s * s
        return s * (_Q0 + w * (_Q1 + w * (_Q2 + w * (_Q3 + w * _Q4))))

    return single


@njit(**_HELPER)
def _softplus(x):
    """log(1 + exp(x)), and x itself above the threshold."""
    z = power_of_two(-abs(x) * type(x)(_LOG2_E))
    positive = x if x > 0 else type(x)(0)
    return x if x > type(x)(SOFTPLUS_THRESHOLD) else positive + log1p_of_fraction(z)
