"""`megatron-fp4 crosscheck experiment=quickstart`: Transformer Engine against the emulation, code by code.

One idea: everything before the GEMM can be compared bit for bit. For each distinct local shape and precision of the run
the codes, block scales and amaxes that Transformer Engine makes are compared with those of the `reference` backend,
which the emulated one equals. Stochastic rounding draws other bits, so its codes are compared by distribution (scales
and amax still bitwise); products, whose order of sums differs, by an error bound.

Exit codes: 0 all equal, 1 a difference (the first one of each operand is named), 2 nothing could be compared.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_fp4.cli.compose import ConfigError, compose_config, to_run_config
from megatron_fp4.comm.bootstrap import choose_device
from megatron_fp4.comm.mesh import Group
from megatron_fp4.numerics import formats, random_hadamard
from megatron_fp4.precision.backends import Copy, Prepared, Source, copies_of
from megatron_fp4.precision.backends.reference import ReferenceBackend
from megatron_fp4.precision.backends.transformer_engine import TransformerEngineBackend
from megatron_fp4.precision.config import BackendName
from megatron_fp4.precision.operand import AmaxScope, Operand, Rounding, ScaleOrder
from megatron_fp4.precision.spec import LinearPrecision
from megatron_fp4.proofs.gemms import Probe, distinct_probes, probe_tensors
from megatron_fp4.proofs.operands import BLOCK, decoded, first_mismatch, reference_parts, te_parts
from megatron_fp4.proofs.shards import build_shards, typical_ranks
from megatron_fp4.train.checked import check_config

ORDERS = {ScaleOrder.te: "amax_b * (S_enc * (1/6))", ScaleOrder.paper: "(amax_b / 6) * S_enc"}
MAX_BIAS = 0.01
"""Of stochastic rounding, in steps of the code's grid; 8 random bits alone give 1/512."""
GEMM_BOUND = 2.0**-12
"""Of a product, relative to the product of the absolute values: accumulation in FP32 with some bits lost."""


@dataclass(frozen=True)
class Finding:
    """What was compared and what came out."""

    what: str
    text: str
    wrong: bool

    def __str__(self) -> str:
        return f"{self.what}: {self.text}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print one line per operand and product; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if "-h" in arguments or "--help" in arguments:
        print("usage: crosscheck [experiment=NAME] [key=value ...]")
        return 0
    try:
        config = to_run_config(compose_config(arguments))
        world_size = config.parallel.smallest_world
        checked = check_config(config, world_size)
        backend = TransformerEngineBackend(replace(config.precision, backend=BackendName.transformer_engine))
        device = choose_device(config.train.device, 0)
        ranks = typical_ranks(config.parallel, world_size)
        shards = build_shards(checked, backend, device, world_size=world_size, ranks=ranks)
    except (ConfigError, ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    order = backend.api.features.scale_order
    print(f"Transformer Engine {backend.api.version}, block scale = {ORDERS[order]}, on {device}")
    wrong = 0
    for probe in distinct_probes(checked, shards, device):
        if probe.precision.quantized:
            print(probe)
            for finding in cross_check(probe, backend, device):
                wrong += finding.wrong
                print(f"  {'DIFFERS' if finding.wrong else 'equal  '} {finding}")
    print(f"{wrong} differences" if wrong else "no difference")
    return 1 if wrong else 0


def cross_check(probe: Probe, backend: TransformerEngineBackend, device: torch.device) -> list[Finding]:
    """Every quantized operand and product of one linear. (Alone on this rank: amax over its own part.)"""
    tensors = probe_tensors(probe, device, torch.bfloat16)
    reference, precision = ReferenceBackend(), _on_one_rank(probe.precision)
    findings: list[Finding] = []
    for name, copies in copies_of(precision).items():
        wanted = [copy for copy in copies if copy.operand.quantized]
        source = _source(probe, name, tensors[name])
        theirs = backend.quantize(tensors[name], source, wanted)
        ours = reference.quantize(tensors[name], source, wanted)
        for copy, a, b in zip(wanted, theirs, ours, strict=True):
            if copy.operand.format in BLOCK:
                findings.append(_compare_operand(name, copy, a, b, tensors[name]))
    return findings + _compare_products(probe, _nearest(precision), backend, tensors)


def _source(probe: Probe, operand: str, x: Tensor) -> Source:
    rows, cols = (torch.arange(size, device=x.device) for size in x.shape)
    return Source(probe.names[0], operand, rows, cols, Group.single(), 1, 0)


def _compare_operand(name: str, copy: Copy, theirs: Prepared, ours: Prepared, x: Tensor) -> Finding:
    what = f"{copy.gemm}.{name}"
    mine, other = reference_parts(ours), te_parts(theirs, copy)
    found = first_mismatch(other, mine, copy, with_codes=not copy.operand.stochastic)
    if found is not None:
        return Finding(what, str(found), wrong=True)
    if not copy.operand.stochastic:
        return Finding(what, "amax, scales and codes, bit for bit", wrong=False)
    oriented = _exact_codes(copy, x, other.scales, other.amax)
    bias, worst = _distribution(decoded(other.codes, copy), oriented)
    text = f"amax and scales bit for bit; stochastic codes: bias {bias:+.4f} steps, farthest {worst:.2f} steps"
    return Finding(what, text, wrong=abs(bias) > MAX_BIAS + 5.0 * 0.5 / oriented.numel() ** 0.5 or worst > 1.01)


def _exact_codes(copy: Copy, x: Tensor, scales: Tensor, amax: Tensor | None) -> Tensor:
    """What each code stands for before rounding, FP64 `[M, K]`, clipped to the grid's range."""
    assert amax is not None
    oriented = x if copy.along == 1 else x.T.contiguous()
    if copy.operand.rht_size:
        oriented = random_hadamard(oriented, size=16, signs="fixed" if copy.operand.rht_signs.name == "fixed" else None)
    scale = scales.contiguous().view(torch.float8_e4m3fn).double().repeat_interleave(16, 1)
    decode = scale * amax.double() / (formats.E2M1_MAX * formats.E4M3_MAX)
    return torch.where(decode > 0, oriented.double() / decode, 0.0).clamp(-6.0, 6.0)


def _distribution(codes: Tensor, exact: Tensor) -> tuple[float, float]:
    """(mean, largest absolute) difference of magnitudes in steps of the grid at `exact`."""
    magnitude = exact.abs()
    step = torch.where(magnitude < 2.0, 0.5, torch.where(magnitude < 4.0, 1.0, 2.0))
    difference = (codes.double() * exact.sign() - magnitude) / step
    return difference.mean().item(), difference.abs().max().item()


def _compare_products(
    probe: Probe, precision: LinearPrecision, backend: TransformerEngineBackend, tensors: dict[str, Tensor]
) -> list[Finding]:
    """The three GEMMs on nearest-even operands, against FP64 products of the reference's operands."""
    reference = ReferenceBackend()
    made = {}
    for name, copies in copies_of(precision).items():
        source = _source(probe, name, tensors[name])
        made[name] = [b.quantize(tensors[name], source, copies) for b in (backend, reference)]
    findings = []
    for gemm, (a, i), (b, j) in (
        ("fprop", ("x", 0), ("w", 0)),
        ("dgrad", ("dy", 0), ("w", 1)),
        ("wgrad", ("dy", 1), ("x", 1)),
    ):
        if not getattr(precision, gemm).quantized:
            continue
        theirs = backend.matmul(made[a][0][i], made[b][0][j], out_dtype=torch.float32)
        exact = reference.matmul(made[a][1][i], made[b][1][j], out_dtype=torch.float32)
        left = tensors[a].abs().amax().item() * tensors[b].abs().amax().item()
        contracted = tensors[a].shape[1 if i == 0 else 0]
        error = (theirs - exact).abs().max().item()
        limit = GEMM_BOUND * max(exact.abs().max().item(), left * contracted**0.5)
        findings.append(Finding(gemm, f"largest error {error:.2e}, limit {limit:.2e}", wrong=not error <= limit))
    return findings


def _map(precision: LinearPrecision, change: dict[str, object]) -> LinearPrecision:
    """The recipe with fields of its operands replaced, where they have a meaning."""

    def operand(value: Operand) -> Operand:
        wanted = {k: v for k, v in change.items() if getattr(value, k) != v}
        if not value.quantized or (value.format.name != "nvfp4" and "amax_scope" in wanted):
            return value
        return replace(value, **wanted)  # type: ignore[arg-type]

    return precision.with_operands(operand)


def _on_one_rank(precision: LinearPrecision) -> LinearPrecision:
    return _map(precision, {"amax_scope": AmaxScope.shard})


def _nearest(precision: LinearPrecision) -> LinearPrecision:
    return _map(precision, {"rounding": Rounding.rne, "noise_bits": 8})
