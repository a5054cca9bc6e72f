"""The size of the residual stream, against what the blocks return."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from megatron_fp4.comm.mesh import Group
from megatron_fp4.layers.parameter import initialize_parameters
from megatron_fp4.models.decoder import Recompute
from megatron_fp4.models.residuals import residual_rms
from tests.models.test_count import ODD_HYBRID, make_decoder


def test_all_microbatches_count_and_what_is_recomputed_counts_once() -> None:
    model = make_decoder(replace(ODD_HYBRID, pattern="M-*M-"), "cpu")
    initialize_parameters(model, 1)
    model.recompute = Recompute.full
    seen = list[Tensor]()
    model.blocks["3"].register_forward_hook(lambda _module, _arguments, x: seen.append(x.detach().double()))
    model.residuals.begin()
    for first in (0, 7):
        tokens = (torch.arange(2 * 21).view(2, 21) * 5 + first) % 56
        zeros = torch.zeros_like(tokens)
        model(tokens, zeros, torch.arange(21).expand_as(tokens), zeros).square().mean().backward()
    model.residuals.recording = False
    model(tokens, zeros, torch.arange(21).expand_as(tokens), zeros)
    rms = residual_rms([model.residuals], 5, Group.single(), torch.device("cpu"))
    expected = torch.cat([seen[0], seen[-1]]).square().mean().sqrt()
    torch.testing.assert_close(rms[3], float(expected), rtol=1e-6, atol=0)
    assert set(model.residuals.counts.values()) == {2 * 2 * 21 * ODD_HYBRID.hidden}
