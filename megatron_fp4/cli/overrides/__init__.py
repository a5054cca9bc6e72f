"""What overrides and YAML files say, before hydra merges them."""
