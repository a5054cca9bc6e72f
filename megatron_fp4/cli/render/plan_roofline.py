"""The roofline of a plan as text: a line per product of each kind of linear, and the totals per GPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_fp4.cli.render.plan_time import heading


def roofline_lines(section: Mapping[str, Any]) -> list[str]:
    """The section `roofline` of a report."""
    lines = [
        *heading(
            f"Roofline of the linears on {section['gpu']}, a microbatch of {section['tokens']:,} tokens on a rank"
        ),
        "  product: the longer of its FLOPs at peak and its bytes (memory); quantize: readings and copies, by bytes",
        "  linear            n   tokens x in x out     product format       GFLOP      us  quantize MB     us  share",
    ]
    for linear in section["linears"]:
        shape = f"{linear['tokens']:.0f} x {linear['columns']} x {linear['rows']}"
        head = f"  {linear['linear']:<16} {linear['count']:>3}  {shape:<20} "
        lines += [f"{head} {_product(product)}" for product in linear["products"]]
    lines += [
        "  all linears, ms        at peak: products quantize  share    reached: products quantize  share"
        "    a step, over MXFP8  BF16",
    ]
    for one in section["machines"]:
        parts = [
            f"{1e3 * one[kind]['product_seconds']:>8,.2f} {1e3 * one[kind]['quantizer_seconds']:>8,.2f}"
            f" {one[kind]['share']:>6.1%}"
            for kind in ("at_peak", "reached")
        ]
        lines.append(
            f"    {one['gpu']:<26} {parts[0]}             {parts[1]}               {one['over_mxfp8']:>6.2f}"
            f" {one['over_bf16']:>5.2f}"
        )
    return lines


def _product(product: Mapping[str, Any]) -> str:
    return (
        f"{product['gemm']:<7} {product['format']:<10} {product['flops'] / 1e9:>7,.0f}"
        f" {1e6 * product['product_seconds']:>7,.1f} {product['quantized'] / 1e6:>12,.1f}"
        f" {1e6 * product['quantizer_seconds']:>6,.1f} {product['share']:>6.1%}"
        f"{'  memory' if product['by_memory'] else ''}"
    )
