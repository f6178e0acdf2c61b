"""Masked attention: one mask for all heads; the CPU path equals PyTorch's attention."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from maskwright.models.layers import Attention, attention
from maskwright.models.ops.masked_attention_cpu import masked_attention_cpu


class LargestTensor(TorchDispatchMode):
    """Records how many float32 values fit the largest memory that an operation returned."""

    def __init__(self):
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        found = result if isinstance(result, tuple | list) else [result]
        storages = [tensor.untyped_storage().nbytes() for tensor in found if isinstance(tensor, torch.Tensor)]
        self.values = max([self.values, *(size // 4 for size in storages)])
        return result


def test_no_tensor_of_heads_times_queries_times_tokens_is_made():
    torch.manual_seed(0)
    batch, queries, tokens, heads = 2, 40, 96, 8
    module = Attention(16, heads)
    visible = torch.rand(batch, queries, tokens) > 0.5
    values = torch.randn(batch, tokens, 16)
    with LargestTensor() as largest:
        module(torch.randn(batch, queries, 16), values, values, visible)
    assert largest.values < batch * heads * queries * tokens / 2


def test_the_mask_hides_the_same_keys_from_every_head():
    torch.manual_seed(1)
    module = Attention(16, 4).double()
    queries, values = torch.randn(2, 5, 16).double(), torch.randn(2, 7, 16).double()
    visible = torch.rand(2, 5, 7) > 0.4
    visible[:, :, 0] = True
    found = module(queries, values, values, visible)
    query, key, value = (
        project(tensor).unflatten(-1, (4, -1)).transpose(1, 2)
        for project, tensor in ((module.query, queries), (module.key, values), (module.value, values))
    )
    scores = (query @ key.transpose(2, 3) / 2).masked_fill(~visible[:, None], -torch.inf).softmax(-1)
    expected = module.output((scores @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(found, expected)


@pytest.fixture
def inputs() -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, count, 32) * 2 for count in (10, 3000, 3000))
    visible = torch.rand(2, 10, 3000) < 0.1
    visible[1, 3] = False
    visible[1, 3, 17] = True
    return query, key, value, visible


def test_the_cpu_path_equals_the_plain_path(inputs):
    torch.testing.assert_close(masked_attention_cpu(*inputs, 4), attention(*inputs, 4), rtol=1e-5, atol=1e-5)


def test_hidden_keys_that_outweigh_all_visible_ones_are_left_to_the_plain_path(inputs):
    query, key, value, visible = inputs
    key = key.clone()
    key[0, 5] = 100 * query[0, 2]
    visible[0, 2, 5] = False
    assert masked_attention_cpu(query, key, value, visible, 4) is None


def test_a_query_that_is_not_finite_is_left_to_the_plain_path(inputs):
    query, key, value, visible = inputs
    query[1, 4, 3] = torch.nan
    assert masked_attention_cpu(query, key, value, visible, 4) is None


@pytest.mark.parametrize("change", ["nothing", "a hidden key outweighs", "a query is not finite"])
def test_prediction_and_training_are_the_same(inputs, change):
    query, key, value, visible = inputs
    module = Attention(32, 4)
    if change == "a hidden key outweighs":
        query, key, module = query * 100, key * 100, module.requires_grad_(False)
    if change == "a query is not finite":
        query[1, 4, 3] = torch.nan
    with torch.enable_grad():
        expected = module(query, key, value, visible).detach()
    with torch.inference_mode():
        found = module(query, key, value, visible)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert found.isnan().any() == (change == "a query is not finite")
