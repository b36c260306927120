"""The tables of benchmarks/paper's pages are those that the JSON files of the results make."""

import pytest

from benchmarks.paper import tables


@pytest.mark.parametrize("page", tables.PAGES)
def test_every_table_of_a_page_is_made_from_its_json(page):
    text = (tables.HERE / page).read_text()
    assert tables.rendered(text, tables.PAGES[page]) == text
    assert sorted(match[2] for match in tables.BLOCK.finditer(text)) == sorted(tables.PAGES[page])


def test_a_changed_number_and_an_unknown_table_are_found():
    text = (tables.HERE / "README.md").read_text()
    changed = text.replace("15,150", "15,151")
    assert changed != text
    assert tables.rendered(changed, tables.TABLES) == text
    with pytest.raises(KeyError, match="no_such"):
        tables.rendered("<!-- table: no_such -->\n<!-- end -->", tables.TABLES)
