"""The sections of benchmarks/gpu.py, each a process: `python -m benchmarks.gpu_sections operands [--tiny]`.

A row is said as soon as it is known. Tiny sizes are for a CPU, where only the script itself is tried.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.gpu import ROW, Row, row
from benchmarks.linear import Layer, saved_bytes
from megatron_fp4.cli import pretrain
from megatron_fp4.cli.compose import CONFIG_DIR, compose_config, to_run_config
from megatron_fp4.data.shards.shard import token_dtype
from megatron_fp4.data.shards.writer import ShardWriter
from megatron_fp4.precision import LinearPrecision
from megatron_fp4.precision.auto import PREFERENCE, recipe_objection
from megatron_fp4.precision.backends.choose import make_backend
from megatron_fp4.precision.config import BackendName, PrecisionConfig
from megatron_fp4.precision.recipes import RECIPES
from megatron_fp4.precision.selftest import trial
from megatron_fp4.precision.selftest.examine import Question, answer
from megatron_fp4.train.telemetry.metrics import read_metrics

TINY_RECIPES = ("nvfp4", "mxfp4")
SHAPES = {"8B attention out": (4096, 4096), "8B MLP up": (21504, 4096), "8B MLP down": (4096, 21504)}
"""Weights `[N, K]` of nemotron_h_8b; 8,192 tokens."""
VOCABULARY = 512


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def operands(tiny: bool) -> Iterator[Row]:
    """The self-test of our kernels in every recipe of configs/precision that they compute, the paper's first."""
    if tiny:
        trial.SIZES.update({"T": 32, "N": 32, "K": 64})
    names = sorted(path.stem for path in (CONFIG_DIR / "precision/recipe").glob("*.yaml") if path.stem != "bf16")
    for name in sorted(names, key=lambda one: one != "nvfp4"):
        if tiny and name not in TINY_RECIPES:
            continue
        config = to_run_config(compose_config([f"precision/recipe={name}"])).precision
        config = replace(config, backend=BackendName.triton, compile=False)
        if reason := recipe_objection(BackendName.triton, config):
            yield row("operands", name, f"not native: {reason}", passed=None)
            continue
        begun = time.monotonic()
        rejection = answer(Question(config, list(config.recipes.values()), str(device())))
        seconds = time.monotonic() - begun
        text = f"operands as on a CPU, products within their bound ({seconds:.0f} s)"
        yield row("operands", name, rejection.reason if rejection else text, rejection is None, seconds=seconds)


def kernels(tiny: bool) -> Iterator[Row]:
    """A linear forward and backward in each backend, as a multiple of BF16, and what it keeps between them."""
    tokens, rounds = (32, 1) if tiny else (8192, 9)
    for what, shape in ({"tiny": (32, 64)} if tiny else SHAPES).items():
        N, K = shape
        x = torch.randn(tokens, K, device=device()).bfloat16().requires_grad_()
        w = (torch.randn(N, K, device=device()) / K**0.5).bfloat16()
        dy = torch.randn(tokens, N, device=device()).bfloat16()
        plain = make_backend(PrecisionConfig(BackendName.emulated, compile=False))
        baseline = _seconds(Layer(w, LinearPrecision(), plain, tokens), x, dy, rounds)  # type: ignore[arg-type]
        yield row("kernels", f"{what} {N}x{K}, bf16", f"{1e3 * baseline:.2f} ms", passed=None, seconds=baseline)
        for name in PREFERENCE:
            recipe = "fp8" if name is BackendName.native_fp8 else "nvfp4"
            config = PrecisionConfig(name, compile=not tiny, recipes={recipe: RECIPES[recipe]})
            label = f"{what} {N}x{K}, {recipe} by {name.name}"
            try:
                layer = Layer(w, RECIPES[recipe], make_backend(config), tokens)  # type: ignore[arg-type]
            except ValueError as error:
                yield row("kernels", label, f"not here: {error}", passed=None)
                continue
            seconds = _seconds(layer, x, dy, rounds)
            kept = 8 * saved_bytes(layer, x) / x.numel()
            text = f"{1e3 * seconds:.2f} ms, {seconds / baseline:.2f} x BF16; keeps {kept:.2f} bits an element of x"
            yield row("kernels", label, text, None, seconds=seconds, ratio=seconds / baseline, kept_bits=kept)


def training(tiny: bool) -> Iterator[Row]:
    """Some steps of a small model on a toy language: losses, step time and peak memory beside BF16's."""
    with tempfile.TemporaryDirectory(prefix="gpu-") as name:
        folder, first = Path(name), dict[str, float]()
        _write_shard(folder / "toy")
        for label in ("bf16", *(backend.name for backend in PREFERENCE if backend is not BackendName.native_fp8)):
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            if label != "bf16" and (absence := _absence(BackendName[label])):
                yield row("training", label, f"not here: {absence}", passed=None)
                continue
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
                code = pretrain.main(_overrides(folder, label, tiny))
            if code not in (0, 85):
                last = next(iter(reversed(printed.getvalue().strip().splitlines())), "")
                yield row("training", label, f"ended with code {code}: {last}", passed=False)
                continue
            records = [record for record in read_metrics(folder / label) if "loss" in record]
            losses = [record["loss"] for record in records]
            seconds = statistics.median(record["step_seconds"] for record in records[len(records) // 2 :])
            memory = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0
            first = first or {"seconds": seconds, "loss": losses[-1]}
            near = abs(losses[-1] - first["loss"]) < 0.1 * first["loss"]
            text = (
                f"loss {losses[0]:.4f} -> {losses[-1]:.4f} in {len(losses)} steps, {1e3 * seconds:.1f} ms a step,"
                f" {seconds / first['seconds']:.2f} x BF16, peak {memory:.2f} GB"
            )
            yield row("training", label, text, near, seconds=seconds, ratio=seconds / first["seconds"], peak_gb=memory)


def collectives(tiny: bool) -> Iterator[Row]:
    """NCCL in a world of one GPU: that it is there, and what a call costs."""
    backend, size = ("nccl", 1 << 24) if device().type == "cuda" else ("gloo", 1 << 10)
    store = dist.HashStore()
    dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timedelta(seconds=30))
    x = torch.arange(size, dtype=torch.float32, device=device())
    out = torch.empty_like(x)
    calls: dict[str, Callable[[], object]] = {
        "all_reduce": lambda: dist.all_reduce(out.copy_(x)),
        "all_gather": lambda: dist.all_gather_into_tensor(out, x),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(out, x),
        "all_to_all": lambda: dist.all_to_all_single(out, x),
    }
    for name, call in calls.items():
        call()
        _wait()
        begun = time.perf_counter()
        call()
        _wait()
        seconds = time.perf_counter() - begun
        text = f"{4 * size / 1e6:.0f} MB in {1e3 * seconds:.2f} ms"
        yield row("collectives", f"{backend} {name}", text, bool(torch.equal(out, x)), seconds=seconds)
    dist.destroy_process_group()


SECTIONS = {"operands": operands, "kernels": kernels, "training": training, "collectives": collectives}


def _seconds(layer: Layer, x: torch.Tensor, dy: torch.Tensor, rounds: int) -> float:
    """Median of a forward and backward pass with new weights, after one that compiles."""
    times = []
    for _ in range(rounds + 1):
        _wait()
        begun = time.perf_counter()
        layer.step(x, dy, new_weights=True)
        _wait()
        times.append(time.perf_counter() - begun)
    return statistics.median(times[1:])


def _absence(name: BackendName) -> str:
    """Why a backend cannot be tried on this machine; "" if it can."""
    try:
        make_backend(PrecisionConfig(name, compile=False, recipes={"nvfp4": RECIPES["nvfp4"]}))
    except ValueError as error:
        return str(error)
    return ""


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _write_shard(prefix: Path) -> None:
    """Documents in which each token mostly follows from the one before."""
    random, writer = np.random.default_rng(0), ShardWriter(prefix, token_dtype(VOCABULARY))
    for _ in range(300):
        tokens = [2]
        for jump in random.random(400):
            tokens.append((tokens[-1] * 7 + 3) % VOCABULARY if jump < 0.8 else int(random.integers(2, VOCABULARY)))
        writer.add_document(np.array([*tokens, 1]))
    writer.close()


def _overrides(folder: Path, label: str, tiny: bool) -> list[str]:
    """A run of one process in BF16, or in the paper's recipe by a backend."""
    model = [
        "model=gpt_tiny",
        "model.num_layers=1",
        "data.seq_length=32",
        "train.micro_batch=1",
        "train.global_batch=1",
    ]
    if not tiny:
        model = ["model=gpt_50m", "data.seq_length=1024", "train.micro_batch=8", "train.global_batch=8"]
    precision = ["precision=bf16"] if label == "bf16" else ["precision/recipe=nvfp4", f"precision.backend={label}"]
    return [
        *model,
        *precision,
        f"precision.compile={not tiny}",
        *([] if label == "bf16" else ["precision.keep_bf16.last=0"]),
        f"model.vocab_size={VOCABULARY}",
        f"data.sources=[{{name: toy, paths: ['{folder / 'toy'}'], max_epochs: 0}}]",
        f"train.run_dir='{folder / label}'",
        "train.total_tokens=1e9",
        f"train.stop_after_steps={1 if tiny else 20}",
        "train.log_interval_steps=1",
        "optim.lr=1e-3",
        "logging.tensorboard=false",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("section", choices=SECTIONS)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    for one in SECTIONS[args.section](args.tiny):
        print(f"{ROW}{json.dumps(one)}", flush=True)


if __name__ == "__main__":
    main()
