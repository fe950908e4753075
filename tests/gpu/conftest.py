"""Where the tests of this folder run: on a GPU, else they skip; with `--on=cpu`, in a dry run, there if they can."""

from __future__ import annotations

import pytest
import torch

from fdiff.runtime import allow_tf32
from tests.gpu.record import NEEDS_GPU


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--on", choices=("cuda", "cpu"), default="cuda", help="device of the tests marked gpu")


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """The GPU, or in a dry run the CPU."""
    if request.config.getoption("--on", "cuda") == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip(NEEDS_GPU)
    return torch.device("cuda", 0)


@pytest.fixture
def gpu(device: torch.device) -> torch.device:
    """The GPU: what a dry run can't do."""
    if device.type != "cuda":
        pytest.skip(NEEDS_GPU)
    return device


@pytest.fixture(autouse=True)
def float32_products():
    """Each test begins in float32: torch by itself has convolutions in tf32."""
    allow_tf32(False)
    yield
    allow_tf32(False)
