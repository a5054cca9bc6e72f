"""Checkpoints: rectangles of logical tensors in files that all ranks write side by side, complete or absent (floor 4).

    (none)
      | save.py         the ranks agree in one message; rank 0 makes the directory
    step_N.writing-...
      | write.py        a thread of each rank: its part of a file, fsynced; then its mark in the store (marks.py)
      | commit.py       rank 0's thread, when all marks are there: layout, small state, manifest
    sealed
      | commit.py       rename; `latest` is replaced
    step_N              load.py: choose() -> Verified, load(Verified, shards)
      | retention.py    when no rule keeps it: rename to step_N.deleting-...
    (gone)

A rank that fails on the way renames step_N.writing-... to step_N.failed-..., which stops the others; what a killed run
left is swept at the next start (retention.py). directory.py has the names, pieces/ what is in the files.
"""

from megatron_fp4.checkpoint.config import CheckpointConfig, OnCorrupt
from megatron_fp4.checkpoint.directory import latest_step
from megatron_fp4.checkpoint.load import CheckpointReader, CorruptCheckpoint, Verified
from megatron_fp4.checkpoint.outcome import SaveFailed, SaveReport, SaveStatus
from megatron_fp4.checkpoint.store import CheckpointStore
from megatron_fp4.checkpoint.weights import load_weights

__all__ = [
    "CheckpointConfig",
    "CheckpointReader",
    "CheckpointStore",
    "CorruptCheckpoint",
    "OnCorrupt",
    "SaveFailed",
    "SaveReport",
    "SaveStatus",
    "Verified",
    "latest_step",
    "load_weights",
]
