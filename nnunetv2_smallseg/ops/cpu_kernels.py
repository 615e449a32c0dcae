"""Compiled kernels of the selective scan for the CPU; beside ``cpu_ss2d_kernels`` the only module that imports numba.

One call works on one batch element and at most ``BLOCK`` channels of one group. The block is taken through time in
chunks of ``CHUNK_STEPS`` steps, whose data is transposed into scratch rows of ``BLOCK`` channels that stay in cache.
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

__all__ = [
    "BLOCK",
    "HELPER_OPTIONS",
    "KERNEL_OPTIONS",
    "backward",
    "forward",
    "power_of_two",
    "step_size",
    "step_size_slope",
    "typed",
]

BLOCK = 64
"""Channels of a block. Fewer make the sums over channels in the backward pass slow (measured)."""

_ROWS = CHUNK_STEPS + 1
_LOG2_E = math.log2(math.e)

# Multiply and add may be contracted; NaN and infinity keep their meaning.
HELPER_OPTIONS = {"nogil": True, "fastmath": {"contract"}, "error_model": "numpy"}
"""For the functions that kernels call."""
KERNEL_OPTIONS = {"nogil": True, "fastmath": {"contract", "reassoc", "nsz"}, "error_model": "numpy"}
"""For the two kernels. Sums over channels may be reordered: otherwise they cannot run in vector registers."""

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


# The implementations of the next three have no annotations: numba wants them equal to those of the lambdas they return.


def power_of_two(x: float) -> float:
    """2 ** x for a float32 or float64.

    float32: relative error 2e-7; zero below 2 ** -126, so that no denormal numbers slow the scan; infinity above
    2 ** 127.5; NaN stays NaN.
    """
    raise NotImplementedError("only for compiled code")


def log1p_of_fraction(z: float) -> float:
    """log(1 + z) for z in [0, 1], float32 (relative error 3e-7) or float64."""
    raise NotImplementedError("only for compiled code")


def typed(value: float, x: float) -> float:
    """The constant ``value`` in the type of ``x``: a float64 constant would turn float32 loops into float64 ones."""
    raise NotImplementedError("only for compiled code")


@overload(typed, jit_options=HELPER_OPTIONS)
def _typed(value, x):
    if x == types.float64:
        return lambda value, x: np.float64(value)
    return lambda value, x: np.float32(value)


@overload(power_of_two, jit_options=HELPER_OPTIONS)
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


@overload(log1p_of_fraction, jit_options=HELPER_OPTIONS)
def _log1p_of_fraction(z):
    if z == types.float64:
        return lambda z: np.log1p(z)

    def single(z):
        # log(1 + z) = 2 * atanh(z / (2 + z)), whose series has no cancellation for small z.
        s = z / (_TWO + z)
        w = s * s
        return s * (_Q0 + w * (_Q1 + w * (_Q2 + w * (_Q3 + w * _Q4))))

    return single


@njit(**HELPER_OPTIONS)
def step_size(x: float) -> float:
    """softplus(x) = log(1 + exp(x)), and x itself above the threshold."""
    tail = log1p_of_fraction(power_of_two(-abs(x) * typed(_LOG2_E, x)))
    positive = x if x > typed(0.0, x) else typed(0.0, x)
    return x if x > typed(SOFTPLUS_THRESHOLD, x) else positive + tail


@njit(**HELPER_OPTIONS)
def step_size_slope(x: float) -> float:
    """Derivative of ``step_size``: the sigmoid of x, and one above the threshold."""
    one = typed(1.0, x)
    z = power_of_two(-abs(x) * typed(_LOG2_E, x))
    sigmoid = (one if x > typed(0.0, x) else z) / (one + z)
    return one if x > typed(SOFTPLUS_THRESHOLD, x) else sigmoid


@njit(**HELPER_OPTIONS)
def _load(target: np.ndarray, source: np.ndarray, batch: int, first: int, count: int, start: int, steps: int) -> None:
    """Transposes ``count`` channels and ``steps`` steps of source (batch, dim, L) into target (steps, channels)."""
    for c in range(count):
        for t in range(steps):
            target[t, c] = source[batch, first + c, start + t]


@njit(**HELPER_OPTIONS)
def _store(target: np.ndarray, source: np.ndarray, batch: int, first: int, count: int, start: int, steps: int) -> None:
    """The way back of ``_load``."""
    for c in range(count):
        for t in range(steps):
            target[batch, first + c, start + t] = source[t, c]


def forward(
    u: np.ndarray,
    delta: np.ndarray,
    A: np.ndarray,
    B: np.ndarray,
    C: np.ndarray,
    D: np.ndarray,
    delta_bias: np.ndarray,
    delta_softplus: bool,
    out: np.ndarray,
    states: np.ndarray,
    batch: int,
    first: int,
    count: int,
) -> None:
    """Scans ``count`` channels from ``first`` on, all of one group.

    Args:
        u: (batch, dim, L), as ``delta`` and ``out``.
        delta: Step sizes before bias and softplus.
        A: (dim, N).
        B: (batch, groups, N, L), as ``C``.
        C: Output weights.
        D: (dim,), or empty for none.
        delta_bias: (dim,), or empty for none.
        delta_softplus: Whether softplus is applied.
        out: Takes the output.
        states: (batch, chunks, N, dim), takes the states at the chunk starts unless it has no chunks.
        batch: Index of the batch element.
        first: First channel.
        count: Number of channels, at most ``BLOCK``.
    """
    length = u.shape[2]
    num_states = A.shape[1]
    group = first // (u.shape[1] // B.shape[1])
    zero = typed(0.0, u[0, 0, 0])
    rows = np.zeros((3, _ROWS, BLOCK), u.dtype)
    dt, drive, y = rows[0], rows[1], rows[2]
    per_state = np.zeros((2, num_states, BLOCK), u.dtype)
    rates, h = per_state[0], per_state[1]
    channel_bias = np.zeros(BLOCK, u.dtype)
    for c in range(count):
        for n in range(num_states):
            rates[n, c] = A[first + c, n] * typed(_LOG2_E, zero)
        if delta_bias.size > 0:
            channel_bias[c] = delta_bias[first + c]

    for start in range(0, length, CHUNK_STEPS):
        steps = min(CHUNK_STEPS, length - start)
        if states.shape[1] > 0:
            for n in range(num_states):
                for c in range(count):
                    states[batch, start // CHUNK_STEPS, n, first + c] = h[n, c]
        _load(dt, delta, batch, first, count, start, steps)
        _load(drive, u, batch, first, count, start, steps)
        for t in range(steps):
            for c in range(BLOCK):
                dt[t, c] += channel_bias[c]
            if delta_softplus:
                for c in range(BLOCK):
                    dt[t, c] = step_size(dt[t, c])
            for c in range(BLOCK):
                drive[t, c] *= dt[t, c]
                y[t, c] = zero
        for t in range(steps):
            for n in range(num_states):
                input_weight = B[batch, group, n, start + t]
                output_weight = C[batch, group, n, start + t]
                for c in range(BLOCK):
                    state = power_of_two(dt[t, c] * rates[n, c]) * h[n, c] + input_weight * drive[t, c]
                    h[n, c] = state
                    y[t, c] += output_weight * state
        _store(out, y, batch, first, count, start, steps)
        if D.size > 0:
            for c in range(count):
                for t in range(start, start + steps):
                    out[batch, first + c, t] += D[first + c] * u[batch, first + c, t]


def backward(u, delta, A, B, C, D, delta_bias, delta_softplus, gradient, states, gradients, batch, first, count, part):
    """Gradients for ``count`` channels from ``first`` on, all of one group.

    Args:
        u: Input, as all arguments down to ``delta_softplus`` shaped as in ``forward``.
        delta: Step sizes before bias and softplus.
        A: Decay rates.
        B: Input weights.
        C: Output weights.
        D: Skip weights.
        delta_bias: Bias of the step sizes.
        delta_softplus: Whether softplus is applied.
        gradient: Gradient of the output, (batch, dim, L).
        states: As kept by ``forward``.
        gradients: Takes the gradients: of u and delta (batch, dim, L), of A (batch, dim, N), of B and C (parts, batch,
            groups, N, L), of D and delta_bias (batch, dim). Blocks of one group write to different parts.
        batch: Index of the batch element.
        first: First channel.
        count: Number of channels, at most ``BLOCK``.
        part: Index of the block within its group.
    """
    u_gradient, delta_gradient, A_gradient, B_gradient, C_gradient, D_gradient, bias_gradient = gradients
    length = u.shape[2]
    num_states = A.shape[1]
    group = first // (u.shape[1] // B.shape[1])
    zero = typed(0.0, u[0, 0, 0])
    one = typed(1.0, u[0, 0, 0])
    rows = np.zeros((11, _ROWS, BLOCK), u.dtype)
    dt, slope, inputs, drive, outputs = rows[0], rows[1], rows[2], rows[3], rows[4]
    # Gradient of the drive dt * u, and of dt through the decays.
    drive_gradient, dt_gradient = rows[5], rows[6]
    # Of one state: h[t] is the state before step t.
    h, decay = rows[7], rows[8]
    # Rows 0 to 3 of the last two: bias; sums for D and bias; the state gradient, sum for A, A and rate of one state.
    channel, single = rows[9], rows[10]
    state_gradient = np.zeros((num_states, BLOCK), u.dtype)
    A_sum = np.zeros((num_states, BLOCK), u.dtype)
    if delta_bias.size > 0:
        for c in range(count):
            channel[0, c] = delta_bias[first + c]

    num_chunks = (length + CHUNK_STEPS - 1) // CHUNK_STEPS
    for chunk in range(num_chunks - 1, -1, -1):
        start = chunk * CHUNK_STEPS
        steps = min(CHUNK_STEPS, length - start)
        _load(dt, delta, batch, first, count, start, steps)
        _load(inputs, u, batch, first, count, start, steps)
        _load(outputs, gradient, batch, first, count, start, steps)
        for t in range(steps):
            for c in range(BLOCK):
                dt[t, c] += channel[0, c]
                slope[t, c] = one
            if delta_softplus:
                for c in range(BLOCK):
                    slope[t, c] = step_size_slope(dt[t, c])
                    dt[t, c] = step_size(dt[t, c])
            for c in range(BLOCK):
                drive[t, c] = dt[t, c] * inputs[t, c]
                drive_gradient[t, c] = zero
                dt_gradient[t, c] = zero
        for n in range(num_states):
            for c in range(count):
                h[0, c] = states[batch, chunk, n, first + c]
                single[2, c] = A[first + c, n]
                single[3, c] = A[first + c, n] * typed(_LOG2_E, zero)
            for t in range(steps):
                input_weight = B[batch, group, n, start + t]
                for c in range(BLOCK):
                    power = power_of_two(dt[t, c] * single[3, c])
                    decay[t, c] = power
                    h[t + 1, c] = power * h[t, c] + input_weight * drive[t, c]
            for c in range(BLOCK):
                single[0, c] = state_gradient[n, c]
                single[1, c] = zero
            for t in range(steps - 1, -1, -1):
                input_weight = B[batch, group, n, start + t]
                output_weight = C[batch, group, n, start + t]
                B_sum = zero
                C_sum = zero
                for c in range(BLOCK):
                    through = single[0, c] + output_weight * outputs[t, c]
                    C_sum += h[t + 1, c] * outputs[t, c]
                    B_sum += through * drive[t, c]
                    drive_gradient[t, c] += through * input_weight
                    through *= decay[t, c]
                    single[0, c] = through
                    through *= h[t, c]
                    single[1, c] += through * dt[t, c]
                    dt_gradient[t, c] += through * single[2, c]
                B_gradient[part, batch, group, n, start + t] = B_sum
                C_gradient[part, batch, group, n, start + t] = C_sum
            for c in range(BLOCK):
                state_gradient[n, c] = single[0, c]
                A_sum[n, c] += single[1, c]
        for t in range(steps):
            for c in range(BLOCK):
                dt_gradient[t, c] = (dt_gradient[t, c] + drive_gradient[t, c] * inputs[t, c]) * slope[t, c]
                drive_gradient[t, c] *= dt[t, c]
                channel[1, c] += outputs[t, c] * inputs[t, c]
                channel[2, c] += dt_gradient[t, c]
        _store(u_gradient, drive_gradient, batch, first, count, start, steps)
        _store(delta_gradient, dt_gradient, batch, first, count, start, steps)
        if D.size > 0:
            for c in range(count):
                for t in range(start, start + steps):
                    u_gradient[batch, first + c, t] += D[first + c] * gradient[batch, first + c, t]
    for c in range(count):
        for n in range(num_states):
            A_gradient[batch, first + c, n] = A_sum[n, c]
        D_gradient[batch, first + c] = channel[1, c]
        bias_gradient[batch, first + c] = channel[2, c]
