"""A layout that a search may choose: its sizes, its schedule, and whether a model can be cut so.

Not here: which layouts a world allows (choices.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from megatron_fp4.models.decoder import Recompute
from megatron_fp4.models.layout import check_model_layout
from megatron_fp4.models.partition import split_stages
from megatron_fp4.pipeline.schedules import stages_per_rank
from megatron_fp4.train.config import RunConfig


@dataclass(frozen=True)
class ChosenLayout:
    """What a search chooses. dp follows from the world."""

    tp: int
    pp: int
    cp: int
    dp: int
    micro_batch: int
    schedule: str
    recompute: str = "none"
    ep: int = 1

    def applied_to(self, config: RunConfig) -> RunConfig:
        """The configuration with this layout."""
        parallel = replace(
            config.parallel,
            tp=self.tp,
            pp=self.pp,
            cp=self.cp,
            dp=self.dp,
            ep=self.ep,
            schedule=self.schedule,
            virtual_stages=0,
            stage_split="cost",
        )
        train = replace(config.train, micro_batch=self.micro_batch, recompute=Recompute[self.recompute])
        return replace(config, parallel=parallel, train=train)

    @property
    def overrides(self) -> list[str]:
        """Arguments of a command."""
        sizes: dict[str, Any] = {"tp": self.tp, "pp": self.pp, "cp": self.cp, "dp": self.dp}
        sizes |= {"ep": self.ep} if self.ep > 1 else {}
        sizes |= {"schedule": self.schedule} if self.pp > 1 else {}
        parallel = [f"parallel.{name}={value}" for name, value in sizes.items()]
        return [*parallel, f"train.micro_batch={self.micro_batch}", f"train.recompute={self.recompute}"]

    def tokens(self, config: RunConfig) -> int:
        """Rows of a microbatch on a rank."""
        return self.micro_batch * config.data.seq_length // self.cp

    def divides(self, config: RunConfig) -> bool:
        """Whether the sizes of the model can be cut so. config: with this layout."""
        try:
            check_model_layout(
                config.model, config.parallel, seq_length=config.data.seq_length, tokens=self.tokens(config)
            )
            split_stages(config.model, self.pp * stages_per_rank(config.parallel))
        except ValueError:
            return False
        return True
