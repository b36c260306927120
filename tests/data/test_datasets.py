"""Tasks from PyTorch datasets: the plan's order, bits without regard to workers and layout, failures of workers."""

import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_flatten
from torch.utils.data import Dataset, IterableDataset, TensorDataset
from torch.utils.data._utils.pin_memory import pin_memory  # what a DataLoader calls

from dist_cts.data import datasets, loader
from dist_cts.data.batches import DataConfig
from dist_cts.data.datasets import DATASETS, DatasetBatches, DatasetSplit
from dist_cts.data.hugging_face import HuggingFace
from dist_cts.data.plan import SamplePlan
from dist_cts.data.samples import Batch
from dist_cts.data.tasks import open_split, outputs
from dist_cts.errors import RankError
from dist_cts.run.meta_test import balanced_subset
from tests.helpers.commands import ROOT
from tests.helpers.datasets import Faulty, Images, Noisy

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def server():
    """The server that workers are forked from; with the modules that other tests need, not only with the loader's."""
    loader.multiprocessing.get_context("forkserver").Process(target=os.getpid).start()


@pytest.fixture
def make(server):
    """make(dataset, ...) -> DatasetBatches, closed at the end."""
    made = []

    def make(dataset, seed=1, batch_size=6, **options):
        made.append(DatasetBatches(dataset, "set", seed, batch_size, **options))
        return made[-1]

    yield make
    for batches in made:
        batches.close()


def take(batches, count):
    return [batches.next() for _ in range(count)]


def assert_same(first, second):
    (leaves, form), (others, other_form) = tree_flatten(first), tree_flatten(second)
    assert form == other_form
    for leaf, other in zip(leaves, others, strict=True):
        assert leaf.dtype == other.dtype
        assert torch.equal(leaf, other)


def test_batches_come_in_the_plans_order(make):
    samples = torch.arange(20)
    index = SamplePlan(1, "set", 20, 6, 0, False).chunk(0, 300).index
    batches = take(make(TensorDataset(samples, samples)), 300)  # more than one chunk
    assert [targets.tolist() for _, targets in batches] == index.tolist()
    some = np.array([2, 3, 5, 7, 11, 13, 17])
    index = some[SamplePlan(1, "set", 7, 6, 0, False).chunk(0, 5).index]
    batches = take(make(TensorDataset(samples, samples), indices=some), 5)
    assert [targets.tolist() for _, targets in batches] == index.tolist()


def test_bits_depend_neither_on_workers_nor_on_the_layout_nor_on_a_resume(make):
    expected = take(make(Noisy()), 9)
    for workers in (1, 3):
        assert_same(take(make(Noisy(), workers=workers), 9), expected)
    ranks = [take(make(Noisy(), data_rank=rank, data_ranks=2), 9) for rank in range(2)]
    for step, (inputs, targets) in enumerate(expected):
        shares = [ranks[rank][step] for rank in range(2)]
        assert torch.equal(torch.cat([share[1] for share in shares]), targets)
        assert torch.equal(torch.cat([share[0]["noise"] for share in shares]), inputs["noise"])
    resumed = make(Noisy())
    resumed.seek(6)
    assert_same(take(resumed, 3), expected[6:])
    assert resumed.step == 9


def test_random_transforms_differ_between_samples_epochs_tasks_and_seeds():
    def noise(name, seed):
        return torch.cat([inputs["noise"] for inputs, _ in take(DatasetBatches(Noisy(), name, seed, 20), 2)])

    drawn = torch.cat([noise("a", 0), noise("a", 1), noise("b", 0)])
    assert len(drawn.unique(dim=0)) == len(drawn) == 120


def test_values_become_tensors_of_their_own_types():
    inputs, targets = DatasetBatches(Noisy(), "set", 1, 4).next()
    assert list(inputs) == sorted(inputs)
    assert isinstance(inputs["pair"], tuple)
    types = {key: value.dtype for key, value in inputs.items() if key != "pair"}
    assert types == {
        "noise": torch.float32,
        "index": torch.int64,
        "bytes": torch.uint8,
        "threads": torch.int64,
        "even": torch.bool,
    }
    assert [value.dtype for value in inputs["pair"]] == [torch.float64, torch.float32]
    assert targets.dtype == torch.int64
    assert torch.equal(inputs["index"][:, :1].repeat(1, 2).to(torch.uint8), inputs["bytes"])


def test_loading_in_the_training_process_leaves_its_generators_and_threads_alone():
    def draw():
        return random.random(), np.random.rand(), torch.rand(()).item()

    def seed():
        random.seed(0), np.random.seed(0), torch.manual_seed(0)

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        seed()
        expected = draw()
        seed()
        inputs, _ = DatasetBatches(Noisy(), "set", 1, 4).next()
        assert draw() == expected
        assert torch.get_num_threads() == 2
        assert inputs["threads"].tolist() == [1] * 4  # as in a worker: sums over two threads have other bits
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("workers", [0, 2])
def test_seek_replays_and_keeps_the_workers(make, workers):
    batches = make(Noisy(), workers=workers)
    expected = take(batches, 5)
    running = [worker.pid for worker in batches._loader._processes()]
    batches.seek(1)
    batches.seek(2)
    assert_same(take(batches, 2), expected[2:4])
    assert [worker.pid for worker in batches._loader._processes()] == running
    assert len(running) == workers
    batches.close()
    batches.close()
    assert_same(batches.next(), expected[4])  # a closed stream resumes where it stopped


def test_pinning_keeps_tuples(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self + 1)  # needs a GPU
    zero = torch.zeros(1)
    pinned = pin_memory(Batch({"a": (zero, zero)}, zero))
    assert isinstance(pinned.inputs["a"], tuple)
    assert pinned.inputs["a"][1] == pinned.targets == 1


def test_channels_last_is_for_images_only():
    images = TensorDataset(torch.rand(8, 3, 4, 4), torch.zeros(8))
    inputs, _ = DatasetBatches(images, "set", 1, 4, channels_last=True).next()
    assert inputs.is_contiguous(memory_format=torch.channels_last)
    assert_same(inputs.contiguous(), DatasetBatches(images, "set", 1, 4).next()[0])
    DatasetBatches(TensorDataset(torch.rand(8, 3), torch.zeros(8)), "set", 1, 4, channels_last=True).next()


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raise", r"OSError: cannot read the image \(.*helpers/datasets.py, line \d+\)"),
        ("word", "TypeError: a sample must hold tensors, arrays and numbers, found a str"),
        ("dict", r"TypeError: a sample must be a pair \(inputs, target\), found a dict with the keys x, y"),
        ("shape", r"ValueError: samples \d and 7 do not fit into one batch: .*\(3,\).* and .*\(2,\)"),
    ],
)
def test_a_sample_that_cannot_be_loaded_is_named(make, workers, how, message):
    step = 1 if 7 in SamplePlan(1, "set", 10, 5, 0, False).chunk(0, 2).index[1] else 0
    batches = make(Faulty(how), batch_size=5, workers=workers)
    with pytest.raises(RankError, match=rf"^rank 0: task set, step {step}(, sample 7)?: {message}"):
        take(batches, 2)


def test_a_killed_and_a_stuck_worker_are_named(make, monkeypatch):
    monkeypatch.setattr(loader, "POLL", 0.5)
    with pytest.raises(RankError, match=r"step \d, sample 7: worker process \d+ was killed by SIGKILL; is the machine"):
        take(make(Faulty("kill"), batch_size=5, workers=2), 2)
    monkeypatch.setattr(loader, "STALLED", 1.0)
    with pytest.raises(RankError, match=r"step \d, sample 7: no batch for 1 s; its workers are stuck"):
        take(make(Faulty("hang"), batch_size=5, workers=2), 2)


def test_a_slow_worker_is_waited_for(make, monkeypatch):
    expected = make(Noisy()).next()
    monkeypatch.setattr(loader, "POLL", 0.01)
    assert_same(make(Noisy(), workers=1).next(), expected)  # the first batch takes longer


def test_a_dataset_that_cannot_be_sent_to_workers_is_refused(make):
    class Local(Dataset):
        __len__, __getitem__ = (lambda self: 3), (lambda self, index: (0, 0))

    with pytest.raises(RankError, match=r"task set: its dataset cannot be sent .*; define it at the top level"):
        make(Local(), workers=1).next()


def test_what_is_not_map_style_or_empty_is_refused():
    class Stream(IterableDataset):
        __iter__, __len__ = (lambda self: iter(())), (lambda self: 3)

    with pytest.raises(ValueError, match=r"task set: expected a map-style dataset, .* found Stream"):
        DatasetBatches(Stream(), "set", 1, 4)
    with pytest.raises(ValueError, match=r"task set: expected a map-style dataset, .* found NoneType"):
        DatasetBatches(None, "set", 1, 4)
    with pytest.raises(ValueError, match="task set: its dataset is empty"):
        DatasetBatches(TensorDataset(torch.zeros(0)), "set", 1, 4)
    with pytest.raises(ValueError, match="task set: batch_size=5 is not divisible by its 2 data ranks"):
        DatasetBatches(Noisy(), "set", 1, 5, data_ranks=2)


def test_signals_that_stop_a_rank_do_not_end_its_workers(make):
    batches = make(Noisy(), workers=1)
    expected = take(make(Noisy()), 9)
    received = take(batches, 1)
    for worker in batches._loader._processes():
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
            os.kill(worker.pid, number)
    assert_same(received + take(batches, 8), expected)


RANK = """
import signal
from dist_cts.data import loader
from dist_cts.data.datasets import DatasetBatches
from tests.helpers.datasets import Slow
if __name__ == "__main__":
    loader.POLL = 0.1
    signal.signal(signal.SIGTERM, lambda *_: None)
    DatasetBatches(Slow({path!r}), "set", 0, 1, workers=2).next()
"""


def test_workers_survive_a_signal_to_stop_and_end_with_a_killed_rank(tmp_path):
    pids, script = tmp_path / "pids", tmp_path / "rank.py"
    pids.touch()
    script.write_text(RANK.format(path=str(pids)))
    rank = subprocess.Popen(
        [sys.executable, script], env=os.environ | {"PYTHONPATH": str(ROOT)}, start_new_session=True
    )
    try:
        wait(lambda: len(pids.read_text().split()) == 2, rank)
        os.killpg(rank.pid, signal.SIGTERM)  # as torchrun does: the rank decides when to stop, and still loads
        time.sleep(1)
        assert rank.poll() is None
        assert all(alive(pid) for pid in pids.read_text().split())
        rank.kill()
        wait(lambda: not any(alive(pid) for pid in pids.read_text().split()))
    finally:
        rank.kill()


def wait(condition, process=None):
    for _ in range(600):
        if condition():
            return
        assert process is None or process.poll() is None
        time.sleep(0.05)
    pytest.fail("not within 30 s")


def alive(pid):
    try:
        return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_test_batches_hold_every_sample_once_with_the_same_bits(server, monkeypatch):
    monkeypatch.setitem(DATASETS, "set", lambda split: Noisy())
    expected = list(DatasetSplit("set", "test", 0, CPU).test_batches(8))
    assert [len(targets) for _, targets in expected] == [8, 8, 4]
    assert torch.cat([inputs["index"][:, 0] for inputs, _ in expected]).tolist() == list(range(20))
    noise = torch.cat([inputs["noise"] for inputs, _ in expected])
    by_other_sizes = torch.cat([x["noise"] for x, _ in DatasetSplit("set", "test", 2, CPU).test_batches(7)])
    assert torch.equal(by_other_sizes, noise)


def test_a_fault_in_the_test_split_says_so(monkeypatch):
    monkeypatch.setitem(DATASETS, "set", lambda split: Faulty("raise"))
    with pytest.raises(RankError, match="task set, test split, step 1, sample 7: OSError"):
        list(DatasetSplit("set", "test", 0, CPU).test_batches(5))


@pytest.mark.parametrize("with_targets", [True, False])
def test_labels_balance_a_subset(monkeypatch, with_targets):
    def open_split(split):
        images = Images(0, split)
        if not with_targets:
            del images.targets
            images = TensorDataset(images.images, torch.arange(48) % 3)
        return images

    monkeypatch.setitem(DATASETS, "set", open_split)
    labels = DatasetSplit("set", "train", 0, CPU).labels
    assert labels.tolist() == [index % 3 for index in range(48)]
    assert np.bincount(labels[balanced_subset(labels, 9, 0)]).tolist() == [3, 3, 3]


def test_a_subset_for_other_targets_is_plain(monkeypatch):
    monkeypatch.setitem(DATASETS, "set", lambda split: TensorDataset(torch.rand(30, 2), torch.rand(30)))
    labels = DatasetSplit("set", "train", 0, CPU).labels
    subsets = [balanced_subset(labels, 9, seed) for seed in range(3)]
    assert all(len(set(subset)) == 9 and subset.max() < 30 for subset in subsets)
    assert not np.array_equal(subsets[0], subsets[1])


def test_a_split_is_created_once_until_its_entry_changes(monkeypatch):
    opened = []

    def open_images(split):
        opened.append(split)
        return Images(0, split)

    monkeypatch.setitem(DATASETS, "set", open_images)
    monkeypatch.setattr(datasets, "_opened", {})
    config = DataConfig()
    for split in ("train", "test", "train"):
        assert open_split("set", split, config, CPU).classes == 3
    assert opened == ["train", "test"]
    monkeypatch.setitem(DATASETS, "set", lambda split: Noisy())
    assert isinstance(open_split("set", "train", config, CPU).dataset, Noisy)


def test_outputs_come_from_the_data_or_the_config(monkeypatch):
    monkeypatch.setitem(DATASETS, "set", lambda split: TensorDataset(torch.zeros(3), torch.zeros(3)))
    split = DatasetSplit("set", "train", 0, CPU)
    assert outputs(split, "set", 5) == 5
    with pytest.raises(ValueError, match=r"task set: the number of outputs is unknown; give its dataset .* `classes`"):
        outputs(split, "set")
    split.dataset.classes = 2
    assert outputs(split, "set") == 2
    with pytest.raises(ValueError, match="task set: the config says 5 classes, its data have 2"):
        outputs(split, "set", 5)


def test_an_unknown_task_gets_the_nearest_names(tasks, monkeypatch):
    monkeypatch.setitem(DATASETS, "birds", Noisy)
    config = DataConfig(root=tasks)
    with pytest.raises(FileNotFoundError, match=r"no prepared task 'brids' in /.*; did you mean 'birds'\?"):
        open_split("brids", "train", config, CPU)
    with pytest.raises(FileNotFoundError, match=r"no prepared task 'zzz' in /.*; prepare it: .*; prepared: a, b"):
        open_split("zzz", "train", config, CPU)
    assert open_split("a", "train", config, CPU).classes == 3


@pytest.fixture(scope="module")
def hub_folder(tmp_path_factory):
    """A folder of save_to_disk: a sequence of integers, a number and a class label per row."""
    hub = pytest.importorskip("datasets")
    hub.disable_progress_bars()
    rows = {"tokens": [[1, 2], [3, 4], [5, 6]], "size": [0.5, 1.5, 2.5], "label": [0, 1, 0]}
    rows = hub.Dataset.from_dict(rows).cast_column("label", hub.ClassLabel(names=["no", "yes"]))
    folder = tmp_path_factory.mktemp("hub") / "rows"
    hub.DatasetDict({"train": rows, "validation": rows.select([2, 0])}).save_to_disk(folder)
    return str(folder)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_hugging_face_dataset_is_a_task(server, hub_folder, monkeypatch, workers):
    entry = HuggingFace(hub_folder, inputs=["tokens", "size"], target="label", splits={"test": "validation"})
    monkeypatch.setitem(DATASETS, "rows", entry)
    train, test = (DatasetSplit("rows", split, workers, CPU) for split in ("train", "test"))
    assert (train.classes, train.labels.tolist(), test.labels.tolist()) == (2, [0, 1, 0], [0, 0])
    ((inputs, targets),) = test.test_batches(8)
    assert inputs["tokens"].tolist() == [[5, 6], [1, 2]]
    assert inputs["size"].tolist() == [2.5, 0.5]
    assert targets.tolist() == [0, 0]


def test_a_hugging_face_dataset_takes_a_transform_and_a_number_of_outputs(hub_folder):
    rows = HuggingFace(hub_folder, "size", "size", transform=lambda size: torch.full((2,), size), classes=1)("train")
    assert rows.classes == 1
    inputs, target = rows[1]
    assert (inputs.tolist(), target) == ([1.5, 1.5], 1.5)


def test_a_hugging_face_dataset_without_the_split_the_column_or_the_package_is_refused(hub_folder, monkeypatch):
    with pytest.raises(ValueError, match="no split 'test' among train, validation; set `splits`"):
        HuggingFace(hub_folder, "tokens", "label")("test")
    with pytest.raises(ValueError, match="no column 'image' among tokens, size, label"):
        HuggingFace(hub_folder, "image", "label")("train")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"datasets is not installed: pip install 'dist_cts\[datasets\]'"):
        HuggingFace(hub_folder, "tokens", "label")("train")
