"""The plan's report as text for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_fp4.cli.render.plan_roofline import roofline_lines
from megatron_fp4.cli.render.plan_time import heading, time_lines, whole_run_lines
from megatron_fp4.cli.render.schedule import draw


def render(report: Mapping[str, Any]) -> str:
    """The report of `planning.report.run_plan`, one section after the other; what does not fit comes first."""
    run = report["run"]
    lines = [
        *_verdict(report),
        *([report["backend"]["reason"]] if report["backend"]["reason"] else []),
        f"{run['gpus']} GPUs = tp {run['tp']} x pp {run['pp']} x cp {run['cp']} x dp {run['dp']};"
        f" {run['tokens_per_step']:,} tokens a step ({run['global_batch']} x {run['seq_length']}),"
        f" {run['steps']:,} steps, {run['total_tokens']:,} tokens",
        f"each rank: {run['microbatches_per_step']} microbatch(es) of {run['micro_batch']} a step, recompute"
        f" {run['recompute']}",
        *_ramp(report["batch_ramp"]),
        *_parameters(report["parameters"]),
        *_precision(report["precision"]),
        *_experts(report["experts"]),
        *_flops(report["flops"]),
        *_pipeline(report["pipeline"]),
        *time_lines(report["time"]),
        *whole_run_lines(report["whole_run"]),
        *(roofline_lines(report["roofline"]) if "roofline" in report else []),
        *_memory(report["memory_per_rank"], report["bytes_sent_per_step"]),
        *_division(report["division"], run["dp"] * run["cp"]),
        *(f"note: {note}" for note in report["notes"]),
        *_warnings(report["warnings"]),
        *heading("Left out"),
        *(f"  {text}" for text in report["left_out"]),
    ]
    return "\n".join(lines)


def _verdict(report: Mapping[str, Any]) -> list[str]:
    """Why a layout cannot run, and which can; empty for one that fits."""
    if report["fits"]:
        return []
    lines = [f"THIS LAYOUT CANNOT RUN: {reason}" for reason in report["obstacles"]]
    shipped = report.get("shipped_layouts", [])
    return [*lines, *(["layouts of this model that do:"] if shipped else []), *(f"  {text}" for text in shipped), ""]


def _ramp(stages: list[Mapping[str, Any]]) -> list[str]:
    if not stages:
        return []
    lines = heading("Batch-size ramp (time per step and memory below are those of the last stage)")
    for stage in stages:
        lines.append(
            f"  from {stage['from_tokens']:,} tokens: {stage['steps']:,} steps of {stage['samples']} samples,"
            f" {stage['microbatches']} microbatch(es), idle {stage['bubble']:.1%}"
        )
    return lines


def _parameters(section: Mapping[str, Any]) -> list[str]:
    kinds = ", ".join(f"{kind} {count / 1e9:.3f}" for kind, count in section["by_kind"].items())
    return [
        *heading(f"Parameters: {section['total'] / 1e9:.3f} B ({section['total']:,})"),
        f"  in billions: {kinds}",
        *([f"  acting on a token: {section['active'] / 1e9:.3f} B"] if section["active"] < section["total"] else []),
        f"  in quantized linears: {section['quantized'] / 1e9:.3f} B, {section['quantized_share']:.1%}",
    ]


def _precision(phases: list[Mapping[str, Any]]) -> list[str]:
    lines = heading("Precision")
    for phase in phases:
        share = f"{phase['quantized_share_of_flops']:.1%} of the training FLOPs"
        lines.append(f"  from {phase['from_tokens']:,} tokens: {share}; {phase['summary']}")
    return lines


def _experts(section: Mapping[str, Any]) -> list[str]:
    if not section:
        return []
    return [
        *heading(
            f"Experts: {section['per_rank']} of {section['experts']} on a rank, {section['top_k']} for a token; padding"
            f" {section['padding']:.1%}"
        ),
        f"  a microbatch brings a rank {section['rows']:,} rows of {section['width']} if every expert gets the same:"
        f" {section['rows_per_segment']:,.0f} in each of {section['segments']:,.0f} segments",
        f"  grouped products are assumed to reach {section['grouped_share']:.0%} of what dense ones do"
        " (--assume grouped_share=PART)",
    ]


def _flops(section: Mapping[str, Any]) -> list[str]:
    total = section["forward_per_token"]
    kinds = ", ".join(f"{kind} {value / total:.1%}" for kind, value in section["forward_per_token_by_kind"].items())
    rates = section["training_per_token_by_rate"]
    shares = ", ".join(f"{name.upper()} {value / section['training_per_token']:.1%}" for name, value in rates.items())
    return [
        *heading(
            f"FLOPs: {section['training_per_token'] / 1e9:.2f} G per token in training, forward {total / 1e9:.2f} G"
        ),
        f"  forward: {kinds}",
        f"  training, by rate: {shares}; {section['training_per_step']:.3e} a step",
        *_orthogonalization(section["orthogonalization_per_step"], section["training_per_step"]),
    ]


def _orthogonalization(flops: float, of_step: float) -> list[str]:
    return [f"  Muon: {flops:.3e} a step in all, {flops / of_step:.2%} of these"] if flops else []


def _pipeline(section: Mapping[str, Any]) -> list[str]:
    if section["schedule"] == "none":
        return []
    blocks = ", ".join(str(count) for count in section["blocks_per_stage"])
    return [
        *heading(f"Pipeline: {section['schedule']}, blocks per stage {blocks}"),
        f"  idle {section['bubble']:.1%} by the order of actions; {section['bubble_by_formula']:.1%} by the formula"
        f" {section['bubble_formula']}",
        f"  heaviest rank {section['heaviest_rank_over_mean']:.3f} x the mean",
        *(draw(section["timeline"]) if "timeline" in section else []),
    ]


def _memory(section: Mapping[str, Any], traffic: list[Mapping[str, float]]) -> list[str]:
    lines = heading(f"Memory per rank, GB (GPU: {section['gpu_bytes'] / 1e9:.0f}; without allocator and NCCL overhead)")
    for number, entry in enumerate(section["pipeline_ranks"]):
        kinds = ", ".join(f"{kind} {value / 1e9:.2f}" for kind, value in entry["bytes"].items())
        lines.append(
            f"  pipeline rank {number}: {entry['total'] / 1e9:.2f} = {kinds} ({entry['in_flight']:g} in flight)"
        )
    each = ", ".join(f"{kind} {value:.4g}" for kind, value in section["per_parameter"].items())
    lines.append(f"  bytes per parameter: {each}; the replicas of a rank divide the last")
    lines += heading("Sent per rank and step, GB")
    for number, axes in enumerate(traffic):
        kinds = ", ".join(f"{axis} {value / 1e9:.2f}" for axis, value in axes.items())
        lines.append(f"  pipeline rank {number}: {kinds}")
    return lines


def _division(entries: list[Mapping[str, Any]], replicas: int) -> list[str]:
    if replicas == 1 and not any(entry["muon"] or entry["experts"] for entry in entries):
        return []
    lines = heading(f"Gradients and optimizer state, divided over {replicas} ranks")
    named = [(f"pipeline rank {number}", entry) for number, entry in enumerate(entries)]
    named += [
        (f"{name}, experts over {entry['experts']['ranks']} ranks", entry["experts"])
        for name, entry in named
        if entry["experts"]
    ]
    for name, entry in named:
        mib = entry["part_numel"] * 4 / 2**20
        lines.append(
            f"  {name}: buckets {entry['num_buckets']}, of each up to {mib:.2f} MiB a rank (FP32);"
            f" padding {entry['padding']:.2%}, largest share {entry['imbalance']:.3f} x the mean,"
            f" {entry['empty_ranks']} ranks own nothing"
        )
        if muon := entry["muon"]:
            lines.append(
                f"    Muon: {muon['matrices']} matrices over {muon['ranks']} ranks, the busiest has"
                f" {muon['flops'] / 1e12:.2f} TFLOP a step, {muon['imbalance']:.2f} x the mean"
            )
    return lines


def _warnings(entries: list[Mapping[str, str]]) -> list[str]:
    aligned = [] if any(entry["about"] == "shapes" for entry in entries) else ["every quantized GEMM is 128-aligned"]
    texts = [f"{entry['about']}: {entry['severity']}: {entry['text']}" for entry in entries]
    return [*heading("Warnings" if entries else "Shapes"), *(f"  {text}" for text in [*texts, *aligned])]
