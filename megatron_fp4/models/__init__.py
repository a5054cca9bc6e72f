"""Model architectures: blocks in a pattern, and how they are split into pipeline stages (floor 5)."""
