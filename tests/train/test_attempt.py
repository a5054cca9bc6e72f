"""A rollback is a new attempt: nothing that counts steps survives it, and the next one is born as on any resume."""

from __future__ import annotations

from pathlib import Path

from megatron_fp4.train.trainer import Attempt
from tests.helpers.tiny_run import tiny_run
from tests.train.faults.test_faults_spikes import LADDER, plant
from tests.train.in_process import make_trainer, values_of


def test_an_attempt_holds_nothing_of_the_one_before(tmp_path: Path) -> None:
    """Steps 11 and 12 spike: back to step 8, past evaluations, a save and a change of precision at step 10."""
    sets = f"data.evaluation=[{{name: held, paths: ['{tmp_path}/shards/toy'], max_tokens: 64, may_overlap: true}}]"
    switch = f"precision.switch=[{{at_tokens: {9 * 4 * 32}, use: bf16}}]"
    run = tiny_run(tmp_path, *LADDER[:-1], sets, "train.eval_interval_steps=1", switch, "train.stop_after_steps=13")
    trainer, console = make_trainer(run.overrides)
    plant(trainer, range(40, 48))
    assert trainer.fit() == 0
    first, second = trainer.attempts
    changes = [text.splitlines()[0] for text in console.said if "precision changes" in text]
    assert changes == ["step 10: precision changes"] * 2, "the precision of the undone steps was remembered"

    undone = {id(value) for value in vars(first).values() if hasattr(value, "__dict__")}
    carried = {name for name, value in vars(second).items() if id(value) in undone}
    assert carried == {"run", "outputs"}, "what the undone steps left in the others goes on counting"
    assert set(vars(trainer.outputs)) == {"metrics", "console", "stop", "guard", "wandb_id"}, (
        "an output that counts steps must be told of a rollback in `fit`, or belong to the attempt"
    )

    born = trainer.births[1]
    assert (born["position"].step, first.position.step) == (8, 11)
    assert born["_score"] is None, "the loss of an undone evaluation would rank a checkpoint"
    with Attempt(trainer.run, born["position"], trainer.outputs) as fresh:
        assert values_of(fresh) == born, "an attempt after a rollback begins otherwise than one after a resume"
