"""The step reads as it runs: the parts that its docstring numbers are those of its body and of the watchdog."""

from __future__ import annotations

import inspect
import re

from megatron_fp4.train.phases import STEP_PHASES
from megatron_fp4.train.step import train_step


def test_the_six_parts_begin_where_their_number_stands() -> None:
    named = re.findall(r"^    (\d) (\w+(?: \w+)*)  ", inspect.getsource(train_step), flags=re.MULTILINE)
    entered = re.findall(r'^    enter\("(\w+)"\)  # (\d)$', inspect.getsource(train_step), flags=re.MULTILINE)
    assert [number for number, _ in named] == [number for _, number in entered] == list("123456")
    phases = [phase for phase, _ in entered]
    assert ("data", *phases[:-1]) == STEP_PHASES, "the stragglers of a part would not be seen"
