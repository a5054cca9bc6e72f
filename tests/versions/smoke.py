"""The framework on the torch of this interpreter: all modules are imported, a run is resumed, a layout proved.

Started by run.sh, once for each version. Not here: the tests themselves, which run on the version of constraints.txt.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
import tempfile
from pathlib import Path

import torch

import megatron_fp4
from megatron_fp4.cli import verify_parallel
from tests.helpers.tiny_run import tiny_run

STEPS = 20


def import_everything() -> int:
    """Without the kernels, which need Triton. Returns the number of modules."""
    names = [module.name for module in pkgutil.walk_packages(megatron_fp4.__path__, "megatron_fp4.")]
    names = [name for name in names if not name.startswith("megatron_fp4.kernels")]
    for name in names:
        importlib.import_module(name)
    return len(names)


def stop_and_resume(folder: Path) -> None:
    """Half of a run and the other half end in the state of a whole one, bit for bit; the quantizer is compiled."""
    base = tiny_run(folder, f"train.total_tokens={STEPS * 4 * 32}", "precision.compile=true", "train.check_gemms=true")
    whole = base.with_overrides(run_dir=folder / "whole")
    whole.run()
    base.with_overrides(f"train.stop_after_steps={STEPS // 2}").run()
    base.run()
    expected = whole.state(STEPS)
    different = [name for name, tensor in base.state(STEPS).items() if not torch.equal(tensor, expected[name])]
    assert not different, f"after a resume these differ: {different}"


def main() -> int:
    """Returns the exit code."""
    print(f"torch {torch.__version__}: {import_everything()} modules imported", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        stop_and_resume(Path(folder))
    print(f"torch {torch.__version__}: {STEPS} steps, stopped and resumed, equal bit for bit", flush=True)
    return verify_parallel.main(["model=gpt_tiny", "model.vocab_size=96", "--layouts", "tp2", "--steps", "2"])


if __name__ == "__main__":
    sys.exit(main())
