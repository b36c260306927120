"""The dry run against the expected collectives and bytes; the model against published times."""

import pytest

from benchmarks import scaling


@pytest.mark.parametrize("tasks", [128, 512])
def test_a_meta_update_is_one_collective_of_phi_and_tail(tasks):
    sent = scaling.dry_run(tasks, 128, "tiny")
    assert sent["tasks a rank"] == tasks // 128
    assert sent["collectives a step"] == 1
    assert sent["bytes a step"] == 4 * (scaling.body_size("tiny") + 2 + 128 + 4 * tasks)


def test_a_data_group_adds_its_own():
    sent = scaling.dry_run(16, 64, "tiny")
    batch_norms = 2
    assert sent["ranks a task"] == 4
    assert sent["collectives a step"] == 1 + 1 + 4 * batch_norms  # phi, gradient, two sums forward and two backward
    assert sent["bytes a step"] > sent["of which the meta-update's"] + 4 * scaling.body_size("tiny")


def test_the_model_is_near_published_times():
    def microseconds(mebibytes):
        return 1e6 * min(scaling.all_reduce_seconds(mebibytes * 2**20, 8).values())

    assert microseconds(1) == pytest.approx(28, rel=0.15)  # 25 and 32 on 8 H100
    assert microseconds(47.8) == pytest.approx(267, rel=0.15)
    assert scaling.all_reduce_seconds(0, 1024)["tree"] < scaling.all_reduce_seconds(0, 1024)["ring"]
