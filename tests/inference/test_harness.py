"""What lm-eval finds of a run is what it finds of its export, asked through transformers; on any layout."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from megatron_fp4.cli import checkpoint
from megatron_fp4.cli.compose import load_run_config
from megatron_fp4.cli.trained import eval_harness
from megatron_fp4.comm.bootstrap import Process
from megatron_fp4.comm.config import ParallelConfig
from megatron_fp4.comm.local import run_local
from megatron_fp4.train.open import open_trained
from tests.helpers.judged import asked, judged_model
from tests.helpers.letters import make_tokenizer
from tests.helpers.tiny_run import tiny_run
from tests.train.in_process import make_trainer

CHOICE = """
task: which_word
dataset_path: json
dataset_kwargs: {data_files: {test: 'FOLDER/questions.jsonl'}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
TEXT = """
task: running_text
dataset_path: json
dataset_kwargs: {data_files: {test: 'FOLDER/questions.jsonl'}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}, {metric: word_perplexity}]
"""
WRITE = """
task: what_follows
dataset_path: json
dataset_kwargs: {data_files: {test: 'FOLDER/questions.jsonl'}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{text}}"
generation_kwargs: {until: ["q"], max_gen_toks: 9, do_sample: false}
metric_list: [{metric: exact_match}]
"""
TASKS = "which_word,running_text,what_follows"
"""Written to files of their own; the same questions serve all three."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a Llama, its export in FP32, and tasks."""
    folder = tmp_path_factory.mktemp("judged")
    tokenizer = make_tokenizer(folder)
    run = tiny_run(
        folder, "model.activation=swiglu", "model.init_std=0.1", "precision.compute_dtype=fp32", "precision=nvfp4",
        "precision.keep_bf16={first: 0, last: 0}", f"data.tokenizer='{tokenizer}'", "data.seq_length=64",
        "train.total_tokens=10240", "train.stop_after_steps=2", "train.save_interval_steps=2",
    )  # fmt: skip
    trainer = make_trainer(run.overrides)[0]
    trainer.fit()
    questions = [
        {
            "question": "the cat sat ",
            "choices": ["on the mat", "in a hat", "q"],
            "answer": 0,
            "text": "so it goes " * 9,
        },
        {"question": "a dog ran", "choices": [" away", " to me", " up up up"], "answer": 2, "text": "and on"},
        {"question": "x", "choices": ["y", "z z"], "answer": 1, "text": "x y z"},
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    for name, text in {"choice": CHOICE, "text": TEXT, "write": WRITE}.items():
        (folder / f"{name}.yaml").write_text(text.replace("FOLDER", str(folder)))
    return folder


def judged(folder: Path, *arguments: str) -> dict[str, Any]:
    """What the command finds, by precision and task."""
    where = [str(folder / "run"), "--tasks", TASKS, "--include-path", str(folder), "--output", str(folder / "out.json")]
    assert eval_harness.main([*where, *arguments]) == 0
    answer: dict[str, Any] = json.loads((folder / "out.json").read_text())
    return answer


def transformers_model(folder: Path) -> Any:
    """lm-eval's own model of transformers, over the export."""
    from lm_eval.models.huggingface import HFLM

    newest = str(folder / "run/checkpoints/step_00000002")
    assert checkpoint.main(["export", newest, "--to", str(folder / "hf"), "--dtype", "fp32"]) == 0
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), eos_token="</s>", pad_token="</s>"
    )
    model = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32)
    return HFLM(pretrained=model, tokenizer=tokenizer, add_bos_token=False, batch_size=2, max_length=64)


def found_by(model: Any, folder: Path) -> dict[str, Any]:
    """What lm-eval finds of a model of its own."""
    answer = simple_evaluate(
        model=model, tasks=TASKS.split(","), bootstrap_iters=0, log_samples=False,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
    )  # fmt: skip
    assert answer is not None
    return dict(answer["results"])


def numbers(results: dict[str, Any]) -> dict[tuple[str, str], float]:
    """Task and metric -> value, without standard errors, which are drawn."""
    return {
        (task, key): value
        for task, metrics in results.items()
        for key, value in metrics.items()
        if isinstance(value, float) and "stderr" not in key
    }


def test_the_export_asked_through_transformers_says_the_same(folder: Path) -> None:
    answer = judged(folder, "--precision", "bf16", "--precision", "same", "--precision", "exported")
    ours, theirs = judged_model(folder / "run", "bf16"), transformers_model(folder)
    own, wanted = numbers(answer["bf16"]), numbers(found_by(theirs, folder))
    assert own.keys() == wanted.keys()
    assert {task for task, _ in own} == set(TASKS.split(","))
    assert own == pytest.approx(wanted, abs=1e-6, rel=1e-6)
    for precision in ("same", "exported"):
        assert numbers(answer[precision]) != own, "four bits do not show"
    assert numbers(answer["same"]) != numbers(answer["exported"])
    prompts = ["the cat sat ", "a", "so it goes and goes and goes and goes and goes on for ever and ever"]
    for settings in ({"max_gen_toks": 9}, {"max_gen_toks": 30, "until": ["e", "g"]}):
        questions = [asked("generate_until", prompt, settings) for prompt in prompts]
        texts = ours.generate_until(questions)
        assert texts == theirs.generate_until(questions, disable_tqdm=True)
        assert any(texts)
    pairs = [("", "to be"), ("to be", " or not"), ("x" * 70, "y" * 5), ("x ", "y")]
    questions = [asked("loglikelihood", *pair) for pair in pairs]
    for own_score, their_score in zip(ours.loglikelihood(questions), theirs.loglikelihood(questions), strict=True):
        assert own_score[0] == pytest.approx(their_score[0], abs=1e-4)
        assert own_score[1] == their_score[1]


def judged_on_ranks(process: Process, folder: Path, arguments: list[str]) -> None:
    config = replace(load_run_config(folder / "run"), parallel=ParallelConfig(tp=2))
    eval_harness.judge(open_trained(config, None, process, documents_apart=True), eval_harness.parse(arguments))


def test_rank_0_asks_for_all(folder: Path) -> None:
    where = ["--tasks", TASKS, "--include-path", str(folder), "--output", str(folder / "two.json")]
    run_local(judged_on_ranks, 2, folder, [str(folder / "run"), *where, "--precision", "same"])
    alone = judged(folder, "--precision", "same")
    assert numbers(json.loads((folder / "two.json").read_text())["same"]) == pytest.approx(numbers(alone["same"]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", TASKS, "--precision", "fp3"], "precision recipe 'fp3' does not exist"),
        (["--tasks", "what_follows", "--gen-kwargs", "max_gen_toks=64"], "generates 64 tokens, and the run"),
        (["--tasks", "what_follows", "--gen-kwargs", "top_p=0.9"], "settings top_p of a task have no meaning"),
        (["--tasks", TASKS, "--bos"], "says of no token that it is its bos"),
    ],
)  # fmt: skip
def test_refusals(arguments: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert eval_harness.main([str(folder / "run"), "--include-path", str(folder), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_task_that_is_not_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "lm_eval.tasks.TaskManager", lambda **_: TaskManager(include_path=str(folder), include_defaults=False)
    )
    assert eval_harness.main([str(folder / "run"), "--include-path", str(folder), "--tasks", "which_wrod"]) == 2
    assert "lm-eval has no task which_wrod" in capsys.readouterr().err


def test_a_machine_without_lm_eval(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(eval_harness, "find_spec", lambda name: None)
    assert eval_harness.main(["run", "--tasks", "arc_easy"]) == 2
    assert "pip install 'megatron-fp4[judge]'" in capsys.readouterr().err
