import pytest
from PIL import Image

from dist_cts.commands.prepare import main
from dist_cts.data.prepare import embedded, suites
from dist_cts.data.prepare.suites import SuiteTask, suite
from tests.data.test_readers import make_tiny_imagenet


def test_the_suites_are_the_papers_tables():
    counts = {name: [task.counts for task in suite(name)] for name in suites.NAMES if name != "demo"}
    assert counts["paper-8"] == [
        (50_000, 5_000, 100), (50_000, 5_000, 100), (50_000, 10_000, 100), (12_000, 8_580, 120),
        (6_667, 3_333, 100), (5_994, 5_794, 200), (60_000, 10_000, 10), (73_257, 26_032, 10),
    ]  # fmt: skip
    assert [task.entry.pixels for task in suite("paper-8")] == [64, 64, 32, 84, 84, 84, 28, 32]
    assert counts["paper-targets"] == [
        (8_144, 8_041, 196), (34_500, 34_500, 345), (2_040, 6_149, 102), (3_680, 3_669, 37), (5_000, 8_000, 10),
    ]  # fmt: skip
    assert [sum(column) for column in zip(*counts["imagenet-8"], strict=True)] == [1_281_167, 50_000, 1_000]
    assert [task.pixels for task in suite("imagenet-targets")] == [128] * 3 + [224] * 6
    assert counts["imagenet-targets"][-1] == (4_230, 1_410, 47)
    assert [task.dataset for task in suite("demo")] == [f"embedded:{name}" for name in embedded.TASKS]


def test_an_unknown_suite_is_refused():
    with pytest.raises(ValueError, match=r"unknown suite 'all'; expected paper-8"):
        suite("all")


@pytest.mark.parametrize(
    ("text", "fault"),
    [("dataset: x", "expected a list of tasks"), ("- dataset: x", "unknown dataset 'x'"),
     ("- {dataset: digits, x: 1}", "unknown key 'x'"),
     ("- {dataset: digits, pixels: 0}", "pixels"), ("[", "not a YAML file")],
)  # fmt: skip
def test_a_wrong_suite_file_is_refused(tmp_path, text, fault):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ValueError, match=rf"mine\.yaml.*{fault}|{fault}"):
        suite(str(tmp_path / "mine.yaml"))


def test_your_own_data_become_tasks_by_a_file_alone(tmp_path, capsys):
    for name in ("ant", "bee"):
        (tmp_path / "raw/photos" / name).mkdir(parents=True)
        for i in range(5):
            Image.new("RGB", (9, 7), (i, 2, 3)).save(tmp_path / f"raw/photos/{name}/{i}.png")
    rows = [f"photos/{name}/{i}.png,{name}" for name in ("ant", "bee") for i in range(5)]
    (tmp_path / "raw/birds.csv").write_text("path,label\n" + "\n".join(rows) + "\n")
    (tmp_path / "mine.yaml").write_text(
        "- {dataset: image-folder, root: photos, pixels: 8, expected: [8, 2, 2]}\n"
        "- {dataset: table, root: birds.csv, pixels: 8, name: birds, mode: jpg, expected: [9, 1, 2]}\n"
    )
    arguments = [
        "--suite",
        str(tmp_path / "mine.yaml"),
        "--root",
        str(tmp_path / "raw"),
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(arguments) == 1  # birds differ from what was expected
    lines = capsys.readouterr().out.splitlines()[-2:]
    assert lines[0].split() == ["image-folder", "8", "2", "2", "8", "8", "/", "2", "/", "2", "ok"]
    assert lines[1].split() == ["birds", "8", "2", "2", "8", "9", "/", "1", "/", "2", "differs"]
    assert main(["verify", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.count(": ok, ") == 4


def test_a_suite_prepares_what_is_there_and_tells_what_is_missing(tmp_path, capsys):
    make_tiny_imagenet(tmp_path / "raw/tiny-imagenet-200")
    (tmp_path / "raw/cub").mkdir()
    (tmp_path / "raw/cub/CUB_200_2011.tgz").write_bytes(b"<html>")
    tasks = [
        SuiteTask(dataset="tiny-imagenet", split_classes=(0, 2)),
        SuiteTask(dataset="cub"),
        SuiteTask(dataset="svhn"),
    ]
    ended = []
    outcomes = suites.prepare_all(
        tasks,
        tmp_path / "raw",
        tmp_path / "out",
        2,
        "stop",
        done=lambda task, folder, outcome: ended.append(folder.name),
    )
    assert [suites.verdict(*pair) for pair in zip(tasks, outcomes, strict=True)] == ["ok", "failed", "missing"]
    assert sorted(ended) == ["cub", "svhn", "tiny-imagenet-0-2"]
    table = suites.table(tasks, outcomes).splitlines()
    assert table[1].split()[:5] == ["tiny-imagenet-0-2", "4", "3", "2", "64"]
    assert "CUB_200_2011.tgz: cannot be read" in table[2]
    assert "missing: dist-cts prepare svhn --download" in table[3]
    said = []
    suites.prepare_all(tasks[:1], tmp_path / "raw", tmp_path / "out", 2, "stop", said.append)
    assert "already prepared and intact" in said[0]


def test_two_tasks_of_one_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"two tasks would be written to .*digits; give them different names"):
        suites.prepare_all([SuiteTask(dataset="digits")] * 2, None, tmp_path, 1, "stop")
