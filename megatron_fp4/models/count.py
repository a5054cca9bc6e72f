"""What a model holds and what it costs: parameters and FLOPs, by arithmetic, without building it.

The list of logical parameters and the list of linears (block.model_linears) say everything; totals, stages and shares
are sums over them. The lists are tested against the real modules on the meta device, the FLOPs against torch's own
counter.

Conventions: a multiply-add is two FLOPs. Only matrix products are counted (as torch's FlopCounter does): projections,
the two products of attention, the four of the chunked scan; not norms, activations, the short convolution, softmax.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from megatron_fp4.layers.qk_norm import QkNorm
from megatron_fp4.models.block import MIXERS, LinearInfo, letter_linears, model_linears
from megatron_fp4.models.config import ModelConfig
from megatron_fp4.models.decoder import StageRange

KINDS = (
    "embedding",
    "head",
    "attention",
    "mlp",
    "mamba",
    "mamba_other",
    "experts",
    "shared",
    "latent",
    "router",
    "mtp",
    "norms",
)
"""mamba: its two projections. mamba_other: convolution, A_log, dt_bias, D. mtp: all that multi-token prediction adds.
norms: all others, the gated one included."""


@dataclass(frozen=True)
class ParameterInfo:
    """One logical parameter. block: None outside the blocks. sharded: the dimension that tp divides, None if whole.
    expert: the routed expert that it is of. trained: False of FP32 state that changes without a gradient."""

    name: str
    block: int | None
    kind: str
    shape: tuple[int, ...]
    sharded: int | None
    expert: int | None = None
    trained: bool = True

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def local_numel(self, tp: int) -> int:
        """Elements on the first tensor-parallel rank, which holds the remainder of an uneven vocabulary."""
        if self.sharded is None:
            return self.numel
        size = self.shape[self.sharded]
        return self.numel // size * -(-size // tp)


def model_parameters(config: ModelConfig) -> list[ParameterInfo]:
    """All logical parameters in the order of the model. A tied head is the embedding and is not listed again."""
    table = (config.vocab_size, config.hidden)
    parameters = [ParameterInfo("embedding.weight", None, "embedding", table, 0)]
    for index, letter in enumerate(config.blocks):
        parameters += _block_parameters(f"blocks.{index}", letter, index, config)
    parameters += _mtp_parameters(config)
    parameters.append(ParameterInfo("final_norm.weight", None, "norms", (config.hidden,), None))
    if not config.tied_embeddings:
        parameters.append(ParameterInfo("head.weight", None, "head", table, 0))
    return parameters


def logical_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every logical parameter, by name."""
    return {parameter.name: parameter.shape for parameter in model_parameters(config)}


def _mtp_parameters(config: ModelConfig) -> Iterator[ParameterInfo]:
    D = config.hidden
    for number in range(config.mtp.num_sequences):
        name = f"mtp.{number}"
        for norm in ("norm_embedding", "norm_hidden", "final_norm"):
            yield ParameterInfo(f"{name}.{norm}.weight", None, "mtp", (D,), None)
        yield ParameterInfo(f"{name}.projection.weight", None, "mtp", (D, 2 * D), None)
        for index, letter in enumerate(config.mtp.pattern):
            for parameter in _block_parameters(f"{name}.blocks.{index}", letter, None, config):
                yield replace(parameter, kind="mtp")


def _block_parameters(name: str, letter: str, block: int | None, config: ModelConfig) -> list[ParameterInfo]:
    """The parameters of the block `name` of the kind `letter`."""
    norms = [f"{name}.{mixer}_norm.weight" for mixer in MIXERS[letter]]
    parameters = [ParameterInfo(norm, block, "norms", (config.hidden,), None) for norm in norms]
    for info in letter_linears(name, letter, block, config):
        parameters += _linear_parameters(info)
    if "attention" in MIXERS[letter]:
        parameters += _attention_parameters(f"{name}.attention", block, config)
    if letter == "M":
        parameters += _mamba_parameters(f"{name}.mamba", block, config)
    if letter == "E":
        parameters += _router_parameters(f"{name}.moe.router", block, config)
    return parameters


def _linear_parameters(info: LinearInfo) -> Iterator[ParameterInfo]:
    """The weight of each part; of a linear of experts, one after the other, those of each expert."""
    *_, kind, linear = info.name.split(".")
    sharded = None if info.whole else 0 if info.column else 1
    for expert in range(info.num_experts) or (None,):
        name = info.name if expert is None else f"{info.name.removesuffix(linear)}{expert}.{linear}"
        for part, rows in info.outputs.items():
            label = f"{name}.{part}" if part else name
            yield ParameterInfo(f"{label}.weight", info.block, kind, (rows, info.in_features), sharded, expert)


def _router_parameters(name: str, index: int | None, config: ModelConfig) -> Iterator[ParameterInfo]:
    """A router's weight, and by the settings its bias in the choice and the overload of the global batch before."""
    moe = config.moe
    yield ParameterInfo(f"{name}.weight", index, "router", (moe.num_experts, config.hidden), None)
    if moe.expert_bias:
        yield ParameterInfo(f"{name}.bias", index, "router", (moe.num_experts,), None, trained=False)
    if moe.global_loss:
        yield ParameterInfo(f"{name}.overload", index, "router", (moe.num_experts,), None, trained=False)


def _attention_parameters(name: str, index: int | None, config: ModelConfig) -> Iterator[ParameterInfo]:
    """What an attention has besides its projections."""
    head_dim = config.attention_head_dim
    for part, heads in (("q", config.num_heads), ("k", config.num_kv_heads), ("v", config.num_kv_heads)):
        if config.qkv_bias:
            yield ParameterInfo(f"{name}.qkv.{part}.bias", index, "attention", (heads * head_dim,), 0)
        if config.qk_norm is not QkNorm.none and part != "v":
            full = config.qk_norm is QkNorm.full
            size, sharded = (heads * head_dim, 0) if full else (head_dim, None)
            yield ParameterInfo(f"{name}.{part}_norm.weight", index, "norms", (size,), sharded)


def _mamba_parameters(name: str, index: int | None, config: ModelConfig) -> list[ParameterInfo]:
    """What Mamba-2 has besides its projections."""
    inner = config.mamba_inner
    states, heads = config.mamba_num_groups * config.mamba_state, config.mamba_num_heads
    shapes: dict[str, tuple[int, ...]] = {}
    for part, rows in (("x", inner), ("B", states), ("C", states)):
        shapes[f"conv.{part}.weight"] = (rows, config.mamba_conv)
        shapes[f"conv.{part}.bias"] = (rows,)
    shapes |= {"A_log": (heads,), "dt_bias": (heads,), "D": (heads,)}
    others = [ParameterInfo(f"{name}.{part}", index, "mamba_other", shape, 0) for part, shape in shapes.items()]
    return [*others, ParameterInfo(f"{name}.norm.weight", index, "norms", (inner,), 0)]


def active_parameters(config: ModelConfig) -> int:
    """Elements of the parameters that act on a token: of the routed experts, as many as a token is sent to."""
    idle = sum(info.numel - info.active_numel for info in model_linears(config))
    return sum(parameter.numel for parameter in model_parameters(config)) - idle


def by_kind(parameters: Iterable[ParameterInfo], tp: int = 1) -> dict[str, int]:
    """Elements per kind, on one tensor-parallel rank; kinds that do not occur are left out."""
    counts = dict.fromkeys(KINDS, 0)
    for parameter in parameters:
        counts[parameter.kind] += parameter.local_numel(tp)
    return {kind: count for kind, count in counts.items() if count}


@functools.cache
def stage_parameters(config: ModelConfig, stage: StageRange) -> tuple[ParameterInfo, ...]:
    """The parameters that one pipeline stage holds; a tied table counts on both of its stages."""

    def holds(parameter: ParameterInfo) -> bool:
        if parameter.block is not None:
            return stage.first <= parameter.block < stage.stop
        if parameter.kind == "embedding":
            return stage.has_embedding or (config.embeds_at_both_ends and stage.has_head)
        return stage.has_head

    return tuple(parameter for parameter in model_parameters(config) if holds(parameter))


def held_parameters(config: ModelConfig, stages: Iterable[StageRange]) -> tuple[ParameterInfo, ...]:
    """The parameters of a rank that holds `stages`; a tied table counts once where both ends are its own."""
    held = {parameter.name: parameter for stage in stages for parameter in stage_parameters(config, stage)}
    return tuple(held.values())


@dataclass(frozen=True)
class Flops:
    """FLOPs of one token's forward pass in training, multi-token prediction included.

    linears: each linear by name; of routed experts, those that a token is sent to. attention: scores and mixing, all
    blocks together. scan: the chunked state-space scan, all blocks together. router: the logits, all blocks together.
    """

    linears: dict[str, float]
    attention: float
    scan: float
    router: float = 0.0

    @property
    def forward(self) -> float:
        return sum(self.linears.values()) + self.attention + self.scan + self.router

    @property
    def training(self) -> float:
        """Forward and backward (each product has two gradients); recomputation is not counted."""
        return 3.0 * self.forward

    def quantized_share(self, gemms: Mapping[str, Sequence[bool]]) -> float:
        """Part of the training FLOPs in quantized GEMMs. gemms: per linear, whether fprop, dgrad and wgrad are."""
        quantized = sum(flops * sum(gemms[name]) for name, flops in self.linears.items())
        return quantized / self.training


def count_flops(config: ModelConfig, seq_length: int, *, causal: bool = True) -> Flops:
    """FLOPs per token at `seq_length`.

    causal: count the keys that a token attends to on average, (seq_length + 1) / 2 without a sliding window; otherwise
    all of them, which is what
    a kernel without causal skipping, and torch's counter, see. Documents kept apart attend to fewer; that depends on
    the data and is left out. The scan is the one of layers/mamba/ssd.py: its chunks are dense.
    """
    linears = {info.name: 2.0 * info.active_numel * info.uses for info in model_linears(config)}
    window = min(config.sliding_window or seq_length, seq_length)
    keys = window - window * (window - 1) / (2 * seq_length) if causal else seq_length
    blocks = config.blocks + config.mtp.depth * config.mtp.pattern
    attention_blocks = sum("attention" in MIXERS[letter] for letter in blocks)
    attention = attention_blocks * 4.0 * config.num_heads * config.attention_head_dim * keys
    mamba_blocks = blocks.count("M")
    scan = mamba_blocks * _scan_flops(config, seq_length) if mamba_blocks else 0.0
    router = blocks.count("E") * 2.0 * config.hidden * config.moe.num_experts
    return Flops(linears, attention, scan, router)


def _scan_flops(config: ModelConfig, seq_length: int) -> float:
    """FLOPs per token: C B^T of each group and its product with x, inside a chunk; writing and reading the state."""
    chunk = config.mamba_chunk
    inner = config.mamba_inner
    state = config.mamba_state
    inside = 2.0 * chunk * (config.mamba_num_groups * state + inner)
    padding = math.ceil(seq_length / chunk) * chunk / seq_length
    return padding * (inside + 4.0 * inner * state)


def quantized_parameters(config: ModelConfig, names: Iterable[str]) -> int:
    """Parameters in the linears `names`."""
    chosen = set(names)
    return sum(info.numel for info in model_linears(config) if info.name in chosen)
