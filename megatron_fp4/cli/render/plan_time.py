"""Time, cost and goodput of a plan as text, and the table of a search."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_fp4.planning.indices import index_text

DAY = 86400


def heading(text: str) -> list[str]:
    """An empty line and a title."""
    return ["", text]


def time_lines(section: Mapping[str, Any]) -> list[str]:
    """The range of a run's time, its terms, and what they rest on."""
    rates = ", ".join(f"{name.upper()} {value:,.0f}" for name, value in section["peak_tflops"].items())
    days, compute = section["days"], section["compute"]
    speed = section["tokens_per_second_per_gpu"]["expected"]
    terms = sorted(section["terms"].items(), key=lambda item: -item[1])
    shown = ", ".join(f"{name} {1000 * value:,.1f}" for name, value in terms if value > 0)
    lines = [
        *heading(f"Time on {section['gpu']} ({rates} dense TFLOPS; {section['source']})"),
        f"  products and bytes alone: {days['hidden']:.2f} days if all traffic hides ... {days['exposed']:.2f} if none"
        f" does; {section['dominating']} dominates",
        f"  expected: {days['expected']:.2f} days, {section['step_seconds']['expected']:.3f} s a step, {speed:,.0f}"
        f" tokens/s/GPU; at worst {days['worst']:.2f} days, everything one after the other",
        f"  a step in ms: {shown}",
        f"  of this, matrix products at {section['efficiency']:.0%} of peak with idle time and imbalance:"
        f" {compute['days']:.2f} days; at peak {compute['days_at_peak']:.2f}",
        f"  speed-up over BF16 by Amdahl's law: at most {section['speed_up_over_bf16']:.2f}x here,"
        f" {section['speed_up_limit']:.2f}x if quantized GEMMs took no time",
    ]
    for axis, link in section["links"].items():
        where = f"{link['in_a_domain']} of them in a domain" if link["crosses_network"] else "inside a domain"
        lines.append(f"  {axis}: {link['ranks']} ranks, {where}, {link['gb_per_second']:.0f} GB/s a rank")
        if link["gb_per_second_by_all_links"] > link["gb_per_second"]:
            inside, most = link["in_a_domain"], link["gb_per_second_by_all_links"]
            lines.append(
                f"    up to {most:,.0f} if its rings leave a domain by the network links of all {inside} (--assume"
                f" rails={inside}); the run then takes {section['expected_days_by_all_links']:.2f} days"
            )
    return lines


def whole_run_lines(section: Mapping[str, Any]) -> list[str]:
    """Hours, energy, failures, data, checkpoints."""
    saves = section["saves"]
    cost = f", cost {section['cost']:,.0f}" if section["cost"] else ""
    return [
        *heading("The whole run, as expected"),
        f"  {section['wall_days']:.2f} days with failures, saves and {section['evaluation_seconds'] / DAY:.2f} days of"
        f" evaluation; {section['tokens_per_day']:.3g} tokens a day",
        f"  {section['gpu_hours']:,.0f} GPU hours{cost}, {section['megawatt_hours']:,.0f} MWh at"
        f" {section['kilowatts_per_gpu']:.2f} kW a GPU",
        f"  failures: one every {saves['seconds_between_failures'] / 3600:.1f} h,"
        f" {saves['expected_failures']:.1f} in the run; progress {saves['goodput']:.1%} of the time,"
        f" {saves['best_goodput']:.1%} at best",
        f"  a save: {saves['bytes'] / 1e9:.1f} GB, {saves['seconds']:.1f} s to write,"
        f" {saves['blocking_seconds']:.3f} s of them blocking; every {saves['interval_seconds']:.0f} s,"
        f" best every {saves['best_interval_seconds']:.0f} s"
        f" (train.save_interval_steps={saves['best_interval_steps']})",
        f"  checkpoints: {saves['times']:,} saves write {saves['written_bytes'] / 1e12:,.1f} TB; {saves['kept']} stay,"
        f" {saves['kept_bytes'] / 1e12:,.2f} TB",
        f"  data: {section['data_bytes'] / 1e12:,.2f} TB ({section['bytes_per_token']} bytes a token)",
        f"  its index of an epoch: {index_text(section['data_index'])}",
        f"  host memory for these: {section['host_bytes_per_gpu'] / 1e9:,.2f} GB a GPU",
    ]


def search_lines(results: Mapping[str, Any]) -> list[str]:
    """The layouts that fit, fastest first; why the others fell out; batch sizes near the asked one."""
    with_experts = any(entry["ep"] > 1 for entry in results["fitting"])
    lines = [
        *([results["backend"]["reason"]] if results["backend"]["reason"] else []),
        f"{results['tried']} layouts of {results['gpus']} {results['gpu']}, global batch {results['global_batch']},"
        f" up to {results['memory_share']:.0%} of the memory",
        "days: by products and bytes alone, with all traffic hidden ... none; and as expected",
        "",
        f"  tp pp cp    dp {' ep ' if with_experts else ''}mb  m schedule                recompute  idle   GB"
        "  hidden ... none  expected  dominated by",
    ]
    for entry in results["fitting"]:
        days = entry["days"]
        schedule = entry["schedule"] if entry["pp"] > 1 else "-"
        experts = f" {entry['ep']:>3}" if with_experts else ""
        lines.append(
            f"  {entry['tp']:>2} {entry['pp']:>2} {entry['cp']:>2} {entry['dp']:>5}{experts} {entry['micro_batch']:>2}"
            f" {entry['microbatches']:>2} {schedule:<23} {entry['recompute']:<9} {entry['idle']:>5.1%}"
            f" {entry['memory_bytes'] / 1e9:>4.0f}  {days['hidden']:>6.2f} ... {days['exposed']:<5.2f}"
            f" {days['expected']:>8.2f}  {entry['dominating']}"
        )
    if not results["fitting"]:
        lines.append("  none fits")
    lines += heading("Fallen out, by the first reason")
    reasons = {"batch": "dp x micro_batch does not divide the global batch", "schedule": "wrong number of microbatches"}
    reasons |= {
        "model": "sizes of the model do not divide",
        "alignment": f"{results['backend']['name']} could not quantize",
    }
    reasons |= {"mamba": "cp > 1: Mamba has no kernels for it, and the time of torch's loops is not known"}
    reasons |= {"experts": "parallel.ep does not divide tp x cp x dp"}
    reasons |= {"memory": "do not fit, with full recomputation either"}
    for reason, count in results["fallen"].items():
        lines.append(f"  {count:>5} {reasons.get(reason, reason)}")
    lines.append(f"  {results['slower']:>5} slower than those shown; their memory was not counted")
    batches = results["batches"]
    lines += heading(f"Batch: {batches['global_batch']} = {batches['factors']}, so dp may be {_numbers(batches['dp'])}")
    for near in batches["near"]:
        lines.append(f"  {near['global_batch']} = {near['factors']}: dp {_numbers(near['dp'])}")
    if results["fitting"]:
        lines += heading("The first, as overrides")
        lines.append("  " + " ".join(results["fitting"][0]["overrides"]))
    return lines


def _numbers(values: list[int]) -> str:
    return ", ".join(map(str, values))
