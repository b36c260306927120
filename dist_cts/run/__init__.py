"""The entry points train and meta_test: configuration, setup, periodic hooks, shutdown, the run folder."""
