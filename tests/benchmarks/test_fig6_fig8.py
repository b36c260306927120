"""The search for beta; the runs themselves are those of launch/train.py and launch/meta_test.py."""

import math

import pytest

from benchmarks.paper import fig6_fig8


def test_beta_starts_at_the_papers_value_and_between_them_on_logarithmic_axes():
    assert [fig6_fig8.start_beta("reptile", K) for K in (10, 100, 1000)] == [5, 2, 1]
    assert [fig6_fig8.start_beta("cts", K) for K in (10, 30, 100, 1000)] == [1, 0.5, 0.1, 0.01]


class Losses:
    """A study whose runs end with a loss known beforehand; those without one diverge."""

    def __init__(self, losses: dict[float, float]) -> None:
        self.of, self.trained = losses, []

    def train(self, run: fig6_fig8.Run) -> bool:
        self.trained.append(run.beta)
        return run.beta in self.of

    def losses(self, run: fig6_fig8.Run) -> tuple[list[int], list[float]]:
        return [1, 2], [9.0, self.of[run.beta]]


@pytest.mark.parametrize(
    ("losses", "best", "tried"),
    [
        ({0.05: 2, 0.1: 1, 0.2: 3}, 0.1, [0.05, 0.1, 0.2]),  # the start is the best
        ({0.05: 4, 0.1: 3, 0.2: 2, 0.5: 1, 1: 2}, 0.5, [0.05, 0.1, 0.2, 0.5, 1]),  # climbs
        ({0.02: 3, 0.05: 2, 0.1: math.nan}, 0.05, [0.02, 0.05, 0.1, 0.2]),  # neither NaN nor what diverges wins
    ],
)
def test_the_search_ends_where_both_neighbours_are_worse(losses, best, tried):
    study = Losses(losses)
    run, found = fig6_fig8.tune(study, fig6_fig8.Run("cts", 100, 0.1, seed=0, steps=300))
    assert run.beta == best
    assert list(found) == sorted(study.trained) == tried
    assert all(value == losses.get(beta, "diverged") or math.isnan(losses[beta]) for beta, value in found.items())
