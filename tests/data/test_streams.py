"""Streams: every way of giving batches gives the batch of a step, in any order of steps."""

import itertools

import pytest
import torch

from dist_cts.data.batches import DataConfig
from dist_cts.data.datasets import DATASETS
from dist_cts.data.streams import Stream, StreamBatches
from dist_cts.data.tasks import open_split, outputs
from dist_cts.errors import RankError

CPU = torch.device("cpu")


def batch(step, size=6):
    generator = torch.Generator().manual_seed(step)
    return {"x": torch.rand(size, 2, generator=generator)}, torch.full((size,), step)


class Counted:
    """Batches with next and seek, as a learner's."""

    def __init__(self):
        self.step = 0

    def next(self):
        self.step += 1
        return batch(self.step - 1)

    def seek(self, step):
        self.step = step


def of(train, **options):
    return StreamBatches(Stream(train), "own", 3, 6, **options)


def steps(batches, count):
    return [int(batches.next()[1][0]) for _ in range(count)]


@pytest.mark.parametrize("train", [lambda step: batch(step), [batch(step) for step in range(9)], Counted()])
def test_a_seek_makes_any_step_the_next_one(train):
    batches = of(train)
    assert steps(batches, 4) == [0, 1, 2, 3]
    for step in (7, 1, 4):
        batches.seek(step)
        assert steps(batches, 2) == [step, step + 1]
    batches.seek(5)
    assert torch.equal(batches.next()[0]["x"], batch(5)[0]["x"])


def test_an_iterable_is_repeated():
    batches = of([batch(step) for step in range(3)])
    assert steps(batches, 7) == [0, 1, 2, 0, 1, 2, 0]
    batches.seek(4)
    assert steps(batches, 2) == [1, 2]


def test_an_iterator_loses_no_batch_and_cannot_go_back():
    stream = Stream(batch(step) for step in itertools.count())
    DATASETS["own"] = stream
    try:
        split = open_split("own", "train", DataConfig(), CPU)
        assert torch.equal(split.example["x"], batch(0)[0]["x"][:2])
        batches = split.batches(0, 6)
        assert steps(batches, 3) == [0, 1, 2]
        batches.seek(5)
        assert steps(batches, 1) == [5]
        batches.seek(1)
        with pytest.raises(RankError, match="task own: its iterator cannot go back after 6 batches; give a list"):
            batches.next()
    finally:
        del DATASETS["own"]
    with pytest.raises(RankError, match="its iterator ended after 1 batches"):
        steps(of(iter([batch(0)])), 2)
    with pytest.raises(ValueError, match="the test batches are read several times"):
        Stream(batch, test=iter([batch(0)]))


def test_the_generator_follows_from_seed_task_and_step():
    def draw(generator, batch_size):
        return torch.rand(batch_size, 1, generator=generator), torch.zeros(batch_size)

    def first(seed=0, name="a", step=0, size=4):
        batches = StreamBatches(Stream(draw), name, seed, size)
        batches.seek(step)
        return batches.next()[0]

    assert torch.equal(first(), first())
    assert len(first(size=9)) == 9
    assert not any(torch.equal(first(), other) for other in (first(seed=1), first(name="b"), first(step=1)))


def test_data_ranks_share_a_batch():
    whole, parts = of(batch_of_12).next(), [of(batch_of_12, data_rank=rank, data_ranks=3).next() for rank in range(3)]
    assert torch.equal(torch.cat([inputs["x"] for inputs, _ in parts]), whole[0]["x"])
    assert [len(targets) for _, targets in parts] == [4, 4, 4]
    with pytest.raises(RankError, match="task own: a batch of 12 cannot be shared by its 5 data ranks"):
        of(batch_of_12, data_ranks=5).next()


def batch_of_12(step):
    return batch(step, 12)


def test_a_test_split_is_read_as_it_is(monkeypatch):
    stream = Stream(batch, test=[batch(0, 3), batch(1, 2)], classes=4, fingerprint="v1")
    monkeypatch.setitem(DATASETS, "own", stream)
    split = open_split("own", "test", DataConfig(), CPU)
    for _ in range(2):
        assert [len(targets) for _, targets in split.test_batches(100)] == [3, 2]
    assert (outputs(split, "own"), split.fingerprint, split.batches(0, 6).fingerprint) == (4, "v1", "v1")
    assert split.example["x"].shape == (2, 2)
    with pytest.raises(ValueError, match="task own: its batches are ready-made; leave out train_limit"):
        _ = split.labels


@pytest.mark.parametrize(
    ("train", "error", "message"),
    [
        (lambda seed: batch(seed), ValueError, "task own: the parameters of its function may be step, .* not 'seed'"),
        (5, ValueError, "task own: train=5 is neither a function nor an iterable"),
        (lambda: torch.zeros(3), RankError, r"task own: a batch must be a pair \(inputs, targets\), not a Tensor"),
        ([], RankError, "task own: its iterable has no batch"),
    ],
)
def test_what_is_no_stream_is_an_error(train, error, message):
    with pytest.raises(error, match=message):
        of(train).next()


def test_a_task_without_test_batches_cannot_be_tested(monkeypatch):
    monkeypatch.setitem(DATASETS, "own", Stream(batch))
    with pytest.raises(ValueError, match="task own: it has no test batches"):
        open_split("own", "test", DataConfig(), CPU)
