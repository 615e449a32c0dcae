"""Compiled kernels of the fused SS2D for the CPU.

One call works on one batch element and takes blocks of at most ``BLOCK`` channels through directions of the map, which
stays channel-last: a direction is an order in which its pixels are visited, so nothing is written out for it and the
outputs of all directions are summed in place. The projections of the pixels (step sizes of low rank, B and C) are
given; the step sizes of a block are computed from them chunk by chunk.

As in ``cpu_kernels``: time in chunks of ``CHUNK_STEPS`` steps, scratch rows in one array of constant shape, innermost
loops over channels, decays as powers of two.

Directions: 0 rows, 1 columns, 2 rows backwards, 3 columns backwards. With S groups of directions, group s has the
directions s, s + S, ...: all four for S = 1, rows and columns apart for S = 2.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from nnunetv2_smallseg.ops.arguments import CHUNK_STEPS
from nnunetv2_smallseg.ops.cpu_kernels import (
    BLOCK,
    HELPER_OPTIONS,
    KERNEL_OPTIONS,
    power_of_two,
    step_size,
    step_size_slope,
    typed,
)

__all__ = ["BLOCK", "KERNEL_OPTIONS", "backward", "forward"]

_ROWS = CHUNK_STEPS + 1
_NUM_DIRECTIONS = 4
_LOG2_E = math.log2(math.e)


@njit(**HELPER_OPTIONS)
def _places(places: np.ndarray, direction: int, start: int, steps: int, height: int, width: int) -> None:
    """The pixels that a direction visits in ``steps`` steps from ``start`` on."""
    for t in range(steps):
        step = start + t if direction < 2 else height * width - 1 - start - t
        places[t] = step if direction % 2 == 0 else step % height * width + step // height


@njit(**HELPER_OPTIONS)
def _gather(target: np.ndarray, source: np.ndarray, places: np.ndarray, first: int, count: int, steps: int) -> None:
    """Copies ``count`` channels of the visited pixels of source (L, D) to the rows of target (steps, channels).

    A loop of its own: the processor then waits for many pixels at a time, which matters for columns.
    """
    for t in range(steps):
        pixel = source[places[t], first : first + count]
        for c in range(count):
            target[t, c] = pixel[c]


@njit(**HELPER_OPTIONS)
def _scatter(target: np.ndarray, source: np.ndarray, places: np.ndarray, first: int, count: int, steps: int) -> None:
    """The way back of ``_gather``."""
    for t in range(steps):
        pixel = target[places[t], first : first + count]
        for c in range(count):
            pixel[c] = source[t, c]


@njit(**HELPER_OPTIONS)
def _split_projections(
    factors: np.ndarray, projected: np.ndarray, places: np.ndarray, rank: int, num_states: int, steps: int
) -> None:
    """Copies the projections of the visited pixels to the rows of factors: of the step sizes first, B and C last."""
    others = factors.shape[1] - 2 * num_states
    for t in range(steps):
        projection = projected[places[t]]
        for r in range(rank):
            factors[t, r] = projection[r]
        for n in range(2 * num_states):
            factors[t, others + n] = projection[rank + n]


@njit(**HELPER_OPTIONS)
def _raw_step_sizes(dt: np.ndarray, factors: np.ndarray, weight: np.ndarray, t: int) -> None:
    """Step sizes of step t before softplus, four weights at a time."""
    f0, f1, f2, f3 = factors[t, 0], factors[t, 1], factors[t, 2], factors[t, 3]
    for c in range(BLOCK):
        dt[t, c] = (f0 * weight[0, c] + f1 * weight[1, c]) + (f2 * weight[2, c] + f3 * weight[3, c])
    for r in range(4, weight.shape[0], 4):
        f0, f1, f2, f3 = factors[t, r], factors[t, r + 1], factors[t, r + 2], factors[t, r + 3]
        for c in range(BLOCK):
            first_pair = f0 * weight[r, c] + f1 * weight[r + 1, c]
            dt[t, c] += first_pair + (f2 * weight[r + 2, c] + f3 * weight[r + 3, c])


def forward(x, projected, step_weight, bias, rates, skip, out, states, height, width, batch, group, first, count):
    """SS2D of ``count`` channels from ``first`` on, in the directions of one group.

    Args:
        x: (B, L, D).
        projected: Projections of the pixels, (B, L, 4, R + 2N).
        step_weight: (4, R, D).
        bias: Of the step sizes, (4, D).
        rates: A * log2(e), (4, N, D).
        skip: (4, D).
        out: (groups, B, L, D), takes the sum over the directions of the group.
        states: (B, chunks, N, 4D), takes the states at the chunk starts unless it has no chunks.
        height: H.
        width: W, with L = H * W.
        batch: Index of the batch element.
        group: Index of the group of directions.
        first: First channel.
        count: Number of channels, at most ``BLOCK``.
    """
    length, channels = x.shape[1:]
    groups = out.shape[0]
    rank = step_weight.shape[1]
    num_states = rates.shape[1]
    zero = typed(0.0, x[0, 0, 0])
    # The bias is one more weight, with the factor 1; the number of weights is a multiple of four.
    num_weights = rank // 4 * 4 + 4
    rows = np.zeros((5, _ROWS, BLOCK), x.dtype)
    dt, drive, y, inputs = rows[0], rows[1], rows[2], rows[3]
    skips = rows[4, 0]
    per_state = np.zeros((2, num_states, BLOCK), x.dtype)
    rate, h = per_state[0], per_state[1]
    weight = np.zeros((num_weights, BLOCK), x.dtype)
    factors = np.zeros((CHUNK_STEPS, num_weights + 2 * num_states), x.dtype)
    factors[:, rank] = typed(1.0, zero)
    places = np.zeros(CHUNK_STEPS, np.int64)
    for direction in range(group, _NUM_DIRECTIONS, groups):
        for c in range(count):
            skips[c] = skip[direction, first + c]
            weight[rank, c] = bias[direction, first + c]
        for r in range(rank):
            for c in range(count):
                weight[r, c] = step_weight[direction, r, first + c]
        for n in range(num_states):
            for c in range(count):
                rate[n, c] = rates[direction, n, first + c]
            for c in range(BLOCK):
                h[n, c] = zero
        for start in range(0, length, CHUNK_STEPS):
            steps = min(CHUNK_STEPS, length - start)
            _places(places, direction, start, steps, height, width)
            if states.shape[1] > 0:
                for n in range(num_states):
                    for c in range(count):
                        states[batch, start // CHUNK_STEPS, n, direction * channels + first + c] = h[n, c]
            _gather(inputs, x[batch], places, first, count, steps)
            if direction == group:
                y[:] = zero
            else:
                _gather(y, out[group, batch], places, first, count, steps)
            _split_projections(factors, projected[batch, :, direction], places, rank, num_states, steps)
            for t in range(steps):
                _raw_step_sizes(dt, factors, weight, t)
                for c in range(BLOCK):
                    size = step_size(dt[t, c])
                    dt[t, c] = size
                    drive[t, c] = size * inputs[t, c]
                    y[t, c] += skips[c] * inputs[t, c]
            for t in range(steps):
                for n in range(num_states):
                    input_weight = factors[t, num_weights + n]
                    output_weight = factors[t, num_weights + num_states + n]
                    for c in range(BLOCK):
                        state = power_of_two(dt[t, c] * rate[n, c]) * h[n, c] + input_weight * drive[t, c]
                        h[n, c] = state
                        y[t, c] += output_weight * state
            _scatter(out[group, batch], y, places, first, count, steps)


def backward(
    x, projected, step_weight, bias, rates, skip, gradient, states, gradients, height, width, batch, group, part
):
    """Gradients for every ``parts``-th block of channels from block ``part`` on, in the directions of one group.

    Args:
        x: Input, as all arguments down to ``skip`` shaped as in ``forward``.
        projected: Projections of the pixels.
        step_weight: Weights of the step sizes.
        bias: Bias of the step sizes.
        rates: A * log2(e).
        skip: Skip weights.
        gradient: Gradient of the output, (B, L, D).
        states: As kept by ``forward``.
        gradients: Takes the gradients: of x, without what comes through the projections, (groups, B, L, D); of the
            projections (parts, B, L, 4, R + 2N), summed over the blocks of a part; of step_weight (B, 4, R, D), of A
            (B, 4, N, D), and of the bias and skip (B, 4, D).
        height: H.
        width: W, with L = H * W.
        batch: Index of the batch element.
        group: Index of the group of directions.
        part: Index of the first block.
    """
    x_gradient, projected_gradient, weight_gradient, A_gradient, bias_gradient, skip_gradient = gradients
    length, channels = x.shape[1:]
    groups = x_gradient.shape[0]
    parts = projected_gradient.shape[0]
    rank = step_weight.shape[1]
    num_states = rates.shape[1]
    zero = typed(0.0, x[0, 0, 0])
    rows = np.zeros((11, _ROWS, BLOCK), x.dtype)
    dt, slope, inputs, drive, outputs = rows[0], rows[1], rows[2], rows[3], rows[4]
    # Gradient of the drive dt * u, and of dt through the decays times log2(e).
    drive_gradient, dt_gradient = rows[5], rows[6]
    # Of one state: h[t] is the state before step t.
    h, decay = rows[7], rows[8]
    # Rows of the last two: skip weights and their sums; the state gradient, sum for A and rate of one state.
    channel, single = rows[9], rows[10]
    per_state = np.zeros((2, num_states, BLOCK), x.dtype)
    state_gradient, A_sum = per_state[0], per_state[1]
    # As in the forward pass, the bias is one more weight.
    num_weights = rank // 4 * 4 + 4
    per_weight = np.zeros((2, num_weights, BLOCK), x.dtype)
    weight, weight_sum = per_weight[0], per_weight[1]
    per_step = np.zeros((2, CHUNK_STEPS, num_weights + 2 * num_states), x.dtype)
    factors, sums = per_step[0], per_step[1]
    factors[:, rank] = typed(1.0, zero)
    places = np.zeros(CHUNK_STEPS, np.int64)
    num_chunks = (length + CHUNK_STEPS - 1) // CHUNK_STEPS
    for first in range(part * BLOCK, channels, parts * BLOCK):
        count = min(BLOCK, channels - first)
        for row in range(11):
            # A narrower last block computes its missing channels on zeros.
            for t in range(_ROWS):
                for c in range(BLOCK):
                    rows[row, t, c] = zero
        weight[:] = zero
        for direction in range(group, _NUM_DIRECTIONS, groups):
            state_gradient[:] = zero
            A_sum[:] = zero
            weight_sum[:] = zero
            for c in range(count):
                channel[0, c] = skip[direction, first + c]
                weight[rank, c] = bias[direction, first + c]
            for c in range(BLOCK):
                channel[1, c] = zero
            for r in range(rank):
                for c in range(count):
                    weight[r, c] = step_weight[direction, r, first + c]
            for chunk in range(num_chunks - 1, -1, -1):
                start = chunk * CHUNK_STEPS
                steps = min(CHUNK_STEPS, length - start)
                _places(places, direction, start, steps, height, width)
                _gather(inputs, x[batch], places, first, count, steps)
                _gather(outputs, gradient[batch], places, first, count, steps)
                _split_projections(factors, projected[batch, :, direction], places, rank, num_states, steps)
                for t in range(steps):
                    _raw_step_sizes(dt, factors, weight, t)
                    for c in range(BLOCK):
                        raw = dt[t, c]
                        slope[t, c] = step_size_slope(raw)
                        size = step_size(raw)
                        dt[t, c] = size
                        drive[t, c] = size * inputs[t, c]
                        drive_gradient[t, c] = zero
                        dt_gradient[t, c] = zero
                for n in range(num_states):
                    for c in range(count):
                        h[0, c] = states[batch, chunk, n, direction * channels + first + c]
                        single[2, c] = rates[direction, n, first + c]
                    for t in range(steps):
                        input_weight = factors[t, num_weights + n]
                        for c in range(BLOCK):
                            power = power_of_two(dt[t, c] * single[2, c])
                            decay[t, c] = power
                            h[t + 1, c] = power * h[t, c] + input_weight * drive[t, c]
                    for c in range(BLOCK):
                        single[0, c] = state_gradient[n, c]
                        single[1, c] = zero
                    for t in range(steps - 1, -1, -1):
                        input_weight = factors[t, num_weights + n]
                        output_weight = factors[t, num_weights + num_states + n]
                        input_sum = zero
                        output_sum = zero
                        for c in range(BLOCK):
                            through = single[0, c] + output_weight * outputs[t, c]
                            output_sum += h[t + 1, c] * outputs[t, c]
                            input_sum += through * drive[t, c]
                            drive_gradient[t, c] += through * input_weight
                            through *= decay[t, c]
                            single[0, c] = through
                            through *= h[t, c]
                            single[1, c] += through * dt[t, c]
                            dt_gradient[t, c] += through * single[2, c]
                        sums[t, num_weights + n] = input_sum
                        sums[t, num_weights + num_states + n] = output_sum
                    for c in range(BLOCK):
                        state_gradient[n, c] = single[0, c]
                        A_sum[n, c] += single[1, c]
                for t in range(steps):
                    for c in range(BLOCK):
                        # The rates carry log2(e), which their gradient must not.
                        through_decay = dt_gradient[t, c] * typed(1.0 / _LOG2_E, zero)
                        dt_gradient[t, c] = (through_decay + drive_gradient[t, c] * inputs[t, c]) * slope[t, c]
                        drive_gradient[t, c] = drive_gradient[t, c] * dt[t, c] + channel[0, c] * outputs[t, c]
                        channel[1, c] += outputs[t, c] * inputs[t, c]
                    for r in range(0, num_weights, 2):
                        factor, next_factor = factors[t, r], factors[t, r + 1]
                        rank_sum = zero
                        next_sum = zero
                        for c in range(BLOCK):
                            rank_sum += dt_gradient[t, c] * weight[r, c]
                            weight_sum[r, c] += dt_gradient[t, c] * factor
                            next_sum += dt_gradient[t, c] * weight[r + 1, c]
                            weight_sum[r + 1, c] += dt_gradient[t, c] * next_factor
                        sums[t, r] = rank_sum
                        sums[t, r + 1] = next_sum
                if direction != group:
                    _gather(outputs, x_gradient[group, batch], places, first, count, steps)
                    for t in range(steps):
                        for c in range(BLOCK):
                            drive_gradient[t, c] += outputs[t, c]
                _scatter(x_gradient[group, batch], drive_gradient, places, first, count, steps)
                for t in range(steps):
                    target = projected_gradient[part, batch, places[t], direction]
                    if first == part * BLOCK:
                        target[:] = zero
                    for r in range(rank):
                        target[r] += sums[t, r]
                    for n in range(2 * num_states):
                        target[rank + n] += sums[t, num_weights + n]
            for c in range(count):
                bias_gradient[batch, direction, first + c] = weight_sum[rank, c]
                skip_gradient[batch, direction, first + c] = channel[1, c]
                for n in range(num_states):
                    A_gradient[batch, direction, n, first + c] = A_sum[n, c]
                for r in range(rank):
                    weight_gradient[batch, direction, r, first + c] = weight_sum[r, c]
