"""Peak rates and memory of GPUs, and the FLOPs of a model by the rate at which they could run.

A GEMM runs at the rate of its slower operand, and everything that is not a quantized GEMM at BF16's.

Dense rates (without sparsity), per GPU, from NVIDIA's data sheets: H100 and H200 SXM, B200 (DGX B200), GB200 NVL72 and
GB300 NVL72 divided by 72, RTX PRO 6000. The FP4 rates of the data-center parts are 4 and 6 times BF16, as in table 1 of
arXiv 2509.25149. Cloud vendors quote GB200 down to 10% lower. Cards of a desk run above the clock of their data sheet:
an RTX 5090 was measured at 254 TFLOP/s in BF16 (github.com/xzwgit/gpu-flops-bench).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from megatron_fp4.models.count import Flops
from megatron_fp4.precision.table import PrecisionTable, gemm_formats

RATES = ("bf16", "fp8", "fp4")
"""Slowest first."""
BLOCK_SCALED = ("nvfp4", "mxfp4", "mxfp8")
"""Formats whose block scales the tensor cores of Blackwell apply; elsewhere their operands run as BF16 (emulation)."""
RATE_OF_FORMAT = {"bf16": "bf16", "nvfp4": "fp4", "mxfp4": "fp4", "mxfp8": "fp8", "fp8_block": "fp8"}


@dataclass(frozen=True)
class Gpu:
    """What a data sheet says of a GPU.

    tflops: TFLOP/s without sparsity by rate (`RATES`); fp4 is absent where the hardware has none. memory_gb: 1e9 bytes.
    """

    name: str
    tflops: dict[str, float]
    memory_gb: float
    source: str

    def rate(self, name: str) -> float:
        """FLOP/s at one of `RATES`; FP4 operands run as BF16 where there is no FP4 unit (emulation)."""
        return 1e12 * self.tflops.get(name, self.tflops["bf16"])

    def multiplies(self, number_format: str) -> bool:
        """Whether the tensor cores multiply operands of this format as they are."""
        return "fp4" in self.tflops if number_format in BLOCK_SCALED else True


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("H100", {"bf16": 989.0, "fp8": 1979.0}, 80.0, "NVIDIA H100 data sheet (SXM), sparse / 2"),
        Gpu("H200", {"bf16": 989.0, "fp8": 1979.0}, 141.0, "NVIDIA H200 data sheet (SXM), sparse / 2"),
        Gpu("B200", {"bf16": 2250.0, "fp8": 4500.0, "fp4": 9000.0}, 180.0, "NVIDIA DGX B200 data sheet / 8"),
        Gpu("GB200", {"bf16": 2500.0, "fp8": 5000.0, "fp4": 10000.0}, 186.0, "NVIDIA GB200 NVL72 data sheet / 72"),
        Gpu("GB300", {"bf16": 2500.0, "fp8": 5000.0, "fp4": 15000.0}, 279.0, "NVIDIA GB300 NVL72 data sheet / 72"),
        Gpu(
            "RTX_PRO_6000",
            {"bf16": 500.0, "fp8": 1000.0, "fp4": 2000.0},
            96.0,
            "NVIDIA RTX PRO 6000 Blackwell data sheet: 4,000 TOPS, of FP4 with sparsity; FP8 a half, BF16 a quarter",
        ),
        Gpu(
            "RTX_5090",
            {"bf16": 209.5, "fp8": 838.0, "fp4": 1676.0},
            32.0,
            "NVIDIA RTX Blackwell GPU Architecture: 3,352 TOPS of FP4 with sparsity, FP8 a half; BF16 with FP32 sums",
        ),
    )
}


def find_gpu(device_name: str) -> Gpu | None:
    """The entry for a name as the driver gives it ("NVIDIA H100 80GB HBM3"); None if it is not in the table."""
    words = device_name.replace("-", " ")
    return next((gpu for name, gpu in GPUS.items() if re.search(rf"\b{name.replace('_', ' ')}\b", words)), None)


def flops_by_rate(flops: Flops, table: PrecisionTable, gpu: Gpu | None = None) -> dict[str, float]:
    """Training FLOPs per token by rate; a GEMM of mixed operands runs at the slower one's. gpu: see `rate_of`."""
    by_rate = dict.fromkeys(RATES, 0.0)
    by_rate["bf16"] = 3.0 * (flops.attention + flops.scan)
    for row in table.rows:
        for text in gemm_formats(row.precision):
            by_rate[rate_of(text, gpu)] += flops.linears[row.name]
    return by_rate


def rate_of(formats: str, gpu: Gpu | None = None) -> str:
    """The rate of a GEMM, from its formats as text ("nvfp4", "nvfp4/bf16"), on hardware that has it or on `gpu`."""
    names = [name if gpu is None or gpu.multiplies(name) else "bf16" for name in formats.split("/")]
    return min((RATE_OF_FORMAT[name] for name in names), key=RATES.index)
