"""Configs: strict, and every file in configs/ loads."""

import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from dist_cts import config
from dist_cts.algorithms.table import make_algorithm
from dist_cts.learner import InnerConfig
from dist_cts.run.config import TrainConfig
from dist_cts.run.meta_test import MetaTestConfig

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
CHOICES = ["sgd", "nesterov", "adam", "cosine", "cpu", "bf16", "ordered", "skip", "fomaml", "last", "dataset", "stream"]


def flatten(values, prefix=""):
    """The values under their dotted keys; an empty section stays one key."""
    nested = {
        k: flatten(v, f"{prefix}{k}.") if isinstance(v, dict) and v else {f"{prefix}{k}": v} for k, v in values.items()
    }
    return {key: value for part in nested.values() for key, value in part.items()}


def nested(key, value):
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


@pytest.fixture
def write(tmp_path):
    def write(text, name="a.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_shipped_config_loads(path):
    if "targets" in yaml.safe_load(path.read_text()):
        config.load(MetaTestConfig, path)
        return
    loaded = config.load(TrainConfig, path)
    make_algorithm(
        loaded.algorithm, loaded.method, inner_steps=loaded.inner_steps, meta_lr=loaded.meta_lr, seed=loaded.seed
    )


def test_every_config_has_a_run_folder_of_its_own():
    settings = TrainConfig(tasks=["a"], algorithm="leap")
    assert len({settings.with_run_dir(path).run_dir for path in CONFIGS}) == len(CONFIGS)
    assert settings.with_run_dir(ROOT / "configs" / "paper" / "cts.yaml").run_dir == Path("runs/paper/cts")
    assert settings.with_run_dir(Path("/elsewhere/mine.yaml")).run_dir == Path("runs/mine")
    assert settings.with_run_dir().run_dir == Path("runs/leap")


def test_overrides_win_over_the_file_and_the_file_over_defaults(write):
    path = write("tasks: [a, {name: b, classes: 3}]\ninner: {lr: 0.5}\nepisodes: 7\n")
    loaded = config.load(TrainConfig, path, ["inner.lr=1e-3", "model.name=tiny", "inner.momentum=0"])
    assert (loaded.inner.lr, loaded.inner.momentum, loaded.episodes, loaded.inner_steps) == (1e-3, 0, 7, 1000)
    assert [(task.name, task.classes) for task in loaded.tasks] == [("a", None), ("b", 3)]


@pytest.mark.parametrize("model", [TrainConfig, MetaTestConfig])
@given(value=st.sampled_from([True, False, 1, 0.25, "a", ["a"], {}, *CHOICES]), data=st.data())
def test_giving_one_key_leaves_all_others_at_their_defaults(model, value, data):
    """Setting one key leaves every other key at its default, at every depth."""
    required = {"tasks": ["t"]} if model is TrainConfig else {"targets": ["t"]}
    empty = flatten(model.model_validate(required).model_dump())
    key = data.draw(st.sampled_from(sorted(empty)))
    try:
        given_one = model.model_validate(required | nested(key, value))
    except ValidationError:
        return
    others = flatten(given_one.model_dump())
    rest = {k: v for k, v in others.items() if k != key and not k.startswith(f"{key}.")}  # an optional section
    assert rest == {k: v for k, v in empty.items() if k != key}


def test_a_section_given_in_part_keeps_the_defaults_of_the_field_that_holds_it(write):
    class Outer(config.Config):
        middle: MetaTestConfig = MetaTestConfig(targets=["a"], inner=InnerConfig(optimizer="adam", lr=0.3), steps=7)

    path = write("targets: [a]\ninner: {lr: 0.05}\n")
    assert config.load(MetaTestConfig, path).inner == InnerConfig(optimizer="nesterov", lr=0.05)
    assert config.load(MetaTestConfig, path, ["inner.momentum=0.5"]).inner.optimizer == "nesterov"
    middle = config.load(Outer, write("middle: {inner: {momentum: 0.5}}\n")).middle
    assert (middle.steps, middle.inner) == (7, InnerConfig(optimizer="adam", lr=0.3, momentum=0.5))


def test_a_saved_config_loads_as_itself(write, tmp_path):
    loaded = config.load(TrainConfig, write("tasks: [a]\nmeta_lr: 1.0e-3\n"))
    config.save(loaded, tmp_path / "resolved.yaml")
    assert config.load(TrainConfig, tmp_path / "resolved.yaml") == loaded


def test_a_base_file_is_extended(write):
    write("tasks: [a]\ninner: {lr: 0.5, momentum: 0.1}\n", "base.yaml")
    loaded = config.load(TrainConfig, write("base: base.yaml\ninner: {lr: 0.25}\n"))
    assert (loaded.inner.lr, loaded.inner.momentum) == (0.25, 0.1)


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (
            "tasks: [a]\ninner: {learning_rate: 1}",
            [],
            r"a.yaml:2: unknown key 'inner.learning_rate'; did you mean 'inner.lr'\?",
        ),
        ("tasks: [a]\nepisode: 1", [], r"a.yaml:2: unknown key 'episode'; did you mean 'episodes'\?"),
        ("tasks: [a]", ["episodes=many"], r"command line: episodes is 'many': expected an integer"),
        ("tasks: [a]\ninner:\n  lr: -1", [], r"a.yaml:3: inner.lr is -1: expected a number above 0"),
        ("tasks: [a]\ninner:\n  lr: 1", ["inner.lr=-1"], r"^command line: inner.lr is -1: expected a number above 0"),
        ("base: base.yaml\nseed: 1", [], r"base.yaml:2: episodes is 0: expected a number above 0"),
        ("tasks: [a]", ["device=tpu"], r"device is 'tpu': expected 'auto', 'cpu' or 'cuda'; did you mean 'cpu'\?"),
        ("tasks: [a]", ["episodes"], r"override 'episodes': expected section.key=value"),
        ("tasks: []", [], r"a.yaml:1: tasks is \[\]: expected 1 or more, found 0"),
        ("episodes: 3", [], r"a.yaml: 'tasks' is required"),
        (
            "tasks: [a]\nseed: 1\nseed: 2",
            [],
            r"a.yaml:3: not a YAML file: duplicate key 'seed', first on line 2; remove one",
        ),
        ("tasks: [a]\ninner:\n\tlr: 1", [], r"a.yaml:3: not a YAML file: .*indent with spaces, not tabs"),
        ("- a\n- b", [], r"expected `key: value` lines, found a list"),
        ("tasks: [a", [], r"not a YAML file"),
        (
            "tasks: [a, b]\nalgorithm: mtl",
            ["inner.optimizer=adam"],
            r"a.yaml:2: algorithm=mtl with inner.optimizer=adam",
        ),
        (
            "tasks: [a]\nalgorithm: mtl",
            ["outer.momentum=0.9"],
            r"algorithm=mtl is joint training.* leave section outer out",
        ),
        ("tasks: [a]", ["inner.freeze_body=true"], r"inner.freeze_body with algorithm=cts: the difference .* stays 0"),
        ("tasks: [a]", ["outer.nesterov=true"], r"outer.nesterov=true needs outer.momentum above 0"),
        ("tasks: [a]\ninner_steps: 5", ["inner.warmup=5"], r"inner.warmup=5 must be below inner_steps=5"),
        ("tasks: [a]\nstep: graph", ["inner.schedule=cosine"], r"step=graph records the learning rate"),
        ("base: a.yaml", [], r"circular `base:` chain"),
        ("tasks: !!python/object/apply:os.system [ls]", [], r"not a YAML file"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(write, text, overrides, message):
    write("tasks: [a]\nepisodes: 0\n", "base.yaml")
    path = write(text)
    with pytest.raises(ValueError, match=message) as caught:
        config.load(TrainConfig, path, overrides)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"not found: .*absent\.yaml"):
        config.load(TrainConfig, tmp_path / "absent.yaml")


@pytest.mark.parametrize("model", [TrainConfig, MetaTestConfig])
def test_help_shows_what_holds(model):
    required = {"tasks": ["t"]} if model is TrainConfig else {"targets": ["t"]}
    empty = flatten(model.model_validate(required).model_dump())
    shown = {line.split(" = ")[0].strip(): line.split(" = ", 1)[1] for line in config.describe(model)}
    optional = {key for key in empty if any(other.startswith(f"{key}.") for other in shown)}  # a section, or null
    assert {key for key in shown if key.rpartition(".")[0] not in optional} == empty.keys() - optional
    for key in empty.keys() - required.keys() - optional:
        assert yaml.safe_load(shown[key].split("   ")[0]) in (empty[key], str(empty[key])), key
    assert not re.search(r"= (None|True|False)\b", "\n".join(config.describe(model)))


# In each line, what pydantic would say.
PYDANTIC = re.compile(
    r"Input should|valid (dictionary|list|integer|number|string)|instance of|ensure|unable to parse|type="
)
WRONG = ["-1", "0.5", "x", "null", "[1]", "{x: 1}", ".inf"]


@pytest.mark.parametrize("model", [TrainConfig, MetaTestConfig])
def test_no_key_answers_a_wrong_value_in_the_words_of_pydantic(model):
    required = {"tasks": ["t"]} if model is TrainConfig else {"targets": ["t"]}
    given = "tasks=[t]" if model is TrainConfig else "targets=[t]"
    refused = []
    for key in [*flatten(model.model_validate(required).model_dump()), *model.model_fields]:
        for value in WRONG:
            try:
                config.load(model, None, [given, f"{key}={value}"])
            except ValueError as error:
                refused.append((key, str(error)))
    for key, line in refused:
        assert line.startswith("command line: "), line
        assert key in line, line
        assert not PYDANTIC.search(line), line
    assert len({key for key, _ in refused}) > 20


@pytest.mark.parametrize("model", [TrainConfig, MetaTestConfig])
def test_every_synonym_leads_to_a_key_or_a_sentence(model):
    keys = {line.split()[0] for line in config.describe(model)}
    assert all(meant in keys or " " in meant for meant in model.synonyms.values())
    assert not (keys | model.model_fields.keys()) & model.synonyms.keys()


def test_an_error_after_loading_that_begins_with_a_key_gets_the_place_of_its_value(write):
    path = write("tasks: [a]\nmodel: {name: vgg}\n")
    for text, place in (
        ("model.name='vgg': x", f"{path}:2: "),
        ("rank 1: seed=3: x", "command line: "),
        ("task: x", ""),
    ):
        with pytest.raises(ValueError, match=r"x$") as caught, config.blamed(path, ["seed=3"]):
            raise ValueError(text)
        assert str(caught.value) == place + text


def test_help_lists_every_key():
    lines = "\n".join(config.describe(TrainConfig))
    for key in (
        "algorithm = cts",
        "inner.lr = 0.01",
        "data.cache = auto",
        "checkpoint.every_steps",
        "tasks = (required)",
    ):
        assert key in lines
