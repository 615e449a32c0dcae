"""Kernels of the fused SS2D on CUDA; the only module that imports Triton.

A map of L = H * W pixels is read as four sequences, each cut into chunks of ``CHUNK`` positions:

1. ``summarize_chunks``: what each chunk adds to a state that passes through it, and the sum of its step sizes, whose
   exponential is the decay of that state;
2. ``carry_states``: the state that enters each chunk;
3. ``write_outputs``: every chunk from its true state. One program serves both ways through a chunk, and the launches
   for rows and columns follow each other, so the four directions are summed without atomic additions.

The backward pass does 1 and 2 for the gradient of the state, in the opposite order of time, and then
``write_gradients``, which computes the states of a chunk again, in tiles of ``TILE`` steps that stay in registers.

A program is one warp and a lane is a channel: states, decays and sums over states never leave their lane. Sequences
exist only as an order of pixels: position l is pixel l * stride - floor(l / H) * wrap, with stride 1 and no wrap along
rows, and stride W and wrap H * W - 1 along columns. ``magic`` = ceil(2^31 / H) makes the floor a multiplication.

Decays are powers of two: ``rates`` holds A * log2(e). Arguments that several kernels share:

- ``length`` L, ``dim`` D, ``chunks``; ``stride``, ``wrap`` and ``magic`` of the order along columns;
- ``RANK`` of the step sizes and ``NUM_STATES`` N, rounded up to powers of two in ``RANKS`` and ``STATES``;
- ``LANES`` of a warp, ``REGISTERS`` channels of a lane.
"""

# Tuples are joined with +: Triton knows no starred expressions. Shared arguments are described once, above.
# ruff: noqa: RUF005, D417

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["INTEGERS", "carry_states", "summarize_chunks", "write_gradients", "write_outputs"]

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

INTEGERS = ("stride", "wrap", "magic", "length", "dim", "chunks")
"""Integer arguments of all kernels."""

_POINTERS = (
    "source",
    "gradient",
    "projected",
    "rates",
    "dt_weight",
    "dt_bias",
    "skip",
    "states",
    "dt_sums",
    "total",
    "out",
    "adjoints",
    "boundaries",
    "source_gradient",
    "projected_gradient",
    "rates_gradient",
    "dt_weight_gradient",
    "dt_bias_gradient",
    "skip_gradient",
)


def _kernel(function):
    """``triton.jit`` without specialisation.

    Told that addresses are multiples of 16 bytes, Triton gives each lane several neighbouring channels and moves the
    states between lanes at every step.
    """
    code = function.__code__
    names = [name for name in code.co_varnames[: code.co_argcount] if name in _POINTERS + INTEGERS]
    integers = [name for name in names if name in INTEGERS]
    return triton.jit(do_not_specialize=integers, do_not_specialize_on_alignment=names)(function)


@triton.jit
def _pixel(position, stride, wrap, magic):
    """Pixel at a position of a sequence."""
    return position * stride - tl.umulhi(2 * position, magic) * wrap


@triton.jit
def _softplus(x):
    """log(1 + exp(x)) with a relative error of about 3e-7, also where it is tiny."""
    z = tl.exp2(-tl.abs(x) * LOG2_E)
    # log(1 + z) = 2 * atanh(s) with s = z / (2 + z); polynomial as in ``cpu_kernels``.
    s = z / (2.0 + z)
    w = s * s
    tail = s * (2.0 + w * (0.66666322 + w * (0.40024595 + w * (0.27965158 + w * 0.28157778))))
    return tl.maximum(x, 0.0) + tail


@triton.jit
def _softplus_slope(dt):
    """Derivative of softplus from its value: 1 - exp(-dt), without cancellation for small dt."""
    series = dt * (1.0 - dt * (1.0 / 2.0) * (1.0 - dt * (1.0 / 3.0) * (1.0 - dt * (1.0 / 4.0) * (1.0 - dt * 0.2))))
    return tl.where(dt < 0.125, series, 1.0 - tl.exp2(-dt * LOG2_E))


@triton.jit
def _plain(index):
    """The same indices (below 2^24), without what Triton knows of them.

    Triton lays out a load along its contiguous axis. For weights that all lanes share, this is the axis of states, and
    the states would have to move between lanes.
    """
    return index.to(tl.float32).to(tl.int32)


@triton.jit
def _shared_by_lanes(row, COUNT: tl.constexpr, LIMIT: tl.constexpr, LANES: tl.constexpr):
    """``LIMIT`` neighbouring values, the same for all lanes, (COUNT, 1, LANES), zero from ``LIMIT`` on."""
    index = tl.broadcast_to(_plain(tl.arange(0, COUNT))[:, None, None], (COUNT, 1, LANES))
    return tl.load(row + index, mask=index < LIMIT, other=0.0).to(tl.float32)


@triton.jit
def _step_size(row, weight, bias, RANK: tl.constexpr, RANKS: tl.constexpr, LANES: tl.constexpr):
    """dt, (1, REGISTERS, LANES), from the features of a pixel and the weights (RANKS, REGISTERS, LANES)."""
    features = _shared_by_lanes(row, RANKS, RANK, LANES)
    return _softplus(bias + tl.sum(features * weight, axis=0, keep_dims=True))


@_kernel
def summarize_chunks(
    source,
    projected,
    rates,
    dt_weight,
    dt_bias,
    states,
    dt_sums,
    stride,
    wrap,
    magic,
    length,
    dim,
    chunks,
    ADJOINT: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    NUM_STATES: tl.constexpr,
    STATES: tl.constexpr,
    CHUNK: tl.constexpr,
    REGISTERS: tl.constexpr,
    LANES: tl.constexpr,
):
    """State after each chunk from a zero state, and the chunk's sum of dt, stored with the chunk that comes next.

    Grid: (chunks - 1, channel blocks, 4 * batch).

    Args:
        source: x, or with ``ADJOINT`` the gradient of the output, (batch, L, dim).
        projected: (batch, L, 4, RANK + 2 * NUM_STATES).
        rates: (4, NUM_STATES, dim).
        dt_weight: (4, RANK, dim).
        dt_bias: (4, dim).
        states: Output, (batch, 4, chunks, NUM_STATES, dim).
        dt_sums: Output, (batch, 4, chunks, dim).
        ADJOINT: Whether the gradient of the state is summed, which moves against the direction.
    """
    FEATURES: tl.constexpr = RANK + 2 * NUM_STATES
    sequence = tl.program_id(2)
    batch, direction = sequence // 4, sequence % 4
    sign = 1 - 2 * (direction // 2)
    if ADJOINT:
        sign = -sign
    stride = tl.where(direction % 2 == 1, stride, 1)
    magic = tl.where(direction % 2 == 1, magic, 0)
    chunk = tl.program_id(0) + (1 - sign) // 2
    count = tl.minimum(CHUNK, length - chunk * CHUNK)
    first = chunk * CHUNK + tl.where(sign > 0, 0, count - 1)

    n = tl.arange(0, STATES)[:, None, None]
    r = tl.arange(0, RANKS)[:, None, None]
    register = tl.arange(0, REGISTERS)[None, :, None]
    lane = tl.arange(0, LANES)[None, None, :]
    channel = (tl.program_id(1) * REGISTERS + register) * LANES + lane
    inside = channel < dim
    rate = tl.load(rates + (direction * NUM_STATES + n) * dim + channel, mask=(n < NUM_STATES) & inside, other=0.0)
    weight = tl.load(dt_weight + (direction * RANK + r) * dim + channel, mask=(r < RANK) & inside, other=0.0)
    bias = tl.load(dt_bias + direction * dim + channel, mask=inside, other=0.0)

    source += batch.to(tl.int64) * length * dim
    projected += (batch.to(tl.int64) * length * 4 + direction) * FEATURES
    state = tl.zeros((STATES, REGISTERS, LANES), tl.float32)
    dt_sum = tl.zeros((1, REGISTERS, LANES), tl.float32)
    for i in range(count):
        pixel = _pixel(first + sign * i, stride, wrap, magic)
        row = projected + pixel * (4 * FEATURES)
        value = tl.load(source + pixel * dim + channel, mask=inside, other=0.0).to(tl.float32)
        dt = _step_size(row, weight, bias, RANK, RANKS, LANES)
        decay = tl.exp2(dt * rate)
        if ADJOINT:
            state = (state + value * _shared_by_lanes(row + RANK + NUM_STATES, STATES, NUM_STATES, LANES)) * decay
        else:
            state = state * decay + (dt * value) * _shared_by_lanes(row + RANK, STATES, NUM_STATES, LANES)
        dt_sum += dt

    slot = sequence.to(tl.int64) * chunks + chunk + sign
    tl.store(states + (slot * NUM_STATES + n) * dim + channel, state, mask=(n < NUM_STATES) & inside)
    tl.store(dt_sums + slot * dim + channel, dt_sum, mask=inside)


@triton.jit
def _one_after_the_other(first_decay, first, second_decay, second):
    """Two maps h -> decay * h + value, the first applied first."""
    return first_decay * second_decay, second_decay * first + second


@_kernel
def carry_states(
    rates,
    states,
    dt_sums,
    dim,
    chunks,
    ADJOINT: tl.constexpr,
    NUM_STATES: tl.constexpr,
    SLOTS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Replaces what the chunk before adds by the state that enters a chunk; zero for the first one.

    Grid: (blocks of NUM_STATES * dim, 4 * batch). Arguments as in ``summarize_chunks``; ``SLOTS`` chunks at a time.
    """
    sequence = tl.program_id(1)
    direction = sequence % 4
    forwards = direction < 2
    if ADJOINT:
        forwards = direction >= 2
    element = (tl.program_id(0) * LANES + tl.arange(0, LANES))[None, :]
    elements = NUM_STATES * dim
    inside = element < elements
    rate = tl.load(rates + direction * elements + element, mask=inside, other=0.0)
    states += sequence.to(tl.int64) * chunks * elements
    dt_sums += sequence.to(tl.int64) * chunks * dim
    turn = tl.arange(0, SLOTS)[:, None]
    carried = tl.zeros((1, LANES), tl.float32)
    for start in range(0, chunks, SLOTS):
        chunk = tl.where(forwards, start + turn, chunks - 1 - start - turn)
        there = (start + turn < chunks) & inside
        written = (start + turn > 0) & there
        dt_sum = tl.load(dt_sums + chunk * dim + element % dim, mask=written, other=0.0)
        added = tl.load(states + chunk * elements + element, mask=written, other=0.0)
        decay = tl.exp2(dt_sum * rate)
        added += tl.where(turn == 0, decay * carried, 0.0)
        _, state = tl.associative_scan((decay, added), 0, _one_after_the_other)
        tl.store(states + chunk * elements + element, state, mask=there)
        carried = tl.sum(tl.where(turn == SLOTS - 1, state, 0.0), axis=0, keep_dims=True)


@_kernel
def write_outputs(
    source,
    projected,
    rates,
    dt_weight,
    dt_bias,
    skip,
    states,
    total,
    out,
    stride,
    wrap,
    magic,
    length,
    dim,
    chunks,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    NUM_STATES: tl.constexpr,
    STATES: tl.constexpr,
    CHUNK: tl.constexpr,
    REGISTERS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Both scans along the rows, or along the columns, added to the sum of outputs.

    Grid: (chunks, channel blocks, batch).

    Args:
        skip: (4, dim).
        states: States that enter the chunks, (batch, 4, chunks, NUM_STATES, dim).
        total: Sum of the outputs so far, float32, (batch, L, dim); written by the rows, read by the columns.
        out: The finished sum, written by the columns.
        COLUMNS: 0 for rows, which come first, 1 for columns.
    """
    FEATURES: tl.constexpr = RANK + 2 * NUM_STATES
    chunk = tl.program_id(0)
    batch = tl.program_id(2)
    count = tl.minimum(CHUNK, length - chunk * CHUNK)
    if not COLUMNS:
        stride = 1
        magic = 0

    n = tl.arange(0, STATES)[:, None, None]
    r = tl.arange(0, RANKS)[:, None, None]
    register = tl.arange(0, REGISTERS)[None, :, None]
    lane = tl.arange(0, LANES)[None, None, :]
    channel = (tl.program_id(1) * REGISTERS + register) * LANES + lane
    inside = channel < dim
    image = batch.to(tl.int64) * length * dim
    source += image
    total += image
    out += image
    for backwards in range(2):
        direction = COLUMNS + 2 * backwards
        sign = 1 - 2 * backwards
        first = chunk * CHUNK + backwards * (count - 1)
        rate = tl.load(rates + (direction * NUM_STATES + n) * dim + channel, mask=(n < NUM_STATES) & inside, other=0.0)
        weight = tl.load(dt_weight + (direction * RANK + r) * dim + channel, mask=(r < RANK) & inside, other=0.0)
        bias = tl.load(dt_bias + direction * dim + channel, mask=inside, other=0.0)
        skip_weight = tl.load(skip + direction * dim + channel, mask=inside, other=0.0)
        slot = (batch.to(tl.int64) * 4 + direction) * chunks + chunk
        state = tl.load(states + (slot * NUM_STATES + n) * dim + channel, mask=(n < NUM_STATES) & inside, other=0.0)
        rows = projected + (batch.to(tl.int64) * length * 4 + direction) * FEATURES
        begun = COLUMNS + backwards > 0
        finished = COLUMNS + backwards == 2
        limit_of_sum = tl.where(begun, dim, 0)
        for i in range(count):
            pixel = _pixel(first + sign * i, stride, wrap, magic)
            row = rows + pixel * (4 * FEATURES)
            place = pixel * dim + channel
            value = tl.load(source + place, mask=inside, other=0.0).to(tl.float32)
            before = tl.load(total + place, mask=channel < limit_of_sum, other=0.0)
            dt = _step_size(row, weight, bias, RANK, RANKS, LANES)
            input_weight = _shared_by_lanes(row + RANK, STATES, NUM_STATES, LANES)
            output_weight = _shared_by_lanes(row + RANK + NUM_STATES, STATES, NUM_STATES, LANES)
            state = state * tl.exp2(dt * rate) + (dt * value) * input_weight
            y = before + skip_weight * value + tl.sum(state * output_weight, axis=0, keep_dims=True)
            if finished:
                tl.store(out + place, y, mask=inside)
            else:
                tl.store(total + place, y, mask=inside)
        # The second way reads what the first has written.
        tl.debug_barrier()


@triton.jit
def _exchange(rows, COUNT: tl.constexpr, DISTANCE: tl.constexpr, LANES: tl.constexpr):
    """Halves ``COUNT`` tensors (LANES,): a lane keeps one half, adds its partner's part of it, and gives the other."""
    lane = tl.arange(0, LANES)
    upper = (lane & DISTANCE) != 0
    halved = ()
    for i in tl.static_range(COUNT // 2):
        low = rows[i]
        high = rows[i + COUNT // 2]
        given = tl.where(upper, low, high)
        halved = halved + (tl.where(upper, high, low) + tl.gather(given, lane ^ DISTANCE, 0),)
    return halved


@triton.jit
def _sum_over_lanes(rows, COUNT: tl.constexpr, LANES: tl.constexpr):
    """Sums ``COUNT`` tensors (LANES,) over their lanes; lane j returns the sum of tensor j * COUNT // LANES.

    About one exchange between lanes for each tensor, where one sum after the other takes log2(LANES) for each. A loop
    that is unrolled: Triton 3.3 and 3.4 do not end when they look for what a recursive function depends on.
    """
    for step in tl.static_range(LANES):
        if COUNT >> step > 1:
            rows = _exchange(rows, COUNT >> step, LANES >> (step + 1), LANES)
    total = rows[0]
    for step in tl.static_range(LANES):
        if COUNT >> step <= 1 and LANES >> (step + 1) > 0:
            total += tl.gather(total, tl.arange(0, LANES) ^ (LANES >> (step + 1)), 0)
    return total


@triton.jit
def _add(place, value, mask):
    """Adds to float32 memory that no other program touches."""
    tl.store(place, tl.load(place, mask=mask, other=0.0) + value, mask=mask)


@triton.jit
def _write_boundaries(
    source,
    rows,
    rates,
    dt_weight,
    dt_bias,
    entering,
    boundaries,
    first,
    sign,
    stride,
    wrap,
    magic,
    dim,
    first_channel,
    tiles,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    NUM_STATES: tl.constexpr,
    STATES: tl.constexpr,
    TILE: tl.constexpr,
    REGISTERS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Stores the states that enter the tiles of a chunk, (tiles, NUM_STATES, channels), for one block of channels."""
    n = tl.arange(0, STATES)[:, None, None]
    r = tl.arange(0, RANKS)[:, None, None]
    register = tl.arange(0, REGISTERS)[None, :, None]
    place = register * LANES + tl.arange(0, LANES)[None, None, :]
    channel = first_channel + place
    inside = channel < dim
    state = tl.load(entering + n * dim + channel, mask=(n < NUM_STATES) & inside, other=0.0)
    rate = tl.load(rates + n * dim + channel, mask=(n < NUM_STATES) & inside, other=0.0)
    weight = tl.load(dt_weight + r * dim + channel, mask=(r < RANK) & inside, other=0.0)
    bias = tl.load(dt_bias + channel, mask=inside, other=0.0)
    for tile in range(tiles):
        tl.store(boundaries + (tile * NUM_STATES + n) * (REGISTERS * LANES) + place, state, mask=n < NUM_STATES)
        # The last tile has no one to hand its state to.
        steps = tl.where(tile + 1 < tiles, TILE, 0)
        for i in range(steps):
            pixel = _pixel(first + sign * (tile * TILE + i), stride, wrap, magic)
            row = rows + pixel * (4 * (RANK + 2 * NUM_STATES))
            value = tl.load(source + pixel * dim + channel, mask=inside, other=0.0).to(tl.float32)
            dt = _step_size(row, weight, bias, RANK, RANKS, LANES)
            input_weight = _shared_by_lanes(row + RANK, STATES, NUM_STATES, LANES)
            state = state * tl.exp2(dt * rate) + (dt * value) * input_weight


@_kernel
def write_gradients(
    source,
    gradient,
    projected,
    rates,
    dt_weight,
    dt_bias,
    skip,
    states,
    adjoints,
    boundaries,
    source_gradient,
    projected_gradient,
    rates_gradient,
    dt_weight_gradient,
    dt_bias_gradient,
    skip_gradient,
    stride,
    wrap,
    magic,
    length,
    dim,
    chunks,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    NUM_STATES: tl.constexpr,
    STATES: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    REGISTERS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Gradients of both scans along the rows, or along the columns, added to what is there.

    Grid: (chunks, parts, batch). A program takes every ``parts``-th channel block of its chunk, one after the other,
    and alone writes to its part of the gradients; only those of x are shared by rows and columns, whose launches follow
    each other. All outputs are float32 and begin with zeros. First axis of ``boundaries``: programs.

    Args:
        gradient: Gradient of the output, (batch, L, dim).
        states: States that enter the chunks, (batch, 4, chunks, NUM_STATES, dim).
        adjoints: Gradients of the states that leave the chunks, same shape; overwritten.
        boundaries: Scratch for the states that enter the tiles, (programs, CHUNK // TILE, NUM_STATES,
            REGISTERS * LANES).
        source_gradient: Gradient of x by the scans, (batch, L, dim).
        projected_gradient: (parts, batch, L, 4, RANK + 2 * NUM_STATES).
        rates_gradient: Of A, (batch, chunks, 4, NUM_STATES, dim).
        dt_weight_gradient: (batch, chunks, 4, RANK, dim).
        dt_bias_gradient: (batch, chunks, 4, dim), as ``skip_gradient``.
        skip_gradient: Of the weights of the skip connections.
    """
    FEATURES: tl.constexpr = RANK + 2 * NUM_STATES
    LANES_PER_STEP: tl.constexpr = LANES // TILE
    BLOCK: tl.constexpr = REGISTERS * LANES
    chunk = tl.program_id(0)
    part = tl.program_id(1)
    batch = tl.program_id(2)
    count = tl.minimum(CHUNK, length - chunk * CHUNK)
    tiles = tl.cdiv(count, TILE)
    if not COLUMNS:
        stride = 1
        magic = 0
    program = (batch * tl.num_programs(1) + part).to(tl.int64) * chunks + chunk
    boundaries += program * (CHUNK // TILE) * NUM_STATES * BLOCK
    image = batch.to(tl.int64) * length
    source += image * dim
    gradient += image * dim
    source_gradient += image * dim
    images = tl.num_programs(2).to(tl.int64) * length
    lane = tl.arange(0, LANES)
    member = tl.arange(0, REGISTERS)[:, None] * LANES + lane[None, :]

    for backwards in range(2):
        direction = COLUMNS + 2 * backwards
        sign = 1 - 2 * backwards
        first = chunk * CHUNK + backwards * (count - 1)
        rows = projected + (image * 4 + direction) * FEATURES
        row_gradients = projected_gradient + ((part * images + image) * 4 + direction) * FEATURES
        entering = states + ((batch.to(tl.int64) * 4 + direction) * chunks + chunk) * NUM_STATES * dim
        leaving = adjoints + ((batch.to(tl.int64) * 4 + direction) * chunks + chunk) * NUM_STATES * dim
        summed = (batch.to(tl.int64) * chunks + chunk) * 4 + direction
        for block in range(part, tl.cdiv(dim, BLOCK), tl.num_programs(1)):
            _write_boundaries(
                source,
                rows,
                rates + direction * NUM_STATES * dim,
                dt_weight + direction * RANK * dim,
                dt_bias + direction * dim,
                entering,
                boundaries,
                first,
                sign,
                stride,
                wrap,
                magic,
                dim,
                block * BLOCK,
                tiles,
                RANK,
                RANKS,
                NUM_STATES,
                STATES,
                TILE,
                REGISTERS,
                LANES,
            )
            tl.debug_barrier()

            channel = block * BLOCK + member
            inside = channel < dim
            bias = tl.load(dt_bias + direction * dim + channel, mask=inside, other=0.0)
            skip_weight = tl.load(skip + direction * dim + channel, mask=inside, other=0.0)
            bias_sum = tl.zeros((REGISTERS, LANES), tl.float32)
            skip_sum = tl.zeros((REGISTERS, LANES), tl.float32)
            for turn in range(tiles):
                tile = tiles - 1 - turn
                # The step that a lane stores sums for; one lane for each step.
                own = tile * TILE + lane // LANES_PER_STEP
                own_limit = tl.where(lane % LANES_PER_STEP == 0, count, 0)
                stored = own < own_limit
                own_pixel = _pixel(first + sign * tl.minimum(own, count - 1), stride, wrap, magic)
                own_row = row_gradients + own_pixel * (4 * FEATURES)

                offset = ()
                place = ()
                there = ()
                raw = ()
                for i in tl.static_range(TILE):
                    pixel = _pixel(first + sign * tl.minimum(tile * TILE + i, count - 1), stride, wrap, magic)
                    offset = offset + (pixel * (4 * FEATURES),)
                    place = place + (pixel * dim,)
                    there = there + (tile * TILE + i < count,)
                    raw = raw + (bias,)
                for r in range(RANK):
                    weight = tl.load(dt_weight + (direction * RANK + r) * dim + channel, mask=inside, other=0.0)
                    updated = ()
                    for i in tl.static_range(TILE):
                        updated = updated + (raw[i] + tl.load(rows + r + offset[i]).to(tl.float32) * weight,)
                    raw = updated

                # Steps past the end repeat the last one with dt = 0 and no gradient: they change nothing.
                dt = ()
                drive = ()
                y_gradient = ()
                drive_gradient = ()
                dt_gradient = ()
                for i in tl.static_range(TILE):
                    step = tl.where(there[i], _softplus(raw[i]), 0.0)
                    value = tl.load(source + place[i] + channel, mask=inside, other=0.0).to(tl.float32)
                    output = tl.load(gradient + place[i] + channel, mask=inside, other=0.0).to(tl.float32)
                    dt = dt + (step,)
                    drive = drive + (step * value,)
                    y_gradient = y_gradient + (tl.where(there[i], output, 0.0),)
                    drive_gradient = drive_gradient + (tl.zeros((REGISTERS, LANES), tl.float32),)
                    dt_gradient = dt_gradient + (tl.zeros((REGISTERS, LANES), tl.float32),)

                for n in range(NUM_STATES):
                    rate = tl.load(rates + (direction * NUM_STATES + n) * dim + channel, mask=inside, other=0.0)
                    state = tl.load(boundaries + (tile * NUM_STATES + n) * BLOCK + member)
                    decays = ()
                    passed = ()
                    weights = ()
                    products = ()
                    for i in tl.static_range(TILE):
                        decay = tl.exp2(dt[i] * rate)
                        weight = tl.load(rows + (RANK + n) + offset[i]).to(tl.float32)
                        old = decay * state
                        state = old + drive[i] * weight
                        decays = decays + (decay,)
                        passed = passed + (old,)
                        weights = weights + (weight,)
                        products = products + (tl.sum(state * y_gradient[i], axis=0),)
                    output_weight_sum = _sum_over_lanes(products, TILE, LANES)

                    adjoint = tl.load(leaving + n * dim + channel, mask=inside, other=0.0)
                    rate_sum = tl.zeros((REGISTERS, LANES), tl.float32)
                    products = ()
                    drive_updated = ()
                    dt_updated = ()
                    for i in tl.static_range(TILE - 1, -1, -1):
                        adjoint += tl.load(rows + (RANK + NUM_STATES + n) + offset[i]).to(tl.float32) * y_gradient[i]
                        products = (tl.sum(adjoint * drive[i], axis=0),) + products
                        drive_updated = (drive_gradient[i] + adjoint * weights[i],) + drive_updated
                        through = adjoint * passed[i]
                        rate_sum += through * dt[i]
                        dt_updated = (dt_gradient[i] + through * rate,) + dt_updated
                        adjoint *= decays[i]
                    drive_gradient = drive_updated
                    dt_gradient = dt_updated
                    input_weight_sum = _sum_over_lanes(products, TILE, LANES)
                    tl.store(leaving + n * dim + channel, adjoint, mask=inside)
                    _add(rates_gradient + (summed * NUM_STATES + n) * dim + channel, rate_sum, inside)
                    _add(own_row + RANK + n, input_weight_sum, stored)
                    _add(own_row + RANK + NUM_STATES + n, output_weight_sum, stored)

                raw_gradient = ()
                for i in tl.static_range(TILE):
                    value = tl.load(source + place[i] + channel, mask=inside, other=0.0).to(tl.float32)
                    # ``rates`` holds A * log2(e).
                    slope = (dt_gradient[i] * LN_2 + drive_gradient[i] * value) * _softplus_slope(dt[i])
                    raw_gradient = raw_gradient + (slope,)
                    bias_sum += slope
                    skip_sum += y_gradient[i] * value
                    added = dt[i] * drive_gradient[i] + skip_weight * y_gradient[i]
                    _add(source_gradient + place[i] + channel, added, inside)
                for r in range(RANK):
                    weight = tl.load(dt_weight + (direction * RANK + r) * dim + channel, mask=inside, other=0.0)
                    weight_sum = tl.zeros((REGISTERS, LANES), tl.float32)
                    products = ()
                    for i in tl.static_range(TILE):
                        weight_sum += raw_gradient[i] * tl.load(rows + r + offset[i]).to(tl.float32)
                        products = products + (tl.sum(raw_gradient[i] * weight, axis=0),)
                    feature_sum = _sum_over_lanes(products, TILE, LANES)
                    _add(dt_weight_gradient + (summed * RANK + r) * dim + channel, weight_sum, inside)
                    _add(own_row + r, feature_sum, stored)
                # The next tile reads what lanes have stored for their steps and channels.
                tl.debug_barrier()
            tl.store(dt_bias_gradient + summed * dim + channel, bias_sum, mask=inside)
            tl.store(skip_gradient + summed * dim + channel, skip_sum, mask=inside)
