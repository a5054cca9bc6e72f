"""`precision.backend=auto`: which backends a run could take on a GPU, best first, and the one that it took.

A backend is trusted when it passed its self-test on that very device (selftest/examine.py), and all ranks take the same
(train/arrival/backend.py). Without the device, as in `plan`, the choice is what a run would expect.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from megatron_fp4.precision.backends.native_fp8 import check_native_recipes
from megatron_fp4.precision.backends.triton_limits import LEAST_CAPABILITY, emulated_gemms
from megatron_fp4.precision.config import BackendName, ComputeDtype, PrecisionConfig
from megatron_fp4.precision.plan import PrecisionPlan
from megatron_fp4.precision.selftest.examine import Rejection
from megatron_fp4.precision.te.refusals import check_recipe
from megatron_fp4.precision.te.versions import KNOWN, features_of

Capability = tuple[int, int]
PREFERENCE = (BackendName.transformer_engine, BackendName.triton, BackendName.native_fp8, BackendName.emulated)
"""Best first: NVIDIA's kernels have run on Blackwell, and ours have run on no card yet."""
WHY = {
    BackendName.transformer_engine: "FP4 and FP8 tensor cores by NVIDIA's kernels",
    BackendName.triton: "our kernels, with the operands of the emulation as packed codes",
    BackendName.native_fp8: "FP8 tensor cores, with the operands of the emulation",
    BackendName.emulated: "the emulation, which multiplies in BF16",
}


@dataclass(frozen=True)
class BackendChoice:
    """What `auto` came to. rejected: the better ones, best first. trusted: who tested it where; "" for a forecast."""

    name: BackendName
    why: str
    rejected: tuple[Rejection, ...] = ()
    trusted: str = ""

    def __str__(self) -> str:
        """One sentence."""
        verb = "chose" if self.trusted else "would choose"
        rejected = [f"{one.backend.name} FAILED its self-test" if one.failed else str(one) for one in self.rejected]
        ending = self.trusted or "if it is installed there and passes its self-test"
        return f"precision.backend=auto {verb} {self.name.name} ({self.why}), {ending}" + "".join(
            f"; {x}" for x in rejected
        )

    @property
    def lines(self) -> tuple[str, ...]:
        """The sentence, and a loud line for each backend that computed something wrong."""
        return str(self), *(f"WARNING: {rejection}" for rejection in self.rejected if rejection.failed)


def candidates(capability: Capability | None) -> tuple[BackendName, ...]:
    """The backends that are considered on a GPU of this compute capability (None: on a CPU), best first."""
    if capability is None:
        return (BackendName.emulated,)
    wanted = {BackendName.emulated}
    if capability[0] == 10:
        wanted.add(BackendName.transformer_engine)
    if capability >= LEAST_CAPABILITY:
        wanted.add(BackendName.triton)
    if capability[0] == 9:
        wanted.add(BackendName.native_fp8)
    return tuple(name for name in PREFERENCE if name in wanted)


def quantizes(plan: PrecisionPlan) -> bool:
    """Whether any table of a plan quantizes a GEMM: else every backend computes the same."""
    return any(table.num_quantized_gemms for _, table in plan.labelled_tables())


def recipe_objection(name: BackendName, config: PrecisionConfig) -> str:
    """Why a backend cannot or need not compute the recipes, by what is known without a machine; "" if it can."""
    config = replace(config, backend=name)
    try:
        if name is BackendName.transformer_engine:
            _check_te(config)
        elif name is BackendName.native_fp8:
            check_native_recipes(config)
    except ValueError as error:
        return str(error)
    if name is BackendName.triton and (left := emulated_gemms(config)):
        gemms = [gemm for recipe in config.recipes.values() for gemm in recipe.gemms if gemm.quantized]
        if len(left) == len(gemms):
            return f"it has no kernels for any quantized GEMM of the recipes ({left[0]})"
    return ""


def expected_choice(
    config: PrecisionConfig, capability: Capability, objection: Callable[[BackendName], str]
) -> BackendChoice:
    """What a run on GPUs of this compute capability would take if everything is installed there and right.

    objection: why a run as a whole refuses a backend, "" if it does not.
    """
    rejected: list[Rejection] = []
    for name in candidates(capability):
        if not (reason := recipe_objection(name, config) or objection(name)):
            return BackendChoice(name, WHY[name], tuple(rejected))
        rejected.append(Rejection(name, reason, failed=False))
    raise ValueError(f"no backend computes this run: {'; '.join(map(str, rejected))}")


NOTHING_QUANTIZED = BackendChoice(
    BackendName.emulated, "no GEMM is quantized", trusted="which all backends compute alike"
)


def _check_te(config: PrecisionConfig) -> None:
    if config.compute_dtype is not ComputeDtype.bf16:
        raise ValueError(f"it computes in BF16 only, and precision.compute_dtype={config.compute_dtype.name}")
    for name, recipe in config.recipes.items():
        check_recipe(name, recipe, KNOWN, features_of(KNOWN))
