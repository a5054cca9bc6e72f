"""Events of a run: in its file, at a command, at a real web server; and the numbers in a file for Prometheus."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from megatron_fp4.pretrain import main
from megatron_fp4.train.sections import LoggingConfig
from megatron_fp4.train.telemetry.operator import hook as hook_module
from megatron_fp4.train.telemetry.operator.events import Events
from megatron_fp4.train.telemetry.operator.hook import check_environment
from megatron_fp4.train.telemetry.operator.prometheus import PrometheusFile, as_text
from tests.helpers.tiny_run import tiny_run

TOKEN = "Xk3f9QpLr27ZtYwNv5MbC8dA"


class Receiver(ThreadingHTTPServer):
    """Keeps (path, body) of what was posted; answers with `status`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.received: list[tuple[str, dict[str, object]]] = []
        self.status = 200
        self.url = f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.received.append((self.path, json.loads(body)))
        self.send_response(self.server.status)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_run_tells_a_web_server_and_the_secret_stays_in_the_environment(
    tmp_path: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PAGER_TOKEN", TOKEN)
    prometheus = tmp_path / "run.prom"
    run = tiny_run(
        tmp_path, "precision=bf16", "model.num_layers=1", "train.stop_after_steps=2",
        f"logging.on_event='{receiver.url}/hooks/$PAGER_TOKEN'", f"logging.prometheus_file='{prometheus}'",
    )  # fmt: skip
    assert main(run.overrides) == 0
    assert main([*run.overrides, "train.stop_after_steps=3", "train.exit_after_seconds=0.001"]) == 85
    assert {path for path, _ in receiver.received} == {f"/hooks/{TOKEN}"}, "$NAME was not filled in"
    kinds = [(event["event"], event["step"]) for _, event in receiver.received]
    assert kinds == [("start", 0), ("finish", 2), ("resume", 2), ("stop", 3)]
    assert [json.loads(line) for line in (run.run_dir / "events.jsonl").read_text().splitlines()] == [
        event for _, event in receiver.received
    ]
    assert receiver.received[0][1]["run"] == str(run.run_dir)
    stored = [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert stored == [], "the secret is in the run directory"
    assert TOKEN not in "".join(capfd.readouterr())
    assert '\nmegatron_fp4_step{run="run"} 3.0\n' in prometheus.read_text()
    assert "\nmegatron_fp4_tokens_per_second{" in prometheus.read_text()
    assert [path.name for path in tmp_path.glob("*.prom*")] == ["run.prom"], "a temporary file stayed"


def test_a_command_gets_the_event_on_its_standard_input(tmp_path: Path) -> None:
    script = tmp_path / "notify.sh"
    script.write_text(f'#!/bin/sh\ncat >> "{tmp_path}/got.jsonl"\n')
    script.chmod(0o755)
    events = Events(tmp_path, LoggingConfig(on_event=f"{script}"))
    events.add("save_failed", 12, "checkpoint 12: failed, the disk is full")
    events.add("hang", 13, "no progress")
    events.close()
    got = [json.loads(line) for line in (tmp_path / "got.jsonl").read_text().splitlines()]
    assert [(event["event"], event["step"]) for event in got] == [("save_failed", 12), ("hang", 13)]
    assert got[0]["text"] == "checkpoint 12: failed, the disk is full"


def test_who_tells_never_waits_and_failures_are_said_once(
    tmp_path: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(hook_module, "DELIVERY_SECONDS", 0.2)
    monkeypatch.setenv("TOKEN", TOKEN)
    receiver.status = 500
    targets = {
        "sleep 60": "the command took longer than 0.2 s",
        "exit 3": "the command ended with exit code 3",
        f"{receiver.url}/$TOKEN": "HTTP status 500",
        "http://127.0.0.1:9/$TOKEN": "Connection refused",
    }
    for target, reason in targets.items():
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            events = Events(tmp_path, LoggingConfig(on_event=target))
            began = time.monotonic()
            for step in range(3):
                events.add("skip", step, "NaN")
            assert time.monotonic() - began < 0.1, f"the step waited for {target}"
            events.close()
        assert time.monotonic() - began < 5, f"the end of the run waited for {target}"
        lines = [record.getMessage() for record in caplog.records]
        assert lines == [
            f"logging.on_event: skip was not delivered ({reason}); this is said once",
            "logging.on_event: 3 event(s) were not delivered",
        ]


@pytest.mark.parametrize(
    "target",
    [f"https://hooks.example.com/services/T01/{TOKEN}", "https://me:word@example.com/", f"curl -H 'Bearer {TOKEN}' x"],
)
def test_a_literal_secret_is_refused_and_not_repeated(target: str) -> None:
    with pytest.raises(ValueError, match=r"logging\.on_event holds what looks like a secret.* write \$NAME") as refusal:
        LoggingConfig(on_event=target)
    assert TOKEN not in str(refusal.value)


def test_a_variable_that_is_not_there_is_refused_at_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tiny_run(tmp_path, "precision=bf16", "logging.on_event='https://example.com/$NO_SUCH_TOKEN'")
    assert main(run.overrides) == 2
    assert "needs the environment variable NO_SUCH_TOKEN, which rank 0 does not have" in capsys.readouterr().err
    assert not run.run_dir.exists()
    check_environment("/bin/notify --token $NO_SUCH_TOKEN")  # its shell knows what it wants


def test_prometheus_text(tmp_path: Path) -> None:
    text = as_text({"loss": 2.5, "eval/held out/loss": float("nan"), "grad_norm": float("inf")}, 'a"b')
    assert text.splitlines() == [
        "# TYPE megatron_fp4_eval_held_out_loss gauge", 'megatron_fp4_eval_held_out_loss{run="a\\"b"} NaN',
        "# TYPE megatron_fp4_grad_norm gauge", 'megatron_fp4_grad_norm{run="a\\"b"} +Inf',
        "# TYPE megatron_fp4_loss gauge", 'megatron_fp4_loss{run="a\\"b"} 2.5',
    ]  # fmt: skip
    sink = PrometheusFile(tmp_path / "x.prom", "x")
    sink.write(1, {"loss": 1.0})
    sink.write(2, {"loss": 2.0})
    assert "megatron_fp4_updated_seconds" in (tmp_path / "x.prom").read_text()
    assert "megatron_fp4_loss" not in (tmp_path / "x.prom").read_text(), "written more than once a second"
    sink.close()
    assert 'megatron_fp4_loss{run="x"} 2.0' in (tmp_path / "x.prom").read_text()


def test_a_command_does_not_outlive_the_launch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The process ends by os._exit: what is still delivered then is killed, with its children; nothing more starts."""
    monkeypatch.setattr(hook_module, "CLOSE_SECONDS", 0.5)
    events = Events(tmp_path, LoggingConfig(on_event=f"echo $$ >> {tmp_path}/groups; sleep 100; true"))
    events.add("start", 0, "")
    events.add("finish", 2, "")
    with caplog.at_level(logging.WARNING):
        events.close()
    (group,) = (tmp_path / "groups").read_text().split()
    deadline = time.monotonic() + 5
    while members(group) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert members(group) == [], "a process of the command lives on"
    assert [record.getMessage() for record in caplog.records] == [
        "logging.on_event: start was not delivered (the command was killed at the end of the launch); this is said"
        " once",
        "logging.on_event: 2 event(s) were not delivered",
    ]


def members(group: str) -> list[str]:
    """The processes of a process group that live."""
    living = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, of_group, *_ = path.read_text().rpartition(")")[2].split()
            living += [path.parent.name] if of_group == group and state != "Z" else []
    return living


def test_a_file_that_nobody_scrapes_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tiny_run(tmp_path, "precision=bf16", "logging.prometheus_file=x.txt")
    assert main(run.overrides) == 2
    assert "x.txt must end in .prom: node_exporter reads no other file; write x.prom" in capsys.readouterr().err
    assert not run.run_dir.exists()
