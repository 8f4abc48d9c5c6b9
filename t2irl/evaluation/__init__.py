"""Held-out measurement, scored picture grids, and the report of a run."""
