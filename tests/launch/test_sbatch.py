"""launch/slurm.sbatch without slurm: its srun command line, its environment, and what it does with an exit code.

With a real scheduler: tests/slurm.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from tests.launch.scripts import ROOT, Programs

SCRIPT = "launch/slurm.sbatch"
JOB = {
    "SLURM_JOB_ID": "12345", "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NODELIST": "gpu[07-08]",
    "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS_PER_NODE": "8", "MEGATRON_FP4_PYTHON": "/env/bin/python",
}  # fmt: skip
AWKWARD = ["note=two words", "quoted=a \"b\" 'c'", "glob=*", "dollar=$HOME", "empty="]


def submit(
    programs: Programs,
    arguments: Sequence[str] = (),
    variables: Mapping[str, str] | None = None,
    *,
    code: int = 0,
    state: str = "RUNNING",
) -> subprocess.CompletedProcess[str]:
    """Run the script as slurm would, with an srun that leaves with `code` and a job in `state`."""
    programs.add("srun", code=code)
    programs.add("scontrol", output="gpu07\ngpu08\n")
    programs.add("squeue", output=f"{state}\n")
    return programs.run(SCRIPT, arguments, {**JOB, **(variables or {})}, cwd=Path("/"))


def requeued(programs: Programs) -> bool:
    return any(call["arguments"] == ["requeue", "12345"] for call in programs.calls("scontrol"))


def test_command_line_and_environment(programs: Programs) -> None:
    done = submit(programs, AWKWARD, {"MASTER_ADDR": "localhost", "MASTER_PORT": "1", "SLURM_CPUS_PER_TASK": "6"})
    assert done.returncode == 0, done.stderr
    (call,) = programs.calls("srun")
    options = call["arguments"][: call["arguments"].index("/env/bin/python")]
    assert {"--wait=60", "--kill-on-bad-exit=0", "--distribution=block", "--cpus-per-task=6"} <= set(options)
    assert call["arguments"][len(options) :] == ["/env/bin/python", "-m", "megatron_fp4.pretrain", *AWKWARD]
    environment = call["environment"]
    assert environment["MASTER_ADDR"] == "gpu07", "the rendezvous is not the first host, where rank 0 runs"
    assert environment["MASTER_PORT"] == str(15000 + 12345 % 10000)
    assert environment["MEGATRON_FP4_EXPECTED_WORLD_SIZE"] == "16"
    assert environment["OMP_NUM_THREADS"] == "6"


@pytest.mark.parametrize(
    ("code", "state", "requeue"),
    [
        (0, "RUNNING", False),
        (85, "RUNNING", True),  # time limit, preemption
        (85, "COMPLETING", False),  # scancel, or slurm requeues it itself
        (2, "RUNNING", False),
        (1, "RUNNING", False),
        (137, "RUNNING", False),
    ],
)
def test_requeue_by_exit_code(programs: Programs, code: int, state: str, requeue: bool) -> None:
    done = submit(programs, code=code, state=state)
    assert done.returncode == code, "slurm would record another exit code than the program's"
    assert requeued(programs) == requeue


def test_pyxis_container(programs: Programs) -> None:
    container = {"CONTAINER_IMAGE": "/images/a b.sqsh", "CONTAINER_MOUNTS": "/data:/data"}
    submit(programs, variables={**container, "MEGATRON_FP4_PYTHON": ""})
    arguments = programs.calls("srun")[0]["arguments"]
    assert "--container-image=/images/a b.sqsh" in arguments
    assert f"--container-mounts={ROOT}:{ROOT},/data:/data" in arguments
    assert arguments[-3:] == ["python3", "-m", "megatron_fp4.pretrain"], "the host's interpreter, in the container"


def test_apptainer_container(programs: Programs) -> None:
    container = {"CONTAINER_IMAGE": "/images/a b.sif", "CONTAINER_RUNTIME": "apptainer"}
    submit(programs, variables={**container, "MEGATRON_FP4_PYTHON": ""})
    arguments = programs.calls("srun")[0]["arguments"]
    inside = arguments[arguments.index("apptainer") :]
    expected = ["apptainer", "exec", "--nv", "--bind", f"{ROOT}:{ROOT}", "--pwd", str(ROOT), "/images/a b.sif"]
    assert inside == [*expected, "python3", "-m", "megatron_fp4.pretrain"]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"SLURM_JOB_ID": ""}, "not inside a slurm job"),
        ({"SLURM_SUBMIT_DIR": "/nowhere"}, "no launch/env.sh under '/nowhere'"),
        ({"SLURM_NTASKS_PER_NODE": ""}, "--ntasks-per-node is not set"),
        ({"CONTAINER_IMAGE": "i", "CONTAINER_RUNTIME": "docker"}, "one of pyxis, apptainer"),
    ],
)
def test_refusals(programs: Programs, variables: dict[str, str], message: str) -> None:
    done = submit(programs, variables=variables)
    assert done.returncode == 2
    assert message in done.stderr
    assert not programs.calls("srun"), "it started the program all the same"


def test_no_hosts_is_an_error_and_not_localhost(programs: Programs) -> None:
    programs.add("srun")
    programs.add("scontrol", code=1)
    done = programs.run(SCRIPT, (), JOB)
    assert done.returncode == 2
    assert not programs.calls("srun")


def test_a_command_takes_the_place_of_training(programs: Programs) -> None:
    submit(programs, ["evaluate", "/runs/mine", "--precision", "bf16"], {"SLURM_NTASKS_PER_NODE": "4"})
    (call,) = programs.calls("srun")
    assert call["arguments"][-6:] == ["-m", "megatron_fp4", "evaluate", "/runs/mine", "--precision", "bf16"]
    assert call["environment"]["MEGATRON_FP4_EXPECTED_WORLD_SIZE"] == "8", "2 trays of 4"
