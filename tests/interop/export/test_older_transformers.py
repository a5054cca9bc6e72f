"""Exports read by transformers 4.57, the last of its line, which looks for some settings elsewhere.

tests/setup.sh installs it into a folder of its own, so that a process of its own imports it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_fp4.cli.checkpoint import main
from tests.helpers.tiny_run import TinyRun
from tests.interop.export.test_hf import TEXT

OLDER = Path(os.environ.get("MEGATRON_FP4_OLDER_TRANSFORMERS", Path(sys.prefix) / "transformers-4.57"))
SCRIPT = """
import json, sys, torch, transformers
folder, text = sys.argv[1:]
model = transformers.AutoModelForCausalLM.from_pretrained(folder)
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
with torch.no_grad():
    logits = model(torch.arange(24)[None]).logits
print(json.dumps({
    "version": transformers.__version__,
    "dtype": str(model.dtype),
    "logits": logits.flatten().tolist(),
    "ids": tokenizer(text)["input_ids"],
    "text": tokenizer.decode(tokenizer(text)["input_ids"]),
    "eos": [model.generation_config.eos_token_id, tokenizer.eos_token_id],
}))
"""


@pytest.mark.skipif(not OLDER.is_dir(), reason=f"transformers 4.57 is not installed in {OLDER}")
def test_it_computes_the_same(run: TinyRun, tmp_path: Path) -> None:
    """Base 500,000: with `rope_parameters` alone 4.57 takes 10,000, and says nothing."""
    transformers = pytest.importorskip("transformers")
    assert main(["export", str(run.run_dir), "--to", str(tmp_path / "hf"), "--dtype", "fp32"]) == 0
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "hf"), TEXT],
        env={**os.environ, "PYTHONPATH": str(OLDER)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout.splitlines()[-1])
    assert theirs["version"].startswith("4.57.")
    assert theirs["dtype"] == "torch.float32"
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    with torch.no_grad():
        expected = model(torch.arange(24)[None]).logits.flatten()
    torch.testing.assert_close(torch.tensor(theirs["logits"]), expected, rtol=1e-5, atol=1e-5)
    assert theirs["ids"] == tokenizer(TEXT)["input_ids"]
    assert theirs["text"] == TEXT
    assert theirs["eos"] == [2, 2]
