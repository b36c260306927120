"""What is read from a profiler's trace of a GPU."""

import pytest

from benchmarks import step_trace


def event(category, name, start, duration, correlation=None):
    args = {} if correlation is None else {"correlation": correlation}
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration, "tid": 1, "args": args}


def test_a_kernel_belongs_to_the_part_that_launched_it():
    events = [
        {"ph": "M", "name": "process_name"},
        event("user_annotation", step_trace.STEP, 0, 100),
        event("user_annotation", step_trace.INNER_STEP, 0, 60),
        event("gpu_user_annotation", step_trace.INNER_STEP, 200, 60),
        event("cpu_op", "aten::conv2d", 5, 20),
        event("cuda_runtime", "cudaLaunchKernel", 10, 2, 1),
        event("cuda_runtime", "cudaLaunchKernel", 50, 2, 2),
        event("cuda_runtime", "cudaMemcpyAsync", 80, 2, 3),
        event("cuda_runtime", "cudaLaunchKernel", 150, 2, 4),  # after the step
        event("kernel", "conv", 200, 40, 1),
        event("kernel", "conv", 230, 30, 2),  # on another stream
        event("gpu_memcpy", "copy", 280, 20, 3),
        event("kernel", "conv", 500, 1000, 4),
    ]
    found = step_trace.summarise(events, steps=1)
    assert found["kernels"] == {"inner steps": 2, "meta-update": 1}
    assert found["busy_ms"] == pytest.approx({"inner steps": 0.060, "meta-update": 0.020})
    assert found["meta_update_share"] == pytest.approx(0.25)
    assert found["meta_update_share_of_host"] == pytest.approx(0.4)
    assert found["step_ms"] == pytest.approx(0.1)
    assert found["idle_share"] == pytest.approx(0.2)
    assert found["longest_gap_ms"] == pytest.approx(0.02)
    assert found["by_kernel"] == pytest.approx({"conv": 0.070, "copy": 0.020})


def test_a_cpu_s_outermost_operations_count_per_step():
    events = [
        event("user_annotation", step_trace.STEP, 0, 50),
        event("user_annotation", step_trace.STEP, 50, 50),
        event("user_annotation", step_trace.INNER_STEP, 0, 40),
        event("cpu_op", "aten::conv2d", 0, 30),
        event("cpu_op", "aten::convolution", 1, 20),
        event("cpu_op", "aten::add", 60, 40),
    ]
    found = step_trace.summarise(events, steps=2)
    assert found["kernels"] == {"inner steps": 0.5, "meta-update": 0.5}
    assert found["idle_share"] == pytest.approx(0.3)
