"""Shared by all tests: where they run. GEORECON_TEST_DEVICE=cuda pytest runs the model's tests on a GPU."""

import os

import pytest
import torch

torch.set_num_threads(1)  # faster than two for networks this small, and no slower on a busy machine


@pytest.fixture(scope="session")
def device():
    return torch.device(os.environ.get("GEORECON_TEST_DEVICE", "cpu"))
