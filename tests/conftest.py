"""What holds for every test."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Test processes share the cores; several threads in each would only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
