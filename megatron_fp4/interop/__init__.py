"""In and out of other people's files and names (floor 7)."""
