"""Fixtures for every test."""

import pytest
import torch

NATIVE = torch.cuda.is_available()

with pytest.MonkeyPatch.context() as patch:
    # triton.jit decides when it decorates a kernel whether that is compiled or interpreted. Afterwards the variable is
    # as it was: on a CPU the other tests run the reference, and so do the processes they start.
    if not NATIVE:
        patch.setenv("TRITON_INTERPRET", "1")
    import cramfast.kernels  # noqa: F401


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    # Tensors this small gain nothing from threads, and on a busy machine threads waiting for each other cost minutes.
    torch.set_num_threads(1)


@pytest.fixture
def reference(monkeypatch):
    """Runs the operators' references, whatever the environment says."""
    monkeypatch.setenv("CRAMFAST_KERNELS", "reference")


@pytest.fixture
def triton_kernels(monkeypatch):
    """Runs the operators' Triton kernels: on a GPU where there is one, else interpreted."""
    monkeypatch.setenv("CRAMFAST_KERNELS", "triton")
    if not NATIVE:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
