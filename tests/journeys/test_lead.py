"""The lead of a run on thousands of GPUs: what it will need, and whether it will hold, before it is paid for."""

from __future__ import annotations

from pathlib import Path

from tests.helpers.tiny_run import write_toy_shard
from tests.journeys.shell import Shell

PAPER = "experiment=paper_12b_10t model.vocab_size=131072 data.tokenizer="
SMALL = "model=gpt_tiny model.num_layers=2 model.vocab_size=96 precision.compile=false train.device=cpu"
LARGE = "model.hidden=256 model.ffn_hidden=1024 train.global_batch=32 parallel.tp=2 --gpus 64"
DATA = "'data.sources=[{name: web, paths: [data/web_text_document], max_epochs: 0}]' data.seq_length=64"


def test_from_the_plan_to_the_proofs(tmp_path: Path) -> None:
    """The paper's 12B is planned; a small model stands for it where something is computed."""
    shell = Shell(tmp_path)
    write_toy_shard(tmp_path / "data/web_text_document")
    search = shell(f"megatron-fp4 plan {PAPER} --search --gpus 2944")
    overrides = search.split("The first, as overrides\n")[1].splitlines()[0].strip()
    plan = shell(f"megatron-fp4 plan {PAPER} {overrides} --gpus 2944")
    assert "2944 GPUs = tp " in plan, "what the search prints can be typed"
    assert "CANNOT RUN" not in plan
    rehearsed = shell(
        f"megatron-fp4 rehearse {SMALL} {LARGE} model.vocab_size=4096 data.sources=[] data.seq_length=256"
    )
    assert "verdict: as planned" in rehearsed
    assert "this run can start" in shell(f"megatron-fp4 preflight {SMALL} {DATA} train.total_tokens=64000")
    assert "3 of 3 comparisons passed" in shell(f"megatron-fp4 verify-parallel {SMALL} --layouts tp2 --steps 2")
    shell(f"megatron-fp4 verify-resume {SMALL} --layout dp1 --others dp1 --steps 2")
