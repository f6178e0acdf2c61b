"""The mask of masked attention is one for all heads: none is made for each of them."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from maskwright.models.layers import Attention


class Largest(TorchDispatchMode):
    """The most numbers that a tensor had which an operation gave."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        found = result if isinstance(result, tuple | list) else [result]
        storages = [tensor.untyped_storage().nbytes() for tensor in found if isinstance(tensor, torch.Tensor)]
        self.numbers = max([self.numbers, *(size // 4 for size in storages)])
        return result


def test_no_tensor_of_heads_times_queries_times_tokens_is_made():
    torch.manual_seed(0)
    batch, queries, tokens, heads = 2, 40, 96, 8
    attention = Attention(16, heads)
    visible = torch.rand(batch, queries, tokens) > 0.5
    values = torch.randn(batch, tokens, 16)
    with Largest() as largest:
        attention(torch.randn(batch, queries, 16), values, values, visible)
    # As floats the mask of all heads is as large as that of one image's pictures times `heads`.
    assert largest.numbers < batch * heads * queries * tokens / 2


def test_the_mask_hides_exactly_what_it_says_from_every_head():
    torch.manual_seed(1)
    attention = Attention(16, 4).double()
    queries, values = torch.randn(2, 5, 16).double(), torch.randn(2, 7, 16).double()
    visible = torch.rand(2, 5, 7) > 0.4
    visible[:, :, 0] = True
    found = attention(queries, values, values, visible)
    query, key, value = (
        project(tensor).unflatten(-1, (4, -1)).transpose(1, 2)
        for project, tensor in ((attention.query, queries), (attention.key, values), (attention.value, values))
    )
    scores = (query @ key.transpose(2, 3) / 2).masked_fill(~visible[:, None], -torch.inf).softmax(-1)
    expected = attention.output((scores @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(found, expected)
