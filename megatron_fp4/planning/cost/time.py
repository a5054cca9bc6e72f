"""The time of a step and of a run: what a device computes, what it sends, and which of the two hides the other.

Every term is a number of seconds per step. Products and the bytes of the traffic give a range that anybody can work out
by hand: `hidden`, if all data-parallel and pipeline traffic hides behind computation, to `exposed`, if none does.
`expected` adds what bandwidth does not say and hides what can hide here; at `worst` each term waits for the one before.
A plan that leaves a term out ranks layouts by what it left out.

    term          what                                              hides behind
    products      matrix products, and the kernels around them      -
    imbalance     the heaviest pipeline rank waits for nobody       -
    idle          the bubble of the pipeline's order                -
    tensor        rows gathered and scattered in every layer        nothing: the next product needs them
    context       keys, values, states between parts of sequences   nothing
    data          gradients reduced, parameters gathered            the last backward, the next forward of a microbatch
    pipeline      activations to the next stage, gradients back     computation
    data_latency  of the messages of `data`                         as `data`
    latency       of the other messages                             nothing
    amax          all-reduces of scales, by latency                 nothing
    experts       rows to routed experts and back, copies too       nothing
    grouped       products of experts: padding, and slower ones     -
    router        its products in FP32, at their peak               -
    quantizers    their bytes by the part of memory's bandwidth     -
    optimizer     its bytes by the bandwidth of memory              -
    muon          matrices to their owners, products there, back    nothing
    qk_clip       the second pass over logits, and their bytes      -
    fp4           FP4 products reach less of their peak than others -
    stretch       idle time while other ranks do these              -

Everything that is not a quantized GEMM runs at the BF16 rate, which by Amdahl's law limits what FP4 can gain.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_fp4.models.count import Flops
from megatron_fp4.models.decoder import Recompute
from megatron_fp4.planning.cost.experts import ExpertTime
from megatron_fp4.planning.cost.hardware import Site
from megatron_fp4.planning.cost.links import Path, paths
from megatron_fp4.planning.cost.overheads import Overheads
from megatron_fp4.planning.idle import PipelineLayout, imbalance
from megatron_fp4.planning.settings import RankSettings
from megatron_fp4.planning.traffic import bytes_sent
from megatron_fp4.precision.table import PrecisionTable, gemm_formats
from megatron_fp4.train.config import RunConfig
from megatron_fp4.train.telemetry.peaks import RATES, Gpu, flops_by_rate, rate_of

KINDS = ("hidden", "exposed", "expected", "worst")


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step, by term (see the top of the file), each of the pipeline rank that it is largest on.

    behind_backward, behind_forward: of the last backward and the next forward of one microbatch, behind which gradients
    and parameters are sent; 0 where the configuration does not let them. gradient_share: their part of `data`.
    """

    products: float
    imbalance: float
    idle: float
    tensor: float
    context: float
    data: float
    pipeline: float
    data_latency: float
    latency: float
    amax: float
    experts: float
    grouped: float
    router: float
    quantizers: float
    optimizer: float
    muon: float
    qk_clip: float
    fp4: float
    stretch: float
    behind_backward: float
    behind_forward: float
    gradient_share: float

    @property
    def terms(self) -> dict[str, float]:
        """The terms that add up to `worst`."""
        names = [field.name for field in dataclasses.fields(self)]
        return {name: getattr(self, name) for name in names[: names.index("behind_backward")]}

    @property
    def compute(self) -> float:
        """Seconds of matrix products alone, unequal stages and the bubble included."""
        return self.products + self.imbalance + self.idle

    @property
    def hidden(self) -> float:
        return max(self.compute + self.tensor + self.context + self.experts + self.muon, self.data, self.pipeline)

    @property
    def exposed(self) -> float:
        return self.compute + self.tensor + self.context + self.experts + self.muon + self.data + self.pipeline

    @property
    def expected(self) -> float:
        reduced = self.data * self.gradient_share + self.data_latency / 2
        gathered = self.data * (1 - self.gradient_share) + self.data_latency / 2
        late = max(0.0, reduced - self.behind_backward) + max(0.0, gathered - self.behind_forward)
        shown = late + max(0.0, self.pipeline - self.compute)
        return self.worst - self.data - self.data_latency - self.pipeline + shown

    @property
    def worst(self) -> float:
        return sum(self.terms.values())

    def seconds(self, kind: str) -> float:
        """One of `KINDS`, `compute`, or a term."""
        value: float = getattr(self, kind)
        return value


def step_time(
    config: RunConfig, flops: Flops, pipeline: PipelineLayout, settings: RankSettings, idle: float, site: Site
) -> StepTime:
    """One step of `settings.num_microbatches` per data-parallel rank. idle: part of the time that the bubble takes."""
    assert settings.table is not None
    table, microbatches = settings.table, settings.num_microbatches
    machine = site.machine
    tokens = microbatches * settings.dp * settings.micro_batch * settings.seq_length
    products = tokens / site.num_gpus * seconds_per_token(flops, table, settings.recompute, machine.gpu)
    products /= site.assumptions.efficiency
    heaviest = imbalance(pipeline.costs(config.model))
    links = _links(config, settings, site)
    sent = [bytes_sent(config.model, held.values(), settings) for held in pipeline.chunks]
    seconds = {axis: max(links[axis].seconds(part[axis]) for part in sent) for axis in sent[0]}
    beside = [Overheads.of(config.model, held.values(), settings) for held in pipeline.chunks]
    memory = 1e9 * machine.memory_gb_per_second
    quantizers = max(one.quantizer_bytes * microbatches + one.weight_bytes for one in beside) / memory
    quantizers /= site.assumptions.quantizer_efficiency
    reductions = max(one.scale_reductions for one in beside) * microbatches
    amax = reductions * links["amax"].small_latency + max(one.weight_reductions for one in beside) * (
        links["tensor"].small_latency
    )
    exchanged = max(part.get("experts", 0.0) for part in sent)
    experts = ExpertTime.of(config.model, pipeline, settings, links.get("experts"), exchanged, site)
    router = 3 * flops.router * tokens / site.num_gpus / (1e12 * site.assumptions.fp32_tflops)
    latency, data_latency = _latencies(config, sent, settings, site)
    fp4 = heaviest * tokens / site.num_gpus * _fp4_shortfall(flops, table, settings.recompute, site)
    in_layers = seconds["tensor"] + seconds["context"] + quantizers + amax + latency + fp4
    in_layers += experts.moving + experts.grouped + router
    device = (products * heaviest + in_layers) / microbatches
    flops_of_muon = max(one.optimizer_flops for one in beside)
    return StepTime(
        products=products,
        imbalance=products * (heaviest - 1),
        idle=products * heaviest * idle / (1 - idle),
        tensor=seconds["tensor"],
        context=seconds["context"],
        data=seconds["data"] + seconds.get("expert_data", 0.0),
        pipeline=seconds["pipeline"],
        data_latency=data_latency,
        latency=latency,
        amax=amax,
        experts=experts.moving,
        grouped=experts.grouped,
        router=router,
        quantizers=quantizers,
        optimizer=max(one.optimizer_bytes for one in beside) / memory,
        muon=_seconds({"bf16": flops_of_muon}, machine.gpu) / site.assumptions.efficiency
        + seconds.get("matrices", 0.0),
        qk_clip=_second_logits(config, flops, tokens / site.num_gpus, site),
        fp4=fp4,
        stretch=in_layers * idle / (1 - idle),
        behind_backward=device * 2 / 3 * config.optim.overlap_reduce.enabled("cuda"),
        behind_forward=device / 3 * config.optim.overlap_gather.enabled("cuda"),
        gradient_share=settings.gradient_bytes / (settings.gradient_bytes + settings.dtype.itemsize),
    )


def _second_logits(config: RunConfig, flops: Flops, tokens: float, site: Site) -> float:
    """Seconds of QK-clip's pass over q k^T: half of attention's forward products, and FP32 logits, written and read."""
    if not config.optim.qk_clip.threshold:
        return 0.0
    products = flops.attention / 2
    logits = products / (2 * config.model.attention_head_dim)
    computed = products / site.machine.gpu.rate("bf16") / site.assumptions.efficiency
    return tokens * (computed + 2 * 4 * logits / (1e9 * site.machine.memory_gb_per_second))


def _latencies(
    config: RunConfig, sent: Sequence[Mapping[str, float]], settings: RankSettings, site: Site
) -> tuple[float, float]:
    """Seconds a step: of tensor parallelism and of one trip down the pipeline and back; of all buckets both ways."""
    links = _links(config, settings, site)
    rows = settings.tokens * config.model.hidden * settings.dtype.itemsize
    share, replicas = 1 - 1 / settings.tp, 1 - 1 / settings.replicas
    messages = max(part["tensor"] for part in sent) / (rows * share) if share else 0.0
    each = settings.gradient_bytes + settings.dtype.itemsize
    parameters = max(part["data"] for part in sent) / each / replicas if replicas else 0.0
    buckets = math.ceil(parameters / config.optim.bucket_numel)
    trips = 2 * (config.parallel.pp - 1)
    latency = messages * links["tensor"].latency + trips * links["pipeline"].latency
    return latency, 2 * buckets * links["data"].latency


def _links(config: RunConfig, settings: RankSettings, site: Site) -> dict[str, Path]:
    """Every path that messages of this run take."""
    some = {"with_owners": True, "with_experts": bool(config.model.moe.num_experts)}
    return paths(config.parallel, settings.dp, site.machine, site.assumptions.rails, **some)


def seconds_per_token(flops: Flops, table: PrecisionTable, recompute: Recompute, gpu: Gpu) -> float:
    """Seconds of one GPU at its peak rates, second forward passes included."""
    second = _recomputed_flops(flops, table, recompute, gpu)
    return _seconds(flops_by_rate(flops, table, gpu), gpu) + _seconds(second, gpu)


def _fp4_shortfall(flops: Flops, table: PrecisionTable, recompute: Recompute, site: Site) -> float:
    """Seconds per token and GPU beyond those at `efficiency`; see `Machine.fp4_share`."""
    machine = site.machine
    gpu = machine.gpu
    products = flops_by_rate(flops, table, gpu)["fp4"] + _recomputed_flops(flops, table, recompute, gpu)["fp4"]
    return products / gpu.rate("fp4") / site.assumptions.efficiency * (1 / machine.fp4_share - 1)


def _recomputed_flops(flops: Flops, table: PrecisionTable, recompute: Recompute, gpu: Gpu) -> dict[str, float]:
    """FLOPs per token of second forward passes, by rate: Mamba's scan always, attention if anything is recomputed, with
    full recompute the blocks."""
    by_rate = dict.fromkeys(RATES, 0.0)
    by_rate["bf16"] = flops.scan
    if recompute is not Recompute.none:
        by_rate["bf16"] += flops.attention
    if recompute is Recompute.full:
        by_rate["bf16"] += flops.scan
        for row in table.rows:
            if row.name != "head":
                by_rate[rate_of(gemm_formats(row.precision)[0], gpu)] += flops.linears[row.name]
    return by_rate


def _seconds(by_rate: Mapping[str, float], gpu: Gpu) -> float:
    return sum(value / gpu.rate(rate) for rate, value in by_rate.items())


def speed_up(flops: Flops, table: PrecisionTable, gpu: Gpu) -> dict[str, Any]:
    """The gain by Amdahl's law at peak rates: over BF16, and if quantized products took no time."""
    slow = flops_by_rate(flops, table)["bf16"]
    return {
        "speed_up_over_bf16": flops.training / gpu.rate("bf16") / _seconds(flops_by_rate(flops, table, gpu), gpu),
        "speed_up_limit": flops.training / slow if slow else None,
    }
