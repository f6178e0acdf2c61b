"""What holds for every test."""

import pytest
import torch

from tests import hostile_files


@pytest.fixture(autouse=True)
def one_thread():
    """Test processes share the cores; several threads in each would only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def hostile(tmp_path_factory):
    """Return the folder of the files of `hostile_files`; only read them."""
    return hostile_files.write(tmp_path_factory.mktemp("hostile") / "files")


@pytest.fixture
def quick_report(monkeypatch):
    """Write placeholders instead of the curves and the report of a run."""
    from tests.in_process import skip_reports

    skip_reports(monkeypatch.setattr)
