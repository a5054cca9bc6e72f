"""Overrides and YAML files: where they are, what they say before hydra merges them, what is said if it cannot."""
