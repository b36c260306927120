import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from dist_cts.commands.prepare import main
from dist_cts.data import beton
from dist_cts.data.prepare import embedded
from tests.helpers.betons import read_back


@pytest.fixture
def photos(tmp_path):
    """An image folder of three classes with ten photos each, none of them square."""
    rng = np.random.default_rng(0)
    for name in ("ant", "bee", "cow"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(10):
            pixels = rng.integers(0, 256, (9, 11, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i}.png")
    return tmp_path / "photos"


def run(out, *arguments):
    return main([*map(str, arguments), "--out", str(out)])


def expected_pixels(path, pixels):
    return np.asarray(Image.open(path).resize((pixels, pixels), Image.Resampling.BILINEAR))


def test_pixels_equal_the_resized_source_to_the_bit(tmp_path, photos, capsys):
    assert run(tmp_path, "image-folder", "--root", photos, "--name", "mine", "--pixels", 6) == 0
    assert "24 train and 6 test images, 3 classes, 6 x 6 RGB, raw" in capsys.readouterr().out
    sources = {expected_pixels(path, 6).tobytes(): path for path in photos.rglob("*.png")}
    found = []
    for split, count in (("train", 8), ("test", 2)):
        images, labels = read_back(tmp_path / f"mine/{split}.beton")
        assert np.bincount(labels).tolist() == [count] * 3
        paths = [sources[image.tobytes()] for image in images]
        assert [("ant", "bee", "cow")[label] for label in labels] == [path.parent.name for path in paths]
        assert paths == sorted(paths)
        found += paths
    assert sorted(found) == sorted(sources.values())
    train, test = (beton.verify(tmp_path / f"mine/{split}.beton") for split in ("train", "test"))
    assert (train.mean, train.std) == (test.mean, test.std)
    assert train.class_names == test.class_names == ["ant", "bee", "cow"]


def test_ranges_limit_and_default_names(tmp_path, photos):
    options = ("--root", photos, "--pixels", 6, "--split-classes", "1:3", "--limit", 7, "--test-fraction", 0.5)
    assert run(tmp_path / "out", "image-folder", *options) == 0
    train = beton.verify(tmp_path / "out/photos-1-3/train.beton")
    assert (train.class_names, train.count) == (["bee", "cow"], 7)
    assert beton.verify(tmp_path / "out/photos-1-3/test.beton").count == 10


def test_an_intact_task_is_left_untouched(tmp_path, photos, capsys):
    arguments = ("image-folder", "--root", photos, "--pixels", 6, "--name", "mine")
    run(tmp_path, *arguments)
    path = tmp_path / "mine/train.beton"
    before, stamp = path.read_bytes(), path.stat().st_mtime_ns
    capsys.readouterr()
    assert run(tmp_path, *arguments) == 0
    assert "already prepared and intact" in capsys.readouterr().out
    assert path.stat().st_mtime_ns == stamp

    path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    assert run(tmp_path, *arguments) == 0
    assert "checksum" in capsys.readouterr().out
    assert path.read_bytes() == before

    assert run(tmp_path, *arguments, "--seed", 1) == 0
    assert "other options" in capsys.readouterr().out
    assert path.read_bytes() != before

    assert run(tmp_path, "digits", "--name", "mine") == 1
    assert "holds another dataset" in capsys.readouterr().err


def test_images_that_cannot_be_decoded(tmp_path, photos, capsys):
    (photos / "bee/3.png").write_bytes((photos / "bee/3.png").read_bytes()[:90])
    arguments = ("image-folder", "--root", photos, "--pixels", 6, "--name", "mine")
    assert run(tmp_path, *arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "bee/3.png: cannot be decoded" in error
    assert error.count("\n") == 1
    assert run(tmp_path, *arguments, "--on-error", "skip") == 0
    assert "skipped 1 that cannot be decoded" in capsys.readouterr().out
    manifests = [beton.verify(tmp_path / f"mine/{split}.beton") for split in ("train", "test")]
    assert sum(manifest.count for manifest in manifests) == 29
    (line,) = manifests[0].skipped + manifests[1].skipped
    assert "bee/3.png" in line


def test_a_missing_root_leaves_the_task_and_its_log_alone(tmp_path, photos, capsys):
    arguments = ("image-folder", "--pixels", 6, "--name", "mine", "--root")
    run(tmp_path / "out", *arguments, photos)
    before = {path: path.read_bytes() for path in (tmp_path / "out/mine").iterdir()}
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run(tmp_path / "out", *arguments, tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    assert run(tmp_path / "out", *arguments, tmp_path / "empty") == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "gone: not found" in printed.err
    assert "empty: no class folders found" in printed.err
    assert {path: path.read_bytes() for path in (tmp_path / "out/mine").iterdir()} == before


def test_a_single_class_is_a_warning(tmp_path, photos, capsys):
    (tmp_path / "alone").mkdir()
    (photos / "ant").rename(tmp_path / "alone/ant")
    assert run(tmp_path / "out", "image-folder", "--root", tmp_path / "alone", "--pixels", 6) == 0
    assert "warning: " in (out := capsys.readouterr().out)
    assert "only one class, ant; classification needs at least two" in out


def test_jpg_mode(tmp_path):
    assert run(tmp_path, "digits", "--pixels", 16, "--limit", 50, "--mode", "jpg") == 0
    train = beton.verify(tmp_path / "digits/train.beton")
    assert (train.mode, train.count, train.channels) == ("jpg", 50, 1)


def test_an_embedded_task_keeps_its_bits(tmp_path):
    assert run(tmp_path, "embedded:colours") == 0
    for split, drawn in zip(("train", "test"), embedded.make("colours"), strict=True):
        images, labels = read_back(tmp_path / f"colours/{split}.beton")
        np.testing.assert_array_equal(images, drawn.images)
        np.testing.assert_array_equal(labels, drawn.labels)


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        ([], "expected either a dataset or --suite"),
        (["digits", "--suite", "demo"], "expected either a dataset or --suite"),
        (["nothing"], "unknown dataset 'nothing'"),
        (["--suite", "nothing"], "unknown suite 'nothing'"),
        (["gtsrb"], "gtsrb needs --root"),
        (["digits", "--pixels", "0"], "--pixels"),
        (["digits", "--pixels", "x"], "--pixels"),
        (["digits", "--limit", "-1"], "--limit"),
        (["digits", "--test-fraction", "1"], "--test-fraction"),
        (["digits", "--workers", "0"], "--workers"),
        (["digits", "--split-classes", "5:5"], "'5:5' is not a range"),
        (["digits", "--split-classes", "5"], "'5' is not a range"),
        (["digits", "--split-classes", "5:11"], "classes 5:11 are not within 0:10"),
        (["digits", "--limit", "9"], "limit of 9 images"),
        (["digits", "--name", "../x"], "not a valid folder name"),
        (["--suite", "demo", "--name", "x"], "--name cannot be combined with --suite"),
    ],
)
def test_bad_usage_exits_with_2_and_a_line(tmp_path, capsys, arguments, fault):
    with pytest.raises(SystemExit) as caught:
        run(tmp_path, *arguments)
    assert caught.value.code == 2
    assert fault in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_missing_raw_data_exit_with_2_and_say_where_to_get_them(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        run(tmp_path, "gtsrb", "--root", tmp_path / "gone")
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert "gone: not found" in error
    assert "torchvision.datasets.GTSRB" in error


def test_raw_tasks_need_no_ffcv(tmp_path):
    """A task of the demo is prepared and opened from device memory where ffcv cannot be imported."""
    code = """
import sys
sys.modules["ffcv"] = sys.modules["numba"] = None
import torch
from dist_cts.data.batches import DataConfig, TaskBatches, open_task, test_batches
from dist_cts.commands.prepare import main
folder = sys.argv[1]
assert main(["embedded:icons", "--out", folder]) == 0
assert main(["verify", folder]) == 0
config = DataConfig(cache="device")
train, test = (open_task(f"{folder}/icons", split, config, torch.device("cpu")) for split in ("train", "test"))
images, labels = TaskBatches(train, 0, 16, config).next()
assert images.shape == (16, 3, 32, 32)
assert sum(len(labels) for _, labels in test_batches(test, 100, config)) == test.manifest.count
"""
    result = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, timeout=250)
    assert result.returncode == 0, result.stderr
    assert ", raw, " in result.stdout


def test_the_script_runs(tmp_path):
    command = [sys.executable, "launch/prepare.py", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert result.returncode == 0
    assert "tiny-imagenet" in result.stdout
