import pytest

from dist_cts.data import catalog, embedded


def test_every_data_set_says_where_to_get_it():
    assert set(catalog.CATALOG) >= {"tiny-imagenet", "gtsrb", "fashion-mnist", "kmnist", "image-folder", "digits"}
    for name, entry in catalog.CATALOG.items():
        assert catalog.entry(name) is entry
        assert entry.where


def test_the_demo_suite_is_all_embedded_tasks():
    entries = catalog.suite("demo")
    assert [entry.name for entry in entries] == [f"embedded:{task}" for task in embedded.TASKS]
    assert not any(entry.needs_root for entry in entries)
    assert all(entry.version for entry in entries)


@pytest.mark.parametrize("name", ["letters", "embedded:nothing", "cifar"])
def test_an_unknown_data_set_shows_the_known_ones(name):
    with pytest.raises(ValueError, match=rf"no data set '{name}'.*kmnist.*embedded:letters"):
        catalog.entry(name)


def test_an_unknown_suite_is_refused():
    with pytest.raises(ValueError, match=r"no suite 'all'.*demo"):
        catalog.suite("all")
