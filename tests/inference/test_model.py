"""Rows are scored and continued alike, whatever is beside them, whoever computes them, with a cache or without."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_fp4.comm.bootstrap import Process, start_alone
from megatron_fp4.comm.config import ParallelConfig
from megatron_fp4.comm.launch import Launch
from megatron_fp4.comm.local import run_local
from megatron_fp4.comm.mesh import DrawnGroup
from megatron_fp4.inference.model import Prompt, RowModel, Sampling, Score, TokenRow
from megatron_fp4.models.past import remembering
from megatron_fp4.train.config import RunConfig
from megatron_fp4.train.open import TrainedModel, open_trained
from tests.helpers.tiny_run import tiny_run
from tests.train.in_process import make_trainer

MODELS = {
    "attention": ("model=gpt_tiny", "model.num_layers=2"),
    "window": (
        "model=gpt_tiny",
        "model.num_layers=2",
        "model.sliding_window=5",
        "model.qk_norm=head",
        "model.qkv_bias=true",
        "model.rope_fraction=0.5",
    ),
    "hybrid": ("model=hybrid_tiny", "model.num_layers=3", "model.pattern='M*-'", "model.mamba_chunk=8"),
    "experts": (
        "model=gpt_tiny",
        "model.num_layers=3",
        "model.pattern='E*E'",
        "model.moe={num_experts: 8, ffn_hidden: 32, shared_ffn_hidden: 32, expert_bias: true, bias_rate: 0.05}",
    ),
}
LENGTHS = (3, 1, 9, 17, 2)
NOISE = Sampling(temperature=1.0, seed=3)


@pytest.fixture(scope="module", params=MODELS)
def config(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run of two steps in the proof mode, whose recipe quantizes everything."""
    run = tiny_run(
        tmp_path_factory.mktemp("run"), *MODELS[request.param], "precision.compute_dtype=fp32", "precision=nvfp4",
        "precision.keep_bf16={first: 0, last: 0}", "precision.evaluation=bf16", "model.init_std=0.3",
        "train.stop_after_steps=2", "train.save_interval_steps=2",
    )  # fmt: skip
    trainer = make_trainer(run.overrides)[0]
    trainer.fit()
    return trainer.run.config


@pytest.fixture(scope="module")
def trained(config: RunConfig) -> TrainedModel:
    return open_trained(config, documents_apart=True)


def some_ids(length: int) -> list[int]:
    return torch.randint(2, 96, (length,), generator=torch.Generator().manual_seed(length)).tolist()


PROMPTS = [Prompt(some_ids(length), 3 + length % 5, NOISE) for length in LENGTHS]
ROWS = [TokenRow(some_ids(length + 3), 1 + length % 3) for length in LENGTHS]


def never(before: list[int], ids: list[int]) -> bool:
    return False


def test_a_score_is_the_log_softmax_of_the_model(trained: TrainedModel) -> None:
    scores = RowModel(trained).score(ROWS)
    (model,) = trained.engine.stages
    for row, score in zip(ROWS, scores, strict=True):
        ids = torch.tensor([row.ids[:-1]])
        positions = torch.arange(ids.shape[1])[None]
        with torch.no_grad():
            logits = model(ids, positions, positions, torch.zeros_like(ids)).double()
        targets = torch.tensor(row.ids[-row.num_targets :])
        chosen = logits.log_softmax(-1)[-row.num_targets :]
        assert score.log_probability == pytest.approx(chosen.gather(1, targets[:, None]).sum().item(), abs=1e-4)
        assert score.greedy == bool((chosen.argmax(-1) == targets).all())


def test_what_is_greedy(trained: TrainedModel) -> None:
    (added,) = RowModel(trained).continue_rows([Prompt(PROMPTS[0].ids, 6)], never)
    scores = RowModel(trained).score(
        [TokenRow(PROMPTS[0].ids + added, 6), TokenRow(PROMPTS[0].ids + added[:-1] + [95], 6)]
    )
    assert [score.greedy for score in scores] == [True, False]
    assert added[-1] != 95


def test_neither_cache_nor_batch_shows(trained: TrainedModel) -> None:
    """Rows of unequal length in one batch, of which one ends early."""
    alone = [RowModel(trained, batch=1, cache=False).continue_rows([prompt], never)[0] for prompt in PROMPTS]
    assert [len(ids) for ids in alone] == [prompt.num_tokens for prompt in PROMPTS]
    assert len({tuple(ids[:3]) for ids in alone}) == len(alone), "the model says one thing whatever it is asked"
    for batch in (1, 2, 5):
        assert RowModel(trained, batch=batch).continue_rows(PROMPTS, never) == alone
    ended = RowModel(trained, batch=5).continue_rows(PROMPTS, lambda _, ids: ids == alone[2][:2])
    assert ended == [*alone[:2], alone[2][:2], *alone[3:]]
    scores = RowModel(trained, batch=5).score(ROWS)
    singly = [RowModel(trained).score([row])[0] for row in ROWS]
    assert [score.log_probability for score in scores] == pytest.approx([s.log_probability for s in singly], abs=1e-5)


def test_what_was_remembered_is_forgotten(trained: TrainedModel) -> None:
    model = RowModel(trained)
    before = model.score(ROWS)
    with pytest.raises(ZeroDivisionError):
        model.continue_rows(PROMPTS, lambda *_: 1 // 0 > 0)
    assert model.score(ROWS) == before


def test_quantized_activations_are_of_one_row(trained: TrainedModel) -> None:
    model = RowModel(trained)
    model.compute_in(trained.table("same"))
    assert model.score(ROWS) == [model.score([row])[0] for row in ROWS]
    assert model.score(ROWS) != RowModel(trained).score(ROWS)


def computed(process: Process, config: RunConfig, greedy: list[TokenRow]) -> list[tuple[list[Score], list[list[int]]]]:
    """Scores and continuations, per precision."""
    model = RowModel(trained := open_trained(config, None, process, documents_apart=True), batch=2)
    results = []
    for precision in ("bf16", "same"):
        model.compute_in(trained.table(precision))
        results.append((model.score([*ROWS, *greedy]), model.continue_rows(PROMPTS, never)))
    return results


@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 2}, {}], ids=["tp2", "pp2", "dp2"])
def test_no_layout_shows(layout: dict[str, int], config: RunConfig, trained: TrainedModel) -> None:
    ids = PROMPTS[3].ids
    greedy = [TokenRow(ids + RowModel(trained).continue_rows([Prompt(ids, 5)], never)[0], 5)]
    wanted = computed(start_alone("cpu"), config, greedy)
    assert [score.greedy for score in wanted[0][0]] == [False] * len(ROWS) + [True]
    shared = {"ep": 2} if "E" in config.model.blocks and "tp" in layout else {}
    first, other = run_local(computed, 2, replace(config, parallel=ParallelConfig(**layout, **shared)), greedy)
    assert other == [([], [])] * 2, "rank 0 has the results"
    for (scores, ids), (right_scores, right_ids) in zip(first, wanted, strict=True):
        assert ids == right_ids
        assert [score.greedy for score in scores] == [score.greedy for score in right_scores]
        values = [score.log_probability for score in right_scores]
        assert [score.log_probability for score in scores] == pytest.approx(values, abs=1e-5)


def test_ranks_that_no_layout_has(config: RunConfig) -> None:
    two = Process(Launch(world_size=2, local_world_size=2), DrawnGroup("world", (0, 1), 0), torch.device("cpu"))
    with pytest.raises(ValueError, match=r"parallel\.tp=3 and parallel\.pp=1; start 1 rank, or a multiple of 3, not 2"):
        open_trained(replace(config, parallel=ParallelConfig(tp=3)), None, two)


def test_nothing_to_go_on_from(trained: TrainedModel) -> None:
    with pytest.raises(ValueError, match="a prompt has no token"):
        RowModel(trained).continue_rows([Prompt([], 3)], never)
    with pytest.raises(ValueError, match="a row of 2 ids cannot have 2 targets"):
        RowModel(trained).score([TokenRow([4, 5], 2)])


def test_stages_remember_only_while_they_should(trained: TrainedModel) -> None:
    stages = trained.engine.stages
    with remembering(stages):
        mixers = [module for stage in stages for module in stage.modules() if getattr(module, "past", None) is not None]
        assert mixers
    assert all(mixer.past is None for mixer in mixers)
