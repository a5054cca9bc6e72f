"""Linears of experts: the three GEMMs of many weights, each with the rows that were routed to it.

Rows are sorted by (expert, source segment, address) and cut into `Segments`. Each segment is quantized by itself, with
an FP32 scale of its own in all three GEMMs and zeros behind it up to the tile, so that its numbers do not depend on
what else has come to the same rank: neither on expert nor on data parallelism.
"""

from megatron_fp4.precision.grouped.linear_op import grouped_linear
from megatron_fp4.precision.grouped.segments import RowSegment, Segments
from megatron_fp4.precision.grouped.weight_cache import GroupedWeightCache

__all__ = ["GroupedWeightCache", "RowSegment", "Segments", "grouped_linear"]
