"""One block of the decoder: a residual around each of its mixers.

    x <- x + dropout(mixer(norm(x)))         once for M, *, - and E;  attention, then MLP for T
    x <- x + dropout(norm(mixer(x)))         with model.post_norm

The linears of a block are also listed here without building it, for the precision plan and for planning.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor, nn

from megatron_fp4.layers.attention import Attention
from megatron_fp4.layers.dropout import Dropout
from megatron_fp4.layers.layer_context import LayerContext, Tokens
from megatron_fp4.layers.mamba.mixer import Mamba2
from megatron_fp4.layers.mlp import MLP, Activation
from megatron_fp4.layers.moe.layer import MixtureOfExperts
from megatron_fp4.layers.norm import RMSNorm
from megatron_fp4.models.config import ModelConfig

Mixer = Attention | MLP | Mamba2 | MixtureOfExperts

MIXERS = {"T": ("attention", "mlp"), "M": ("mamba",), "*": ("attention",), "-": ("mlp",), "E": ("moe",)}
"""The kinds of mixers in a block, by its letter in `model.pattern`; also their part of logical names."""


def make_mixer(
    kind: str, name: str, config: ModelConfig, context: LayerContext, *, keep_documents_apart: bool
) -> Mixer:
    """The mixer `kind` (attention, mlp, mamba or moe) with the logical name `name`."""
    std, out_std = config.init_std, config.residual_std
    if kind == "moe":
        return MixtureOfExperts(
            name,
            config.moe,
            config.hidden,
            config.activation,
            context,
            std=std,
            out_std=out_std,
            impl=config.pointwise_impl,
        )
    if kind == "mlp":
        return MLP(
            name,
            config.hidden,
            config.ffn_hidden,
            config.activation,
            context,
            std=std,
            out_std=out_std,
            impl=config.pointwise_impl,
        )
    if kind == "mamba":
        return Mamba2(
            name,
            config,
            context,
            keep_documents_apart=keep_documents_apart,
            std=std,
            out_std=out_std,
            kernel=config.mamba_kernel,
        )
    return Attention(name, config, context, keep_documents_apart=keep_documents_apart, std=std, out_std=out_std)


def make_norm(name: str, config: ModelConfig, context: LayerContext) -> RMSNorm:
    """The norm `name` of the model's hidden size, computed as `model.norm_impl` says."""
    return RMSNorm(name, config.hidden, context, eps=config.norm_eps, impl=config.norm_impl)


class Residual(nn.Module):
    """`x + dropout(mixer(norm(x)))`: x_TD `[T/tp, D]` -> `[T/tp, D]`. post_norm: `x + dropout(norm(mixer(x)))`."""

    def __init__(self, norm: RMSNorm, mixer: Mixer, dropout: Dropout, *, post_norm: bool) -> None:
        super().__init__()
        self._post_norm = post_norm
        self.norm = norm
        self.mixer = mixer
        self.dropout = dropout

    def forward(self, x_TD: Tensor, tokens: Tokens) -> Tensor:
        y_TD = self.norm(self.mixer(x_TD, tokens)) if self._post_norm else self.mixer(self.norm(x_TD), tokens)
        return x_TD + self.dropout(y_TD, tokens)


class Block(nn.Module):
    """The block `name` of the kind `letter`: x_TD `[T/tp, D]` -> `[T/tp, D]`.

    Its children are its residual branches by kind (`attention`, `mlp`, `mamba`), in the order of execution. A parameter
    of one, `blocks.0.attention.mixer.qkv.weight` to torch, has the logical name `blocks.0.attention.qkv.weight`.
    """

    def __init__(
        self, name: str, letter: str, config: ModelConfig, context: LayerContext, *, keep_documents_apart: bool
    ) -> None:
        super().__init__()
        for kind in MIXERS[letter]:
            label = f"{name}.{kind}"
            norm = make_norm(f"{label}_norm", config, context)
            mixer = make_mixer(kind, label, config, context, keep_documents_apart=keep_documents_apart)
            dropout = Dropout(f"{label}_dropout", config.dropout, context)
            self.add_module(kind, Residual(norm, mixer, dropout, post_norm=config.post_norm))

    def forward(self, x_TD: Tensor, tokens: Tokens) -> Tensor:
        for residual in self.children():
            x_TD = residual(x_TD, tokens)
        return x_TD


@dataclass(frozen=True)
class LinearInfo:
    """A linear of the model as the precision plan and the planner see it, without building it.

    block: None outside the blocks (the head, what predicts later tokens). outputs: logical output features per part.
    column: True if the output features are sharded over tp, False if the input features are. whole: every
    tensor-parallel rank holds all features (latent projections, routed experts). num_experts: that many matrices of
    this shape are the linear, of which a token passes top_k; 0 and 0: one matrix, which every token passes. uses: how
    often a token passes it in training; more than once with multi-token prediction.
    """

    name: str
    block: int | None
    in_features: int
    outputs: dict[str, int]
    column: bool
    whole: bool = False
    num_experts: int = 0
    top_k: int = 0
    uses: int = 1

    @property
    def out_features(self) -> int:
        return sum(self.outputs.values())

    @property
    def numel(self) -> int:
        """Elements of all its matrices."""
        return self.in_features * self.out_features * (self.num_experts or 1)

    @property
    def active_numel(self) -> int:
        """Elements that a token is multiplied by, each time."""
        return self.in_features * self.out_features * (self.top_k or 1)

    def local_shape(self, tp: int) -> tuple[int, int]:
        """Local weight shape [N, K] under `tp` (of the first rank where the vocabulary is uneven); of one expert."""
        if self.whole:
            return self.out_features, self.in_features
        if self.column:
            return sum(-(-rows // tp) for rows in self.outputs.values()), self.in_features
        return self.out_features, self.in_features // tp

    def local_outputs(self, tp: int) -> list[int]:
        """Output features of each part on a rank under `tp`."""
        shards = tp if self.column and not self.whole else 1
        return [rows // shards for rows in self.outputs.values()]

    def local_rows(self, tokens: int, tp: int) -> int:
        """Rows of x on a rank where a microbatch has `tokens`; 0 of experts, whose segments are extended."""
        if self.num_experts:
            return 0
        return tokens // tp if self.whole else tokens


def block_linears(index: int, config: ModelConfig) -> list[LinearInfo]:
    """The linears of block `index`, in the order of execution."""
    return letter_linears(f"blocks.{index}", config.blocks[index], index, config)


def letter_linears(block_name: str, letter: str, block: int | None, config: ModelConfig) -> list[LinearInfo]:
    """The linears of a block of the kind `letter`, in the order of execution."""
    linears: list[LinearInfo] = []

    def add(name: str, in_features: int, outputs: dict[str, int], *, column: bool) -> None:
        linears.append(LinearInfo(f"{block_name}.{name}", block, in_features, outputs, column))

    D = config.hidden
    for kind in MIXERS[letter]:
        if kind == "attention":
            query = config.num_heads * config.attention_head_dim
            key = config.num_kv_heads * config.attention_head_dim
            add("attention.qkv", D, {"q": query, "k": key, "v": key}, column=True)
            add("attention.out", query, {"": D}, column=False)
        elif kind == "mlp":
            first, outputs = mlp_input(config, config.ffn_hidden)
            add(f"mlp.{first}", D, outputs, column=True)
            add("mlp.down", config.ffn_hidden, {"": D}, column=False)
        elif kind == "moe":
            linears += _moe_linears(f"{block_name}.moe", block, config)
        else:
            inner, states = config.mamba_inner, config.mamba_num_groups * config.mamba_state
            parts = {"z": inner, "x": inner, "B": states, "C": states, "dt": config.mamba_num_heads}
            add("mamba.in_proj", D, parts, column=True)
            add("mamba.out_proj", inner, {"": D}, column=False)
    return linears


def mlp_input(config: ModelConfig, ffn_hidden: int) -> tuple[str, dict[str, int]]:
    """Name and outputs of the first linear of an MLP or expert of width `ffn_hidden`."""
    if config.activation is Activation.swiglu:
        return "gate_up", {"gate": ffn_hidden, "up": ffn_hidden}
    return "up", {"": ffn_hidden}


def _moe_linears(name: str, block: int | None, config: ModelConfig) -> Iterator[LinearInfo]:
    """The linears of a mixture of experts. Its router is none: it is always computed in FP32."""
    moe, D = config.moe, config.hidden
    width = moe.latent or D
    if moe.latent:
        yield LinearInfo(f"{name}.latent.down", block, D, {"": width}, column=True, whole=True)
    first, outputs = mlp_input(config, moe.ffn_hidden)
    share = (moe.num_experts, moe.top_k)
    yield LinearInfo(f"{name}.experts.{first}", block, width, outputs, True, True, *share)
    yield LinearInfo(f"{name}.experts.down", block, moe.ffn_hidden, {"": width}, False, True, *share)
    if moe.latent:
        yield LinearInfo(f"{name}.latent.up", block, width, {"": D}, column=False, whole=True)
    if moe.shared_ffn_hidden:
        first, outputs = mlp_input(config, moe.shared_ffn_hidden)
        yield LinearInfo(f"{name}.shared.{first}", block, D, outputs, column=True)
        yield LinearInfo(f"{name}.shared.down", block, moe.shared_ffn_hidden, {"": D}, column=False)


def model_linears(config: ModelConfig) -> list[LinearInfo]:
    """All linears of the model, in the order of execution, the head last."""
    linears = [info for index in range(len(config.blocks)) for info in block_linears(index, config)]
    return [*linears, *last_linears(config)]


def last_linears(config: ModelConfig) -> list[LinearInfo]:
    """The linears behind the blocks: those of multi-token prediction, and the head, which all its depths use."""
    mtp, D = config.mtp, config.hidden
    linears: list[LinearInfo] = []
    for number in range(mtp.num_sequences):
        linears.append(LinearInfo(f"mtp.{number}.projection", None, 2 * D, {"": D}, column=True, whole=True))
        for index, letter in enumerate(mtp.pattern):
            linears += letter_linears(f"mtp.{number}.blocks.{index}", letter, None, config)
    uses = mtp.depth // max(1, mtp.num_sequences)
    head = LinearInfo("head", None, D, {"": config.vocab_size}, column=True, uses=1 + mtp.depth)
    return [*(replace(info, uses=uses) for info in linears), head]
