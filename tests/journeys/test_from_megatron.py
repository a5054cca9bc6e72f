"""Somebody from Megatron-LM: shards as they are, names answered with ours, a model that leaves for others."""

from __future__ import annotations

from pathlib import Path

from tests.helpers.tiny_run import write_toy_shard
from tests.journeys.shell import Shell


def test_from_bin_and_idx_to_a_folder_of_transformers(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    write_toy_shard(tmp_path / "data/web_text_document")
    refused = shell("megatron-fp4 pretrain model.hidden_size=64", expect=2)
    assert "model.hidden" in refused
    refused = shell("megatron-fp4 pretrain tensor_model_parallel_size=2", expect=2)
    assert "parallel.tp" in refused
    run = (
        "megatron-fp4 pretrain model=gpt_tiny model.num_layers=2 model.vocab_size=96 model.activation=swiglu"
        " precision.compile=false 'data.sources=[{name: web, paths: [data/web_text_document]}]' data.seq_length=32"
        " train.device=cpu train.micro_batch=4 train.global_batch=4 train.total_tokens=1280 train.run_dir=runs/a"
    )
    assert "finished: 10 steps" in shell(run)
    assert "this run was finished already" in shell(run)
    shell("megatron-fp4 checkpoint export runs/a --to llama")
    assert (tmp_path / "llama/config.json").exists()
    begun = shell(f"{run} train.run_dir=runs/b train.init_from=llama")
    assert "/llama (" in begun, "where the weights came from"
