# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
import pytest
import torch


@pytest.fixture(scope="module")
def one_thread():
    """As launched processes have: with other numbers of threads, sums are the same only up to rounding."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
