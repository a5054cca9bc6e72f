"""Sweeps: one run for each combination of the values that were typed, and one comparison at the end."""
