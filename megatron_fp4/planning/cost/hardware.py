"""What a GPU's links, memory and power can do, by data sheet, and what nobody's data sheet says: the assumptions.

Every figure has its source beside it and every one can be replaced (`plan --assume KEY=VALUE`). Bandwidths are those of
one direction: data sheets of NVLink add both. Latencies are those by which NCCL itself chooses its algorithms.

Not here: peak rates and memory of GPUs (train/telemetry/peaks.py), which ranks share which link (links.py).
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_fp4.train.telemetry.peaks import GPUS, Gpu


@dataclass(frozen=True)
class Machine:
    """A GPU in its server or rack.

    domain_gpus: GPUs that NVLink (or PCIe) connects. inner, network: GB/s in one direction per GPU, inside a domain and
    between domains. memory: GB/s of the GPU's own. kilowatts: of server or rack, divided by its GPUs. host_link: GB/s
    between GPU and host memory.
    """

    gpu: Gpu
    domain_gpus: int
    inner_gb_per_second: float
    network_gb_per_second: float
    memory_gb_per_second: float
    kilowatts: float
    host_link_gb_per_second: float
    sources: dict[str, str]


_CONNECTX7 = "ConnectX-7, 400 Gb/s per GPU"
_PCIE5 = "PCIe 5.0 x16, 64 GB/s"
MACHINES = {
    machine.gpu.name: machine
    for machine in (
        Machine(
            GPUS["H100"],
            8,
            450.0,
            50.0,
            3350.0,
            10.2 / 8,
            64.0,
            {
                "domain, inner": "NVIDIA H100 data sheet: NVLink 900 GB/s in both directions; DGX H100: 8 GPUs",
                "network": f"DGX H100 user guide: {_CONNECTX7}",
                "memory": "NVIDIA H100 data sheet (SXM): 3.35 TB/s",
                "power": "DGX H100 user guide: 10.2 kW at most / 8",
                "host link": _PCIE5,
            },
        ),
        Machine(
            GPUS["H200"],
            8,
            450.0,
            50.0,
            4800.0,
            10.2 / 8,
            64.0,
            {
                "domain, inner": "NVIDIA H200 data sheet: NVLink 900 GB/s in both directions; DGX H200: 8 GPUs",
                "network": f"DGX H200 user guide: {_CONNECTX7}",
                "memory": "NVIDIA H200 data sheet (SXM): 4.8 TB/s",
                "power": "DGX H200 user guide: 10.2 kW at most / 8",
                "host link": _PCIE5,
            },
        ),
        Machine(
            GPUS["B200"],
            8,
            900.0,
            50.0,
            8000.0,
            14.3 / 8,
            64.0,
            {
                "domain, inner": "DGX B200 user guide: 8 GPUs, NVLink switches of 14.4 TB/s, which is 2 x 0.9 per GPU",
                "network": f"DGX B200 user guide: {_CONNECTX7}",
                "memory": "NVIDIA DGX B200 data sheet: 64 TB/s / 8",
                "power": "DGX B200 user guide: 14.3 kW at most / 8",
                "host link": _PCIE5,
            },
        ),
        Machine(
            GPUS["GB200"],
            72,
            900.0,
            50.0,
            8000.0,
            120.0 / 72,
            450.0,
            {
                "domain, inner": "NVIDIA GB200 NVL72 data sheet: 72 GPUs, NVLink 130 TB/s, which is 2 x 0.9 per GPU",
                "network": f"DGX GB200: {_CONNECTX7}",
                "memory": "NVIDIA GB200 NVL72 data sheet: 576 TB/s / 72",
                "power": "DGX GB200: about 120 kW a rack / 72",
                "host link": "NVIDIA GB200 data sheet: NVLink-C2C 900 GB/s in both directions per CPU, halved",
            },
        ),
        Machine(
            GPUS["GB300"],
            72,
            900.0,
            100.0,
            8000.0,
            142.0 / 72,
            450.0,
            {
                "domain, inner": "NVL72 AI Factory reference architecture: 72 GPUs, NVLink 130 TB/s, 2 x 0.9 per GPU",
                "network": "NVL72 AI Factory reference architecture: a ConnectX-8 per GPU, 800 Gb/s",
                "memory": "NVIDIA GB300 NVL72 data sheet: 576 TB/s / 72",
                "power": "NVL72 AI Factory reference architecture: up to 142 kW a rack / 72",
                "host link": "as GB200",
            },
        ),
        Machine(
            GPUS["RTX_PRO_6000"],
            8,
            64.0,
            50.0,
            1792.0,
            0.6,
            64.0,
            {
                "domain, inner": f"no NVLink: {_PCIE5}; 8 GPUs a server is an assumption",
                "network": "assumption: 400 Gb/s per GPU, as in the servers above",
                "memory": "NVIDIA RTX PRO 6000 Blackwell data sheet: 1,792 GB/s",
                "power": "NVIDIA RTX PRO 6000 Blackwell data sheet: 600 W, of the card alone",
                "host link": _PCIE5,
            },
        ),
    )
}


@dataclass(frozen=True)
class Assumptions:
    """What a plan assumes; 0 stands for the machine's own figure, or for a figure that is left out of the report."""

    efficiency: float = 0.4
    """Part of the peak rates that matrix products and the kernels around them reach; an assumption. End to end 0.37 is
    published for a 70B in MXFP8 on 64 GB200 and 0.28 in NVFP4 (Megatron-Bridge performance summary 26.04)."""
    fp4_share: float = 0.8
    """Part of `efficiency` that FP4 products reach; an assumption, set by the same table: on GB200 0.77 for a 70B, 0.85
    for a 405B, if MXFP8 products reach `efficiency`."""
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
            positive = field.default != 0.0
            if not math.isfinite(value) or value < 0 or (positive and value == 0):
                raise ValueError(f"--assume {field.name}={value:g}: must be a number above 0")
        for name in ("efficiency", "fp4_share", "memory_share"):
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
        )


@dataclass(frozen=True)
class Site:
    """Where a run is to be: the machine, what is assumed, the world size."""

    machine: Machine
    assumptions: Assumptions
    num_gpus: int
