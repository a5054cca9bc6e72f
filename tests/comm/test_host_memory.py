"""Freed tensors are handed out again instead of going back to the kernel."""

from __future__ import annotations

import resource

import pytest
import torch

from megatron_fp4.comm.bootstrap import Process
from megatron_fp4.comm.host_memory import keep_freed_memory
from megatron_fp4.comm.local import run_local


def page_faults() -> int:
    """Faults while a tensor of 64 MiB is made and freed eight times."""
    x = torch.ones(64 << 20, dtype=torch.uint8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        x.clone()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def faults_before_and_after(process: Process) -> tuple[int, bool, int]:
    before, done = page_faults(), keep_freed_memory()
    page_faults()  # the heap grows, and perhaps once more
    return before, done, page_faults()


def test_large_tensors_reuse_their_pages() -> None:
    ((before, done, after),) = run_local(faults_before_and_after, 1)
    if not done:
        pytest.skip("this C library has no mallopt")
    assert after < before / 4, f"{after} page faults, {before} without: the setting has no effect any more"
