"""What a run prints: lines from rank 0, above the progress bar."""

import sys

import torch.distributed as dist
from tqdm import tqdm


def log_rank0(line: str) -> None:
    """Prints a line to stderr, above the progress bar where there is one; only on rank 0."""
    if dist.get_rank() == 0:
        tqdm.write(line, file=sys.stderr)
        sys.stderr.flush()
