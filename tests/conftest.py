"""Ranks of tests are forked from one server, which has imported the modules of all tests that start any.

Without it the server knows the module of the first such test, and every rank of every other imports half of
megatron_fp4 for itself: 0.5 s a rank instead of 0.05.
"""

from __future__ import annotations

import sys

STARTERS = ("run_distributed", "run_local")


def pytest_collection_finish() -> None:
    if local := sys.modules.get("megatron_fp4.comm.local"):
        modules = [name for name in sorted(sys.modules) if name.startswith(("tests.", "megatron_fp4."))]
        starting = [name for name in modules if any(hasattr(sys.modules[name], starter) for starter in STARTERS)]
        local.PRELOADED += ["pytest", *starting]
