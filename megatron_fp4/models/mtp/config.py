"""What a model has for multi-token prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from megatron_fp4.settings import FP32_MOST, Bound, Count, check_bounds


@dataclass(frozen=True)
class MtpConfig:
    """Multi-token prediction: after the last block, further blocks predict the tokens behind the next one."""

    depth: Count = 0
    """Tokens behind the next one that are predicted too; 0 = off."""
    pattern: str = ""
    """The blocks of a depth, one letter each as in model.pattern; needed where depth is above 0."""
    shared: bool = False
    """Use one block sequence with one set of weights for all depths."""
    loss_scale: Annotated[float, Bound(above=0, most=FP32_MOST)] = 0.1
    """What the mean loss of the depths is multiplied by before it is added to that of the next token."""

    def __post_init__(self) -> None:
        check_bounds(self, "model.mtp")
        if self.depth and not self.pattern:
            raise ValueError(f"model.mtp.depth = {self.depth}, but model.mtp.pattern is empty; set it, such as '*E'")
        if not self.depth and (self.pattern or self.shared):
            raise ValueError(
                f"model.mtp.pattern = {self.pattern!r} and model.mtp.shared = {self.shared} have no effect while"
                " model.mtp.depth = 0; set the depth, or leave them out"
            )
        if self.depth == 1 and self.shared:
            raise ValueError("model.mtp.shared=true has no effect: model.mtp.depth = 1 has nobody to share with")

    @property
    def num_sequences(self) -> int:
        """Block sequences, each with weights of its own."""
        return min(self.depth, 1) if self.shared else self.depth
