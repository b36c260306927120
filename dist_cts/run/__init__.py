"""The training entry point: configuration, setup, periodic hooks, shutdown, run folder."""
