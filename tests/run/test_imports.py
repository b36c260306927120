"""--import: modules of one's own are imported before the config is read, recorded, and asked for by a resume."""

import json
import re
import sys

import pytest

from dist_cts.commands import meta_test as meta_test_command
from dist_cts.commands import train as train_command
from dist_cts.losses import LOSSES
from dist_cts.models import MODELS
from dist_cts.run import imports
from tests.helpers.commands import records

OWN = """
from torch.nn import functional as F
from dist_cts import LOSSES, MODELS, Loss, Metric

def margin(outputs, labels, p=1):
    return F.multi_margin_loss(outputs, labels, p=p)

def wrong(outputs, labels):
    return (outputs.argmax(1) != labels).float().mean()

LOSSES["margin"] = Loss(margin, Metric("error", wrong, higher_is_better=False, percent=True))
MODELS["own"] = MODELS["tiny"]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working folder; tables, imported modules and the search path are restored."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    imports.IMPORTED.clear()
    for table in (LOSSES, MODELS):
        for name in table:
            monkeypatch.setitem(table, name, table[name])
    tables = dict(LOSSES), dict(MODELS)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(sys.modules[name].__file__):
            del sys.modules[name]
    for table, rows in zip((LOSSES, MODELS), tables, strict=True):
        table.clear()
        table.update(rows)


def arguments(tasks, *more):
    settings = {
        "tasks": "[a,b]", "episodes": 1, "inner_steps": 4, "batch_size": 8, "run_dir": "runs/own", "log_every": 2,
        "eval_every": 4, "model.name": "own", "data.root": tasks, "loss.name": "margin", "loss.p": 2,
    }  # fmt: skip
    return [*more, *(f"{key}={value}" for key, value in settings.items())]


def test_own_rows_are_trained_by_name_and_a_resume_without_them_says_so(tasks, folder, capsys):
    (folder / "own_rows.py").write_text(OWN)
    (folder / "x.yaml").write_text("meta_lr: 0.1")
    assert train_command.main(arguments(tasks, "--config", "x.yaml", "--import", "own_rows")) == 0
    assert json.loads((folder / "runs/own/environment.json").read_text())["imports"] == ["own_rows"]
    found = records(folder / "runs/own")
    assert all(0 <= record["error"] <= 1 for record in found if "loss" in record)
    assert {record["task"] for record in found if "test_error" in record} == {"a", "b"}
    assert "error" in capsys.readouterr().err
    meta = ["--config", "y.yaml", "--import", "./own_rows.py", "--phi", "runs/own/phi.safetensors"]
    config = "targets: [c]\nsteps: 3\nseeds: 2\nbatch_size: 8\nloss: margin\nmodel: {name: own}\n"
    (folder / "y.yaml").write_text(config + f"data: {{root: {tasks}}}")
    assert meta_test_command.main(meta) == 0
    cell = json.loads((folder / "runs/own/meta_test/meta_test.json").read_text())["summary"]["own"]["c"]
    assert cell["best"] <= cell["error"] <= 100
    assert "Test error in % after 3 steps" in capsys.readouterr().out

    del sys.modules["own_rows"]
    assert train_command.main(arguments(tasks, "--config", "x.yaml", "episodes=2")) == 2
    assert "runs/own was started with its own code: add --import own_rows to resume it" in capsys.readouterr().err
    more = arguments(tasks, "--config", "x.yaml", "--import", str(folder / "own_rows.py"))
    assert train_command.main([*more, "episodes=2"]) == 0
    assert "resuming from checkpoint at step 4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "text", "code", "message"),
    [
        ("no_such_module", "", 2, "--import no_such_module: no module of that name in"),
        ("gone.py", "", 2, "--import gone.py: file not found"),
        ("broken.py", "x = 1\nx.y\n", 1, "AttributeError: 'int' object has no attribute 'y' .*broken.py, line 2"),
        ("needy.py", "import no_such_library\n", 1, "ModuleNotFoundError: No module named 'no_such_library'"),
        ("json.py", "", 2, "--import json.py: 'json' is already the name of .*json/__init__.py; rename the file"),
    ],
)
def test_what_cannot_be_imported_is_one_line(folder, capsys, source, text, code, message):
    if source != "gone.py" and source.endswith(".py"):
        (folder / source).write_text(text)
    assert train_command.main(["--import", source]) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2  # the first one says that the demo is trained
    assert re.search(message, lines[1]), lines[1]


@pytest.mark.parametrize(
    "line",
    [
        *("import: trap", "imports: [trap]", "model: {name: trap.Model}", "model: {name: trap}", "loss: trap.loss"),
        *("algorithm: trap", "base: trap.py", "tasks: [trap.py]", "loss: {name: !!python/name:trap.loss }"),
        *("model: !!python/object/apply:trap.Model []", "init: trap.py", "method: {args: {import: trap}}"),
    ],
)
def test_a_config_alone_never_imports_code(tasks, folder, capsys, line):
    (folder / "trap.py").write_text("open('sprung', 'w')")
    (folder / "x.yaml").write_text("\n".join([*([] if "tasks" in line else ["tasks: [a]"]), line]))
    given = [f"data.root={tasks}", "episodes=1", "inner_steps=1", "batch_size=8"]
    assert train_command.main(["--config", "x.yaml", *given]) in (1, 2)
    assert capsys.readouterr().err.startswith("error: ")
    assert not (folder / "sprung").exists()
    assert "trap" not in sys.modules
