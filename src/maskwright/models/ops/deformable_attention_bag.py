"""The `bag` backend of deformable attention: one `embedding_bag`, with a backward pass that needs no sorting on a CPU.

The sum over levels, points and bilinear neighbors is a weighted sum of rows of a table: one bag per query and head,
holding the four neighbors of every sample. Each level is padded with a border of zeros and positions are clamped to
it, so a neighbor outside the level is a row of zeros and needs no comparison.

For CPUs, queries are processed in chunks so that row numbers and weights stay in the cache, and intermediate values are
laid out in rows of at least one head's samples, since PyTorch is much slower on short rows. Gain of the
backend: 0.093 -> 0.037 s per encoder layer (ResNet-50 at 800x1088, two threads, AVX2).

`S` below is the number of samples of one head: L levels times P points.
"""

from __future__ import annotations

import warnings
from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from maskwright.models.ops.cpu_path import rows_per_chunk, scratch_buffer

MAX_BATCH_TOKENS = 4096  # images with fewer tokens in total share a table in training


class PaddedLevels(NamedTuple):
    """Geometry of the feature levels, each padded with a border of one cell.

    Attributes:
        shapes: (h, w) of each level.
        padded_shapes: (h + 2, w + 2) of each level.
        num_cells: of all padded levels, plus spare ones that the last neighbors may point to.
        max_positions: (2, heads * S) largest x, then largest y, of each sample inside the border.
        row_stride: (heads * S,) width of the padded level of each sample.
        corner_offsets: (heads, 4, S) int32, table rows of the four neighbors of position (0, 0).
    """

    shapes: tuple[tuple[int, int], ...]
    padded_shapes: tuple[tuple[int, int], ...]
    num_cells: int
    max_positions: Tensor
    row_stride: Tensor
    corner_offsets: Tensor


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def padded_levels(
    shapes: tuple[tuple[int, int], ...], num_heads: int, num_points: int, dtype: torch.dtype, device: torch.device
) -> PaddedLevels:
    """Return the geometry for positions of `dtype`. Cached: do not write to it."""
    sizes = torch.tensor([(h + 2) * (w + 2) for h, w in shapes])
    width = torch.tensor([w + 2 for _, w in shapes])
    first_cell = sizes.cumsum(0) - sizes + width + 1  # of each level, inside its border
    corners = torch.stack([torch.zeros_like(width), torch.ones_like(width), width, width + 1]) + first_cell  # (4, L)
    rows = corners.repeat_interleave(num_points, 1) * num_heads + torch.arange(num_heads)[:, None, None]
    max_positions = torch.tensor([[w for _, w in shapes], [h for h, _ in shapes]], dtype=dtype)
    return PaddedLevels(
        shapes,
        tuple((h + 2, w + 2) for h, w in shapes),
        sum((h + 2) * (w + 2) for h, w in shapes) + shapes[-1][1] + 3,  # reading a tensor would split compiled graphs
        max_positions.repeat_interleave(num_points, 1).repeat(1, num_heads).to(device),
        width.repeat_interleave(num_points).repeat(num_heads).to(dtype).to(device),
        rows.int().to(device),
    )


def build_table(values: Tensor, levels: PaddedLevels) -> Tensor:
    """Return the padded values of n images as rows, (n * num_cells * heads, C), from values (n, T, heads, C)."""
    images, _, num_heads, channels = values.shape
    table = values.new_empty(images, levels.num_cells, num_heads * channels)
    parts = values.flatten(2).split([h * w for h, w in levels.shapes], 1)
    for level, part in zip(_level_views(table, levels), parts, strict=True):
        for border in (level[:, 0], level[:, -1], level[:, :, 0], level[:, :, -1]):
            border.zero_()
        inner = level[:, 1:-1, 1:-1]
        inner.copy_(part.unflatten(1, inner.shape[1:3]))
    table[:, sum(h * w for h, w in levels.padded_shapes) :] = 0
    return table.view(-1, channels)


def _table_values(table: Tensor, levels: PaddedLevels, num_heads: int) -> Tensor:
    """Return the values (n, T, heads, C) of a table: the inverse of `build_table`."""
    views = _level_views(table.view(-1, levels.num_cells, num_heads * table.shape[1]), levels)
    return torch.cat([level[:, 1:-1, 1:-1].flatten(1, 2) for level in views], 1).unflatten(2, (num_heads, -1))


def _level_views(table: Tensor, levels: PaddedLevels) -> list[Tensor]:
    """Return views (n, h + 2, w + 2, heads * C) of the padded levels of (n, num_cells, heads * C)."""
    counts = [h * w for h, w in levels.padded_shapes]
    parts = table[:, : sum(counts)].split(counts, 1)
    return [part.unflatten(1, shape) for part, shape in zip(parts, levels.padded_shapes, strict=True)]


class Bags:
    """Table rows and weights of all samples of a chunk of queries, in buffers that are reused.

    Args:
        max_queries: capacity.
        levels: geometry.
        like: gives dtype and device of the weights.
    """

    def __init__(self, max_queries: int, levels: PaddedLevels, like: Tensor) -> None:
        num_heads, corners, samples = levels.corner_offsets.shape
        self.levels = levels
        self._rows = scratch_buffer("rows", (max_queries, num_heads, corners, samples), levels.corner_offsets)
        self._weights = scratch_buffer("weights", (max_queries, num_heads, corners, samples), like)

    def fill(
        self, positions: Tensor, weights: Tensor, table_starts: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute table rows and their weights for q queries.

        Args:
            positions: (q, 2, heads * S), all x before all y.
            weights: (q, heads * S) attention weights.
            table_starts: (q,) int32, first table row of each query's image; None if there is one image.

        Returns:
            Table rows, and attention weight times bilinear weight, (q * heads, 4 * S) each, in order of corners; valid
            until the next call. Then the fractional parts of the positions, of their shape.
        """
        levels, queries = self.levels, len(positions)
        rows, row_weights = self._rows[:queries], self._weights[:queries]
        clamped = positions.clamp(levels.max_positions.new_tensor(-1.0), levels.max_positions)
        whole = clamped.floor()
        fractions = clamped.sub_(whole)
        top_left = torch.addcmul(whole[:, 0], whole[:, 1], levels.row_stride)
        top_left = top_left.nan_to_num_(-1.0).int().mul_(rows.shape[1])  # a NaN's fraction makes the result NaN
        if table_starts is not None:
            top_left += table_starts[:, None]
        x, y = fractions.unbind(1)
        right = weights * x
        left = weights - right
        bottom_right, bottom_left = right * y, left * y
        corner_weights = left.sub_(bottom_left), right.sub_(bottom_right), bottom_left, bottom_right
        for corner, corner_weight in enumerate(corner_weights):
            rows[:, :, corner].copy_(top_left.unflatten(1, (rows.shape[1], -1)))
            row_weights[:, :, corner].copy_(corner_weight.unflatten(1, (rows.shape[1], -1)))
        rows += levels.corner_offsets
        return rows.view(-1, rows[0, 0].numel()), row_weights.view(-1, rows[0, 0].numel()), fractions

    def sum(self, table: Tensor, positions: Tensor, weights: Tensor, table_starts: Tensor | None = None) -> Tensor:
        """Return the weighted sums (q, heads * C) of q queries; see `fill`."""
        rows, row_weights, _ = self.fill(positions, weights, table_starts)
        return F.embedding_bag(rows, table, per_sample_weights=row_weights, mode="sum").view(len(positions), -1)


class SamplingLayers(NamedTuple):
    """Weights and biases of the two linear layers of `DeformableAttention` that decide where to sample."""

    offset_weight: Tensor
    offset_bias: Tensor
    logit_weight: Tensor
    logit_bias: Tensor


def sampling_positions_and_weights(
    queries: Tensor, reference: Tensor, layers: SamplingLayers, num_heads: int
) -> tuple[Tensor, Tensor]:
    """Compute where each of n queries samples, and the attention weight of each sample.

    Long rows and a softmax along columns, because PyTorch is many times slower on short rows: 35 -> 7 ms per layer.

    Args:
        queries: (n, C) float32.
        reference: (n, 2, S), see `reference_positions`.
        layers: offsets and attention logits.
        num_heads: heads.

    Returns:
        Positions (n, 2, heads * S), all x before all y, and weights (n, heads * S).
    """
    weight, bias = _split_xy(layers.offset_weight), _split_xy(layers.offset_bias)
    offsets = F.linear(queries, weight, bias).view(queries.shape[0], 2, num_heads, -1)
    positions = offsets.add_(reference[:, :, None]).flatten(2)
    logits = torch.addmm(layers.logit_bias[:, None], layers.logit_weight, queries.t())  # (heads * S, n)
    weights = logits.unflatten(0, (num_heads, -1)).softmax(1).flatten(0, 1)
    return positions, weights.t().contiguous()


def _split_xy(parameter: Tensor) -> Tensor:
    """Reorder rows x, y, x, y, ... to all x before all y."""
    return parameter.unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1)


def _interleave_xy(parameter: Tensor) -> Tensor:
    """Reorder rows from all x before all y to x, y, x, y, ..."""
    return parameter.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1)


class SelfAttentionBag(torch.autograd.Function):
    """`sampling_positions_and_weights` and the weighted sum, for all tokens of a batch.

    The backward pass recomputes positions and weights. Small images share one table: a CPU needs as long to start an
    operation as to run it for hundreds of tokens. Gain of sharing tables here and in the criterion: 0.96 -> 0.81 s for
    a training step with 4 samples of 128x160 (one thread).
    """

    @staticmethod
    def forward(
        ctx, values: Tensor, tokens: Tensor, positions: Tensor, reference: Tensor, levels: PaddedLevels, *layers: Tensor
    ) -> Tensor:
        """Return (B, T, heads * C) for values (B, T, heads, C), tokens and their position embeddings (B, T, width)."""
        batch, num_tokens, num_heads, _ = values.shape
        chunk = rows_per_chunk(values, batch * num_tokens)
        bags, output = Bags(chunk, levels, values), torch.empty_like(values).flatten(2)
        for images in _image_groups(batch, num_tokens):
            table = build_table(values[images], levels)
            group = tokens[images]
            inputs = group.flatten(0, 1), positions[images].flatten(0, 1), reference.repeat(len(group), 1, 1)
            outputs = output[images].view(-1, output.shape[-1])
            chunks = (part.split(chunk) for part in (*inputs, _table_starts(table, group), outputs))
            for token, embedding, cell, start, out in zip(*chunks, strict=True):
                queries = token.float() + embedding
                samples = sampling_positions_and_weights(queries, cell, SamplingLayers(*layers), num_heads)
                out.copy_(bags.sum(table, *samples, start))
        ctx.levels = levels
        ctx.save_for_backward(values, tokens, positions, reference, *layers)
        return output

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of values, tokens, positions and layers."""
        values, tokens, positions, reference, *parameters = ctx.saved_tensors
        layers, (batch, num_tokens, num_heads, _) = SamplingLayers(*parameters), values.shape
        groups = _image_groups(batch, num_tokens)
        bags = Bags(num_tokens * (groups[0].stop - groups[0].start), ctx.levels, values)
        layer_gradients = [torch.zeros_like(parameter) for parameter in layers]
        value_gradient, query_gradient = torch.empty_like(values), values.new_empty(positions.shape)
        offset_weight = _split_xy(layers.offset_weight).to(tokens.dtype)
        logit_weight = layers.logit_weight.to(tokens.dtype)
        for images in groups:
            queries = (tokens[images].float() + positions[images]).flatten(0, 1)
            cells = reference.repeat(len(tokens[images]), 1, 1)
            places, weights = sampling_positions_and_weights(queries, cells, layers, num_heads)
            upstream = gradients[0][images].flatten(0, 1)
            value_gradient[images], place_gradient, weight_gradient = _bag_gradients(
                bags, values[images], places, weights, upstream
            )
            offset_gradient = place_gradient.flatten(1)
            logit_gradient = _softmax_gradient(weights, weight_gradient, num_heads)
            offset_bias_gradient, logit_bias_gradient = offset_gradient.sum(0), logit_gradient.sum(0)
            # these products have the tokens' dtype, bfloat16 under autocast; positions stay float32
            offset_gradient, logit_gradient = offset_gradient.to(tokens.dtype), logit_gradient.to(tokens.dtype)
            queries = queries.to(tokens.dtype)
            product = torch.addmm(offset_gradient @ offset_weight, logit_gradient, logit_weight)
            query_gradient[images] = product.view_as(query_gradient[images])
            parts = (
                _interleave_xy(offset_gradient.t() @ queries),
                _interleave_xy(offset_bias_gradient),
                logit_gradient.t() @ queries,
                logit_bias_gradient,
            )
            for total, part in zip(layer_gradients, parts, strict=True):
                total += part
        return value_gradient, query_gradient.to(tokens.dtype), query_gradient, None, None, *layer_gradients


def _softmax_gradient(weights: Tensor, weight_gradient: Tensor, num_heads: int) -> Tensor:
    """Return the gradient of the logits, (n, heads * S), written over that of the weights."""
    product = weight_gradient.mul_(weights).unflatten(1, (num_heads, -1))
    total = product.sum(-1, keepdim=True)
    return product.sub_(weights.unflatten(1, (num_heads, -1)) * total).flatten(1)


def _image_groups(images: int, num_tokens: int) -> list[slice]:
    """Group images so that each group has at most `MAX_BATCH_TOKENS` tokens or one image."""
    count = max(1, MAX_BATCH_TOKENS // num_tokens)
    return [slice(start, min(start + count, images)) for start in range(0, images, count)]


def _table_starts(table: Tensor, queries: Tensor) -> Tensor:
    """Return (n * Q,) int32: the first table row of each query's image, for queries (n, Q, ...)."""
    starts = torch.arange(len(queries), dtype=torch.int32, device=table.device) * (len(table) // len(queries))
    return starts.repeat_interleave(queries.shape[1])


class Bag(torch.autograd.Function):
    """`deformable_attention` for any queries, image by image.

    The backward pass is written out: that of `embedding_bag` sorts 64-bit row numbers of all neighbors, which would be
    most of a training step on a CPU. It recomputes rows and table, which are four times as large as everything else.
    """

    @staticmethod
    def forward(ctx, values: Tensor, positions: Tensor, weights: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
        """Return (B, Q, heads * C)."""
        batch, queries, num_heads, _, num_points = weights.shape
        levels = padded_levels(tuple(shapes), num_heads, num_points, positions.dtype, positions.device)
        chunk = rows_per_chunk(values, queries)
        bags = Bags(chunk, levels, weights)
        output = values.new_empty(batch, queries, num_heads * values.shape[-1])
        for image in range(batch):
            table = build_table(values[image : image + 1], levels)
            chunks = (tensor[image].split(chunk) for tensor in (*_flatten_samples(positions, weights), output))
            for places, place_weights, out in zip(*chunks, strict=True):
                out.copy_(bags.sum(table, places, place_weights))
        ctx.levels = levels
        ctx.save_for_backward(values, positions, weights)
        return output

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of values, positions and weights."""
        values, positions, weights = ctx.saved_tensors
        bags = Bags(weights.shape[1], ctx.levels, weights)
        images = zip(values.split(1), *_flatten_samples(positions, weights), gradients[0], strict=True)
        of_images = [_bag_gradients(bags, *image) for image in images]
        value_gradient = torch.cat([of_image[0] for of_image in of_images])
        position_gradient = torch.stack([of_image[1] for of_image in of_images])
        weight_gradient = torch.stack([of_image[2] for of_image in of_images])
        position_gradient = position_gradient.unflatten(-1, weights.shape[2:]).movedim(2, -1)
        return value_gradient, position_gradient, weight_gradient.view_as(weights), None


def _flatten_samples(positions: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return positions (B, Q, 2, heads * S) and weights (B, Q, heads * S)."""
    return positions.movedim(-1, 2).flatten(3), weights.flatten(2)


def _bag_gradients(
    bags: Bags, values: Tensor, positions: Tensor, weights: Tensor, upstream: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of values (n, T, heads, C), positions and weights, given that of the sums.

    Positions, weights and upstream gradient hold the queries of all n images, concatenated.
    """
    levels, num_heads = bags.levels, values.shape[2]
    table = build_table(values, levels)
    queries = positions.unflatten(0, (len(values), -1))
    rows, row_weights, fractions = bags.fill(positions, weights, _table_starts(table, queries))
    upstream = upstream.reshape(-1, table.shape[1])
    dots = _row_dots(rows, upstream, table).view(len(positions), num_heads, 4, -1)
    top_left, top_right, bottom_left, bottom_right = (part.flatten(1) for part in dots.unbind(2))
    x, y = fractions.unbind(1)
    top_step, bottom_step = top_right.sub_(top_left), bottom_right.sub_(bottom_left)
    top = top_left.addcmul_(top_step, x)
    y_slope = bottom_left.addcmul_(bottom_step, x).sub_(top)
    weight_gradient = torch.addcmul(top, y_slope, y)
    x_slope = top_step.addcmul_(bottom_step.sub_(top_step), y)
    position_gradient = torch.stack([x_slope, y_slope], 1).mul_(weights[:, None])
    position_gradient.mul_((positions >= -1) & (positions < levels.max_positions))
    value_gradient = _table_values(_scatter(rows, row_weights, upstream, len(table)), levels, num_heads)
    return value_gradient, position_gradient, weight_gradient


def _row_dots(rows: Tensor, upstream: Tensor, table: Tensor) -> Tensor:
    """Return the dot product of each bag's gradient with each of its rows, (bags, rows per bag)."""
    if rows.shape[1] > len(table):  # sampled_addmm refuses more entries than a dense matrix has
        return (upstream @ table.t()).gather(1, rows.long())
    _silence_sparse_warning()
    starts = torch.arange(0, rows.numel() + 1, rows.shape[1], device=rows.device, dtype=torch.int32)
    size = (len(rows), len(table))
    pattern = torch.sparse_csr_tensor(
        starts, rows.view(-1), upstream.new_zeros(rows.numel()), size, check_invariants=False
    )
    return torch.sparse.sampled_addmm(pattern, upstream, table.t(), beta=0.0, out=pattern).values()


@cache
def _silence_sparse_warning() -> None:
    """Trigger and suppress PyTorch's one-time warning that sparse CSR is in beta, which users cannot act on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(torch.tensor([0, 0]), torch.tensor([], dtype=torch.int64), torch.tensor([]), (1, 1))


def _scatter(rows: Tensor, row_weights: Tensor, upstream: Tensor, num_rows: int) -> Tensor:
    """Return (num_rows, C): for each table row, the sum of its bags' gradients times its weights."""
    bags, size = rows.shape
    if rows.device.type == "cpu":  # scipy's product with a transposed sparse matrix needs no sorting
        import scipy.sparse  # only training needs it

        starts = np.arange(0, bags * size + 1, size, dtype=np.int32)
        matrix = scipy.sparse.csr_array((row_weights.view(-1).numpy(), rows.view(-1).numpy(), starts), (bags, num_rows))
        return torch.from_numpy(matrix.T @ upstream.numpy())
    ordered, order = rows.view(-1).sort(stable=True)
    ends = torch.bincount(ordered, minlength=num_rows).cumsum(0, dtype=torch.int32)
    owners = order.div(size, rounding_mode="floor").int()
    ordered_weights = row_weights.view(-1)[order]
    return F.embedding_bag(owners, upstream, F.pad(ends[:-1], (1, 0)), per_sample_weights=ordered_weights, mode="sum")
