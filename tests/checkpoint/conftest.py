"""One torch thread for tests of files: the tensors are small, and on a busy machine two threads mostly wait."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
