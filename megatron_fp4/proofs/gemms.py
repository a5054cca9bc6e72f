"""One forward and backward pass of every distinct local linear of a run, for `preflight`.

A kernel goes wrong per local shape and precision, not per layer. So every distinct pair of the run, with the shapes
that a rank will really have, is computed once (precision/selftest/gemms.py), and the operands that kernels make are
compared code by code.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_fp4.precision.backends import Backend
from megatron_fp4.precision.backends.emulated import EmulatedBackend
from megatron_fp4.precision.backends.reference import ReferenceBackend
from megatron_fp4.precision.selftest.gemms import gemm_objections
from megatron_fp4.precision.selftest.operands import cross_check
from megatron_fp4.proofs.checks import CheckResult
from megatron_fp4.proofs.shards import LocalLinear


def check_gemms(
    linears: Sequence[LocalLinear], backend: Backend, device: torch.device, dtype: torch.dtype
) -> list[CheckResult]:
    """The three GEMMs of every linear; of a backend with kernels the operands also code by code.

    One result if all is well, otherwise one per objection.
    """
    by_code = not isinstance(backend, EmulatedBackend | ReferenceBackend)
    wrong: list[str] = []
    for linear in linears:
        case = linear.case
        try:
            objections = gemm_objections(case, backend, case.gaussian_tensors(device, dtype))
            wrong += [f"{linear}: {text}" for text in objections]
            if by_code:
                findings = cross_check(case, backend, case.gaussian_tensors(device, torch.bfloat16))
                wrong += [f"{linear}: {finding}" for finding in findings if finding.wrong]
        except Exception as error:  # a kernel may fail in any way; the point is to say for which linear
            wrong.append(f"{linear}: {type(error).__name__}: {error}")
    if wrong:
        return [CheckResult("gemms", False, text) for text in wrong]
    compared = "compared with FP32 products" + (" and code by code with the emulation" if by_code else "")
    kinds = f"{len(linears)} distinct local shapes and precisions"
    return [CheckResult("gemms", True, f"{kinds}: forward and backward finite, not zero, {compared} ({device.type})")]
