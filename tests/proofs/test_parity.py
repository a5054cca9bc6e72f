"""No axis and no combination of axes changes the numbers; and a bug in one of them is found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from megatron_fp4.comm.config import ParallelConfig
from megatron_fp4.comm.local import run_local
from megatron_fp4.layers.mlp import Activation
from megatron_fp4.layers.moe.config import MoeConfig
from megatron_fp4.layers.qk_norm import QkNorm
from megatron_fp4.layers.rope import RopeScaling, RopeScalingConfig
from megatron_fp4.models.decoder import Recompute
from megatron_fp4.models.mtp.config import MtpConfig
from megatron_fp4.optim import Algorithm, Overlap
from megatron_fp4.proofs.distance import Comparison, compare, worst
from megatron_fp4.proofs.layouts import Layout, parse_layout
from megatron_fp4.proofs.parity import Case, Record, run_cases
from megatron_fp4.proofs.routing import with_drawn_choices
from megatron_fp4.proofs.verdict import TOLERANCES, find_failures, likely_cause
from tests.helpers import planted
from tests.helpers.parity import BF16, FP32, HYBRID, parity_case
from tests.helpers.planted import Bug

Worker = Callable[..., list[Record]]
ONE = ParallelConfig()


def fp32(**settings: Any) -> Case:
    return parity_case(FP32, name="fp32", **settings)


def records_of(cases: list[Case], layout: str, worker: Worker = run_cases) -> list[list[Record]]:
    """Per case, the records of all ranks."""
    parsed = parse_layout(layout)
    per_rank = run_local(worker, parsed.world_size, cases, parsed.parallel)
    return [[records[number] for records in per_rank] for number in range(len(cases))]


def check(cases: list[Case], layout: str, references: list[Record]) -> list[Comparison]:
    """Run the layout and demand that every case passes its tolerance."""
    verdict = []
    for case, reference, records in zip(cases, references, records_of(cases, layout), strict=True):
        comparison = compare(reference, records)
        failures = find_failures(comparison, TOLERANCES[case.name])
        assert not failures, f"{layout}, {case.name}: {[str(failure) for failure in failures[:5]]}"
        verdict.append(comparison)
    return verdict


def alone(*cases: Case) -> list[Record]:
    return run_local(run_cases, 1, list(cases), ONE)[0]


# -- the ladder -------------------------------------------------------------------------------------------------------

LADDER = [fp32(), parity_case()]


@pytest.fixture(scope="module")
def ladder() -> list[Record]:
    return alone(*LADDER)


@pytest.mark.parametrize("layout", ["tp2", "tp4", "pp2", "pp4", "dp4", "tp2 pp2 dp2"])
def test_ladder(layout: str, ladder: list[Record]) -> None:
    """Vocabulary 101 at tp 2 and 4; FP32 and NVFP4 with stochastic rounding; gradients, norm, parameters."""
    exact, recipe = check(LADDER, layout, ladder)
    assert worst(exact.initial) == 0.0, "initial values depend on the layout"
    assert recipe.loss_error < 1e-5, (
        "the loss curve in NVFP4 leaves that of one process: rounding depends on the layout"
    )
    if layout in ("pp2", "pp4"):
        assert worst(recipe.grads) == 0.0, "stages only move tensors: not one bit may change"


def test_context_parallel() -> None:
    """Samples of 64 tokens, so that a chunk of a zig-zag shard holds whole Hadamard blocks; then with documents kept
    apart, and with all targets in the first chunk, so that one rank has no target at all."""
    cases = [
        parity_case(seq_length=64),
        fp32(seq_length=64, reset_documents=True),
        fp32(seq_length=64, targets=(0.0, 0.25)),
    ]
    check(cases, "cp2", alone(*cases))


def test_context_beside_tensor_parallel() -> None:
    """Rows are gathered over tp, keys over cp: an amax or a sum over the wrong one of the two groups shows here."""
    case = parity_case(seq_length=64, pattern="*-")
    check([case], "tp2 cp2", alone(case))


def test_uneven_data_parallel() -> None:
    """Three ranks divide no parameter evenly: rows of ZeRO-1 shards differ in number."""
    case = fp32(train={"global_batch": 6})
    check([case], "dp3", alone(case))


def test_hybrid_model() -> None:
    """Mamba-2 blocks: sharded heads and groups, states carried over sequence shards, stages of any kind."""
    case = parity_case(seq_length=64, reset_documents=True, **HYBRID)
    references = alone(case)
    for layout in ("tp2", "cp2", "tp2 pp2"):
        check([case], layout, references)


def test_experts_on_other_ranks() -> None:
    """Rows go to experts of tensor-parallel and data-parallel ranks and back, weight gradients are put off; Muon's
    experts stay on the ranks that hold them."""
    moe = MoeConfig(
        num_experts=4, top_k=2, ffn_hidden=16, shared_ffn_hidden=32, latent=16, expert_bias=True, bias_rate=1e-2,
        sequence_loss=1e-2, global_loss=1e-2, z_loss=1e-3,
    )  # fmt: skip
    case, muon = (parity_case(pattern="*EE*", moe=moe, optim=optim) for optim in ({}, {"algorithm": Algorithm.muon}))
    bf16 = with_drawn_choices(parity_case(BF16, name="bf16", steps=2, pattern="*EE*", moe=moe))
    cases = [case, muon, bf16]
    references = alone(*cases)
    for layout in ("tp2 dp2 ep4", "pp2 ep2:interleaved_zero_bubble"):
        comparisons = check(cases, layout, references)
        assert worst(comparisons[0].initial) == 0.0, "initial values depend on where an expert is"
        assert comparisons[0].loss_error < 1e-5, "a scale or a draw of rounding noise depends on where an expert is"


def test_what_other_families_have() -> None:
    """QK-norm of each head, whose weight is replicated, and over all heads, whose squares are summed over tp; biases,
    norms behind the mixers, a window that chunks of the zig-zag cut, a part of each head rotated and stretched."""
    common: dict[str, Any] = {
        "seq_length": 64,
        "qkv_bias": True,
        "sliding_window": 24,
        "rope_fraction": 0.5,
        "rope_scaling": RopeScalingConfig(RopeScaling.llama3, factor=4.0, original_length=64),
    }
    head = parity_case(**common, qk_norm=QkNorm.head, reset_documents=True)
    full = parity_case(**common, qk_norm=QkNorm.full, post_norm=True, train={"recompute": Recompute.selective})
    references = alone(head, full)
    for layout in ("tp2 cp2", "pp2:zbv"):
        check([head, full], layout, references)


MTP = MtpConfig(depth=2, pattern="*-", loss_scale=0.3)
MTP_CASES = [
    parity_case(steps=2, seq_length=64, reset_documents=True, mtp=replace(MTP, shared=True), dropout=0.1),
    fp32(steps=2, seq_length=64, mtp=MTP, tied_embeddings=True, train={"recompute": Recompute.full}),
]


@pytest.fixture(scope="module")
def mtp_references() -> list[Record]:
    return alone(*MTP_CASES)


@pytest.mark.parametrize("layout", ["tp2 pp2", "cp2 pp2:zbv"])
def test_multi_token_prediction(layout: str, mtp_references: list[Record]) -> None:
    """Tokens ahead of a zig-zag shard's columns; the embedding on both ends, one copy or two, tied or not; the head and
    a shared block sequence used more than once a microbatch, with weight gradients that wait, and recomputed."""
    for comparison in check(MTP_CASES, layout, mtp_references):
        assert "mtp.0.projection.weight" in {difference.name for difference in comparison.grads}
        assert not comparison.replicas, "the copies of the embedding drifted apart"


# -- features that frameworks got wrong -------------------------------------------------------------------------------


def test_tied_embeddings_on_two_stages() -> None:
    """Sum of both copies' gradients, the norm counts them once, and they are bit-equal after 20 steps."""
    case = fp32(tied_embeddings=True, pattern="*-", steps=20, activation=Activation.swiglu)
    references = alone(case)
    for layout in ("pp2", "pp2 dp2"):
        (verdict,) = check([case], layout, references)
        assert not verdict.replicas, "the two copies drifted apart"


def test_tied_embeddings_in_a_v() -> None:
    """First and last stage are on one rank and share the table: one gradient, one entry in the norm."""
    case = fp32(tied_embeddings=True)
    check([case], "pp2:zbv", alone(case))


def test_accumulation_does_not_matter() -> None:
    """One microbatch of four samples or four of one, at equal global batch."""
    several, one = alone(fp32(), fp32(train={"micro_batch": 4}))
    failures = find_failures(compare(several, [one]), TOLERANCES["fp32"])
    assert not failures, f"gradients depend on how a batch is cut: {failures[0]}"


def test_label_smoothing() -> None:
    case = fp32(train={"label_smoothing": 0.1})
    reference = alone(case)
    assert reference[0].losses != alone(fp32())[0].losses, "label smoothing had no effect"
    check([case], "tp2 pp2", reference)


def test_dropout_with_and_without_recompute() -> None:
    """Masks have an address: recompute, sequence shards and stages draw the same ones."""
    kept, selective, full = (
        parity_case(dropout=0.1, train={"recompute": recompute})
        for recompute in (Recompute.none, Recompute.selective, Recompute.full)
    )
    references = alone(kept, selective, full)
    for other in references[1:]:
        assert worst(compare(references[0], [other]).grads) == 0.0, "recompute drew other dropout or rounding noise"
    assert references[0].losses != alone(parity_case())[0].losses, "dropout had no effect"
    check([kept, full], "tp2", [references[0]] * 2)
    check([full], "pp2:zbv", references[:1])


def test_overlap_changes_no_bit() -> None:
    """The engine announces the last contributions before its schedule; a bucket sent too early would miss some."""
    both = [fp32(steps=4, optim={"overlap_reduce": o, "overlap_gather": o}) for o in (Overlap.never, Overlap.always)]
    off, on = records_of(both, "pp2:interleaved_zero_bubble")
    assert [record.losses for record in on] == [record.losses for record in off]
    off, on = records_of(both, "pp2 dp2")
    for ours, theirs in zip(on, off, strict=True):
        assert (ours.losses, ours.norms) == (theirs.losses, theirs.norms), "overlap changed the sum"


# -- planted bugs -----------------------------------------------------------------------------------------------------


def caught(case: Case, layout: str, bug: Bug) -> tuple[str, str]:
    """The first failure and the likely cause that the check reports."""
    (reference,) = alone(case)
    (records,) = records_of([case], layout, planted.run_cases_with(bug))
    comparison, tolerance = compare(reference, records), TOLERANCES[case.name]
    failures = find_failures(comparison, tolerance)
    assert failures, "a planted bug was not found"
    parsed: Layout = parse_layout(layout)
    tied = case.config.model.tied_embeddings
    passed = {"fp32": True, "bf16": True} if case.name == "recipe" else {}
    return str(failures[0]), likely_cause(parsed, comparison, tolerance, tied=tied, passed=passed)


@pytest.mark.parametrize(
    ("case", "layout", "bug", "failure", "cause"),
    [
        (parity_case(steps=2), "tp2", planted.local_amax, "loss of step 1", "amax"),
        (fp32(steps=2), "tp2", planted.unsummed_replicas, "norm.weight", "norm weights"),
        (fp32(steps=2), "tp2", planted.rows_kept, "gradient of", "backward pass"),
        (fp32(steps=2), "tp2", planted.unsummed_grad_norm, "gradient norm of step 1", "norm is"),
        (fp32(steps=2, tied_embeddings=True), "pp2", planted.doubled_tied_gradient, "embedding", "2 times the right"),
        (fp32(steps=2, tied_embeddings=True), "pp2", planted.unsummed_replicas, "embedding", "tied"),
    ],
    ids=["amax", "norm-weights", "gather", "grad-norm", "tied-twice", "tied-unsummed"],
)
def test_planted_bugs_are_found_and_named(case: Case, layout: str, bug: Bug, failure: str, cause: str) -> None:
    first, why = caught(case, layout, bug)
    assert failure in first, f"first difference: {first}"
    assert cause in why, f"likely cause: {why}"
