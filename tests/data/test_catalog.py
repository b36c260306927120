import pytest

from dist_cts.data.prepare import catalog


def test_every_data_set_says_where_to_get_it():
    assert set(catalog.CATALOG) >= {"tiny-imagenet", "gtsrb", "fashion-mnist", "kmnist", "image-folder", "digits"}
    for name, entry in catalog.CATALOG.items():
        assert catalog.entry(name) is entry
        assert entry.where


@pytest.mark.parametrize("name", ["letters", "embedded:nothing", "cifar"])
def test_an_unknown_data_set_shows_the_known_ones(name):
    with pytest.raises(ValueError, match=rf"unknown dataset '{name}'.*kmnist.*embedded:letters"):
        catalog.entry(name)
