"""Figure 9: improvements paired by seed, one meta-test per number of images."""

import json

import pytest

from benchmarks.paper import fig9


def meta_test(limit, **starts):
    """A meta-test on one target; accuracies by seed for each initialization."""
    config = {"train_limit": limit, "targets": ["pets"], "seeds": 2, "steps": 3, "batch_size": 4, "inner": {"lr": 0.1}}
    return {"config": config, "summary": {start: {"pets": {"seeds": seeds}} for start, seeds in starts.items()}}


def test_improvements_are_paired_by_seed_and_sorted_by_images():
    many = meta_test(1000, none=[50.0, 60.0], cts=[51.0, 61.0])
    few = meta_test(250, none=[10.0, 30.0], cts=[14.0, 34.0])
    found = fig9.improvements([many, few], "none")
    assert found == {"pets": {"cts": [(250, 4.0, pytest.approx(0)), (1000, 1.0, pytest.approx(0))]}}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (meta_test(250, none=[1.0]), "two meta-tests have train_limit=250"),
        (meta_test(500, cts=[1.0]), "--base none: the meta-test with train_limit=500 has cts"),
        (meta_test(500, none=[1.0]) | {"config": {**meta_test(500)["config"], "steps": 9}}, "differ in more than"),
    ],
)
def test_meta_tests_that_do_not_belong_together_are_refused(other, message):
    with pytest.raises(SystemExit, match=message):
        fig9.improvements([meta_test(250, none=[1.0]), other], "none")


def test_the_figure_and_its_numbers(tmp_path):
    files = []
    for limit in (250, 1000):
        files.append(tmp_path / f"{limit}.json")
        files[-1].write_text(json.dumps(meta_test(limit, none=[1.0, 2.0], cts=[3.0, 5.0], mtl=[1.0, 0.0])))
    fig9.main([*map(str, files), "--out", str(tmp_path)])
    assert (tmp_path / "fig9.png").stat().st_size > 1000
    numbers = json.loads((tmp_path / "fig9.json").read_text())["improvements"]["pets"]
    assert [point[:2] for point in numbers["cts"]] == [[250, 2.5], [1000, 2.5]]
