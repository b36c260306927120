"""Tasks on disk and in memory: from raw downloads to .beton files, and from those to batches in the plan's order."""
