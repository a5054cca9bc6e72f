"""Multi-token prediction against its formulas, and the small part that its losses have in the gradients of others."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_fp4.comm.mesh import Group
from megatron_fp4.comm.parameter import logical_parameters
from megatron_fp4.data.batch import Batch
from megatron_fp4.layers import initialize_parameters, lab
from megatron_fp4.layers.embedding import _LookUpApart
from megatron_fp4.layers.linear import linears_of
from megatron_fp4.layers.loss import IGNORE
from megatron_fp4.models.block import model_linears
from megatron_fp4.models.config import ModelConfig
from megatron_fp4.models.count import by_kind, count_flops, model_parameters
from megatron_fp4.models.decoder import Decoder, Recompute, whole_model
from megatron_fp4.models.mtp.config import MtpConfig
from megatron_fp4.train.engine import LocalEngine, TokenLoss
from megatron_fp4.train.inputs import count_targets, look_ahead, make_inputs

CPU = torch.device("cpu")
MODEL = ModelConfig(
    num_layers=1,
    pattern="-",
    hidden=16,
    ffn_hidden=24,
    num_heads=2,
    num_kv_heads=2,
    vocab_size=31,
    rope_base=0.0,
    init_std=0.2,
    mtp=MtpConfig(depth=2, pattern="*-", loss_scale=0.3),
)


def batch_of(ids: Tensor, documents: Tensor, mask: Tensor) -> Batch:
    rows, S = documents.shape
    columns = torch.arange(S).expand(rows, S)
    return Batch(ids[:, :-1], ids[:, 1:], mask, columns, documents, torch.arange(rows * S).view(rows, S), ids[:, 0])


def random_batch(rows: int, S: int, vocabulary: int) -> Batch:
    """Three documents a sample, one that is shorter than the depth; labels across a border are no targets."""
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(vocabulary, (rows, S + 1), generator=random)
    documents = torch.bucketize(torch.arange(S + 1), torch.tensor([S // 2, S // 2 + 2]), right=True).expand(rows, -1)
    mask = documents[:, 1:] == documents[:, :-1]
    mask[0, 1] = False
    return batch_of(ids, documents[:, :-1], mask)


def build(config: ModelConfig, dtype: torch.dtype, grad_dtype: torch.dtype, **settings: Recompute) -> Decoder:
    model = Decoder(config, lab(dtype=dtype), whole_model(config), keep_documents_apart=True, **settings)
    initialize_parameters(model, 0)
    for parameter in logical_parameters(model):
        parameter.main_grad = torch.zeros(parameter.shape, dtype=grad_dtype)
        parameter.register_post_accumulate_grad_hook(absorb)
    return model


def absorb(parameter: Tensor) -> None:
    """As the optimizer's buffer does."""
    if parameter.grad is not None:
        parameter.main_grad.add_(parameter.grad)  # type: ignore[attr-defined]
        parameter.grad = None


def trained(model: Decoder, batch: Batch, micro_batch: int) -> Tensor:
    """The loss and those of the depths, after forward and backward."""
    ahead = look_ahead(batch, model.config.mtp.depth)
    inputs = make_inputs(batch, Group.single(), CPU, ahead)
    engine = LocalEngine(model, TokenLoss(model.config.vocab_size, Group.single(), mtp=model.config.mtp))
    scale = 1.0 / torch.tensor(count_targets(batch, ahead), dtype=torch.float64)
    loss = engine.train(inputs.split(micro_batch), scale if ahead is not None else scale[0], lambda _: None)
    return torch.cat([loss[None], engine.further_losses])


def main_grads(model: Decoder) -> dict[str, Tensor]:
    """By logical name, FP64."""
    return {
        where.name: parameter.main_grad[rows].double()
        for parameter in logical_parameters(model)
        if parameter.main_grad is not None
        for rows, where in parameter.placement.pieces()
    }


# -- the formulas, in FP64, one sample after the other -----------------------------------------------------------------


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + MODEL.norm_eps).sqrt() * weight


def mlp(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    return x + (rms(x, w[f"{name}_norm.weight"]) @ w[f"{name}.up.weight"].T).relu() ** 2 @ w[f"{name}.down.weight"].T


def attention(x: Tensor, documents: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    h = rms(x, w[f"{name}_norm.weight"])
    q, k, v = ((h @ w[f"{name}.qkv.{part}.weight"].T).unflatten(-1, (2, 8)).movedim(1, 0) for part in "qkv")
    allowed = (documents[:, None] == documents[None, :]).tril()
    scores = (q @ k.mT / 8**0.5).masked_fill(~allowed, -torch.inf)
    return x + (scores.softmax(-1) @ v).movedim(0, 1).flatten(1) @ w[f"{name}.out.weight"].T


def reference(config: ModelConfig, w: dict[str, Tensor], batch: Batch) -> list[Tensor]:
    """Mean losses of the next token and of each depth."""
    token_losses: list[list[Tensor]] = [[] for _ in range(1 + config.mtp.depth)]
    S = batch.tokens.shape[1]
    for tokens, labels, mask, documents in zip(
        batch.tokens, batch.labels, batch.loss_mask, batch.documents, strict=True
    ):
        h = rms(mlp(w["embedding.weight"][tokens], w, "blocks.0.mlp"), w["final_norm.weight"])
        for d in range(1 + config.mtp.depth):
            if d:
                name = f"mtp.{0 if config.mtp.shared else d - 1}"
                later = torch.tensor([int(tokens[i + d]) if i + d < S else 0 for i in range(S)])
                e = rms(w["embedding.weight"][later], w[f"{name}.norm_embedding.weight"])
                x = torch.cat([e, rms(h, w[f"{name}.norm_hidden.weight"])], -1) @ w[f"{name}.projection.weight"].T
                x = mlp(attention(x, documents, w, f"{name}.blocks.0.attention"), w, f"{name}.blocks.1.mlp")
                h = rms(x, w[f"{name}.final_norm.weight"])
            log_p = (h @ w["head.weight"].T).log_softmax(-1)
            for i in range(S - d):
                if bool(mask[i + d]) and documents[i] == documents[i + d]:
                    token_losses[d].append(-log_p[i, labels[i + d]])
    return [torch.stack(losses).mean() for losses in token_losses]


@pytest.mark.parametrize(
    ("shared", "recompute"), [(False, Recompute.none), (True, Recompute.full), (True, Recompute.selective)]
)
def test_losses_and_gradients_are_those_of_the_formulas(shared: bool, recompute: Recompute) -> None:
    """What a token beyond its document has as an embedding, and which half of the projection it meets, shows here."""
    config = replace(MODEL, mtp=replace(MODEL.mtp, shared=shared))
    batch = random_batch(3, 12, config.vocab_size)
    model = build(config, torch.float32, torch.float64, recompute=recompute)
    losses = trained(model, batch, micro_batch=1)
    shapes = {parameter.name: parameter.shape for parameter in model_parameters(config)}
    w = {
        where.name: parameter.detach()[rows].double().requires_grad_()
        for parameter in logical_parameters(model)
        for rows, where in parameter.placement.pieces()
    }
    assert {name: tuple(tensor.shape) for name, tensor in w.items()} == shapes
    wanted = reference(config, w, batch)
    (wanted[0] + 0.3 / 2 * (wanted[1] + wanted[2])).backward()
    assert torch.allclose(losses.double(), torch.stack(wanted).detach(), rtol=1e-5)
    for name, grad in main_grads(model).items():
        exact = w[name].grad
        assert exact is not None
        assert float((grad - exact).norm() / exact.norm()) < 1e-5, f"{name}: another gradient than the formulas'"


def test_what_a_position_has_ahead() -> None:
    """Documents of three tokens and two, then padding; the token behind the sample is a label, never an input."""
    ids = torch.tensor([[5, 6, 7, 8, 9, 0, 0]])
    documents = torch.tensor([[0, 0, 0, 1, 1, 2]])
    batch = batch_of(ids, documents, torch.tensor([[True, True, False, True, False, False]]))
    ahead = look_ahead(batch, 2)
    assert ahead is not None
    tokens, labels = ahead[0].movedim(-1, 0).mT
    assert tokens.tolist() == [[6, 7, 0, 9, 0, 0], [7, 0, 0, 0, 0, 0]]
    x = IGNORE
    assert labels.tolist() == [[7, x, x, x, x, x], [x, x, x, x, x, x]]
    assert count_targets(batch, ahead) == [3, 1, 0]
    assert look_ahead(batch, 0) is None


def test_the_small_part_survives_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Head and embedding get the gradient of the next token, of scale 1, and of later ones, of scale 0.05.

    Over 64 microbatches in BF16, with 8 bits of mantissa, most of the small part is rounded away; in FP32 nothing is.
    """
    config = replace(MODEL, mtp=MtpConfig(2, "-", loss_scale=0.05))
    alone = replace(MODEL, mtp=MtpConfig())
    batch = random_batch(64, 12, config.vocab_size)
    grads = {}
    for name, one, grad_dtype in (
        ("large", alone, torch.float64),
        ("both", config, torch.float64),
        ("fp32", config, torch.float32),
        ("bf16", config, torch.bfloat16),
    ):
        model = build(one, torch.bfloat16, grad_dtype)
        trained(model, batch, micro_batch=1)
        grads[name] = main_grads(model)
    with monkeypatch.context() as patch:
        patch.setattr(_LookUpApart, "apply", F.embedding)
        model = build(config, torch.bfloat16, torch.float64)
        trained(model, batch, micro_batch=1)
        grads["by autograd"] = main_grads(model)
    errors = {}
    for tensor in ("head.weight", "embedding.weight"):
        small = grads["both"][tensor] - grads["large"][tensor]
        for name in ("fp32", "bf16", "by autograd"):
            errors[name, tensor] = float((grads[name][tensor] - grads["both"][tensor]).norm() / small.norm())
    assert errors["fp32", "head.weight"] < 1e-4
    assert errors["fp32", "embedding.weight"] < 1e-4
    assert errors["bf16", "head.weight"] > 0.2, "then there would be no need for FP32"
    assert errors["by autograd", "embedding.weight"] > 0.01, "then look-ups could be added in BF16, as autograd does"


def test_counts() -> None:
    """Linears and parameters are those of the modules; every depth passes its blocks and the head once."""
    for mtp in (MODEL.mtp, replace(MODEL.mtp, shared=True)):
        config = replace(MODEL, mtp=mtp)
        model = Decoder(config, lab(device="meta"), whole_model(config))
        linears = model_linears(config)
        assert [info.name for info in linears] == list(linears_of(model))
        assert by_kind(model_parameters(config))["mtp"] == mtp.num_sequences * (
            16 * 32 + 4 * 16 * 16 + 2 * 16 * 24 + 80
        )
        per_depth = 2.0 * (16 * 32 + 4 * 16 * 16 + 2 * 16 * 24 + 16 * 31)
        without = count_flops(replace(config, mtp=MtpConfig()), 12)
        flops = count_flops(config, 12)
        assert sum(flops.linears.values()) == sum(without.linears.values()) + 2 * per_depth
        assert flops.attention == 2 * 4.0 * 16 * 6.5


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"model\.mtp\.pattern is empty"):
        MtpConfig(depth=1)
    with pytest.raises(ValueError, match="nobody to share with"):
        MtpConfig(1, "T", shared=True)
    with pytest.raises(ValueError, match=r"model\.mtp\.pattern holds \['X'\]"):
        replace(MODEL, mtp=MtpConfig(1, "X"))
