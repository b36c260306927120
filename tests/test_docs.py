"""README and docs/: links and file names exist, and the README stays short."""

import re
from pathlib import Path

import pytest

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
