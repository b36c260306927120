"""The files in docs/extending.md are short, and the commands beside them run."""

import re
import shlex
import sys

import pytest
import torch

from dist_cts import ALGORITHMS, DATASETS, LOSSES, MODELS
from dist_cts.commands import train as train_command
from dist_cts.run import imports
from tests.helpers.commands import ROOT, records

PAGE = (ROOT / "docs/extending.md").read_text()
FILES = dict(re.findall(r"^```(?:python|yaml)\n# (\w+\.\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
COMMANDS = {found[1]: found[0] for found in re.findall(r"^    (.*--import (own_\w+\.py).*)$", PAGE, re.MULTILINE)}
SMALL = ["episodes=1", "inner_steps=4", "batch_size=8", "log_every=2", "eval_every=4"]


@pytest.fixture
def page(tmp_path, monkeypatch):
    """A folder with the page's files; tables, imported modules and the search path are restored."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    imports.IMPORTED.clear()
    tables = [(table, dict(table)) for table in (ALGORITHMS, DATASETS, LOSSES, MODELS)]
    yield tmp_path
    for table, rows in tables:
        table.clear()
        table.update(rows)
    for name in FILES:
        sys.modules.pop(name.partition(".")[0], None)


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".py")])
def test_an_example_is_short(name):
    lines = [line for line in FILES[name].splitlines() if line.strip()]
    assert len(lines) <= (20 if name == "own_script.py" else 25)


def test_every_file_has_a_command():
    assert {name for name in FILES if name.endswith(".py")} == {*COMMANDS, "own_script.py"}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_runs_with_its_file(tasks, page, name):
    arguments = shlex.split(COMMANDS[name].partition(" train ")[2])
    if not any(argument.startswith("tasks=") or argument == "own_batches.yaml" for argument in arguments):
        arguments.append("tasks=[a,b]")
    arguments = [argument for argument in arguments if not argument.startswith("run_dir=")]
    assert train_command.main([*arguments, *SMALL, f"data.root={tasks}", "run_dir=run"]) == 0
    keys = {key for record in records(page / "run") for key in record}
    metric = {"own_loss.py": "top2_accuracy", "own_batches.py": "rmse"}.get(name, "accuracy")
    assert {"loss", metric, "test_loss", f"test_{metric}"} <= keys


def test_the_script_runs_alone_and_on_all_ranks_with_the_same_bits(page, start):
    script = page / "own_script.py"
    name = "'-'.join(os.environ.get(key, 'alone') for key in ('WORLD_SIZE', 'RANK')) + '.pt'"
    save = f"torch.save([run.phi, run.history], '{page}/' + {name})\n"
    script.write_text(f"import os\n{script.read_text()}{save}")
    for ranks in (None, 2, 4):
        code, out, err = start(script, forked=ranks).finish()
        assert code in (0, [0] * (ranks or 1)), err
        assert err.count("done: 200 steps") == 1
        assert re.search(r"^\| cts \| \S+ ± \S+ ", out.replace("**", ""), re.MULTILINE), out
    phi, history = torch.load(page / "alone-alone.pt")
    assert phi.keys() == {"body.0.weight", "body.0.bias"}
    for rank in range(2):
        other, records = torch.load(page / f"2-{rank}.pt")
        assert all(torch.equal(phi[name], other[name]) for name in phi)
        for mine, theirs in zip(history, records, strict=True):
            assert [mine[key] for key in ("task", "loss", "rmse")] == [theirs[key] for key in ("task", "loss", "rmse")]
    assert {record["rank"] for record in records} == {0, 1}
    shared, _ = torch.load(page / "4-3.pt")  # two ranks share each task
    for name in phi:
        torch.testing.assert_close(phi[name], shared[name], rtol=1e-4, atol=1e-5)
    assert not (page / "runs").exists()
