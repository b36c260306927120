"""The tables of benchmarks/paper/README.md are those that its JSON files make."""

from pathlib import Path

import pytest

from benchmarks.paper import tables

PAPER = Path(__file__).parents[2] / "benchmarks" / "paper"
PAGE = (PAPER / "README.md").read_text()


def test_every_table_of_the_page_is_made_from_its_json():
    assert tables.rendered(PAGE) == PAGE


def test_every_table_stands_on_the_page():
    assert sorted(match[2] for match in tables.BLOCK.finditer(PAGE)) == sorted(tables.TABLES)


def test_a_changed_number_and_an_unknown_table_are_found():
    changed = PAGE.replace("15,150", "15,151")
    assert changed != PAGE
    assert tables.rendered(changed) == PAGE
    with pytest.raises(KeyError, match="no_such"):
        tables.rendered("<!-- table: no_such -->\n<!-- end -->")
