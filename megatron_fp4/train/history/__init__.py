"""What happened to a run, beside its curves: how it was launched, and what changed on the way."""
