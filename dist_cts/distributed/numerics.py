"""GPU numerics: TF32, bf16, and deterministic kernels."""

import os
from pathlib import Path
from typing import Literal

import torch

Precision = Literal["fp32", "tf32", "bf16"]
PRECISION_HELP = "of matrix products on a GPU: fp32; tf32; bf16: autocast, with theta, phi and the reduction in fp32"
DETERMINISTIC_HELP = "on a GPU, use deterministic kernels, warn where none exists; false may be faster"


def set_numerics(device: torch.device, precision: Precision, deterministic: bool) -> None:
    """Applies `precision` and `deterministic` to this process; call before the first CUDA kernel and the process group.

    No effect on a CPU, whose kernels are deterministic and have no TF32.
    """
    if device.type != "cuda":
        return
    rounding = "tf32" if precision == "tf32" else "ieee"
    torch.backends.cuda.matmul.fp32_precision = rounding
    torch.backends.cudnn.conv.fp32_precision = rounding
    torch.backends.cudnn.deterministic = deterministic
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # costs a kernel per allocation; nothing here reads it
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required by cuBLAS for determinism
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # NVLink SHARP sums in any order


def numerics(device: torch.device) -> dict[str, object]:
    """The libraries, driver and flags that determine the bits of a GPU's results; empty for a CPU."""
    if device.type != "cuda":
        return {}
    driver = Path("/proc/driver/nvidia/version")
    return {
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "driver": driver.read_text().splitlines()[0] if driver.exists() else None,
        "matmul_precision": torch.backends.cuda.matmul.fp32_precision,
        "conv_precision": torch.backends.cudnn.conv.fp32_precision,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn_deterministic": torch.backends.cudnn.deterministic,
        **{name: os.environ.get(name) for name in ("CUBLAS_WORKSPACE_CONFIG", "NCCL_NVLS_ENABLE", "NCCL_ALGO")},
    }
