"""Stages that remember what they were given, so that a text is continued token by token."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from megatron_fp4.layers.attention import Attention
from megatron_fp4.layers.mamba.mixer import Mamba2
from megatron_fp4.layers.past import KeyValues, ScanState


@contextmanager
def remembering(stages: Iterable[nn.Module]) -> Iterator[None]:
    """While it lasts, what a stage is given goes on after what it was given before, and is one text with it."""
    mixers = [mixer for stage in stages for mixer in stage.modules() if isinstance(mixer, Attention | Mamba2)]
    for mixer in mixers:
        mixer.past = KeyValues() if isinstance(mixer, Attention) else ScanState()
    try:
        yield
    finally:
        for mixer in mixers:
            mixer.past = None
