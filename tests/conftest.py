"""Fixtures for every test."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    # Tensors this small gain nothing from threads, and on a busy machine threads waiting for each other cost minutes.
    torch.set_num_threads(1)


@pytest.fixture
def reference(monkeypatch):
    """Runs the operators' references, whatever the environment says."""
    monkeypatch.setenv("CRAMFAST_KERNELS", "reference")
