"""Checkpoints that megatron-core writes, as ours: its logits, no tensor too much or too few, refusals by name."""

from __future__ import annotations

import argparse
import enum
import json
import os
import pickle
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from megatron_fp4.checkpoint.pieces.torch_dist import Inert
from megatron_fp4.cli.checkpoint import main
from megatron_fp4.comm.mesh import Group
from megatron_fp4.comm.rect import Rectangle, Shard
from megatron_fp4.interop.logical import write_logical
from megatron_fp4.layers.mlp import Activation
from megatron_fp4.models.config import ModelConfig
from megatron_fp4.models.foreign.megatron_args import Arguments, NoArguments, parse_arguments, read_arguments
from megatron_fp4.models.foreign.megatron_weights import MegatronWeights
from megatron_fp4.train.resume.description import describe_origin
from megatron_fp4.train.resume.foreign_origin import fill_from_foreign
from megatron_fp4.train.resume.same_model import check_model
from tests.interop.test_families import our_logits
from tests.interop.test_import import masters
from tests.models.test_count import make_decoder

PADDED, VOCABULARY = 96, 83
TOKENS = torch.arange(2 * 21).view(2, 21) * 5 % VOCABULARY
SIZES = {
    "num_layers": 2,
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_query_groups": 2,
    "kv_channels": 12,
    "ffn_hidden_size": 80,
}
LLAMA = {**SIZES, "swiglu": True, "untie_embeddings_and_output_weights": True, "rotary_base": 5000}
SQUARED = {**SIZES, "squared_relu": True, "rotary_percent": 0.5, "window_size": (4, 0)}
QWEN = {**LLAMA, "add_qkv_bias": True, "qk_layernorm": True, "use_rope_scaling": True, "rope_scaling_factor": 4.0}
OURS = ModelConfig(
    num_layers=2,
    hidden=48,
    ffn_hidden=80,
    num_heads=6,
    num_kv_heads=2,
    head_dim=12,
    vocab_size=VOCABULARY,
    activation=Activation.swiglu,
    rope_base=5000.0,
)


class WithoutCuda(TorchFunctionMode):
    """What asks for memory of a GPU gets the CPU's."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = dict(kwargs or {})
        if named.get("device") == "cuda":
            named["device"] = "cpu"
        return function(*args, **named)


class Backend(enum.Enum):
    """A class of the program that wrote the checkpoint, which is not imported to read it."""

    auto = 5


def arguments(**values: Any) -> argparse.Namespace:
    """What Megatron-LM stores of its arguments, and some of those that it has besides."""
    defaults = {
        "add_bias_linear": False,
        "group_query_attention": True,
        "normalization": "RMSNorm",
        "position_embedding_type": "rope",
        "norm_epsilon": 1e-4,
        "vocab_size": VOCABULARY,
        "padded_vocab_size": PADDED,
        "max_position_embeddings": 64,
        "attention_backend": Backend.auto,
        "params_dtype": torch.bfloat16,
        "num_experts": None,
        "data_path": ["a", "b"],
    }
    return argparse.Namespace(**{**defaults, **values})


@pytest.fixture(scope="module")
def core() -> Iterator[Any]:
    """megatron.core in a group of one rank, without CUDA, which its writer asks for."""
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        megatron = pytest.importorskip("megatron.core")
        patch.setattr(torch.cuda, "current_device", lambda: "cpu")
        patch.setattr(torch.cuda, "synchronize", lambda *_: None)
        for key, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}.items():
            patch.setitem(os.environ, key, value)
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        megatron.parallel_state.initialize_model_parallel()
        tracker = megatron.tensor_parallel.random.get_cuda_rng_tracker()
        patch.setattr(tracker, "fork", lambda *_: warnings.catch_warnings())
        yield megatron
        megatron.parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def make_theirs(args: argparse.Namespace) -> Any:
    from megatron.core.activations import squared_relu
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    values = vars(args)
    same = ("add_qkv_bias", "qk_layernorm", "window_size", "normalization", *SIZES)
    config = TransformerConfig(
        **{name: values[name] for name in same if name in values},
        add_bias_linear=False,
        gated_linear_unit="swiglu" in values,
        activation_func=torch.nn.functional.silu if "swiglu" in values else squared_relu,
        layernorm_epsilon=args.norm_epsilon,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        persist_layer_norm=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        masked_softmax_fusion=False,
    )
    torch.manual_seed(5)
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(qk_layernorm="qk_layernorm" in values, normalization="RMSNorm"),
        vocab_size=PADDED,
        max_sequence_length=64,
        position_embedding_type="rope",
        rotary_percent=values.get("rotary_percent", 1.0),
        rotary_base=values.get("rotary_base", 10000),
        rope_scaling="use_rope_scaling" in values,
        rope_scaling_factor=values.get("rope_scaling_factor", 8.0),
        share_embeddings_and_output_weights="untie_embeddings_and_output_weights" not in values,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model.eval()


def save(folder: Path, state: dict[str, Any], **common: Any) -> Path:
    from megatron.core import dist_checkpointing

    folder.mkdir(parents=True)
    dist_checkpointing.save({**state, "iteration": 7, **common}, str(folder))
    return folder


def logits(model: Any) -> Tensor:
    length = TOKENS.shape[1]
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    with torch.no_grad(), WithoutCuda():
        return model(TOKENS, torch.arange(length).expand_as(TOKENS), mask)[..., :VOCABULARY]


def bits(root: Path) -> dict[str, list[int]]:
    return {name: tensor.view(torch.int32).flatten().tolist() for name, tensor in masters(root).items()}


@pytest.mark.parametrize("model", [LLAMA, SQUARED, QWEN], ids=["llama", "squared", "qwen"])
def test_the_logits_are_theirs(model: dict[str, Any], core: Any, tmp_path: Path) -> None:
    """Both layouts of layers, the norms, the groups of queries, the padding; an export goes on from it."""
    args = arguments(**model)
    theirs = make_theirs(args)
    extra = {
        "optimizer": {"state": core.dist_checkpointing.ShardedTensor.from_rank_offsets("optimizer.x", torch.ones(3))}
    }
    for name, metadata in (("one", None), ("two", {"singleton_local_shards": True, "non_homogeneous_layers": True})):
        state = {"model": theirs.sharded_state_dict(metadata=metadata), **(extra if name == "one" else {})}
        save(tmp_path / name, state, args=args)
        assert main(["import", str(tmp_path / name), "--from", "megatron", "--to", str(tmp_path / f"{name}-ours")]) == 0
    assert bits(tmp_path / "one-ours") == bits(tmp_path / "two-ours")
    weights = MegatronWeights(tmp_path / "one")
    model_ours = make_decoder(weights.config, "cpu")
    write_logical(model_ours, masters(tmp_path / "one-ours"))
    torch.testing.assert_close(our_logits(model_ours, TOKENS), logits(theirs), rtol=1e-5, atol=1e-5)


def test_from_megatron_to_transformers(core: Any, tmp_path: Path) -> None:
    """Import, export, and the logits of the class of transformers are those of megatron-core."""
    from transformers import AutoModelForCausalLM

    theirs = make_theirs(args := arguments(**LLAMA))
    save(tmp_path / "run" / "iter_0000007", {"model": theirs.sharded_state_dict()}, args=args)
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("7")
    assert main(["import", str(tmp_path / "run"), "--to", str(tmp_path / "ours")]) == 0
    assert main(["export", str(tmp_path / "ours"), "--to", str(tmp_path / "hf"), "--dtype", "fp32"]) == 0
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    with torch.no_grad():
        torch.testing.assert_close(other(TOKENS).logits, logits(theirs), rtol=1e-5, atol=1e-5)


def test_a_run_begins_with_them(core: Any, tmp_path: Path) -> None:
    """Every rank fills its rectangles from the directory itself, with the values of the imported checkpoint."""
    theirs = make_theirs(args := arguments(**LLAMA))
    folder = save(tmp_path / "theirs", {"model": theirs.sharded_state_dict()}, args=args)
    assert main(["import", str(folder), "--to", str(tmp_path / "ours")]) == 0
    check_model(folder, replace(OURS, norm_eps=1e-4))
    with pytest.raises(ValueError, match=r"model\.norm_eps: 0\.0001 in the weights, 1e-05 in this run"):
        check_model(folder, OURS)
    expected = masters(tmp_path / "ours")
    shards = [Shard(Rectangle.whole(name, t.shape), {"master": torch.zeros_like(t)}) for name, t in expected.items()]
    record = fill_from_foreign(folder, shards, Group.single("world"), lambda: None)
    assert all(torch.equal(shard.tensors["master"], expected[shard.name]) for shard in shards)
    assert record["format"] == "megatron"
    assert "13 rows of padding of output_layer.weight are dropped" in describe_origin(record, None)[0]


def test_pieces_of_two_ranks(core: Any, tmp_path: Path) -> None:
    """Rows of a linear that tensor parallelism cut, and a rectangle across the groups of queries."""
    from megatron.core.dist_checkpointing import ShardedTensor

    theirs = make_theirs(args := arguments(**LLAMA))
    state = theirs.sharded_state_dict()
    for key in [key for key in state if key.endswith("linear_qkv.weight")]:
        layer = (0, int(key.split(".")[2]), 2)
        for rank, part in enumerate(state.pop(key).data.chunk(2)):
            name = "decoder.layers.self_attention.linear_qkv.weight"
            cut = ShardedTensor.from_rank_offsets(name, part, layer, (1, rank, 2), prepend_axis_num=1)
            state[f"{key}.{rank}"] = cut
    weights = MegatronWeights(save(tmp_path / "cut", {"model": state}, args=args))
    whole = MegatronWeights(save(tmp_path / "whole", {"model": theirs.sharded_state_dict()}, args=args))
    name = "blocks.1.attention.qkv.q.weight"
    shape = whole.shapes[name]
    expected = whole.read(Rectangle.whole(name, shape))
    assert torch.equal(weights.read(Rectangle.whole(name, shape)), expected)
    inside = Rectangle(name, shape, (30, 5), (20, 7))
    assert torch.equal(weights.read(inside), expected[inside.slices])
    assert weights.read(Rectangle(name, shape, (72, 0), (0, 48))).shape == (0, 48)


@pytest.mark.parametrize(
    ("values", "refusal"),
    [
        ({"num_experts": 8}, "num_experts = 8, which this model does not compute"),
        ({"multi_latent_attention": True}, "multi_latent_attention = True"),
        ({"mtp_num_layers": 1}, "mtp_num_layers = 1"),
        ({"normalization": "LayerNorm"}, "normalization = 'LayerNorm'.*'RMSNorm'"),
        ({"apply_layernorm_1p": True}, "apply_layernorm_1p = True"),
        ({"add_bias_linear": True}, "add_bias_linear = True"),
        ({"swiglu": False}, "a GELU"),
        ({"position_embedding_type": "learned_absolute"}, "position_embedding_type = 'learned_absolute'"),
        ({"rotary_interleaved": True}, "rotary_interleaved = True"),
        ({"hybrid_override_pattern": "M*"}, r"hybrid_override_pattern = 'M\*'"),
        ({"window_size": (4, 4)}, r"window_size = \(4, 4\)"),
        ({"num_layers": Inert()}, "num_layers = .*no positive whole number"),
        ({"rotary_seq_len_interpolation_factor": 2, "use_rope_scaling": True}, "use_rope_scaling = True, beside"),
    ],
)
def test_what_is_not_computed_is_refused_by_its_argument(values: dict[str, Any], refusal: str) -> None:
    with pytest.raises(ValueError, match=refusal):
        parse_arguments(Arguments(vars(arguments(**{**LLAMA, **values}))), "args")


def test_what_arguments_mean() -> None:
    def model(**values: Any) -> ModelConfig:
        described = parse_arguments(Arguments(vars(arguments(**{**LLAMA, **values}))), "args")
        return described.config(described.vocab_size or 1)

    plain = replace(OURS, norm_eps=1e-4)
    assert model() == plain
    assert model(group_query_attention=False, num_query_groups=1).num_kv_heads == 6
    assert model(tokenizer_type="NullTokenizer").vocab_size == VOCABULARY + 1
    assert model(window_size=(-1, 0)).sliding_window == 0
    assert model(window_size=(4, 0)).sliding_window == 5
    assert model(rotary_seq_len_interpolation_factor=2).rope_scaling.factor == 2
    assert model(position_embedding_type="none").rope_base == 0
    assert model(untie_embeddings_and_output_weights=False).tied_embeddings


class Harmful:
    """A pickle that would write a file."""

    def __reduce__(self) -> Any:
        return os.system, ("touch harmed",)


def test_arguments_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of a pickle runs; then the settings of the model must be said."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "common.pt"
    assert isinstance(read_arguments(tmp_path), NoArguments)
    for held, reason in (
        ({"args": arguments(spec=Harmful())}, "without running what it names"),
        ({"iteration": 7}, "holds no arguments"),
        ({"args": "x"}, "holds no arguments"),
    ):
        torch.save(held, path)
        none = read_arguments(tmp_path)
        assert isinstance(none, NoArguments)
        assert reason in none.reason
    path.write_bytes(pickle.dumps(Harmful()))
    assert isinstance(read_arguments(tmp_path), NoArguments)
    assert not (tmp_path / "harmed").exists()


def test_a_model_that_is_said(core: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without arguments: refused with the remedy, which works; all rows where nothing says how many are tokens."""
    theirs = make_theirs(arguments(**LLAMA))
    folder = save(tmp_path / "bare", {"model": theirs.sharded_state_dict()})
    command = ["import", str(folder), "--to", str(tmp_path / "ours")]
    assert main(command) == 2
    assert "so what model it is must be said: checkpoint import --from megatron" in capsys.readouterr().err
    sizes = {"num_layers": 2, "hidden": 48, "ffn_hidden": 80, "num_heads": 6, "num_kv_heads": 2, "head_dim": 12}
    sizes_given = [f"model.{key}={value}" for key, value in sizes.items()]
    assert main([*command, *sizes_given, "model.activation=swiglu", "model.ffn_hidden=40"]) == 2
    assert "linear_fc1.weight has shape (2, 160, 48), a model of these settings has (2, 80, 48)" in (
        capsys.readouterr().err
    )
    assert main([*command, "train.seed=2"]) == 2
    assert "train.seed=2 says nothing of the model" in capsys.readouterr().err
    assert main([*command, *sizes_given, "model.activation=swiglu"]) == 0
    assert masters(tmp_path / "ours")["embedding.weight"].shape == (PADDED, 48)
    save(tmp_path / "no-count", {"model": theirs.sharded_state_dict()}, args=arguments(**LLAMA, vocab_size=None))
    command = ["import", str(tmp_path / "no-count"), "--to"]
    assert main([*command, str(tmp_path / "all")]) == 0
    assert "do not say how many of the 96 rows" in capsys.readouterr().out
    assert main([*command, str(tmp_path / "some"), "model.vocab_size=83"]) == 0
    assert masters(tmp_path / "some")["head.weight"].shape == (83, 48)
    assert main([*command, str(tmp_path / "none"), "model.hidden=48"]) == 2
    assert "give none but model.vocab_size" in capsys.readouterr().err


def test_checkpoints_that_do_not_fit(core: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A tensor too much or too few, another shape, other formats, damaged descriptions."""
    from megatron.core.dist_checkpointing import ShardedTensor

    theirs = make_theirs(args := arguments(**LLAMA))

    def error_of(folder: Path) -> str:
        assert main(["import", str(folder), "--from", "megatron", "--to", str(tmp_path / "ours")]) == 2
        assert not (tmp_path / "ours").exists()
        return capsys.readouterr().err

    extra = ShardedTensor.from_rank_offsets("decoder.layers.mlp.router.weight", torch.ones(3))
    state = theirs.sharded_state_dict()
    folder = save(tmp_path / "more", {"model": {**state, "x": extra}}, args=args)
    assert "has, and the model has no place for, decoder.layers.mlp.router.weight" in error_of(folder)
    state.pop("output_layer.weight")
    folder = save(tmp_path / "fewer", {"model": state}, args=args)
    assert "lacks head.weight: it has no output_layer.weight" in error_of(folder)
    other = arguments(**{**LLAMA, "ffn_hidden_size": 40})
    folder = save(tmp_path / "shape", {"model": theirs.sharded_state_dict()}, args=other)
    assert "linear_fc1.weight has shape (2, 160, 48), a model of these settings has (2, 80, 48)" in error_of(folder)
    description = (folder / ".metadata").read_bytes()
    (folder / ".metadata").write_bytes(description[:-20])
    assert ".metadata is refused" in error_of(folder)
    (folder / ".metadata").write_bytes(pickle.dumps(Harmful()))
    assert ".metadata is refused" in error_of(folder)
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr"}))
    assert "is stored as 'zarr', not as torch_dist; Megatron-LM converts with" in error_of(folder)
    (tmp_path / "old" / "iter_0000002" / "mp_rank_00").mkdir(parents=True)
    (tmp_path / "old" / "latest_checkpointed_iteration.txt").write_text("2\n")
    assert "mp_rank_00 is of an older one" in error_of(tmp_path / "old")
