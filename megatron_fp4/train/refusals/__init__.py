"""What a start refuses: packages and GPUs that are not there, precision over time, settings without effect."""
