"""`python -m tests.precision.te.real_te_check [--save FILE]`: this package against real Transformer Engine, no GPU.

Needs Transformer Engine 2.19 or newer, built against a CUDA build of torch (docs/transformer_engine.md says how). What
is real and what stands in for a kernel: te_on_cpu.py. Each part is printed line by line:

1. recipes and quantizers, made with the real classes, against the plans (real_te_quantizers.py);
2. every case of te_cases.py through real `te.Linear` modules, under `te_recipe(plan)` and `reference=True`, and through
   the Transformer Engine backend: outputs and gradients bit for bit those of the emulated backend;
3. a switch of phases and cached weights, and weight gradients accumulated in `main_grad`, in real modules;
4. column- and row-parallel modules with sequence parallelism on two ranks (real_te_parallel.py);
5. whole training steps of test_te_training.py with the backend on the real classes, operand by operand;
6. `crosscheck` and `preflight` of a tiny run with the real classes.

`--save` stores what parts 2 and 4 got from `te.Linear`, as tests/golden has it. Exit code 1 if anything differs.
"""

from __future__ import annotations

import functools
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.precision import te_cases, te_on_cpu

te_on_cpu.patch_cuda()

from megatron_fp4.cli import crosscheck, preflight  # noqa: E402
from megatron_fp4.comm.config import ParallelConfig  # noqa: E402
from megatron_fp4.comm.mesh import ParallelMesh  # noqa: E402
from megatron_fp4.comm.parameter import LogicalParameter  # noqa: E402
from megatron_fp4.precision import EmulatedBackend, te_recipe  # noqa: E402
from megatron_fp4.precision.backends.transformer_engine import TransformerEngineBackend  # noqa: E402
from megatron_fp4.precision.config import Switch  # noqa: E402
from megatron_fp4.precision.te.api import load_api  # noqa: E402
from tests.helpers.tiny_run import tiny_run  # noqa: E402
from tests.precision.te.real_te_parallel import run_tensor_parallel  # noqa: E402
from tests.precision.te.real_te_quantizers import check_quantizers  # noqa: E402
from tests.precision.te.test_te_training import BothBackends, train  # noqa: E402

Results = dict[str, Tensor]


def modules(name: str, tensors: Results, **settings: Any) -> list[Any]:
    """Real `te.Linear` modules with the weights of the case."""
    import transformer_engine.pytorch as te

    case, modules = te_cases.CASES[name], []
    for index, (linear, layer) in enumerate(zip(te_cases.names(case), case.layers, strict=True)):
        modules.append(
            te.Linear(layer.K, layer.N, bias=False, params_dtype=torch.bfloat16, device="cpu", name=linear, **settings)
        )
        modules[-1].weight.data.copy_(tensors[f"w{index}"])
    return modules


def through_modules(name: str, tensors: Results, recipe: Any) -> Results:
    """The case through a stack of real `te.Linear`."""
    import transformer_engine.pytorch as te

    stack = modules(name, tensors)
    with te.autocast(enabled=True, recipe=recipe):
        return te_cases.forward_backward(tensors, stack, [module.weight for module in stack])


def unequal(what: str, theirs: Results, ours: Results) -> list[str]:
    """Prints one line; returns one per tensor that differs."""
    mismatches = [
        f"{key}: {int((ours[key] != theirs[key]).sum())} of {ours[key].numel()} elements"
        for key in ours
        if not torch.equal(ours[key], theirs[key])
    ]
    print(f"  {what}: {'; '.join(mismatches) or 'bit for bit: ' + ', '.join(ours)}")
    return [f"{what}: {text}" for text in mismatches]


def check_case(name: str) -> tuple[list[str], Results]:
    """(differences, what real modules computed)"""
    tensors, plan = te_cases.inputs(name), te_cases.plan(name)
    ours = te_cases.run_ours(name, EmulatedBackend(), tensors)
    theirs = through_modules(name, tensors, te_recipe(plan, unsharded=True))
    wrong = unequal(f"{name}: te.Linear, te_recipe(plan)", theirs, ours)
    backend = te_cases.run_ours(name, TransformerEngineBackend(plan.config), tensors)
    wrong += unequal(f"{name}: backend", backend, ours)
    try:
        recipe = te_recipe(plan, unsharded=True, reference=True)
    except ValueError as refusal:
        print(f"  {name}: te.Linear, reference=True: refused: {refusal}")
    else:
        wrong += unequal(f"{name}: te.Linear, reference=True", through_modules(name, tensors, recipe), ours)
    return wrong, tensors | theirs


def check_phases() -> list[str]:
    """One module through two phases, without and with cached weights (traps 1 and 2)."""
    import transformer_engine.pytorch as te

    name, wrong = "paper", []
    tensors = te_cases.inputs(name)
    switch = Switch(at_tokens=1, gemms=["wgrad"], use=te_cases.OTHER)
    plan = te_cases.plan(name, switch)
    ours = [te_cases.run_ours(name, EmulatedBackend(), tensors, plan.table(phase)) for phase in range(2)]
    assert not torch.equal(ours[0]["dw0"], ours[1]["dw0"]), "the two phases are to differ"
    for cached in (False, True):
        (module,) = modules(name, tensors)
        for phase, first in ((0, True), (0, False), (1, True), (1, False)):
            module.weight.grad = None
            with te.autocast(enabled=True, recipe=te_recipe(plan, phase, unsharded=True)):
                linear = functools.partial(module, is_first_microbatch=first if cached else None)
                theirs = te_cases.forward_backward(tensors, [linear], [module.weight])
            label = f"first microbatch {first}" if cached else "weights not cached"
            wrong += unequal(f"phase {phase}, {label}", theirs, ours[phase])
    return wrong


def check_main_grad() -> list[str]:
    """Two microbatches into an FP32 `main_grad`, with `fuse_wgrad_accumulation`."""
    import transformer_engine.pytorch as te

    name, grads = "paper", []
    tensors, plan = te_cases.inputs(name), te_cases.plan("paper")
    (module,) = modules(name, tensors, fuse_wgrad_accumulation=True)
    with te.autocast(enabled=True, recipe=te_recipe(plan, unsharded=True)):
        grads.append(te_cases.main_grad(tensors, module, module.weight))
    for backend in (EmulatedBackend(), TransformerEngineBackend(plan.config)):
        weight = LogicalParameter.whole("w0", tensors["w0"].clone())
        grads.append(te_cases.main_grad(tensors, te_cases.our_linear(name, 0, backend, weight), weight))
    theirs, emulated, through_backend = ({"main_grad": grad} for grad in grads)
    return unequal("te.Linear", theirs, emulated) + unequal("backend", through_backend, emulated)


def check_tensor_parallel() -> tuple[list[str], dict[str, Tensor]]:
    """(differences, what the ranks computed)"""
    name = te_cases.TENSOR_PARALLEL
    tensors = te_cases.inputs(name)
    theirs, ours = run_tensor_parallel(tensors), te_cases.run_ours_sharded(EmulatedBackend(), tensors)
    whole = te_cases.run_ours(name, EmulatedBackend(), tensors)
    for key, dim in (("y0", 1), ("dw0", 0), ("dw1", 1)):
        assert not torch.equal(torch.cat([part[key] for part in ours], dim), whole[key]), "the scope is to show"
    wrong, stored = [], {}
    for rank in range(te_cases.RANKS):
        wrong += unequal(f"rank {rank}", theirs[rank], ours[rank])
        stored |= {f"{name}_rank{rank}/{key}": value for key, value in theirs[rank].items()}
    return wrong, stored


def main() -> int:
    warnings.filterwarnings("ignore")
    api = load_api()
    te_on_cpu.patch_kernels()
    print(f"Transformer Engine {api.version}, torch {torch.__version__}, {api.features}")
    print("1. recipes and quantizers:")
    wrong = check_quantizers()
    print("2. stacks of linears:")
    stored: Results = {}
    for name in te_cases.CASES:
        mismatches, results = check_case(name)
        wrong += mismatches
        stored |= {f"{name}/{key}": value for key, value in results.items()}
    print("3. phases and accumulation:")
    wrong += check_phases() + check_main_grad()
    print("4. two tensor-parallel ranks:")
    mismatches, results = check_tensor_parallel()
    wrong += mismatches
    if "--save" in sys.argv:
        bits = {key: value.view(torch.int16).numpy().view(np.uint16) for key, value in (stored | results).items()}
        np.savez_compressed(sys.argv[sys.argv.index("--save") + 1], **bits)  # type: ignore[arg-type]
    print("5. training steps:")
    both = BothBackends()
    train(both, ParallelMesh.single_process(), ParallelConfig())  # raises at the first difference
    print(f"  operands bit for bit, products within a bound: {dict(both.compared)}")
    print("6. crosscheck and preflight:", flush=True)
    options = ["precision/recipe=nvfp4_no_sr", "precision.compile=false", "precision.backend=transformer_engine"]
    with tempfile.TemporaryDirectory() as folder:
        run = tiny_run(Path(folder), *options)
        wrong += [f"{command.__name__} failed" for command in (crosscheck, preflight) if command.main(run.overrides)]
    print("\n".join([*wrong, f"{len(wrong)} differences" if wrong else "no difference"]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
