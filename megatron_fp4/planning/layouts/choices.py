"""The layouts that a world allows, each with its time: what `search` (search.py) chooses from.

What layouts share is worked out once: the precision plan depends on the tokens of a microbatch alone, whether a backend
can quantize on those and tp, the order of a pipeline on pp, schedule and number of microbatches.

Not here: memory, and the order in which layouts are looked at.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from megatron_fp4.pipeline.schedules import SCHEDULES
from megatron_fp4.planning.cost.hardware import Site
from megatron_fp4.planning.cost.time import StepTime, step_time
from megatron_fp4.planning.idle import PipelineLayout, idle_part
from megatron_fp4.planning.layouts.bound import TimeBound
from megatron_fp4.planning.layouts.chosen import ChosenLayout
from megatron_fp4.planning.settings import RankSettings
from megatron_fp4.train.checked import CheckedConfig, check_config
from megatron_fp4.train.config import RunConfig

LARGEST = {"tp": 16, "pp": 16, "cp": 16}
LARGEST_EP = 128
MICRO_BATCHES = (1, 2, 4)


@dataclass(frozen=True)
class TimedLayout:
    """A layout with its times."""

    layout: ChosenLayout
    checked: CheckedConfig
    pipeline: PipelineLayout
    settings: RankSettings
    idle: float
    time: StepTime


class Choices:
    """Layouts of a world. fallen: how many fell out, by the first reason.

    One of them: with cp > 1 convolution and scan of Mamba-2 are torch's loops (train/telemetry/slow_paths.py), the time
    of which no figure of a machine tells.
    """

    def __init__(self, config: RunConfig, site: Site, micro_batches: Sequence[int] = MICRO_BATCHES) -> None:
        self.config, self.site = config, site
        self._micro_batches = micro_batches
        self._bound = TimeBound(config, site)
        self.fallen: Counter[str] = Counter()
        self._by_tokens: dict[tuple[int, int], CheckedConfig | str] = {}
        self._quantizable: dict[tuple[int, int, int], bool] = {}

    def layouts(self) -> list[ChosenLayout]:
        """The layouts that a run would not refuse; the others are counted."""
        return [layout for layout in self._divisible() if self._allowed(layout)]

    def _divisible(self) -> Iterator[ChosenLayout]:
        """The layouts whose sizes divide world and batch and whose schedule takes the number of microbatches."""
        num_gpus, batches = self.site.num_gpus, self.config.train.batch_sizes
        sizes = [[size for size in range(1, most + 1) if num_gpus % size == 0] for most in LARGEST.values()]
        has_mamba = "M" in self.config.model.letters
        for tp, pp, cp in itertools.product(*sizes):
            if num_gpus % (tp * pp * cp):
                continue
            dp = num_gpus // (tp * pp * cp)
            for micro_batch, schedule in itertools.product(self._micro_batches, SCHEDULES if pp > 1 else ["1f1b"]):
                if any(size % (micro_batch * dp) for size in batches):
                    self.fallen["batch"] += 1
                elif pp > 1 and not all(SCHEDULES[schedule].fits(size // (micro_batch * dp), pp) for size in batches):
                    self.fallen["schedule"] += 1
                elif cp > 1 and has_mamba:
                    self.fallen["mamba"] += 1
                elif not (sizes_of_ep := self._sizes_of_ep(tp * cp * dp)):
                    self.fallen["experts"] += 1
                else:
                    yield from (ChosenLayout(tp, pp, cp, dp, micro_batch, schedule, ep=ep) for ep in sizes_of_ep)

    def _sizes_of_ep(self, ranks: int) -> list[int]:
        """The one that was asked for, or the powers of two that divide experts and the ranks of a stage."""
        asked, experts = self.config.parallel.ep, self.config.model.moe.num_experts
        powers = (2**power for power in range(LARGEST_EP.bit_length()))
        sizes = [asked] if asked > 1 or not experts else [size for size in powers if experts % size == 0]
        return [size for size in sizes if ranks % size == 0]

    def _allowed(self, layout: ChosenLayout) -> bool:
        reason = self._objection(layout)
        self.fallen.update([reason] if reason else [])
        return not reason

    def _objection(self, layout: ChosenLayout) -> str:
        key = (layout.cp, layout.micro_batch)
        if key not in self._by_tokens:
            self._by_tokens[key] = self._check(replace(layout, tp=1, pp=1, dp=1, schedule="1f1b"))
        checked = self._by_tokens[key]
        if isinstance(checked, str):
            return checked
        config = layout.applied_to(checked.config)
        if not layout.divides(config):
            return "model"
        shape = (layout.tp, layout.cp, layout.micro_batch)
        if shape not in self._quantizable:
            alone = self._check(replace(layout, pp=1, dp=1, schedule="1f1b"))
            self._quantizable[shape] = not isinstance(alone, str)  # else a run would refuse what tp leaves of a linear
        return "" if self._quantizable[shape] else "alignment"

    def _check(self, layout: ChosenLayout) -> CheckedConfig | str:
        try:
            config = layout.applied_to(self.config)
            sharing = layout.tp * layout.cp
            alone = replace(config, parallel=replace(config.parallel, ep=math.gcd(layout.ep, sharing)))
            return check_config(alone, sharing)
        except ValueError as error:
            return f"refused: {str(error).split(';')[0]}"

    def at_best(self, layout: ChosenLayout) -> float:
        """Seconds of a step that `timed` will hardly undercut."""
        return self._bound.seconds(layout, self._checked(layout).plan.table())

    def _checked(self, layout: ChosenLayout) -> CheckedConfig:
        """With what `check_config` would find: its plan depends on the tokens of a microbatch alone."""
        checked = self._by_tokens[layout.cp, layout.micro_batch]
        assert not isinstance(checked, str)
        return replace(checked, config=layout.applied_to(checked.config), dp=layout.dp)

    def timed(self, layout: ChosenLayout) -> TimedLayout:
        """Everything but memory, as a plan of this layout alone would say it."""
        checked = self._checked(layout)
        settings = RankSettings.of(checked, checked.plan.table())
        pipeline = PipelineLayout.of(checked.config, settings.num_microbatches)
        idle = idle_part(checked.config.parallel, settings.num_microbatches)
        time = step_time(checked.config, self._bound.flops, pipeline, settings, idle, self.site)
        return TimedLayout(layout, checked, pipeline, settings, idle, time)
