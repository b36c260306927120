"""The meta-test's statistics, subsets and table; tests/test_launch.py runs the command."""

import numpy as np
import pytest

from dist_cts.meta_test import balanced_subset, interval, markdown


def test_the_interval_is_student_s():
    # Three values 1 apart: standard error 1 / sqrt(3), and t(0.975, 2 degrees of freedom) = 4.302653.
    assert interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 4.302653 / 3**0.5))
    mean, half = interval([5.0])
    assert mean == 5.0
    assert np.isnan(half)


def test_a_subset_is_balanced_seeded_and_without_repeats():
    labels = np.repeat(np.arange(7), 50)
    subset = balanced_subset(labels, 100, "seed")
    assert len(set(subset)) == 100
    counts = np.bincount(labels[subset], minlength=7)
    assert counts.min() >= 14
    assert counts.max() <= 15
    assert np.array_equal(subset, balanced_subset(labels, 100, "seed"))
    assert not np.array_equal(subset, balanced_subset(labels, 100, "other"))
    with pytest.raises(ValueError, match="train_limit=351: the task has 350 training images"):
        balanced_subset(labels, 351, "seed")


def test_the_table_marks_the_best_of_every_column():
    def cell(mean, half=0.5):
        return {"accuracy": mean, "ci95": half}

    table = markdown(
        {"random": {"x": cell(10.0), "y": cell(30.0)}, "cts": {"x": cell(20.0), "y": cell(28.0)}}, ["x", "y"]
    )
    assert table.splitlines() == [
        "| start | x | y | average |",
        "|---|---|---|---|",
        "| random | 10.00 ± 0.50 | **30.00 ± 0.50** | 20.00 |",
        "| cts | **20.00 ± 0.50** | 28.00 ± 0.50 | **24.00** |",
    ]
