"""How good the model is on the way: its loss on held-out text, and the questions of task files."""
