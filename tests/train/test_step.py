"""One step: it reads as it runs, and its message tells every rank the same."""

from __future__ import annotations

import inspect
import re

import torch

from megatron_fp4.optim.clip import norm_of
from megatron_fp4.train.message import StepAgreement, StepMessage, TokensDifferError, exchange
from megatron_fp4.train.phases import STEP_PHASES
from megatron_fp4.train.step import train_step
from tests.helpers.distributed import mesh_for, run_distributed


def messages(rank: int, world_size: int) -> list[StepAgreement | str]:
    """tp 2, dp 2: an agreement; then rank 1, second of the first pair, is fed other tokens."""
    mesh = mesh_for(rank, world_size, tp=2, dp=2)
    answers: list[StepAgreement | str] = []
    for strayed in (False, True):
        tokens = 1000 + mesh.dp.rank + 7 * (strayed and rank == 1)
        loss, square = (torch.tensor(value, dtype=torch.float64) for value in (0.1 * (rank + 1), (rank + 1) ** 2))
        try:
            message = StepMessage(
                loss, square, stop=rank == 2, late=rank == 3, num_targets=10 + mesh.dp.rank, tokens_hash=tokens
            )
            answers.append(exchange(message, mesh))
        except TokensDifferError as error:
            answers.append(str(error))
    return answers


def test_all_ranks_agree_and_all_see_a_peer_that_was_fed_other_tokens() -> None:
    ranks = run_distributed(messages, 4)
    for agreement, error in ranks:
        assert agreement == ranks[0][0], "the ranks come to different conclusions"
        assert abs(agreement.loss - 1.0) < 1e-12, "a rank's loss is lost, or counted twice"
        assert agreement.norm == norm_of(1 + 4 + 9 + 16), "a rank's part of the norm is lost, or counted twice"
        assert agreement.stop, "a request to stop on one rank is not seen by all"
        assert agreement.late, "one rank's sums are worthless, and not all know"
        assert agreement.num_targets == 10 + 11, "once for each data shard, whatever the ranks that share it"
        assert error.startswith("data shard 0: 1 of its 2 ranks were fed other tokens"), error


def test_the_six_parts_begin_where_their_number_stands() -> None:
    """The parts that the docstring numbers are those of the body, and of the watchdog and the straggler report."""
    named = re.findall(r"^    (\d) (\w+(?: \w+)*)  ", inspect.getsource(train_step), flags=re.MULTILINE)
    entered = re.findall(r'^    enter\("(\w+)"\)  # (\d)$', inspect.getsource(train_step), flags=re.MULTILINE)
    assert [number for number, _ in named] == [number for _, number in entered] == list("123456")
    phases = [phase for phase, _ in entered]
    assert ("data", *phases[:-1]) == STEP_PHASES, "the stragglers of a part would not be seen"
