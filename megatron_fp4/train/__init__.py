"""Assemble a run from its configuration and carry it out (floor 6)."""
