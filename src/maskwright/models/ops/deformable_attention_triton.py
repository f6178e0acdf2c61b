"""The `triton` backend of deformable attention: forward and backward kernels for CUDA and ROCm.

Importing this module imports Triton. Values may be float32, bfloat16 or float16; positions and weights are float32, as
are all sums. A program computes one head of a block of queries, so no other program adds to its gradients of positions
and weights. The gradient of values uses atomics: its last bits depend on the order in which programs run. Unusual: the
sizes of the levels are arguments of the launch, so nothing is copied to the device for them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

_FORWARD_BLOCK, _BACKWARD_BLOCK = 2048, 1024  # values per program: queries times channels


@torch.library.custom_op("maskwright::deformable_attention", mutates_args=())
def attend(values: Tensor, sizes: Sequence[int], positions: Tensor, weights: Tensor) -> Tensor:
    """Compute weighted sums of bilinearly sampled values.

    Args:
        values: (B, T, heads, C) float32, bfloat16 or float16.
        sizes: height and width of each level, alternating.
        positions: (B, Q, heads, L, P, 2) float32, as in `deformable_attention`.
        weights: (B, Q, heads, L, P) float32.

    Returns:
        (B, Q, heads * C) with the dtype of `values`.
    """
    values, weights = values.contiguous(), weights.contiguous()
    batch, queries, heads, levels, points, _ = positions.shape
    channels = values.shape[-1]
    output = values.new_empty(batch, queries, heads * channels)
    if output.numel():
        grid, blocks = _launch_sizes(_FORWARD_BLOCK, batch, queries, heads, channels)
        _forward_kernel[grid](
            values,
            positions,
            weights,
            output,
            queries,
            values.shape[1],
            tuple(sizes[0::2]),
            tuple(sizes[1::2]),
            positions.stride(),
            HEADS=heads,
            CHANNELS=channels,
            LEVELS=levels,
            POINTS=points,
            **blocks,
        )
    return output


@torch.library.custom_op("maskwright::deformable_attention_backward", mutates_args=())
def gradients(
    gradient: Tensor, values: Tensor, sizes: Sequence[int], positions: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of values, positions and weights, given that of the output."""
    gradient, values, weights = gradient.contiguous(), values.contiguous(), weights.contiguous()
    batch, queries, heads, levels, points, _ = positions.shape
    channels = values.shape[-1]
    value_gradient = torch.zeros_like(values, dtype=torch.float32)
    position_gradient, weight_gradient = torch.empty_like(positions), torch.empty_like(weights)
    if gradient.numel():
        grid, blocks = _launch_sizes(_BACKWARD_BLOCK, batch, queries, heads, channels)
        _backward_kernel[grid](
            gradient,
            values,
            positions,
            weights,
            value_gradient,
            position_gradient,
            weight_gradient,
            queries,
            values.shape[1],
            tuple(sizes[0::2]),
            tuple(sizes[1::2]),
            positions.stride(),
            position_gradient.stride(),
            HEADS=heads,
            CHANNELS=channels,
            LEVELS=levels,
            POINTS=points,
            **blocks,
        )
    return value_gradient.to(values.dtype), position_gradient, weight_gradient


@attend.register_fake
def _(values, sizes, positions, weights) -> Tensor:
    return values.new_empty(*positions.shape[:2], values.shape[2] * values.shape[3])


@gradients.register_fake
def _(gradient, values, sizes, positions, weights) -> tuple[Tensor, Tensor, Tensor]:
    like = torch.empty_like
    return like(values.contiguous()), like(positions), like(weights.contiguous())


def _save_inputs(ctx, inputs, output) -> None:
    values, ctx.sizes, positions, weights = inputs
    ctx.save_for_backward(values, positions, weights)


def _backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
    values, positions, weights = ctx.saved_tensors
    value_gradient, position_gradient, weight_gradient = gradients(gradient, values, ctx.sizes, positions, weights)
    return value_gradient, None, position_gradient, weight_gradient


attend.register_autograd(_backward, setup_context=_save_inputs)


def _launch_sizes(
    block: int, batch: int, queries: int, heads: int, channels: int
) -> tuple[tuple[int, ...], dict[str, int]]:
    """Return the grid of programs and their block sizes, which are powers of two."""
    channel_block = triton.next_power_of_2(channels)
    query_block = max(1, block // channel_block)
    grid = (triton.cdiv(queries, query_block), heads, batch)
    return grid, {"QUERY_BLOCK": query_block, "CHANNEL_BLOCK": channel_block}


@triton.jit
def _split(position, size):
    """Return integer part (int32) and fraction of a position, clamped to two cells around the level; NaN stays NaN."""
    position = tl.where(position < -2.0, -2.0, position)
    position = tl.where(position > size + 1.0, size + 1.0, position)
    whole = tl.floor(position)
    return tl.where(position == position, whole, -2.0).to(tl.int32), position - whole


@triton.jit
def _inside(row, column, height, width, is_query):
    return is_query & (row >= 0) & (row < height) & (column >= 0) & (column < width)


@triton.jit
def _offset(row, column, start, width, ROW: tl.constexpr):
    """Return the offset of a cell's first channel from that of the image's first cell."""
    return (start + row * width + column).to(tl.int64)[:, None] * ROW


@triton.jit
def _load_cells(table, row, column, start, height, width, is_query, is_channel, ROW: tl.constexpr):
    """Load one cell per query as float32 (queries, channels), zeros outside the level."""
    mask = _inside(row, column, height, width, is_query)[:, None] & is_channel[None, :]
    return tl.load(table + _offset(row, column, start, width, ROW), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _forward_kernel(
    values,
    positions,
    weights,
    output,
    queries,
    cells,
    heights,
    widths,
    strides,
    HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    CHANNEL_BLOCK: tl.constexpr,
):
    ROW: tl.constexpr = HEADS * CHANNELS
    head, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    query = (tl.program_id(0) * QUERY_BLOCK + tl.arange(0, QUERY_BLOCK)).to(tl.int64)
    channel = tl.arange(0, CHANNEL_BLOCK)
    is_query, is_channel = query < queries, channel < CHANNELS
    table = values + image * cells * ROW + head * CHANNELS + channel[None, :]
    position = positions + image * strides[0] + query * strides[1] + head * strides[2]
    sample = ((image * queries + query) * HEADS + head) * (LEVELS * POINTS)
    total = tl.zeros((QUERY_BLOCK, CHANNEL_BLOCK), tl.float32)
    start = 0
    for level in tl.static_range(LEVELS):
        height, width = heights[level], widths[level]
        for point in range(POINTS):
            here = position + level * strides[3] + point * strides[4]
            column, right = _split(tl.load(here, mask=is_query, other=0.0), width)
            row, down = _split(tl.load(here + strides[5], mask=is_query, other=0.0), height)
            weight = tl.load(weights + sample + level * POINTS + point, mask=is_query, other=0.0)
            top_left = _load_cells(table, row, column, start, height, width, is_query, is_channel, ROW)
            top_right = _load_cells(table, row, column + 1, start, height, width, is_query, is_channel, ROW)
            bottom_left = _load_cells(table, row + 1, column, start, height, width, is_query, is_channel, ROW)
            bottom_right = _load_cells(table, row + 1, column + 1, start, height, width, is_query, is_channel, ROW)
            top = top_left + (top_right - top_left) * right[:, None]
            bottom = bottom_left + (bottom_right - bottom_left) * right[:, None]
            total += (top + (bottom - top) * down[:, None]) * weight[:, None]
        start += height * width
    target = output + (image * queries + query)[:, None] * ROW + head * CHANNELS + channel[None, :]
    tl.store(target, total.to(output.dtype.element_ty), mask=is_query[:, None] & is_channel[None, :])


@triton.jit
def _add_gradient(table, gradient, scale, row, column, start, height, width, is_query, is_channel, ROW: tl.constexpr):
    """Add each query's gradient, times `scale`, to its cell."""
    mask = _inside(row, column, height, width, is_query)[:, None] & is_channel[None, :]
    tl.atomic_add(table + _offset(row, column, start, width, ROW), gradient * scale[:, None], mask=mask, sem="relaxed")


@triton.jit
def _backward_kernel(
    gradient,
    values,
    positions,
    weights,
    value_gradient,
    position_gradient,
    weight_gradient,
    queries,
    cells,
    heights,
    widths,
    strides,
    gradient_strides,
    HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    CHANNEL_BLOCK: tl.constexpr,
):
    ROW: tl.constexpr = HEADS * CHANNELS
    head, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    query = (tl.program_id(0) * QUERY_BLOCK + tl.arange(0, QUERY_BLOCK)).to(tl.int64)
    channel = tl.arange(0, CHANNEL_BLOCK)
    is_query, is_channel = query < queries, channel < CHANNELS
    first = image * cells * ROW + head * CHANNELS + channel[None, :]
    table, table_gradient = values + first, value_gradient + first
    position = positions + image * strides[0] + query * strides[1] + head * strides[2]
    target = position_gradient + image * gradient_strides[0] + query * gradient_strides[1] + head * gradient_strides[2]
    sample = ((image * queries + query) * HEADS + head) * (LEVELS * POINTS)
    source = gradient + (image * queries + query)[:, None] * ROW + head * CHANNELS + channel[None, :]
    upstream = tl.load(source, mask=is_query[:, None] & is_channel[None, :], other=0.0).to(tl.float32)
    start = 0
    for level in tl.static_range(LEVELS):
        height, width = heights[level], widths[level]
        for point in range(POINTS):
            here = position + level * strides[3] + point * strides[4]
            column, right = _split(tl.load(here, mask=is_query, other=0.0), width)
            row, down = _split(tl.load(here + strides[5], mask=is_query, other=0.0), height)
            weight = tl.load(weights + sample + level * POINTS + point, mask=is_query, other=0.0)
            top_left = _load_cells(table, row, column, start, height, width, is_query, is_channel, ROW)
            top_left = tl.sum(top_left * upstream, 1)
            top_right = _load_cells(table, row, column + 1, start, height, width, is_query, is_channel, ROW)
            top_right = tl.sum(top_right * upstream, 1)
            bottom_left = _load_cells(table, row + 1, column, start, height, width, is_query, is_channel, ROW)
            bottom_left = tl.sum(bottom_left * upstream, 1)
            bottom_right = _load_cells(table, row + 1, column + 1, start, height, width, is_query, is_channel, ROW)
            bottom_right = tl.sum(bottom_right * upstream, 1)
            top = top_left + (top_right - top_left) * right
            bottom = bottom_left + (bottom_right - bottom_left) * right
            slope = (top_right - top_left) * (1 - down) + (bottom_right - bottom_left) * down
            slope_target = target + level * gradient_strides[3] + point * gradient_strides[4]
            tl.store(weight_gradient + sample + level * POINTS + point, top + (bottom - top) * down, mask=is_query)
            tl.store(slope_target, slope * weight, mask=is_query)
            tl.store(slope_target + gradient_strides[5], (bottom - top) * weight, mask=is_query)
            up, low = (1 - down) * weight, down * weight
            scale = up * (1 - right)
            _add_gradient(table_gradient, upstream, scale, row, column, start, height, width, is_query, is_channel, ROW)
            scale = up * right
            _add_gradient(
                table_gradient, upstream, scale, row, column + 1, start, height, width, is_query, is_channel, ROW
            )
            scale = low * (1 - right)
            _add_gradient(
                table_gradient, upstream, scale, row + 1, column, start, height, width, is_query, is_channel, ROW
            )
            scale = low * right
            _add_gradient(
                table_gradient, upstream, scale, row + 1, column + 1, start, height, width, is_query, is_channel, ROW
            )
        start += height * width
