"""Mistakes of a first-time user: each one ends with one line, what - where - what to do, and an exit code."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
from PIL import Image

from dist_cts.commands import meta_test, plot, prepare, synthetic, train
from dist_cts.run.folder import claim
from tests.helpers.batches import write_task
from tests.helpers.commands import ENVIRONMENT, ROOT, TORCHRUN

TRAIN = """tasks: [digits, signs]
episodes: 1
inner_steps: 2
batch_size: 4
device: cpu
model: {name: tiny}
data: {root: tasks}
run_dir: run
"""
TEST = """targets: [digits]
steps: 2
seeds: 1
batch_size: 4
device: cpu
model: {name: tiny}
data: {root: tasks}
out: out
"""
FILES = {
    "train.yaml": TRAIN,
    "test.yaml": TEST,
    "empty.yaml": "",
    "list.yaml": "- digits\n",
    "twice.yaml": f"{TRAIN}batch_size: 8\n",
    "tabs.yaml": "tasks: [digits]\ninner:\n\tlr: 0.1\n",
    "nospace.yaml": "tasks: [digits]\nlr:0.1\n",
    "base.yaml": "base: nothing.yaml\n",
    "wrong.yaml": TRAIN.replace("batch_size: 4", "batch_size: four"),
    "suite.yaml": "- {dataset: digits, pixel: 3}\n",
    "table.csv": "file,class\na.png,3\n",
    "notes.txt": "a: b: c\n",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with two tasks, photos, configurations and a finished run."""
    folder = tmp_path_factory.mktemp("place")
    for index, name in enumerate(("digits", "signs")):
        write_task(folder / "tasks", name, classes=3 + index, seed=index)
    for name, text in FILES.items():
        (folder / name).write_text(text)
    for name in ("photos/ant", "photos/bee", "mixed"):
        (folder / name).mkdir(parents=True)
        for i in range(2):
            Image.fromarray(np.full((9, 9, 3), 50 * i, np.uint8)).save(folder / name / f"{i}.png")
    (folder / "hollow" / "ant").mkdir(parents=True)
    (folder / "dangling").symlink_to("nowhere")
    (folder / "loop").symlink_to("loop")
    before = os.getcwd()
    os.chdir(folder)
    assert train.main(["--config", "train.yaml"]) == 0
    os.chdir(before)
    return folder


@pytest.fixture
def run(place, monkeypatch, capsys):
    """run(command, *arguments) -> exit code, stderr; the command runs in this process, in `place`."""

    def run(command, *arguments):
        monkeypatch.chdir(place)
        capsys.readouterr()
        try:
            code = command.main(list(arguments))
        except SystemExit as usage:
            code = usage.code
        finally:
            if dist.is_initialized():  # a failed run leaves it to the end of its process
                dist.destroy_process_group()
        return code, capsys.readouterr().err

    return run


COMMANDS = {"train": train, "meta-test": meta_test, "prepare": prepare, "plot": plot, "synthetic": synthetic}
# A command, and below it its exit code and its error line: a regular expression.
MISTAKES = r"""
train --config train.yaml tasks=[digits,signz]
    2 no prepared task 'signz' in /.*/tasks; did you mean 'signs'\? prepared: digits, signs
train --config train.yaml tasks=[unheard]
    2 no prepared task 'unheard' in /.*/tasks; prepare it: dist-cts prepare .*; prepared: digits
train --config train.yaml data.root=nowhere
    2 no prepared task 'digits': /.*/nowhere does not exist; set data.root, or prepare it
train --config train.yaml data.root=tasks/digits
    2 in /.*/tasks/digits, which is a task itself; set data.root=/.*/tasks$
train --config train.yaml data.root=. tasks=[photos]
    2 /photos is not a prepared task; .*: dist-cts prepare image-folder --root /
train --config train.yaml tasks=[../tasks/digits]
    2 command line: tasks\[0\] is '../tasks/digits': expected a plain folder name, without /
train --config train.yaml tasks=[tasks/digits]
    2 command line: tasks\[0\] is 'tasks/digits': expected a plain folder name
train --config train.yaml tasks=digits,signs
    2 command line: tasks is 'digits,signs': expected a list; did you mean \[digits,signs\]\?
train --config train.yaml 'tasks=[{name: digits, clases: 3}]'
    2 'tasks\[0\].clases'; did you mean 'classes'\? keys of a task: name, classes
train --config train.yaml 'tasks=[{name: digits, classes: 7}]'
    2 task digits: the config says 7 classes, its data have 3$
train --config train.yaml epochs=3
    2 command line: unknown key 'epochs'; did you mean 'episodes'\?$
train --config train.yaml lr=0.1
    2 command line: unknown key 'lr'; did you mean 'inner.lr'\?$
train --config train.yaml beta=0.1
    2 unknown key 'beta'; did you mean 'meta_lr'\?$
train --config train.yaml bs=4
    2 unknown key 'bs'; did you mean 'batch_size'\?$
train --config train.yaml width=2
    2 unknown key 'width'; did you mean 'model.width'\?$
train --config train.yaml inner.learning-rate=2
    2 unknown key 'inner.learning-rate'; did you mean 'inner.lr'\?$
train --config train.yaml gpus=4
    2 unknown key 'gpus'; the number of ranks is torchrun's: torchrun --nproc_per_node=N$
train --config train.yaml output_dir=x
    2 unknown key 'output_dir'; did you mean 'run_dir'\?$
train --config train.yaml resume=true
    2 unknown key 'resume'; the same command resumes; --fresh starts from scratch$
train --config train.yaml inner.lr=-1
    2 ^error: command line: inner.lr is -1: expected a number above 0$
train --config train.yaml inner.lr=0,1
    2 command line: inner.lr is '0,1': expected a number$
train --config train.yaml episodes=1.5
    2 command line: episodes is 1.5: expected an integer$
train --config train.yaml batch_size=0
    2 command line: batch_size is 0: expected a number above 0$
train --config train.yaml batch_size=1000000000
    2 command line: batch_size=1000000000: a step of task digits needs .* lower batch_size$
train --config train.yaml model=resnet18
    2 command line: model is 'resnet18': .*; did you mean model.name=resnet18\?$
train --config train.yaml inner=adam
    2 did you mean inner.optimizer=adam\?$
train --config train.yaml inner.optimizer=adm
    2 inner.optimizer is 'adm': expected .*; did you mean 'adam'\?$
train --config train.yaml run_dir=None
    2 override 'run_dir=None': None is not a YAML value; write null
train --config train.yaml device=gpu
    2 command line: device is 'gpu': .*; did you mean 'cuda'\?$
train --config train.yaml device=cuda
    2 device=cuda: 1 ranks but 0 GPUs on this node; start one rank per GPU, or set device=cpu
train --config train.yaml inner.lr = 0.1
    2 override 'inner.lr': expected section.key=value, without spaces
train --config train.yaml train.yaml
    2 override 'train.yaml': to use this configuration, write --config train.yaml$
train --config train.yaml --inner.lr=0.1
    2 unrecognized arguments: --inner.lr=0.1; keys .* are given as section.key=value, without dashes
train --config train.yaml run_dir=notes.txt
    1 cannot write to notes.txt \(it is not a folder\)
train --config train.yaml run_dir=dangling
    1 cannot write to dangling \(it is not a folder\)
train --config train.yaml run_dir=loop
    1 cannot write to loop \(it is not a folder\)
train --config train.yaml data.root=loop
    2 no prepared task 'digits': /.*/loop does not exist
train --config train.yaml inner.lr=0.5
    2 run/checkpoints/step-00000002: inner.lr was 0.01, is 0.5; restore these values, choose another run_dir
train --config train.yaml tasks=[digits]
    2 tasks was \['digits', 'signs'\], is \['digits'\]; restore these values
train --config train.yaml init=nothing.safetensors run_dir=r1
    2 nothing.safetensors: file not found$
train --config train.yaml init=run run_dir=r2
    2 run: a folder; expected a file, such as run/phi.safetensors$
train --config train.yaml init=train.yaml run_dir=r3
    2 train.yaml: expected a .safetensors file or a state dict \(.pt, .pth\)$
train --config train.yaml 'placement={digits: [0]}'
    2 command line: placement: task signs has no rank; add it to the mapping$
train --config trian.yaml
    2 config file not found: trian.yaml \(working directory: /.*nearest.*: train.yaml, 
train --config run
    2 --config run: a folder, expected a YAML file .*; did you mean run/config.yaml\?$
train --config
    2 argument --config: expected one argument; see dist-cts train --help$
train --config empty.yaml
    2 empty.yaml: 'tasks' is required; add it$
train --config list.yaml
    2 list.yaml: expected `key: value` lines, found a list$
train --config twice.yaml
    2 twice.yaml:9: not a YAML file: duplicate key 'batch_size', first on line 4; remove one$
train --config tabs.yaml
    2 tabs.yaml:3: not a YAML file: .*; indent with spaces, not tabs$
train --config nospace.yaml
    2 nospace.yaml:3: not a YAML file: .*':'$
train --config base.yaml
    2 base.yaml:1: base file not found, or not a regular file: 'nothing.yaml'$
train --config wrong.yaml
    2 ^error: wrong.yaml:4: batch_size is 'four': expected an integer$
train --config notes.txt
    2 notes.txt:1: not a YAML file: mapping values are not allowed here$
train --config test.yaml
    2 test.yaml:1: unknown key 'targets'; it belongs to configurations of meta-test
meta-test
    2 arguments are required: --config; see dist-cts meta-test --help$
meta-test --config train.yaml
    2 train.yaml:1: unknown key 'tasks'; it belongs to configurations of train
meta-test --config test.yaml --phi run
    2 run: a folder; expected a file, such as run/phi.safetensors, or a folder of
meta-test --config test.yaml --phi run/checkpoints
    2 expected a file, such as run/phi.safetensors
meta-test --config test.yaml --phi nothing
    2 nothing: not a file \(.safetensors, .pt, .pth\), and tiny has no such weights$
meta-test --config test.yaml --phi run/metrics.jsonl
    2 run/metrics.jsonl: expected a .safetensors file or a state dict
meta-test --config test.yaml run/phi.safetensors
    2 to meta-test this phi, write --phi run/phi.safetensors
meta-test --config test.yaml phi=run/phi.safetensors
    2 unknown key 'phi'; an initialization is given by --phi PATH$
meta-test --config test.yaml --phi run/phi.safetensors model.name=resnet8
    2 run/phi.safetensors does not fit the model
meta-test --config test.yaml random=false
    2 nothing to test: pass --phi or set random=true$
meta-test --config test.yaml targets=[digits,digits]
    2 command line: targets: duplicate name 'digits'
meta-test --config test.yaml targets=[digit]
    2 no prepared task 'digit' in /.*; did you mean 'digits'\?
meta-test --config test.yaml train_limit=999
    2 command line: train_limit=999: the target has only 60 training images$
meta-test --config test.yaml out=notes.txt
    1 cannot write to notes.txt \(it is not a folder\)
prepare photos --out o
    2 unknown dataset 'photos'; for a folder .*: dist-cts prepare image-folder --root photos; known
prepare cifar-10 --out o
    2 unknown dataset 'cifar-10'; did you mean 'cifar10'
prepare image-folder --out o
    2 image-folder needs --root, the folder of the raw data; see dist-cts prepare --help$
prepare image-folder --root nowhere --out o
    2 --root nowhere: not found; source of the raw data: your own images
prepare image-folder --root notes.txt --out o
    1 notes.txt: expected a folder with one subfolder of images per class
prepare image-folder --root mixed --out o
    1 mixed: no class folders found; expected one subfolder of images per class$
prepare image-folder --root hollow --out o
    1 hollow/ant: no images found$
prepare image-folder --root photos --out notes.txt
    2 --out notes.txt: is not a folder; choose the folder
prepare image-folder --root photos --out o --pixels 0
    2 argument --pixels is 0: expected at least 1; see
prepare image-folder --root photos --out o --name a/b
    2 argument --name: 'a/b' is not a valid folder name
prepare digits --out o --split-classes 0-5
    2 '0-5' is not a range a:b with a < b, such as 0:100
prepare table --root table.csv --out o
    1 table.csv: columns file, class; expected one of image, .* and one of label
prepare --suite suite.yaml --out o
    2 suite.yaml:1: unknown key 'pixel'; did you mean 'pixels'\?
prepare verify nowhere
    1 nowhere: file not found; prepare the task again with `dist-cts prepare`$
plot photos
    2 photos/metrics.jsonl not found; expected a run folder$
synthetic --inner-lr x --out o
    2 argument --inner-lr: invalid number value: 'x'; see dist-cts synthetic --help$
synthetic --env x --out o
    2 no environment 'x': choose released or paper, or name a JSON file$
"""
LINES = MISTAKES.strip().splitlines()


@pytest.mark.parametrize(("command", "outcome"), list(zip(LINES[::2], LINES[1::2], strict=True)), ids=LINES[::2])
def test_a_mistake_is_one_line(run, command, outcome):
    name, *arguments = shlex.split(command)
    code, _, message = outcome.strip().partition(" ")
    returned, err = run(COMMANDS[name], *arguments)
    assert returned == int(code), err
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert re.search(message, line), line
    assert err.splitlines()[-1] == line
    assert not re.search(r"Traceback|Errno|Input should|usage:", err)


def test_a_home_and_a_variable_in_a_path_are_expanded(run, place, monkeypatch):
    monkeypatch.setenv("HOME", str(place))
    monkeypatch.setenv("PLACE", str(place))
    code, err = run(
        train, "--config", "train.yaml", "data.root=~/tasks", "run_dir=$PLACE/expanded", "init=~/run/phi.safetensors"
    )
    assert code == 0, err
    assert (place / "expanded" / "phi.safetensors").is_file()


def test_a_link_to_a_folder_is_as_good_as_the_folder(run, place):
    (place / "linked").mkdir()
    for name, target in (("link-tasks", "tasks"), ("link-run", "linked"), ("tasks/marks", "signs")):
        (place / name).symlink_to(target)
    keys = ["data.root=link-tasks", "tasks=[digits, marks]", "run_dir=link-run"]
    assert run(train, "--config", "train.yaml", *keys)[0] == 0
    assert (place / "linked" / "phi.safetensors").is_file()
    assert run(train, "--config", "train.yaml", *keys, "episodes=2")[0] == 0
    (place / "tasks" / "marks").unlink()


def test_a_batch_above_the_dataset_is_a_warning(run):
    code, err = run(train, "--config", "train.yaml", "batch_size=61", "run_dir=repeats")
    assert code == 0, err
    assert (
        "warning: task digits: batch_size=61 exceeds its 60 training images; every batch repeats some of them\n" in err
    )


def test_a_second_meta_test_in_the_folder_is_refused(run, place):
    with claim(place / "taken"):
        code, err = run(meta_test, "--config", "test.yaml", "out=taken")
    holder = f"another run (process {os.getpid()} on {os.uname().nodename})"
    assert code == 2
    assert err.endswith(f"error: taken is in use by {holder}: stop it, or choose another out\n"), err


def torchrun(place, *arguments, options=()):
    command = [*TORCHRUN, "--standalone", "--nproc_per_node=2", *options, "-m", "dist_cts", *arguments]
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=250)
    return done.returncode, done.stderr.splitlines()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["train", "--config", "train.yaml", "epochs=3"],
            "command line: unknown key 'epochs'; did you mean 'episodes'?",
        ),
        pytest.param(["train", "--lr=3"], "unrecognized arguments: --lr=3; ", marks=pytest.mark.slow),
    ],
)
def test_under_torchrun_rank_0_alone_speaks_and_the_report_ends_with_its_line(place, arguments, line):
    code, lines = torchrun(place, *arguments)
    assert code == 1  # torchrun's own
    assert sum(text.startswith("error: ") for text in lines) == 1
    assert not any("usage:" in text for text in lines)
    assert sum(line in text for text in lines) == 2
    *_, last, border = [text for text in lines if text]
    assert last.startswith(f"  traceback : {line}")
    assert set(border) == {"="}


def test_an_error_of_one_rank_is_the_root_cause_in_the_report(place):
    code, lines = torchrun(place, "train", "--config", "train.yaml", "tasks=[digits, signz]", "run_dir=other")
    assert code == 1
    assert sum(text.startswith("error: rank 1: no prepared task 'signz'") for text in lines) == 1
    assert [text for text in lines if text][-2].startswith("  traceback : rank 1: no prepared task 'signz'")


def test_a_silent_rank_that_torchrun_ends_is_no_failure_of_its_own(tmp_path):
    """torchrun sends SIGTERM to the ranks that are left, and lists those that do not exit with 0."""
    code = "from dist_cts.run import exit_codes; exit_codes.TORCHRUN_SECONDS = 100; exit_codes.report('of rank 0')"
    environment = ENVIRONMENT | {"RANK": "1", "TORCHELASTIC_ERROR_FILE": str(tmp_path / "error.json")}
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment, stderr=subprocess.PIPE) as process:
        status = Path(f"/proc/{process.pid}/status")
        while not int(re.search(r"SigCgt:\s*(\w+)", status.read_text())[1], 16) & 1 << (signal.SIGTERM - 1):
            assert process.poll() is None
            time.sleep(0.01)
        process.terminate()
        assert process.wait(250) == 0
        assert process.stderr.read() == b""
    assert not (tmp_path / "error.json").exists()
