"""What all tests share: one thread, fixed seeds, and hypothesis without deadlines."""

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "default", deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
settings.register_profile("ci", settings.get_profile("default"), derandomize=True, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "default"))


if not torch.cuda.is_available():  # read when Triton is imported: its kernels then run on CPU tensors
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)  # here already: fixtures of modules are made before those of tests
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the same in processes that tests start


@pytest.fixture(autouse=True)
def _same_every_time() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch.set_num_threads(1)
    assert torch.is_grad_enabled(), "a test has left gradients off for all that come after it"


@pytest.fixture
def exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention in plain torch, for tests of what is attended to: compiled kernels may round queries (rounding.py)."""
    monkeypatch.setenv("KVFOLD_CPU", "off")
