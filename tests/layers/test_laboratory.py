"""The example that shows how to try a layer runs as it is written."""

from __future__ import annotations

import doctest

import pytest
import torch

from megatron_fp4 import layers
from megatron_fp4.layers import laboratory


def test_the_example_runs() -> None:
    results = doctest.testmod(laboratory)
    assert results.attempted >= 10, "the example is not a doctest any more"
    assert results.failed == 0


def test_a_context_is_what_was_asked_for() -> None:
    context = layers.lab(seed=5, backend="reference", device="meta", dtype=torch.bfloat16)
    assert (context.clock.seed, context.dtype, context.device.type) == (5, torch.bfloat16, "meta")
    assert type(context.backend).__name__ == "ReferenceBackend"
    with pytest.raises(ValueError, match="'emulate' is not a valid BackendName"):
        layers.lab(backend="emulate")
