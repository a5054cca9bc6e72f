"""The commands that look ahead: what a run will need, and what a step of any of its ranks does."""
