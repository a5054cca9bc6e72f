"""What a checkpoint keeps of a run, and what a resumed run may change."""
