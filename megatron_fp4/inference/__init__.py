"""A trained model at work, on any layout: texts are scored, continued and judged (floor 7)."""
