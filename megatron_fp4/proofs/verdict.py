"""What a comparison means: passed or not, the first tensor that differs, and the likely cause.

In FP32 compute, sums are made in FP64 and rounded once, so a right layout shows hardly anything. The first step is
compared sharply; the later ones have some room, because one FP4 code that falls the other way changes every step after
it. BF16 rounds partial sums, which depend on the layout: that case is coarse. Largest relative errors of right layouts
(tp 2 and 4, cp 2 and 4, dp 4, tp2 pp2 dp2, tp2 cp2 pp2; 8 blocks, 5 steps), and what passes:

              step 1: loss, norm, gradients         later: loss, norm, parameters
    fp32      1e-7, 6e-8, 1e-7 (1e-6, 1e-6, 2e-6)   1e-7, 6e-8, 3e-5 (1e-6, 1e-6, 1e-3)
    bf16      3e-5, 6e-4, 1e-2 (5e-4, 5e-3, 1e-1)   3e-5, 6e-4, 2e-1 (5e-4, 1e-2, 8e-1)
    recipe    1e-7, 6e-8, 1e-7 (1e-6, 1e-6, 1e-5)   1e-7, 6e-8, 3e-4 (1e-5, 1e-3, 2e-2)

With experts, those of a token are drawn from its address in BF16 (routing.py): a rounding must not choose.

"recipe" is the quantized precision of the run, in FP32 compute. Parameters are compared relative to their change; Adam
turns the sign of a gradient that is nearly zero into a whole step, hence the large numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_fp4.proofs.distance import Comparison, Difference, worst
from megatron_fp4.proofs.layouts import Layout


@dataclass(frozen=True)
class Tolerance:
    """Largest relative error that passes. loss, norm, grad: step 1. later_*: the steps after it. master: parameters."""

    loss: float
    norm: float
    grad: float
    later_loss: float
    later_norm: float
    master: float


TOLERANCES: Mapping[str, Tolerance] = {
    "fp32": Tolerance(loss=1e-6, norm=1e-6, grad=2e-6, later_loss=1e-6, later_norm=1e-6, master=1e-3),
    "bf16": Tolerance(loss=5e-4, norm=5e-3, grad=0.1, later_loss=5e-4, later_norm=1e-2, master=0.8),
    "recipe": Tolerance(loss=1e-6, norm=1e-6, grad=1e-5, later_loss=1e-5, later_norm=1e-3, master=2e-2),
}


@dataclass(frozen=True)
class Failure:
    """One thing that differs. tensor: the first one, seen from the output of the model; "" for a scalar."""

    what: str
    tensor: str
    error: float

    def __str__(self) -> str:
        where = f" {self.tensor}" if self.tensor else ""
        return f"{self.what}{where} differs by {self.error:.1e}"


def find_failures(comparison: Comparison, tolerance: Tolerance) -> list[Failure]:
    """Everything beyond the tolerance, in the order in which it is computed. Empty: the layout passed."""
    failures = [Failure("initial value of", d.name, d.error) for d in comparison.initial if d.error > 0.0]

    def check_scalar(what: str, error: float, allowed: float) -> None:
        if not error <= allowed:
            failures.append(Failure(what, "", error))

    check_scalar("loss of step 1", comparison.losses[0], tolerance.loss)
    failures += [Failure("gradient of", d.name, d.error) for d in comparison.grads if not d.error <= tolerance.grad]
    check_scalar("gradient norm of step 1", comparison.norms[0], tolerance.norm)
    for step, differences in comparison.masters.items():
        failures += [
            Failure(f"after {step} step(s), parameter", d.name, d.error)
            for d in differences
            if not d.error <= tolerance.master
        ]
    for step, (loss, norm) in enumerate(zip(comparison.losses[1:], comparison.norms[1:], strict=True), start=2):
        check_scalar(f"loss of step {step}", loss, tolerance.later_loss)
        check_scalar(f"gradient norm of step {step}", norm, tolerance.later_norm)
    return failures + [Failure("replica of", name, 1.0) for name in comparison.replicas]


def likely_cause(
    layout: Layout, comparison: Comparison, tolerance: Tolerance, *, tied: bool, passed: Mapping[str, bool]
) -> str:
    """A guess at the bug, from the pattern of differences. passed: the verdicts on other cases of the layout."""
    if worst(comparison.initial) > 0.0:
        return "initial values depend on the layout: a parameter's placement names the wrong rectangle"
    bad = [d for d in comparison.grads if not d.error <= tolerance.grad]
    loss_right = comparison.losses[0] <= tolerance.loss
    if bad and passed.get("fp32") and passed.get("bf16"):
        return (
            "only the quantized precision differs: an amax is not reduced over the ranks that share a tensor"
            " (Sharding groups), or rounding noise has a local instead of a global address"
        )
    if bad:
        return _gradient_cause(layout, bad, len(comparison.grads), tied=tied, loss_right=loss_right)
    if not loss_right:
        return "gradients agree but the loss does not: it is not summed once over its ranks"
    if not comparison.norms[0] <= tolerance.norm:
        often = comparison.norm_ratio > 1.0
        return f"gradients agree but their norm is {comparison.norm_ratio:.3f} times the right one: " + (
            "a replica is counted more than once" if often else "squares are not summed over all ranks"
        )
    if comparison.replicas:
        return "ranks that should hold the same parameters do not: the gather after the update, or a tied copy"
    return "gradients agree but the update does not: clipping, weight decay, or the elements that a rank updates"


def _gradient_cause(
    layout: Layout, bad: Sequence[Difference], num_tensors: int, *, tied: bool, loss_right: bool
) -> str:
    parallel = layout.parallel
    names = [difference.name for difference in bad]
    factor = _common_factor(bad)
    if tied and names == ["embedding.weight"]:
        times = f"{factor:.2g} times the right one: " if factor else ""
        return f"the gradient of the tied embedding is {times}its two copies are not summed exactly once"
    if factor:
        sizes = {"tp": parallel.tp, "pp": parallel.pp, "cp": parallel.cp, "dp": parallel.dp, "ep": parallel.ep}
        for axis, size in sizes.items():
            if size > 1 and abs(factor * size - 1) < 0.2:
                return f"gradients are 1/{size} of the right ones: a sum over {axis} is missing"
            if size > 1 and abs(factor / size - 1) < 0.1:
                return f"gradients are {size} times the right ones: summed once too often over {axis}"
        return f"gradients are {factor:.3g} times the right ones: the loss is scaled differently"
    if parallel.tp > 1 and all("norm" in name for name in names):
        return "only norm weights differ: the partial gradients of tp-replicated parameters are not summed over tp"
    if loss_right and len(bad) < num_tensors:
        return f"the loss agrees and gradients differ from {names[0]} on towards the input: the backward pass there"
    return "the forward pass differs already" if not loss_right else "a sum over ranks is missing in the backward pass"


def _common_factor(bad: Sequence[Difference]) -> float:
    """The factor by which all are wrong, 0 if it is not the same for all or does not explain them."""
    first = bad[0].ratio
    explained = all(d.unexplained < 0.1 * d.error and abs(d.ratio - first) < 0.05 * abs(first) for d in bad)
    return first if explained else 0.0
