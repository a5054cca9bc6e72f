"""launch/torchrun.sh: what it starts, what it refuses, and that codes and signals get through (two real ranks)."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launch.scripts import ROOT, Programs

SCRIPT = "launch/torchrun.sh"
AWKWARD = ["note=two words", "quoted=a \"b\" 'c'", "glob=*", "dollar=$HOME", "empty=", "--looks=like an option"]
STANDIN = "tests.slurm.standin"


def launch_line(programs: Programs, *arguments: str) -> tuple[list[str], dict[str, str]]:
    """Arguments and environment of the interpreter that the script would start."""
    done = programs.run(SCRIPT, arguments, {"MEGATRON_FP4_PYTHON": str(programs.add("interpreter"))})
    assert done.returncode == 0, done.stderr
    (call,) = programs.calls("interpreter")
    return call["arguments"], call["environment"]


def test_one_node_command_line(programs: Programs) -> None:
    arguments, environment = launch_line(programs, "--nproc-per-node", "4", "experiment=quickstart", *AWKWARD)
    supervise = str(ROOT / "launch" / "supervise.py")
    assert arguments[:6] == [supervise, "--standalone", "--nproc-per-node", "4", "-m", "megatron_fp4.pretrain"]
    assert arguments[6:] == ["experiment=quickstart", *AWKWARD], "an argument was split, expanded or lost its quotes"
    assert environment["MEGATRON_FP4_EXPECTED_WORLD_SIZE"] == "4"
    assert environment["OMP_NUM_THREADS"] == "1", "the ranks of a node would fight for its cores"


@pytest.mark.parametrize("flag", ["-m", "--multirun"])
def test_a_sweep_is_one_program_that_starts_the_ranks_of_each_run(programs: Programs, flag: str) -> None:
    sweep = [flag, "experiment=quickstart", "optim.lr=1e-3,3e-3"]
    arguments, environment = launch_line(programs, "--nproc-per-node", "2", *sweep)
    assert arguments[:3] == ["-m", "megatron_fp4.pretrain", "--launch"]
    assert shlex.split(arguments[3]) == [str(ROOT / SCRIPT), "--nproc-per-node", "2"]
    assert arguments[4:] == sweep
    assert "MEGATRON_FP4_EXPECTED_WORLD_SIZE" not in environment


@pytest.mark.parametrize("own", [["--config-dir", "mine"], ["--config-dir=mine"], ["--cfg"]])
def test_options_of_the_program_may_come_first(programs: Programs, own: list[str]) -> None:
    arguments, _ = launch_line(programs, "--nproc-per-node", "1", *own, "a=1")
    assert arguments[-len(own) - 1 :] == [*own, "a=1"]


def test_double_dash_ends_the_options(programs: Programs) -> None:
    arguments, _ = launch_line(programs, "--nproc-per-node", "1", "--", "--help")
    assert arguments[-1] == "--help"


def test_several_nodes_command_line(programs: Programs) -> None:
    programs.add("getent", output="10.1.2.3  node0\n")
    options = ["--nproc-per-node", "8", "--nnodes", "2", "--node-rank", "1", "--master-addr", "node0"]
    arguments, environment = launch_line(programs, *options, "a=1")
    assert arguments[1:9] == ["--nnodes", "2", "--node-rank", "1", "--master-addr", "node0", "--master-port", "29500"]
    assert environment["MEGATRON_FP4_EXPECTED_WORLD_SIZE"] == "16"


def test_exported_variables_win_over_env_sh(programs: Programs) -> None:
    python = str(programs.add("interpreter"))
    programs.run(SCRIPT, ["--nproc-per-node", "1"], {"MEGATRON_FP4_PYTHON": python, "NCCL_DEBUG": "INFO"})
    assert programs.calls("interpreter")[0]["environment"]["NCCL_DEBUG"] == "INFO"


TWO_NODES = ["--nproc-per-node", "8", "--nnodes", "2"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["experiment=x"], "--nproc-per-node is missing"),
        (["--nproc-per-node", "0"], "--nproc-per-node 0: must be a whole number above 0"),
        (["--nproc-per-node", "two"], "--nproc-per-node two: must be"),
        (["--nproc-per-node"], "--nproc-per-node needs a value"),
        (["--nproc", "8"], "unknown option --nproc"),
        ([*TWO_NODES, "--node-rank", "0", "--master-addr", "node0", "a=1", "-m"], "--multirun on several nodes"),
        (TWO_NODES, "needs --master-addr"),
        ([*TWO_NODES, "--master-addr", "node0"], "--node-rank '': must be 0 to 1"),
        ([*TWO_NODES, "--master-addr", "node0", "--node-rank", "2"], "--node-rank '2': must be 0 to 1"),
        ([*TWO_NODES, "--master-addr", "localhost", "--node-rank", "0"], "localhost is a loopback address"),
        ([*TWO_NODES, "--master-addr", "127.0.1.1", "--node-rank", "0"], "127.0.1.1 is a loopback address"),
        (["--nproc-per-node", "8", "--master-addr", "node0"], "have no effect with one node"),
    ],
)
def test_refusals(programs: Programs, options: list[str], message: str) -> None:
    done = programs.run(SCRIPT, options, {"MEGATRON_FP4_PYTHON": str(programs.add("interpreter"))})
    assert done.returncode == 2
    assert message in done.stderr
    assert not programs.calls("interpreter"), "it started the program all the same"


@pytest.mark.parametrize(("answer", "message"), [("127.0.1.1 node0\n", "a loopback address"), ("", "does not resolve")])
def test_name_of_node_0_is_checked_on_the_other_nodes(programs: Programs, answer: str, message: str) -> None:
    programs.add_quick("getent", output=answer)
    programs.add_quick("sleep")  # it asks for two minutes before it gives up
    done = programs.run(SCRIPT, [*TWO_NODES, "--master-addr", "node0", "--node-rank", "1"])
    assert done.returncode == 2
    assert message in done.stderr


def start(run_dir: Path, *arguments: str) -> subprocess.Popen[str]:
    """Two real ranks of the stand-in program."""
    variables = {"MEGATRON_FP4_MODULE": STANDIN, "MEGATRON_FP4_PYTHON": sys.executable}
    return subprocess.Popen(
        ["bash", str(ROOT / SCRIPT), "--nproc-per-node", "2", f"train.run_dir={run_dir}", *arguments],
        env={**os.environ, **variables}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def recorded(run_dir: Path) -> list[dict[str, object]]:
    path = run_dir / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for_start(run_dir: Path) -> None:
    deadline = time.monotonic() + 60
    while not recorded(run_dir):
        assert time.monotonic() < deadline, "the ranks did not start"
        time.sleep(0.1)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signal_reaches_the_ranks_and_code_85_comes_back(tmp_path: Path, signum: signal.Signals) -> None:
    run = start(tmp_path, "steps=1000", "step_seconds=0.05", "slow_exit=1")
    wait_for_start(tmp_path)
    run.send_signal(signum)
    output, _ = run.communicate(timeout=60)
    assert run.returncode == 85, f"torchrun's own 1, or a rank was killed while it saved:\n{output}"
    assert recorded(tmp_path)[-1]["signal"] == signum
    assert "Traceback" not in output


def test_the_second_ctrl_c_ends_the_ranks_at_once(tmp_path: Path) -> None:
    run = start(tmp_path, "steps=1000", "step_seconds=20")
    wait_for_start(tmp_path)
    for _ in range(2):
        run.send_signal(signal.SIGINT)
        time.sleep(0.5)
    output, _ = run.communicate(timeout=15)
    assert run.returncode == 128 + signal.SIGINT, output
    assert "Traceback" not in output


def test_ctrl_c_before_a_rank_is_started(tmp_path: Path) -> None:
    """torch is being imported, for seconds: a traceback of that would be the answer."""
    command = [sys.executable, "-X", "importtime", str(ROOT / "launch" / "supervise.py"), "--standalone", "-m", STANDIN]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert run.stderr is not None
    lines = iter(run.stderr)
    while "torch" not in next(lines):
        pass
    run.send_signal(signal.SIGINT)
    assert "Traceback" not in "".join(lines)
    assert run.wait(15) == -signal.SIGINT


def test_crash_of_one_rank_gives_its_code(tmp_path: Path) -> None:
    run = start(tmp_path, "steps=1000", "step_seconds=0.05", "crash_at=2")
    output, _ = run.communicate(timeout=90)
    assert run.returncode not in (0, 2, 85), output
    assert "left first, with exit code" in output
