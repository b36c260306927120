"""The paper's statements about the synthetic tasks, on coarse grids."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "paper"))
import fig4_fig5
import figures
import matplotlib.pyplot as plt

from dist_cts.synthetic import ENVIRONMENTS

ENV = ENVIRONMENTS["released"]


def test_a_long_horizon_has_more_fixed_points():
    starts = figures.square_grid(8)
    short, long = (fig4_fig5.fixed_points(ENV, starts, k)[1] for k in (5, 100))
    assert len(short) == 2
    assert len(long) > 6


def test_starts_chosen_by_a_short_horizon_are_worse():
    best = fig4_fig5.best_by_horizon(ENV, figures.square_grid(40))
    assert len(best) == 100
    assert best[-1] == min(best)
    assert best[24] > 5 * best[-1]


def test_cts_beats_reptile_from_most_starts():
    numbers = fig4_fig5.statements(ENV, figures.square_grid(6), reset_optimizer=True)
    loss = numbers["mean_loss"]
    assert loss["accurate"] < loss["cts"] < loss["reptile, 300 updates"] < loss["reptile, 3 updates"] < loss["start"]
    assert numbers["share_below_reptile_300"]["cts"] > 0.5


def test_a_figure_comes_with_its_numbers(tmp_path):
    fig, ax = plt.subplots()
    points = figures.square_grid(5)
    figures.landscape(ax, points, points.square().sum(1) + 1, "sum")
    figures.plane(ax, "title")
    figures.save(fig, tmp_path, "name", {"value": 3})
    assert sorted(file.suffix for file in tmp_path.iterdir()) == [".json", ".png"]
    record = json.loads((tmp_path / "name.json").read_text())
    assert record["value"] == 3
    with pytest.raises(ValueError, match="not JSON compliant"):
        figures.save(plt.figure(), tmp_path, "bad", {"value": float("nan")})


def test_grid_covers_the_square_with_x_slowest():
    points = figures.square_grid(3, -1, 1)
    assert points.dtype == torch.float64
    assert points.tolist()[:4] == [[-1, -1], [-1, 0], [-1, 1], [0, -1]]
