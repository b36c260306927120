"""The keys precision and deterministic, as far as they can be tested without a GPU."""

import os

import pytest
import torch

from dist_cts.distributed import numerics as module
from dist_cts.distributed.numerics import numerics, set_numerics


@pytest.fixture
def flags(monkeypatch):
    """Restores every flag that set_numerics sets."""
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = matmul.fp32_precision, conv.fp32_precision, torch.backends.cudnn.deterministic
    monkeypatch.setattr(module.os, "environ", dict(os.environ))
    yield
    matmul.fp32_precision, conv.fp32_precision, torch.backends.cudnn.deterministic = before
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.mark.parametrize(
    ("precision", "deterministic", "expected"),
    [("fp32", True, "ieee"), ("tf32", False, "tf32"), ("bf16", True, "ieee")],
)
def test_precision_and_determinism_reach_every_library(flags, monkeypatch, precision, deterministic, expected):
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 3))
    set_numerics(torch.device("cuda", 0), precision, deterministic)
    found = numerics(torch.device("cuda", 0))
    assert (found["matmul_precision"], found["conv_precision"]) == (expected, expected)
    assert found["deterministic"] == found["cudnn_deterministic"] == deterministic
    assert found["CUBLAS_WORKSPACE_CONFIG"] == (":4096:8" if deterministic else None)
    assert found["NCCL_NVLS_ENABLE"] == ("0" if deterministic else None)
    assert found["nccl"] == "2.27.3"


def test_a_cpu_keeps_its_flags(flags):
    set_numerics(torch.device("cpu"), "tf32", True)
    assert not torch.are_deterministic_algorithms_enabled()
    assert numerics(torch.device("cpu")) == {}
