"""Interpreted and compiled tests are two processes, because `triton.jit` reads TRITON_INTERPRET once: run.sh sets it.

Without it, as in the plain suite, the tests of this folder are not collected.
"""

import os

MODE = os.environ.get("TRITON_INTERPRET", "")
collect_ignore = [folder for folder, mode in (("interpreted", "1"), ("compiled", "0")) if mode != MODE]
