"""`python -m megatron_fp4 COMMAND`, also for launchers: `torchrun --nproc-per-node 2 -m megatron_fp4 evaluate RUN`."""

from megatron_fp4.cli.main import main

if __name__ == "__main__":
    main()
