"""A stranger's model comes in, trains in NVFP4 on two ranks, and leaves in three formats, which all say the same.

Logits, texts, held-out losses and what lm-eval finds are compared.
The model is random. All of it computes in FP32 with sums that no order shows, so that what differs is what was written.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from safetensors.torch import load_file
from torch import Tensor

from megatron_fp4.cli.checkpoint import main
from megatron_fp4.cli.compose import load_run_config
from megatron_fp4.cli.trained import evaluate, generate
from megatron_fp4.data.shards.shard import TokenShard
from megatron_fp4.inference.precisions import table_of
from megatron_fp4.train.open import open_trained
from tests.helpers.judged import asked, judged_model
from tests.interop.export.conftest import llama_run
from tests.interop.export.test_coded import TOKENS, modelopt_decoded

PROMPT = "def add("
STEPS = 20


def save_random_llama(transformers: Any, folder: Path) -> None:
    torch.manual_seed(7)
    config = transformers.LlamaConfig(
        vocab_size=448, hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, rms_norm_eps=1e-5, max_position_embeddings=32, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(TOKENS).logits
    return logits


def loaded(transformers: Any, name: str, folder: Path) -> Any:
    """The model in FP32, by the library that the format is of."""
    if name == "compressed-tensors":
        section = transformers.CompressedTensorsConfig(dequantize=True)
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=section, dtype=torch.float32
        )
    if name == "hf":
        return transformers.AutoModelForCausalLM.from_pretrained(folder)
    config = transformers.AutoConfig.from_pretrained(folder)
    del config.quantization_config  # which transformers does not know
    model = transformers.AutoModelForCausalLM.from_config(config)
    state = load_file(folder / "model.safetensors")
    coded = {key.rpartition(".")[0] for key, tensor in state.items() if tensor.dtype == torch.uint8}
    values = {key: tensor for key, tensor in state.items() if key.rpartition(".")[0] not in coded}
    model.load_state_dict(values | {f"{module}.weight": modelopt_decoded(state, module) for module in coded})
    return model.eval()


def mean_loss(model: Any, run_folder: Path) -> float:
    """The held-out loss over the first 512 tokens of the set, as a user of transformers would compute it."""
    tokens = torch.from_numpy(TokenShard(run_folder / "shards" / "toy").tokens[:512].astype("int64"))
    with torch.no_grad():
        logits = model(tokens.view(-1, 32)).logits.view(512, -1)
    return float(torch.nn.functional.cross_entropy(logits[:-1].double(), tokens[1:]))


def test_in_trained_and_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    save_random_llama(transformers, tmp_path / "theirs")
    assert main(["import", str(tmp_path / "theirs"), "--to", str(tmp_path / "start")]) == 0
    run = llama_run(
        tmp_path, "precision.compute_dtype=fp32", f"train.init_from='{tmp_path / 'start'}'",
        f"train.stop_after_steps={STEPS}", "parallel.tp=2", "model.scale_residual_init=false",
    )  # fmt: skip
    run.run(num_ranks=2)
    models = {}
    for name in ("hf", "compressed-tensors", "modelopt"):
        arguments = ["--format", name, "--dtype", "fp32", "--to", str(tmp_path / name)]
        assert main(["export", str(run.run_dir), *arguments]) == 0
        models[name] = loaded(transformers, name, tmp_path / name)
    ours: dict[str, Tensor] = {}
    trained = open_trained(load_run_config(run.run_dir))
    positions, zeros = torch.arange(TOKENS.shape[1]).expand_as(TOKENS), torch.zeros_like(TOKENS)
    for precision in ("bf16", "exported"):
        trained.assign(table_of(trained, precision))
        with torch.no_grad():
            rows = trained.engine.stages[0](TOKENS, zeros, positions, zeros)
        ours[precision] = rows.view(*TOKENS.shape, -1).float()
    spread = float(ours["bf16"].std())
    assert (ours["exported"] - ours["bf16"]).abs().max() > 0.02 * spread, "the codes must show"
    torch.testing.assert_close(logits_of(models["hf"]), ours["bf16"], rtol=1e-5, atol=1e-5 * spread)
    torch.testing.assert_close(logits_of(models["modelopt"]), ours["exported"], rtol=1e-5, atol=1e-5 * spread)
    rounded = (logits_of(models["compressed-tensors"]) - ours["exported"]).abs().max()
    assert rounded < 0.02 * spread, "its decompressor rounds weights to BF16, and nothing else"
    _compare_commands(run.run_dir, transformers, models, tmp_path, capsys)
    _compare_judgements(run.run_dir, transformers, models, tmp_path)


def _compare_judgements(run_dir: Path, transformers: Any, models: dict[str, Any], folder: Path) -> None:
    """lm-eval finds of each export, through its own model of transformers, what it finds of the run."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "hf")
    ours = {precision: judged_model(run_dir, precision) for precision in ("bf16", "exported")}
    for name, precision, error in (
        ("hf", "bf16", 1e-5), ("modelopt", "exported", 1e-5), ("compressed-tensors", "exported", 0.02),
    ):  # fmt: skip
        settings = {"add_bos_token": False, "batch_size": 2, "max_length": 32}
        theirs = HFLM(
            pretrained=models[name], tokenizer=tokenizer, prefix_token_id=ours[precision].prefix_token_id, **settings
        )
        pairs = [asked("loglikelihood", "def add(", "a, b):"), asked("loglikelihood", "", "import os")]
        texts = [asked("loglikelihood_rolling", "for name in names:\n    print(name)\n" * 2)]
        own, wanted = ours[precision].loglikelihood(pairs), theirs.loglikelihood(pairs, disable_tqdm=True)
        assert [value for value, _ in own] == pytest.approx([value for value, _ in wanted], rel=error)
        assert [greedy for _, greedy in own] == [greedy for _, greedy in wanted]
        own_rolling = ours[precision].loglikelihood_rolling(texts)
        assert own_rolling == pytest.approx(theirs.loglikelihood_rolling(texts, disable_tqdm=True), rel=error)


def _compare_commands(
    run_dir: Path, transformers: Any, models: dict[str, Any], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`evaluate` prints the loss of each file, and `generate` the text of the one without codes."""
    capsys.readouterr()
    assert evaluate.main([str(run_dir), "--precision", "bf16", "--precision", "exported"]) == 0
    losses = [float(text) for text in re.findall(r"loss ([\d.]+), ", capsys.readouterr().out)]
    assert mean_loss(models["hf"], folder) == pytest.approx(losses[0], abs=1e-4)
    assert mean_loss(models["modelopt"], folder) == pytest.approx(losses[1], abs=1e-4)
    assert losses[0] != losses[1]
    assert generate.main([str(run_dir), "--prompt", PROMPT, "--tokens", "12", "--temperature", "0"]) == 0
    text = capsys.readouterr().out.partition("\n")[2]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "hf")
    prompt = tokenizer(PROMPT, return_tensors="pt")
    continued = models["hf"].generate(**prompt, max_new_tokens=12, do_sample=False)
    assert tokenizer.decode(continued[0], skip_special_tokens=True).strip() == text.strip()
