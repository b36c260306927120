"""Console output of a run: only rank 0 prints, above the progress bar."""

import sys

import torch.distributed as dist
from tqdm import tqdm


def log_rank0(line: str) -> None:
    """Prints a line to stderr on rank 0, above the progress bar if there is one."""
    if dist.get_rank() == 0:
        tqdm.write(line, file=sys.stderr)
        sys.stderr.flush()
