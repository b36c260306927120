"""From a raw dataset to the .beton files of one task."""
