"""Freed memory is kept; an idle rank yields its core."""

import os
import subprocess
import sys
import time

import torch
import torch.distributed as dist

PAGE_FAULTS = """
import resource, sys
import torch
from dist_cts.distributed.malloc import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
def step():
    activations = [torch.ones(20 * 2**20, dtype=torch.uint8) for _ in range(6)]
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(malloc):
    command = [sys.executable, "-c", PAGE_FAULTS, malloc]
    gives_back = os.environ | {"MALLOC_TRIM_THRESHOLD_": "1000"}  # at every chance, not only at most
    return int(subprocess.run(command, env=gives_back, check=True, capture_output=True, text=True, timeout=250).stdout)


def test_memory_that_a_step_frees_serves_the_next_one():
    assert 4 * page_faults("kept") < page_faults("as shipped")  # a heap still grows now and then


def wait_for_a_late_rank(rank):
    x = torch.ones(1000)
    dist.all_reduce(x)
    if rank == 1:
        time.sleep(2)
    started = time.process_time()
    dist.all_reduce(x)
    return time.process_time() - started


def test_a_rank_that_waits_leaves_its_core_to_others(run_ranks):
    assert run_ranks(2, wait_for_a_late_rank)[0] < 0.2
