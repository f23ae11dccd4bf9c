"""Programs that measure: each prints a table and writes JSON with versions and hardware to `results/`."""
