"""Tests that need much of a GPU's memory, which several processes may share."""

import pytest
import torch


def needs_memory(gigabytes):
    # What earlier tests gave back PyTorch keeps, each process its own.
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < gigabytes * 2**30:
        pytest.skip(f"needs {gigabytes} GiB of free GPU memory")
