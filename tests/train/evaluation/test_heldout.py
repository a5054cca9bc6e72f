"""The held-out loss, against torch's cross-entropy of the same tokens in FP64, and against what can be said by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_fp4.data.shards.shard import TokenShard
from megatron_fp4.data.text.text_bytes import TextBytes
from megatron_fp4.data.text.tokenizer import Tokenizer
from megatron_fp4.train.evaluation import heldout as evaluate_module
from megatron_fp4.train.evaluation import sets
from megatron_fp4.train.evaluation.heldout import EvaluationStopped, HeldOutLoss, evaluate
from megatron_fp4.train.inputs import look_ahead, make_inputs
from tests.helpers.tiny_run import VOCABULARY, tiny_run
from tests.train.in_process import TrainerInProcess, make_trainer

NUM_TOKENS, LENGTH = 300, 32  # nine whole samples of 32 targets, and one of 11


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> TrainerInProcess:
    folder = tmp_path_factory.mktemp("held_out")
    sets = f"[{{name: a, paths: ['{folder}/shards/toy'], max_tokens: {NUM_TOKENS}, may_overlap: true}}]"
    run = tiny_run(folder, "precision=bf16", f"data.evaluation={sets}", "train.eval_interval_steps=40")
    return make_trainer(run.overrides)[0]


def measured(trainer: TrainerInProcess) -> float:
    run = trainer.run
    return evaluate(run.engine, run.examiner.evaluations[0], run.plan.evaluation_table(), run.mesh, run.device).loss


@torch.no_grad()
def test_the_loss_is_the_mean_over_the_targets_of_the_file(trainer: TrainerInProcess) -> None:
    """Tokens straight from the shard, one sample at a time; the last one is short, so a mean of means is another."""
    model = trainer.run.engine.stages[0]
    paths = trainer.run.config.data.evaluation[0].paths
    shard = TokenShard(paths[0])
    tokens = torch.tensor([t for number in range(20) for t in shard.document(number).tolist()][:NUM_TOKENS])
    losses = []
    for start in range(0, NUM_TOKENS - 1, LENGTH):
        sample = tokens[start : start + LENGTH + 1]
        inputs = F.pad(sample[:-1], (0, LENGTH - len(sample) + 1))[None]  # causal: what follows is not seen
        logits = model(inputs, torch.arange(LENGTH)[None], torch.arange(LENGTH)[None], torch.zeros(1, LENGTH))
        losses.append(F.cross_entropy(logits[: len(sample) - 1].double(), sample[1:].long(), reduction="none"))
    expected = torch.cat(losses)
    assert len(expected) == NUM_TOKENS - 1
    assert measured(trainer) == pytest.approx(expected.mean().item(), rel=1e-6)


@torch.no_grad()
def test_each_depth_of_multi_token_prediction_has_a_loss(tmp_path: Path) -> None:
    """Over its own targets: d fewer of each sample. At depth d a position is judged by the token d behind its label."""
    sets = f"[{{name: a, paths: ['{tmp_path}/shards/toy'], max_tokens: {NUM_TOKENS}, may_overlap: true}}]"
    mtp = "model.mtp={depth: 2, pattern: '*-', shared: true}"
    run = make_trainer(tiny_run(tmp_path, "precision=bf16", f"data.evaluation={sets}", mtp).overrides)[0].run
    loader, model, depths = run.examiner.evaluations[0], run.engine.stages[0], [list[Tensor](), list[Tensor]()]
    for batch in loader:
        inputs = make_inputs(batch, run.mesh.cp, run.device, look_ahead(batch, 2))
        assert inputs.ahead is not None
        _, *logits = model(inputs.tokens, inputs.address, inputs.positions, inputs.documents, inputs.ahead)
        for d, (losses, of_depth) in enumerate(zip(depths, logits, strict=True), start=1):
            for row, of_row in enumerate(of_depth.view(*batch.tokens.shape, -1)):
                length = int(batch.loss_mask[row].sum()) - d
                if length > 0:
                    labels = batch.labels[row, d : d + length]
                    losses.append(F.cross_entropy(of_row[:length].double(), labels, reduction="none"))
    held_out = evaluate(run.engine, loader, run.plan.evaluation_table(), run.mesh, run.device)
    for losses, loss in zip(depths, held_out.depths, strict=True):
        assert loss == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)
    assert held_out.metrics()["mtp_2_loss"] == held_out.depths[1]
    assert str(held_out).endswith(f"{held_out.depths[1]:.4f} of token 3")


def test_a_head_of_zeros_knows_nothing(trainer: TrainerInProcess) -> None:
    """All tokens are equally likely: ln V nats for each of them."""
    head = trainer.run.engine.stages[0].get_parameter("head.weight")
    with torch.no_grad():
        head.zero_()
    assert measured(trainer) == pytest.approx(math.log(VOCABULARY), rel=1e-7)


def test_perplexity_and_bits_per_byte_are_the_same_loss(
    trainer: TrainerInProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Token n stands for n % 5 bytes; the bits of all targets over the bytes of all targets."""
    lengths = torch.arange(VOCABULARY, dtype=torch.float64) % 5
    monkeypatch.setattr(sets, "text_bytes", lambda _: TextBytes(lengths, None, False))
    run = trainer.run
    shard = TokenShard(run.config.data.evaluation[0].paths[0])
    tokens = [t for number in range(20) for t in shard.document(number).tolist()][1:NUM_TOKENS]
    examiner = replace(run.examiner, tokenizer=cast(Tokenizer, object()))
    (result,) = examiner.examine(run.plan.evaluation_table())
    loss = measured(trainer)
    assert result.metrics == {
        "eval/a/loss": loss,
        "eval/a/perplexity": math.exp(loss),
        "eval/a/bits_per_byte": pytest.approx(loss * len(tokens) / math.log(2) / sum(token % 5 for token in tokens)),
    }
    assert f"loss {loss:.4f}, perplexity {math.exp(loss):.4g}, " in result.text
    assert result.text.endswith(" bits per byte")


def test_what_is_not_known_is_absent_and_not_guessed(
    trainer: TrainerInProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer.run
    (alone,) = run.examiner.examine(run.plan.evaluation_table())
    assert set(alone.metrics) == {"eval/a/loss", "eval/a/perplexity"}, "the run names no tokenizer"
    monkeypatch.setattr(sets, "text_bytes", lambda _: TextBytes(torch.full((VOCABULARY,), math.nan), None, False))
    (unknown,) = replace(run.examiner, tokenizer=cast(Tokenizer, object())).examine(run.plan.evaluation_table())
    assert unknown.metrics == alone.metrics


def test_a_perplexity_beyond_all_numbers_is_infinite() -> None:
    assert HeldOutLoss(1000.0).perplexity == math.inf
    assert str(HeldOutLoss(math.log(2), 0.5)) == "loss 0.6931, perplexity 2, 0.5000 bits per byte"


def test_a_stop_is_voted_on_every_few_batches(trainer: TrainerInProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten samples in five batches: with every second one the ranks vote, before batches 0, 2 and 4, and hear the vote
    before; so the host never waits for what the device has still to do."""
    monkeypatch.setattr(evaluate_module, "VOTE_BATCHES", 2)
    run = trainer.run
    batches = 0

    def beat() -> None:
        nonlocal batches
        batches += 1

    asked: list[int] = []

    def stop() -> bool:
        asked.append(batches)
        return answer

    answer, arguments = (
        False,
        (run.engine, run.examiner.evaluations[0], run.plan.evaluation_table(), run.mesh, run.device),
    )
    evaluate(*arguments, beat, stop)
    assert (batches, asked) == (5, [0, 2, 4])
    answer = True
    with pytest.raises(EvaluationStopped):
        evaluate(*arguments, beat, stop)
    assert batches == 5 + 2, "more is computed than until the next vote"
