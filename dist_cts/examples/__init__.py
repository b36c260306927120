"""Examples of one's own data, models and losses, for `--import dist_cts.examples.NAME`."""
