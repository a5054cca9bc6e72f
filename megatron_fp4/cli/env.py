"""`megatron-fp4 env`: what this installation and machine are, to paste into a bug report.

One line per fact, and nothing fails: what is absent is reported as absent. What is installed is compared with what this
package requires, and with the Dockerfile's image; a difference is marked.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from importlib import metadata

import torch
import torch.distributed as dist
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from megatron_fp4 import __version__
from megatron_fp4.cli.arguments import CommandParser
from megatron_fp4.comm.launch import environment, read_launch
from megatron_fp4.precision.operand import Format
from megatron_fp4.precision.te.api import load_api
from megatron_fp4.precision.te.refusals import check_capability

PACKAGES = ("numpy", "hydra-core", "transformer-engine", "apex", "triton", "wandb", "sentencepiece", "tokenizers")
IMAGE = {"torch": "2.13.0a0", "cuda": "13.3", "transformer-engine": "2.17"}
"""What the base image of the Dockerfile has, besides Apex (which has no version numbers)."""
TESTED = {"2.13.0": "all tests", "2.11.0": "tests/versions", "2.14.1": "tests/versions"}
"""Versions of torch, and what of the tests is run on each."""
COMPILERS = ("g++", "c++", "clang++")
SCHEDULERS = {"slurm": "sbatch", "pbs": "qsub", "lsf": "bsub", "kubernetes": "kubectl"}
JOBS = {"slurm": "SLURM_JOB_ID", "pbs": "PBS_JOBID", "lsf": "LSB_JOBID", "kubernetes": "KUBERNETES_SERVICE_HOST"}
VARIABLES = (
    *("NVTE_", "NCCL_", "CUDA_", "CUBLAS", "GLOO_", "TRITON_", "MEGATRON_FP4_"),
    *("TORCH_", "TORCHINDUCTOR_", "TORCHDYNAMO_", "PYTORCH_", "OMP_", "MKL_", "KMP_"),
)
"""Prefixes of variables that change what a run does or how fast."""

EXITS = {0: "done", 1: "an installed version is not the one that is required"}


def main(arguments: Sequence[str]) -> int:
    """Print the report; returns 0, or 1 if an installed version is not the one that is required."""
    CommandParser("env", __doc__, EXITS, "").parse_args(arguments)
    facts = [*software(), *gpus(), *transformer_engine(), *machine(), *variables()]
    for name, text in facts:
        print(f"{name:<20} {text}")
    return 1 if any("REQUIRED" in text for _, text in facts) else 0


def software() -> Iterator[tuple[str, str]]:
    """Versions of this package and of what it uses."""
    required = _requirements()
    yield "megatron-fp4", __version__
    yield "python", platform.python_version()
    version = torch.__version__
    yield "torch", version + _compared(required.get("torch"), version) + _image("torch", version)
    yield "torch, tested", _tested(version)
    yield "cuda (torch's)", str(torch.version.cuda) + _image("cuda", torch.version.cuda)
    yield "cudnn", str(torch.backends.cudnn.version())
    yield "nccl", _nccl()
    yield "gloo", "yes" if dist.is_available() and dist.is_gloo_available() else "no"
    for name in PACKAGES:
        installed = _version(name)
        compared = _compared(required.get(name), installed) if installed else ""
        yield name, (installed or "absent") + compared + _image(name, installed)


def gpus() -> Iterator[tuple[str, str]]:
    """Each GPU, and what of the formats its compute capability allows."""
    if not torch.cuda.is_available():
        yield "gpu", "none seen by torch"
        return
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        formats = ", ".join(fmt.name for fmt in _formats((facts.major, facts.minor))) or "none"
        yield (
            f"gpu {index}",
            f"{facts.name}, {facts.total_memory / 1e9:.0f} GB, compute capability {facts.major}.{facts.minor};"
            f" tensor core formats with Transformer Engine: {formats}",
        )


def transformer_engine() -> Iterator[tuple[str, str]]:
    """What the installed version can do, or why it cannot be used."""
    try:
        api = load_api()
    except ValueError as error:
        yield "te backend", f"no: {error}"
        return
    yield "te backend", f"Transformer Engine {api.version}"
    for name, value in vars(api.features).items():
        yield f"te {name}", str(getattr(value, "name", value))


def machine() -> Iterator[tuple[str, str]]:
    """Compiler, launcher, scheduler, cores and memory."""
    compiler = next((path for name in COMPILERS if (path := shutil.which(name))), None)
    yield "c++ compiler", _first_line(compiler) if compiler else "absent: the emulated backend runs eagerly on CPUs"
    try:
        launch = read_launch()
        yield "launcher", f"{launch.launcher}, {launch.world_size} ranks on {launch.num_nodes} node(s)"
    except ValueError as error:
        yield "launcher", f"contradictory: {error}"
    tools = [f"{name} (its {tool} is here)" for name, tool in SCHEDULERS.items() if shutil.which(tool)]
    jobs = [f"in a job of {name} ({variable} is set)" for name, variable in JOBS.items() if environment(variable)]
    yield "scheduler", ", ".join(tools + jobs) or "none found"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield "machine", f"{platform.platform()}, {os.cpu_count()} cores, {memory / 1e9:.0f} GB"


def variables() -> Iterator[tuple[str, str]]:
    """The settings of libraries that are made by the environment."""
    settings = environment(*VARIABLES)
    if not settings:
        yield "environment", f"no variable {', '.join(prefix + '*' for prefix in VARIABLES)} is set"
    yield from settings.items()


def _formats(capability: tuple[int, int]) -> list[Format]:
    """The formats that Transformer Engine multiplies on a GPU of this compute capability."""
    return [fmt for fmt in (Format.nvfp4, Format.mxfp8, Format.fp8_block) if _is_capable(capability, fmt)]


def _is_capable(capability: tuple[int, int], fmt: Format) -> bool:
    try:
        check_capability(capability, {fmt})
    except ValueError:
        return False
    return True


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _requirements() -> dict[str, SpecifierSet]:
    """Name -> required versions, of this package's own requirements without those of its extras."""
    try:
        lines = metadata.requires("megatron-fp4") or []
    except metadata.PackageNotFoundError:
        return {}
    requirements = [Requirement(line) for line in lines]
    return {one.name: one.specifier for one in requirements if "extra" not in str(one.marker)}


def _compared(required: SpecifierSet | None, version: str) -> str:
    allowed = required is None or required.contains(version, prereleases=True)  # an image's torch is a pre-release
    return "" if allowed else f"   REQUIRED {required}"


def _tested(version: str) -> str:
    """Whether tests are run on this torch, and which."""
    listed = "; ".join(f"{what} on {number}" for number, what in TESTED.items())
    release = version.split("+")[0]
    here = f"{TESTED[release]}, yes" if release in TESTED else "no"
    return f"{here} ({listed})"


def _image(name: str, version: str | None) -> str:
    """Where the version is not that of the image: which one that has."""
    wanted = IMAGE.get(name)
    release = re.match(r"\d+\.\d+", wanted or "")
    return f"   (the Dockerfile's image has {wanted})" if release and not _is_release(release[0], version) else ""


def _is_release(release: str, version: str | None) -> bool:
    return version is not None and re.match(re.escape(release) + r"(\D|$)", version) is not None


def _first_line(compiler: str) -> str:
    """Path and version."""
    try:
        done = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError) as error:
        return f"{compiler}, which does not run: {error}"
    return f"{compiler}, {(done.stdout or done.stderr).partition(chr(10))[0]}"


def _nccl() -> str:
    if not torch.cuda.is_available():
        return "not used (no GPU)"
    return ".".join(map(str, torch.cuda.nccl.version()))
