"""Commands for whoever looks after runs: how one stands."""
