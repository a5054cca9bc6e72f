"""Sixty random models on five ranks, some of which own little or nothing: the bits of one process, also resumed."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_fp4.checkpoint import CheckpointConfig, CheckpointStore
from megatron_fp4.comm.collectives import barrier
from megatron_fp4.comm.mesh import ParallelMesh
from megatron_fp4.comm.parameter import LogicalParameter
from megatron_fp4.optim import Algorithm, OptimConfig, Overlap, Zero1Optimizer
from megatron_fp4.optim import bucket_comm as bucket_comm_module
from megatron_fp4.optim.kept.config import MasterFormat, MomentFormat, MomentsConfig
from tests.helpers.distributed import mesh_for, run_distributed
from tests.optim.synthetic import contribute, exact_gradient, hash_of

NUM_RANKS = 5
NUM_CASES = 60
WITH_CHECKPOINT = (0, 1, 2, 3, 5, 7, 9)


@dataclass(frozen=True)
class Case:
    """shapes: of the parameters, by name. native: the collectives that NCCL gets."""

    shapes: dict[str, tuple[int, ...]]
    config: OptimConfig
    dtype: torch.dtype = torch.float32
    max_norm: float = 0.5
    native: bool = False

    @staticmethod
    def number(number: int) -> Case:
        """Case 0 is one parameter of 64 elements, so that four of five ranks own nothing."""
        if number == 0:
            return Case({"w": (64,)}, OptimConfig())
        draw = random.Random(number)
        shapes = [
            lambda: (draw.choice([1, 9, 64, 333]),),
            lambda: (draw.randint(1, 40), draw.choice([1, 5, 24, 64, 130])),
            lambda: (draw.randint(1, 48), 1, 4),
        ]
        overlap = draw.choice([Overlap.never, Overlap.always])
        case = Case(
            {f"w{index}": draw.choice(shapes)() for index in range(draw.randint(1, 5))},
            OptimConfig(bucket_mib=draw.choice([1e-9, 0.002, 1.0]), overlap_reduce=overlap),
            draw.choice([torch.float32, torch.bfloat16]),
            draw.choice([0.0, 0.5]),
            draw.choice([False, True]),
        )
        config = replace(case.config, algorithm=draw.choice(list(Algorithm)))
        if number % 2:
            kept = MomentsConfig(*(draw.choice(list(MomentFormat)) for _ in range(3)))
            config = replace(config, moments=kept, master=draw.choice(list(MasterFormat)))
        return replace(case, config=config)

    @property
    def in_one_process(self) -> OptimConfig:
        """The same optimizer with other buckets."""
        config = self.config
        return OptimConfig(algorithm=config.algorithm, moments=config.moments, master=config.master)


@dataclass
class Trained:
    """Parameters, their optimizer and the norms that it has seen."""

    case: Case
    mesh: ParallelMesh
    parameters: dict[str, LogicalParameter]
    optimizer: Zero1Optimizer
    norms: list[float]

    @staticmethod
    def start(case: Case, mesh: ParallelMesh, config: OptimConfig) -> Trained:
        def initial(name: str, shape: tuple[int, ...]) -> Tensor:
            return torch.randn(shape, generator=torch.Generator().manual_seed(hash_of(name))).to(case.dtype)

        parameters = {name: LogicalParameter.whole(name, initial(name, shape)) for name, shape in case.shapes.items()}
        return Trained(case, mesh, parameters, Zero1Optimizer(parameters.items(), config, mesh, False), [])

    def train(self, steps: range) -> None:
        for step in steps:
            self.optimizer.zero_grad()
            for part in range(self.mesh.dp.rank, NUM_RANKS, self.mesh.dp.size):
                if part + self.mesh.dp.size >= NUM_RANKS:
                    self.optimizer.begin_last_microbatch()
                for name, shape in reversed(self.case.shapes.items()):
                    contribute(self.parameters[name], exact_gradient(name, shape, step, part))
            norm = self.optimizer.finish_grads()
            self.norms.append(self.optimizer.step(norm, lr=1e-2, max_norm=self.case.max_norm).grad_norm)
        self.optimizer.wait_parameters()

    def differences(self, reference: Trained) -> list[str]:
        """What is not bitwise as in one process."""
        whole = {
            shard.name: {kind: shard.read(kind) for kind in shard.tensors}
            for shard in reference.optimizer.state_shards()
        }
        wrong = [name for name, ours in self.parameters.items() if not torch.equal(ours, reference.parameters[name])]
        for shard in self.optimizer.state_shards():
            wrong += [
                f"{kind}/{shard.name} at {shard.where}"
                for kind in shard.tensors
                if not torch.equal(shard.read(kind), whole[shard.name][kind][shard.where.slices])
            ]
        return wrong + ([] if self.norms == reference.norms else [f"norms {self.norms}, {reference.norms}"])


def save(trained: Trained, root: Path) -> None:
    store = CheckpointStore(root, trained.mesh.world, CheckpointConfig(asynchronous=False))
    store.save(1, trained.optimizer.state_shards(), {"steps": trained.optimizer.step_count})
    store.close()


def load(saver: Trained, mesh: ParallelMesh, root: Path) -> Trained:
    """The same model on the ranks of another mesh and in other buckets, with the state in the file."""
    config = replace(saver.case.in_one_process, bucket_mib=0.001)
    loader = Trained.start(saver.case, mesh, config)
    store = CheckpointStore(root, mesh.world, CheckpointConfig())
    chosen = store.choose(1)
    store.load(chosen, loader.optimizer.state_to_fill())
    loader.optimizer.after_load(chosen.meta["steps"])
    loader.norms = list(saver.norms)
    return loader


def all_cases(rank: int, world_size: int, root: str) -> list[str]:
    mesh, single = mesh_for(rank, world_size, dp=world_size), ParallelMesh.single_process()
    wrong = []
    gloo = bucket_comm_module.uses_gloo
    for number in range(NUM_CASES):
        case = Case.number(number)
        ours, reference = (
            Trained.start(case, mesh, case.config),
            Trained.start(case, single, case.in_one_process),
        )
        bucket_comm_module.uses_gloo = lambda group, native=case.native: not native  # type: ignore[misc]
        for trained in (ours, reference):
            trained.train(range(3))
        bucket_comm_module.uses_gloo = gloo
        wrong += [f"case {number}, {case}: {text}" for text in ours.differences(reference)]
        if number in WITH_CHECKPOINT:
            files = Path(root, f"{number} of all"), Path(root, f"{number} of one")
            save(ours, files[0])
            if rank == 0:
                save(reference, files[1])
            barrier(mesh.world)
            resumed = load(ours, single, files[0]), load(reference, mesh, files[1])
            for trained in (reference, *resumed):
                trained.train(range(3, 5))
            for trained in resumed:
                wrong += [f"case {number}, resumed: {text}" for text in trained.differences(reference)]
    return wrong


def test_sixty_random_cases_on_five_ranks(tmp_path: Path) -> None:
    for rank, wrong in enumerate(run_distributed(all_cases, NUM_RANKS, str(tmp_path))):
        assert not wrong, f"rank {rank}: {len(wrong)} differences, of which {wrong[:3]}"
