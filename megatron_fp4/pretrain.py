"""`python -m megatron_fp4.pretrain experiment=quickstart model.num_layers=4 ...`: one rank of a pretraining job.

Arguments: cli/pretrain.py. Life: train/job.py.
"""

import signal

if __name__ == "__main__":  # what is imported next takes seconds, and would answer Ctrl-C with a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from megatron_fp4.storage.imports import modules_of_frames_by_name

with modules_of_frames_by_name():
    from megatron_fp4.cli.pretrain import console_main, main

__all__ = ["console_main", "main"]

if __name__ == "__main__":
    console_main()
