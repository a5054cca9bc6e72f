"""What may go wrong in a run: stop requests, hangs, loss spikes, and the way back."""
