"""Fuzzed configs and suites; see hostile.py."""

import os
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dist_cts import config
from dist_cts.data.prepare import suites
from dist_cts.run.config import TrainConfig
from tests.helpers.hostile import attempt, bounded, damaged, values

pytestmark = pytest.mark.usefixtures("elsewhere")
CONFIG = b"""tasks: [a, {name: b, classes: 3}]
inner: {lr: 1e-3, momentum: 0.9}
episodes: 7
meta_lr: 0.5
run_dir: runs/x
data: {cache: stream, padding: null}
"""
KEYS = [line.split()[0] for line in config.describe(TrainConfig)]


def load(path, overrides=()):
    """The config, if it loads; as it was saved it is then the same."""
    loaded = attempt(lambda: config.load(TrainConfig, path, overrides), path.name, "command line")
    if loaded is not None:
        config.save(loaded, path.with_name("saved.yaml"))
        assert config.load(TrainConfig, path.with_name("saved.yaml")) == loaded
    return loaded


@bounded(max_examples=150)
@given(data=damaged(CONFIG))
def test_any_config(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(data)
    load(path)


@bounded(max_examples=150)
@given(key=st.sampled_from([*KEYS, "inner", "no.such"]), value=values)
def test_any_value_of_a_config(tmp_path_factory, key, value):
    path = tmp_path_factory.getbasetemp() / "value.yaml"
    for part in reversed(key.split(".")):
        value = {part: value}
    path.write_text(yaml.safe_dump({"tasks": ["a"]} | value))
    load(path)


@bounded(max_examples=100)
@given(override=st.builds("{}={}".format, st.sampled_from(KEYS), st.text()) | st.text())
def test_any_override(tmp_path_factory, override):
    path = tmp_path_factory.getbasetemp() / "overridden.yaml"
    path.write_bytes(CONFIG)
    load(path, [override])


LAUGHS = "\n".join(
    ["a0: &a0 [x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)), "tasks: *a11"]
)


@pytest.mark.parametrize(
    "text",
    [
        "tasks: !!python/object/apply:os.system ['touch executed']",
        "tasks: !!python/object/new:os.system ['touch executed']",
        "tasks: &a [*a]",
        "tasks: [a]\nbase: other.yaml\ninner: &a {inner: *a}",
        LAUGHS,
        "[" * 5000,
        "tasks: [a]\nseed: 0x" + "f" * 6000,
        "tasks: [a]\nmeta_lr: .inf",
        "tasks: [a]\ntimeout_seconds: .nan",
        "tasks: [" + "1," * 10_000 + "]",
        "tasks: [a]\nrun_dir: 2001-99-99",
        "tasks: [a]\nseed: !!bool maybe",
        "tasks: [a]\nbase: /dev/zero",
        "tasks: [a]\nbase: pipe",
        "tasks: [a]\nbase: loop",
        'tasks: [a]\nbase: "\\0"',
        "tasks: [a]\nbase: " + "x" * 5000,
    ],
    ids=lambda text: text[:60],
)
def test_a_hostile_config_is_refused(tmp_path, text):
    (tmp_path / "other.yaml").write_text("inner: &a {inner: *a}")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "a.yaml").write_text(text)
    assert attempt(lambda: config.load(TrainConfig, tmp_path / "a.yaml"), "a.yaml", "x" * 5000) is None


@bounded(max_examples=150)
@given(name=st.text(max_size=5) | st.text("./\\\0a", max_size=4))
def test_a_task_of_a_suite_stays_in_the_output_folder(tmp_path_factory, name):
    path = tmp_path_factory.getbasetemp() / "suite.yaml"
    path.write_text(yaml.safe_dump([{"dataset": "digits", "name": name}]))
    tasks = attempt(lambda: suites.suite(str(path)), path.name)
    if tasks is not None:
        assert os.path.dirname(os.path.normpath(Path("/out") / tasks[0].name)) == "/out"
