"""Questions are answered alike under every layout, and as a model by itself answers them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron_fp4.comm.bootstrap import Process
from megatron_fp4.comm.local import run_local
from megatron_fp4.data.tasks import TaskSet
from megatron_fp4.layers.linear import assign_precision
from megatron_fp4.train.evaluation import tasks as module
from megatron_fp4.train.evaluation.heldout import EvaluationStopped
from megatron_fp4.train.evaluation.tasks import TaskScore, answer_tasks
from megatron_fp4.train.telemetry.metrics import read_metrics
from tests.helpers.letters import make_tokenizer
from tests.helpers.tiny_run import TinyRun, tiny_run
from tests.train.in_process import TrainerInProcess, make_trainer

WORDS = ["the cat sat", "on a mat", "and so it goes", "x", "to be or not to be that is it", "up"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """One step and its evaluation; a hybrid, so that every mixer pads rows."""
    folder = tmp_path_factory.mktemp("tasks")
    questions = [
        {"context": WORDS[n % 6], "choices": [f" {WORDS[(n + k + 1) % 6]}" for k in range(2 + n % 3)], "answer": n % 2}
        for n in range(13)
    ]
    (folder / "quiz.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    return tiny_run(
        folder, "model=hybrid_tiny", "model.num_layers=3", "model.pattern='M*-'", "model.mamba_chunk=8",
        "precision.compute_dtype=fp32", "precision=nvfp4", "precision.keep_bf16={first: 0, last: 0}",
        "model.init_std=0.3", f"data.tokenizer='{make_tokenizer(folder)}'", "train.micro_batch=1",
        f"data.tasks=[{{name: quiz, path: '{folder}/quiz.jsonl'}}]", "train.eval_interval_steps=1",
        "train.stop_after_steps=1", "train.save_interval_steps=0", "precision.evaluation=same",
    )  # fmt: skip


def totals(trainer: TrainerInProcess, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """ln p of every choice, before it is graded."""
    seen: list[list[float]] = []
    right = module._graded

    def graded(tasks: TaskSet, values: list[float]) -> TaskScore:
        seen.append(values)
        return right(tasks, values)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_graded", graded)
        answers(trainer)
    return seen[0]


def answers(trainer: TrainerInProcess, precision: int = 0) -> TaskScore:
    run = trainer.run
    return answer_tasks(
        run.engine, run.examiner.tasks[0], run.plan.evaluation_table(precision), run.mesh, run.device,
        micro_batch=run.config.train.micro_batch, vocab_size=run.config.model.vocab_size,
    )  # fmt: skip


def test_the_likeliest_choice_by_a_model_by_itself(run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer((*run.overrides, "precision.evaluation=bf16"))[0]
    model, tasks = trainer.run.engine.stages[0], trainer.run.examiner.tasks[0]
    assign_precision(model, trainer.run.plan.evaluation_table())
    wanted = []
    for choice in tasks.choices:
        ids = torch.tensor([choice.ids])
        places = torch.arange(ids.shape[1] - 1)[None]
        with torch.no_grad():
            logits = model(ids[:, :-1], places, places, torch.zeros_like(places)).double().log_softmax(-1)
        own = ids[0, -choice.num_targets :]
        wanted.append(logits[-choice.num_targets :].gather(1, own[:, None]).sum().item())
    assert totals(trainer, monkeypatch) == pytest.approx(wanted, abs=1e-4)
    score = answers(trainer)
    right = normalized = 0
    for question, answer in enumerate(tasks.answers):
        numbers = [number for number, choice in enumerate(tasks.choices) if choice.question == question]
        right += max(numbers, key=lambda n: wanted[n]) == numbers[answer]
        normalized += max(numbers, key=lambda n: wanted[n] / tasks.choices[n].length) == numbers[answer]
    assert (score.accuracy, score.normalized) == (right / 13, normalized / 13)
    assert 0 < right < 13


def answered(process: Process, overrides: tuple[str, ...]) -> list[float]:
    trainer = make_trainer(overrides, process.world.rank, process.world.size)[0]
    with pytest.MonkeyPatch.context() as patch:
        return totals(trainer, patch)


@pytest.mark.parametrize("layout", ["tp", "cp", "pp", "dp"])
def test_no_layout_shows(layout: str, run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """In four bits, whose scales cover a whole batch with its padding."""
    overrides = (*run.overrides, *((f"parallel.{layout}=2",) if layout != "dp" else ()))
    alone = totals(make_trainer(run.overrides)[0], monkeypatch)
    both = run_local(answered, 2, overrides)
    assert both[0] == both[1]
    assert both[0] == pytest.approx(alone, abs=1e-5)


def test_a_run_logs_them_and_a_stop_ends_them(run: TinyRun) -> None:
    trainer, console = make_trainer(run.overrides)
    trainer.fit()
    (record,) = [record for record in read_metrics(run.run_dir) if "task/quiz/acc" in record]
    assert record["step"] == 1
    assert any(f"step 1: quiz acc {record['task/quiz/acc']:.4f}" in text for text in console.said)
    with pytest.raises(EvaluationStopped):
        answer_tasks(
            trainer.run.engine, trainer.run.examiner.tasks[0], trainer.run.plan.evaluation_table(), trainer.run.mesh,
            trainer.run.device, micro_batch=1, vocab_size=96, stop=lambda: True,
        )  # fmt: skip


def test_tasks_that_are_never_asked(run: TinyRun) -> None:
    with pytest.raises(ValueError, match=r"data\.tasks would have no effect"):
        make_trainer((*run.overrides, "train.eval_interval_steps=0"))
    assert Path(run.run_dir).exists()
