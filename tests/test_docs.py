"""README and docs/: links and file names exist, and the README stays short."""

import re
from pathlib import Path

import pytest
import torch

from dist_cts.checkpoint.schedule import CheckpointConfig
from dist_cts.distributed.peer_failure import ANSWER_SECONDS
from dist_cts.distributed.process_group import backend_timeout
from dist_cts.run.exit_codes import STOPPED

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))))


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_leads_to_a_file(page):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / page).read_text())
    assert [link for link in links if not ((ROOT / page).parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_is_named_exists(page):
    text = (ROOT / page).read_text()
    names = set(re.findall(r"(?:[\w-]+/)*\w+\.(?:py|sbatch)\b", text))
    names -= set(re.findall(r"^```python\n# (\w+\.py)$", text, re.MULTILINE))  # the page has the file
    folders = ROOT, ROOT / "dist_cts", ROOT / "launch/slurm"
    assert [name for name in names if not any((folder / name).exists() for folder in folders)] == []


def test_the_readme_has_at_most_900_words():
    assert len((ROOT / "README.md").read_text().split()) <= 900


def test_the_times_and_defaults_in_reliability_are_those_of_the_code():
    text = (ROOT / "docs/reliability.md").read_text()
    defaults = re.findall(r"^\| `checkpoint\.(\w+)` \|.*?default (\d+)", text, re.MULTILINE)
    assert {key: float(value) for key, value in defaults} == dict(CheckpointConfig())
    words = " ".join(text.split())
    for claim in (
        f"that do not respond after {ANSWER_SECONDS:g} more seconds",
        f"every rank reports after at most {4 * ANSWER_SECONDS:g} ",
        f"`timeout_seconds` + {backend_timeout(torch.device('cuda'), 0):g} s",
        f"exits with code {STOPPED}.",
    ):
        assert claim in words, claim
    (wait,) = re.findall(r"`SLURM_WAIT` \((\d+)\) seconds", text)
    assert f"SLURM_WAIT:-{wait}}}" in (ROOT / "launch/slurm/train_multinode.sbatch").read_text()
