"""The architecture of a model as a value.

A model is a pattern of blocks, one letter a block, as NVIDIA writes its hybrids:

    T   transformer block: attention, then MLP, each with its own norm and residual (the classical GPT layer)
    M   Mamba-2    *   attention    -   MLP    E   mixture of experts    (one mixer per block, as in Nemotron-H)

An empty pattern means `num_layers` transformer blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated

from megatron_fp4.layers.fused.loss import LossImpl
from megatron_fp4.layers.fused.norm import NormImpl
from megatron_fp4.layers.fused.pointwise import PointwiseImpl
from megatron_fp4.layers.mamba.kernels import MambaKernel
from megatron_fp4.layers.mlp import Activation
from megatron_fp4.layers.moe.config import MoeConfig
from megatron_fp4.layers.qk_norm import QkNorm
from megatron_fp4.layers.rope import RopeScaling, RopeScalingConfig
from megatron_fp4.models.mtp.config import MtpConfig
from megatron_fp4.settings import FP32_LEAST, FP32_MOST, Bound, Count, Size, check_bounds

BLOCK_LETTERS = "TM*-E"


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and choices of one model; sizes that contradict each other are refused."""

    num_layers: Annotated[int, Bound(least=1, most=100_000)] = 4
    """Number of blocks."""
    pattern: str = ""
    """One letter a block: T transformer, M Mamba-2, * attention, - MLP, E mixture of experts; empty = num_layers
    transformer blocks."""
    hidden: Size = 256
    """Width of the residual stream."""
    ffn_hidden: Size = 1024
    """Width inside an MLP; with swiglu, of each of its two halves."""
    num_heads: Size = 4
    """Query heads of an attention."""
    num_kv_heads: Size = 2
    """Key and value heads of an attention; a divisor of num_heads."""
    head_dim: Count = 0
    """Width of an attention head; 0 = hidden / num_heads."""
    vocab_size: Count = 0
    """Tokens of the vocabulary, and rows of embedding and head; 0 = the vocabulary of data.tokenizer."""
    activation: Activation = Activation.squared_relu
    """Nonlinearity of the MLPs."""
    rope_base: Annotated[float, Bound(above=1, most=1e12, or_zero=True)] = 10000.0
    """Base of the rotary position embedding; 0 = no position embedding."""
    rope_scaling: RopeScalingConfig = field(default_factory=RopeScalingConfig)
    rope_fraction: Annotated[float, Bound(above=0, most=1)] = 1.0
    """Part of each attention head, from its first element on, that is rotated."""
    qk_norm: QkNorm = QkNorm.none
    """Whether queries and keys are normalized before they are rotated; always computed by torch."""
    qkv_bias: bool = False
    """Add a bias to queries, keys and values (Qwen 2)."""
    sliding_window: Count = 0
    """Tokens that one attends to at most, itself included; 0 = all before it in the sample or document."""
    post_norm: bool = False
    """Normalize what a mixer or MLP adds to the residual stream instead of what it reads (OLMo 2)."""
    tied_embeddings: bool = False
    """Use the embedding's weight for the head too."""
    norm_eps: Annotated[float, Bound(least=FP32_LEAST, most=FP32_MOST)] = 1e-5
    """What RMSNorm adds to the mean square, so that nothing is divided by 0."""
    dropout: Annotated[float, Bound(least=0, below=1)] = 0.0
    """Probability with which training zeroes an element that a mixer or MLP adds to the residual stream; 0 = off."""
    init_std: Annotated[float, Bound(least=FP32_LEAST, most=FP32_MOST)] = 0.02
    """Standard deviation of initial weights."""
    scale_residual_init: bool = True
    """Start weights that write into the residual stream smaller, by sqrt(number of residual additions)."""
    mamba_num_heads: Count = 0
    """Heads of a Mamba-2 mixer; a multiple of mamba_num_groups, needed where the pattern has an M."""
    mamba_head_dim: Size = 64
    """Width of a Mamba-2 head; the mixer is mamba_num_heads times as wide."""
    mamba_num_groups: Size = 1
    """Groups of Mamba-2 heads that share B and C."""
    mamba_state: Size = 128
    """Size of a Mamba-2 head's state, per element of its width."""
    mamba_conv: Annotated[int, Bound(least=2)] = 4
    """Tokens that the causal convolution of a Mamba-2 mixer sees."""
    mamba_chunk: Size = 128
    """Tokens that the Mamba-2 scan computes as one matrix product; it changes cost and last bits, not the model."""
    mamba_kernel: MambaKernel = MambaKernel.torch
    """Who computes convolution and scan of Mamba-2; projections never enter it."""
    moe: MoeConfig = field(default_factory=MoeConfig)
    mtp: MtpConfig = field(default_factory=MtpConfig)
    norm_impl: NormImpl = NormImpl.torch
    """Who computes RMSNorm."""
    loss_impl: LossImpl = LossImpl.torch
    """Who computes the cross-entropy."""
    pointwise_impl: PointwiseImpl = PointwiseImpl.auto
    """Who computes activations, the rotary embedding and Mamba-2's convolution; auto = compiled on GPUs, in BF16."""

    def __post_init__(self) -> None:
        check_bounds(self, "model")
        for name, pattern in (("pattern", self.pattern), ("mtp.pattern", self.mtp.pattern)):
            if unknown := sorted(set(pattern) - set(BLOCK_LETTERS)):
                raise ValueError(f"model.{name} holds {unknown}; the letters are {', '.join(BLOCK_LETTERS)}")
        if self.pattern and len(self.pattern) != self.num_layers:
            raise ValueError(
                f"model.pattern has {len(self.pattern)} blocks, model.num_layers = {self.num_layers}; set"
                f" model.num_layers={len(self.pattern)}, or give a pattern of {self.num_layers} letters"
            )
        self._check_experts()
        if not self.head_dim and self.hidden % self.num_heads:
            raise ValueError(
                f"model.hidden = {self.hidden} is not divisible by model.num_heads = {self.num_heads};"
                " set model.head_dim, or a number of heads that divides it"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.num_heads = {self.num_heads} is not a multiple of model.num_kv_heads = {self.num_kv_heads};"
                f" choose a divisor of {self.num_heads} for the latter"
            )
        self._check_rope()
        if "M" in self.letters:
            self._check_mamba()

    def _check_experts(self) -> None:
        if "E" not in self.letters and self.moe != MoeConfig():
            raise ValueError(
                "model.moe has no effect: model.pattern has no E; write one where a mixture of experts shall be, or"
                " leave the settings of model.moe out"
            )
        if "E" in self.letters and not self.moe.num_experts:
            raise ValueError("model.pattern has mixtures of experts (E), but model.moe.num_experts is 0; set it")

    def _check_rope(self) -> None:
        if self.rope_base and self.attention_head_dim % 2:
            raise ValueError(
                f"rotary embedding needs an even head_dim, got {self.attention_head_dim}; set model.head_dim to an even"
                " number, or model.rope_base=0"
            )
        if self.rope_base and (self.rotary_dim % 2 or not self.rotary_dim):
            raise ValueError(
                f"model.rope_fraction = {self.rope_fraction:g} of a head of {self.attention_head_dim} rotates"
                f" {self.rotary_dim} elements, which are no pairs; choose a fraction that gives an even number"
            )
        if not self.rope_base and (self.rope_scaling.kind is not RopeScaling.none or self.rope_fraction != 1):
            raise ValueError(
                f"model.rope_scaling.kind={self.rope_scaling.kind.name} and model.rope_fraction ="
                f" {self.rope_fraction:g} have no effect: model.rope_base = 0 is no position embedding"
            )

    def _check_mamba(self) -> None:
        if self.mamba_num_heads < 1:
            raise ValueError("model.pattern has Mamba-2 blocks (M), but model.mamba_num_heads is 0; set it")
        if self.mamba_num_heads % self.mamba_num_groups:
            raise ValueError(
                f"model.mamba_num_heads = {self.mamba_num_heads} is not a multiple of model.mamba_num_groups ="
                f" {self.mamba_num_groups}; choose a divisor of {self.mamba_num_heads} for the latter"
            )

    def by_torch(self) -> ModelConfig:
        """The same model of layers that can be built on any device."""
        return replace(
            self,
            norm_impl=NormImpl.torch,
            loss_impl=LossImpl.torch,
            pointwise_impl=PointwiseImpl.torch,
            mamba_kernel=MambaKernel.torch,
        )

    def with_blocks(self, pattern: str, mtp: MtpConfig | None = None) -> ModelConfig:
        """The same model of other blocks; where none is a mixture of experts, without the settings of experts."""
        mtp = self.mtp if mtp is None else mtp
        moe = self.moe if "E" in pattern + mtp.pattern else MoeConfig()
        return replace(self, pattern=pattern, num_layers=len(pattern), moe=moe, mtp=mtp)

    @property
    def blocks(self) -> str:
        """One letter per block."""
        return self.pattern or "T" * self.num_layers

    @property
    def letters(self) -> frozenset[str]:
        """The kinds of blocks that occur, those of multi-token prediction included."""
        return frozenset(self.blocks + self.mtp.pattern)

    @property
    def embeds_at_both_ends(self) -> bool:
        """Whether the last stage needs the embedding's table too: it is the head's, or later tokens are predicted."""
        return self.tied_embeddings or self.mtp.depth > 0

    @property
    def attention_head_dim(self) -> int:
        """Width of an attention head."""
        return self.head_dim or self.hidden // self.num_heads

    @property
    def rotary_dim(self) -> int:
        """Elements of an attention head that are rotated."""
        return int(self.attention_head_dim * self.rope_fraction)

    @property
    def mamba_inner(self) -> int:
        """Width of the Mamba-2 mixer, `d_inner`."""
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def num_residual_additions(self) -> int:
        """How many mixers and MLPs write into the residual stream."""
        return sum(2 if letter == "T" else 1 for letter in self.blocks)

    @property
    def residual_std(self) -> float:
        """Initial standard deviation of weights that write into the residual stream."""
        return self.init_std / self.num_residual_additions**0.5 if self.scale_residual_init else self.init_std
