"""What a mixer remembers of the tokens before, so that a text is continued token by token.

An attention keeps keys and values; a Mamba-2 mixer its state, and the few tokens that its convolution looks back at.
Both keep the documents of what they remember: a mixer that keeps documents apart then takes rows of unequal length in
one batch, whose padding before the first token is a document of its own.

Not here: who makes texts of it (inference/).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class KeyValues:
    """Keys and values of the tokens so far, `[B, J, G, E]`, with their places, int64 `[B, J]`."""

    k_BJGE: Tensor | None = None
    v_BJGE: Tensor | None = None
    places: tuple[Tensor, Tensor] | None = None

    def extend(self, k_BSGE: Tensor, v_BSGE: Tensor, positions_BS: Tensor, documents_BS: Tensor) -> None:
        """Remember the next tokens too."""
        if self.k_BJGE is None or self.v_BJGE is None or self.places is None:
            self.k_BJGE, self.v_BJGE = k_BSGE, v_BSGE
            self.places = (positions_BS, documents_BS)
            return
        positions_BJ, documents_BJ = self.places
        self.k_BJGE = torch.cat([self.k_BJGE, k_BSGE], dim=1)
        self.v_BJGE = torch.cat([self.v_BJGE, v_BSGE], dim=1)
        self.places = (torch.cat([positions_BJ, positions_BS], 1), torch.cat([documents_BJ, documents_BS], 1))


@dataclass
class ScanState:
    """state_BHPN after the tokens so far; what the convolution was given of the last of them, `[B, J - 1, W]`, and
    their documents, int64 `[B, J - 1]`. None before the first token."""

    state_BHPN: Tensor | None = None
    last_BJW: Tensor | None = None
    documents_BJ: Tensor | None = None
