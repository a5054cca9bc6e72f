"""Kernels that a step launches, by part of a linear and by phase; compiled stages of a quantizer count one each.

An operation counts one kernel unless it only makes a view or allocates. A stage that torch would compile is run once on
the meta device, for the shapes of its results; afterwards it is one launch that makes nothing else, as compiled.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from megatron_fp4.numerics import compiled

NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias", "lift_fresh"}
NO_KERNEL |= {"set_", "resize_", "_unsafe_view", "_reshape_alias", "view", "is_pinned", "_local_scalar_dense"}
GEMMS = {"mm", "bmm", "addmm", "baddbmm"}


class KernelCounts:
    """by_part: kernels by (phase, part), the part of a linear that is computed, or "other". calls: of each part."""

    def __init__(self) -> None:
        self.by_part: Counter[tuple[str, str]] = Counter()
        self.gemms = self.compiled = 0
        self.calls: Counter[str] = Counter()
        self.part = "other"
        self._launches: dict[Any, bool] = {}

    def clear(self) -> None:
        self.by_part.clear()
        self.calls.clear()
        self.gemms = self.compiled = 0

    @property
    def total(self) -> int:
        return self.by_part.total()

    def see(self, func: Any, phase: str) -> None:
        """Count an operation on the device."""
        name = func._schema.name.partition("::")[2]
        if func not in self._launches:
            views = any(
                value.alias_info is not None and not value.alias_info.is_write for value in func._schema.returns
            )
            self._launches[func] = not views and name not in NO_KERNEL
        if self._launches[func]:
            self.by_part[phase, self.part] += 1
            self.gemms += name in GEMMS or "attention" in name

    @contextmanager
    def computing(self, part: str) -> Iterator[None]:
        """Around what is part of a linear."""
        before, self.part = self.part, part
        self.calls[part] += 1
        try:
            yield
        finally:
            self.part = before

    @contextmanager
    def with_compiled_stages(self, phase: Callable[[], str]) -> Iterator[None]:
        """Stages that would be compiled are one launch each."""

        def stand_in(stage: Callable[..., Any], constants: dict[str, Any]) -> Callable[..., Any]:
            if stage in compiled.EAGER_ON_CUDA:
                return lambda **tensors: stage(**tensors, **constants)
            return _CompiledStage(self, phase, stage, constants)

        with patch.object(compiled, "_compiled", stand_in):
            yield


class _CompiledStage:
    """One launch that makes the results of a stage."""

    def __init__(
        self, counts: KernelCounts, phase: Callable[[], str], stage: Callable[..., Any], constants: dict[str, Any]
    ) -> None:
        self._counts, self._phase = counts, phase
        self._stage, self._constants = stage, constants
        self._results: dict[Any, Any] = {}

    def __call__(self, **tensors: Tensor) -> Any:
        key = tuple((name, x.shape, x.stride(), x.dtype) for name, x in tensors.items())
        if key not in self._results:
            on_meta = {
                name: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
                for name, x in tensors.items()
            }
            self._results[key] = self._stage(**on_meta, **self._constants)
        self._counts.by_part[self._phase(), self._counts.part] += 1
        self._counts.compiled += 1
        device = next(iter(tensors.values())).device
        return tree_map(
            lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device), self._results[key]
        )


def tensors_of(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
