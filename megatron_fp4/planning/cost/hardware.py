"""What a plan assumes, and the site that it is for: a machine, these assumptions, a number of GPUs.

Every one has its source beside it and can be replaced (`plan --assume KEY=VALUE`), and so can most of what data
sheets say (machines.py).

Not here: which ranks share which link (links.py).
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_fp4.planning.cost.machines import MACHINES, Machine

DEFAULT_GPU = "GB200"
"""Of a plan that names none."""
LEAST, MOST = 1e-6, 1e12
"""Bounds of what may be assumed: with figures beyond, days overflow."""


@dataclass(frozen=True)
class Assumptions:
    """What a plan assumes; 0 stands for the machine's own figure, or for a figure that is left out of the report."""

    efficiency: float = 0.4
    """Part of the peak rates that matrix products and the kernels around them reach; an assumption. End to end 0.37 is
    published for a 70B in MXFP8 on 64 GB200 and 0.28 in NVFP4 (Megatron-Bridge performance summary 26.04)."""
    fp4_share: float = 0.0
    """Part of `efficiency` that FP4 products reach."""
    grouped_share: float = 0.8
    """Part of `efficiency` that grouped products of experts reach; an assumption, measure yours. At best as much as
    dense ones: 0.91 of the peak of an H800 by a kernel made for it (arXiv 2501.16103)."""
    fp32_tflops: float = 75.0
    """Of products in FP32 outside the tensor cores, by which routers are computed: 600 / 8 of DGX B200's data sheet, as
    others quote it."""
    quantizer_efficiency: float = 0.5
    """Part of the memory's bandwidth that quantizers reach: 0.53 for NVFP4 and 0.52 for MXFP8, by the bytes counted
    here and the times on a B300, with quantizers and without, in Transformer Engine's GEMM Profiling Tutorial."""
    rails: float = 1.0
    """Network links that carry one group's messages out of a domain; 1 = every rank's bytes leave by its own link, n =
    NCCL's rings leave by the links of n of the group's ranks."""
    domain_gpus: float = 0.0
    """GPUs that NVLink connects."""
    inner_gb_per_second: float = 0.0
    """Inside a domain, one direction, per GPU."""
    network_gb_per_second: float = 0.0
    """Between domains, one direction, per GPU."""
    memory_gb_per_second: float = 0.0
    """Of a GPU's own memory."""
    memory_share: float = 0.9
    """Part of a GPU's memory that a layout of `--search` may plan with; the rest is for CUDA, NCCL, fragmentation."""
    kilowatts: float = 0.0
    """Per GPU, with its share of server and rack."""
    price_per_gpu_hour: float = 0.0
    """In any currency; prices are nobody's published figure, so without it no cost is shown."""
    failure_gpu_hours: float = 54 * 24 * 16384 / 419
    """GPU hours between two unexpected interruptions; default: 419 in 54 days on 16,384 H100 (arXiv 2407.21783)."""
    restart_seconds: float = 600.0
    """From a failure to the next step: noticing, queueing, loading, compiling; an assumption, measure yours."""
    save_stop_seconds: float = 1.0
    """For which a save in the background stops the run, besides the copy to the host; an assumption, measure yours."""
    storage_gb_per_second: float = 100.0
    """What all ranks together write to the file system; an assumption, measure yours."""
    tokens_per_document: float = 1000.0
    """Mean length, which decides the size of the index; an assumption, `data inspect` says it of your shards."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not (LEAST <= value <= MOST or (value == 0 and field.name in MAY_BE_ZERO)):
                zero = ", or 0" if field.name in MAY_BE_ZERO else ""
                raise ValueError(f"--assume {field.name}={value:g}: must be a number from {LEAST:g} to {MOST:g}{zero}")
        for name in ("efficiency", "fp4_share", "grouped_share", "quantizer_efficiency", "memory_share"):
            if getattr(self, name) > 1:
                raise ValueError(f"{name} = {getattr(self, name):g}, must be above 0 and at most 1")
        if self.rails < 1 or self.domain_gpus % 1:
            raise ValueError(f"--assume rails={self.rails:g} domain_gpus={self.domain_gpus:g}: whole numbers from 1")

    @staticmethod
    def of(settings: Sequence[str]) -> Assumptions:
        """From texts KEY=VALUE. Raises ValueError with the known keys."""
        known = [field.name for field in dataclasses.fields(Assumptions)]
        values: dict[str, float] = {}
        for setting in settings:
            key, _, text = setting.partition("=")
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise ValueError(f"--assume {setting}: unknown; {hint}known: {', '.join(known)}")
            try:
                values[key] = float(text)
            except ValueError:
                raise ValueError(f"--assume {setting}: {text!r} is not a number") from None
        return Assumptions(**values)

    def machine(self, name: str) -> Machine:
        """The machine of this name with what is assumed of it. Raises ValueError for an unknown name."""
        if name not in MACHINES:
            raise ValueError(f"unknown GPU {name!r}; known: {', '.join(MACHINES)}")
        machine = MACHINES[name]
        return replace(
            machine,
            domain_gpus=int(self.domain_gpus) or machine.domain_gpus,
            inner_gb_per_second=self.inner_gb_per_second or machine.inner_gb_per_second,
            network_gb_per_second=self.network_gb_per_second or machine.network_gb_per_second,
            memory_gb_per_second=self.memory_gb_per_second or machine.memory_gb_per_second,
            kilowatts=self.kilowatts or machine.kilowatts,
            fp4_share=self.fp4_share or machine.fp4_share,
        )


MAY_BE_ZERO = {field.name for field in dataclasses.fields(Assumptions) if field.default == 0.0}
MAY_BE_ZERO |= {"restart_seconds", "save_stop_seconds"}


@dataclass(frozen=True)
class Site:
    """Where a run is to be: the machine, what is assumed, the world size."""

    machine: Machine
    assumptions: Assumptions
    num_gpus: int
