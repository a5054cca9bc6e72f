"""Checkpoints: rectangles of logical tensors in torch.distributed.checkpoint files, complete or absent (floor 3)."""

from megatron_fp4.checkpoint.config import CheckpointConfig, OnCorrupt
from megatron_fp4.checkpoint.load import CorruptCheckpoint, Verified
from megatron_fp4.checkpoint.save import SaveFailed, SaveReport, SaveStatus
from megatron_fp4.checkpoint.store import CheckpointStore

__all__ = [
    "CheckpointConfig",
    "CheckpointStore",
    "CorruptCheckpoint",
    "OnCorrupt",
    "SaveFailed",
    "SaveReport",
    "SaveStatus",
    "Verified",
]
