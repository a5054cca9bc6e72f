"""The precisions in which a trained model can be judged, by name."""

from __future__ import annotations

from megatron_fp4.precision.operand import Operand
from megatron_fp4.precision.spec import Fprop, LinearPrecision
from megatron_fp4.precision.table import PrecisionTable, Row
from megatron_fp4.train.open import TrainedModel

EXPORTED = "exported"
"""Weights as the run multiplied them, activations as they are: what an export of 4-bit weights computes (W4A16)."""


def table_of(trained: TrainedModel, precision: str) -> PrecisionTable:
    """bf16, same, a recipe of the run, or exported. Raises ValueError for a name that is none of them, and for exported
    where weights are transformed together with activations, so that they mean nothing without."""
    if precision != EXPORTED:
        return trained.table(precision)
    rows = trained.table("same").rows
    if not any(row.precision.fprop.w.quantized for row in rows):
        raise ValueError("precision exported: the run quantizes no weight in its last step, so it is bf16")
    return PrecisionTable(tuple(Row(row.name, _weights_only(row), EXPORTED) for row in rows))


def _weights_only(row: Row) -> LinearPrecision:
    fprop = row.precision.fprop
    if fprop.w.rht_size:
        raise ValueError(
            f"precision exported: {row.name} multiplies weights after a Hadamard transform ({fprop}), which an export"
            " of weights alone cannot hold; judge it in same"
        )
    return LinearPrecision(Fprop(Operand(), fprop.w, pad=fprop.pad and fprop.w.quantized))
