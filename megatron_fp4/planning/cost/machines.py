"""What a GPU's links, memory and power can do: figures of data sheets and guides, each with the document that has it.

Bandwidths are those of one direction: data sheets of NVLink add both. Where a document could not be opened, only what
others say of it, the source says so.

Not here: peak rates and memory of GPUs (train/telemetry/peaks.py), what no document says (hardware.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_fp4.train.telemetry.peaks import GPUS, Gpu


@dataclass(frozen=True)
class Machine:
    """A GPU in its server or rack.

    domain_gpus: GPUs that NVLink (or PCIe) connects. inner, network: GB/s in one direction per GPU, inside a domain and
    between domains. memory: GB/s of the GPU's own. kilowatts: of server or rack, divided by its GPUs. host_link: GB/s
    between GPU and host memory. fp4_share: what FP4 products reach of their peak, relative to what others reach of
    theirs; 1 without FP4 units.
    """

    gpu: Gpu
    domain_gpus: int
    inner_gb_per_second: float
    network_gb_per_second: float
    memory_gb_per_second: float
    kilowatts: float
    host_link_gb_per_second: float
    fp4_share: float
    sources: dict[str, str]


_CONNECTX7 = "ConnectX-7, 400 Gb/s per GPU"
_PCIE5 = "PCIe 5.0 x16, 64 GB/s"
_DGX_H100 = "NVIDIA DGX H100/H200 User Guide"
_DGX_B200 = "NVIDIA DGX B200 User Guide, Hardware Overview"
_DGX_GB200 = "NVIDIA DGX GB Rack Scale Systems User Guide, Hardware"
_NVL72 = "NVIDIA NVL72 AI Factory Enterprise Reference Architecture, Components"
_NOT_OPENED = "as others quote it"
_BRIDGE = "Megatron-Bridge 26.04: Llama 3 in NVFP4 and MXFP8 on GB200, 0.77 for a 70B, 0.85 for a 405B"
_TUTORIAL = "Transformer Engine's GEMM Profiling Tutorial"
_GEMMS = "cuBLASLt products measured by github.com/xzwgit/gpu-flops-bench"
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
            1.0,
            {
                "domain, inner": f"{_DGX_H100}: 8 GPUs; H100 data sheet: NVLink 900 GB/s in both directions",
                "network": f"{_DGX_H100}: {_CONNECTX7}",
                "memory": f"H100 data sheet (SXM): 3.35 TB/s, {_NOT_OPENED}",
                "power": f"{_DGX_H100}: 10.2 kW at most / 8",
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
            1.0,
            {
                "domain, inner": f"{_DGX_H100}: 8 GPUs; H200 data sheet: NVLink 900 GB/s in both directions",
                "network": f"{_DGX_H100}: {_CONNECTX7}",
                "memory": f"H200 data sheet (SXM): 4.8 TB/s, {_NOT_OPENED}",
                "power": f"{_DGX_H100}: 10.2 kW at most / 8",
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
            0.8,
            {
                "domain, inner": f"{_DGX_B200}: 8 GPUs, NVLink switches of 14.4 TB/s, which is 2 x 0.9 per GPU",
                "network": f"{_DGX_B200}: {_CONNECTX7}",
                "memory": f"DGX B200 data sheet: 64 TB/s / 8, {_NOT_OPENED} (some quote 7.7 TB/s)",
                "power": f"{_DGX_B200}: 14.3 kW at most / 8",
                "host link": _PCIE5,
                "fp4 share": _BRIDGE,
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
            0.8,
            {
                "domain, inner": f"{_DGX_GB200}: 72 GPUs; GB200 NVL72 data sheet: NVLink 130 TB/s, 2 x 0.9 per GPU",
                "network": f"{_DGX_GB200}: 4 ConnectX-7 of 400 Gb/s for 4 GPUs",
                "memory": f"GB200 NVL72 data sheet: 576 TB/s / 72, {_NOT_OPENED}",
                "power": "about 120 kW a rack / 72, as the press had it from GTC 2024; in no guide that was opened",
                "host link": "GB200 NVL72 data sheet: NVLink-C2C 900 GB/s in both directions per CPU, halved",
                "fp4 share": _BRIDGE,
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
            0.6,
            {
                "domain, inner": f"{_NVL72}: 72 GPUs, NVLink 130 TB/s, 2 x 0.9 per GPU",
                "network": f"{_NVL72}: 4 ConnectX-8 for 4 GPUs, of 800 Gb/s",
                "memory": f"GB300 NVL72 data sheet: 576 TB/s / 72, {_NOT_OPENED}",
                "power": f"{_NVL72}: up to 142 kW a rack / 72",
                "host link": "as GB200",
                "fp4 share": f"{_TUTORIAL}: products on a B300, NVFP4 3.48 x BF16 of 6, 1.90 x MXFP8 of 3",
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
            0.9,
            {
                "domain, inner": f"no NVLink: {_PCIE5}; 8 GPUs a server is an assumption",
                "network": "assumption: 400 Gb/s per GPU, as in the servers above",
                "memory": f"RTX PRO 6000 Blackwell data sheet: 1,792 GB/s, {_NOT_OPENED}",
                "power": f"RTX PRO 6000 Blackwell data sheet: 600 W, of the card alone, {_NOT_OPENED}",
                "host link": _PCIE5,
                "fp4 share": f"{_GEMMS}: NVFP4 1608, FP8 905, BF16 458 TFLOP/s, 3.5 of 4",
            },
        ),
        Machine(
            GPUS["RTX_5090"],
            8,
            64.0,
            50.0,
            1792.0,
            0.575,
            64.0,
            0.8,
            {
                "domain, inner": f"no NVLink: {_PCIE5}; 8 GPUs a server is an assumption",
                "network": "assumption: 400 Gb/s per GPU, as in the servers above",
                "memory": f"GeForce RTX 5090 specifications: 1,792 GB/s, {_NOT_OPENED}",
                "power": f"GeForce RTX 5090 specifications: 575 W, of the card alone, {_NOT_OPENED}",
                "host link": _PCIE5,
                "fp4 share": f"{_GEMMS}: NVFP4 1617, BF16 254 TFLOP/s, 6.4 of 8",
            },
        ),
    )
}
