"""Measuring this machine: `rsr bench`, and what the numbers in `results/` were made by."""
