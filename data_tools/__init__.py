"""Text to shards: the tools around `megatron_fp4.data`. Each module has `main(argv)`; cli.py dispatches."""
