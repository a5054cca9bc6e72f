"""Multi-token prediction: further heads' worth of blocks that predict the tokens after the next one."""
