"""Traces: valid for the programs that show them, bounded, and nothing where nobody asked."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moshi_mlx.realtime import Conversation, Trace
from tests.realtime.test_conversation import FRAME, _frame, _until, parts  # noqa: F401


def nested(events: list[dict[str, Any]]) -> None:
    """Within a thread, two spans lie apart or one inside the other: else a viewer shows neither."""
    threads = {event["tid"] for event in events}
    for thread in threads:
        spans = [event for event in events if event["ph"] == "X" and event["tid"] == thread]
        open_until: list[float] = []
        for span in sorted(spans, key=lambda span: (span["ts"], -span["dur"])):
            assert span["ts"] >= 0 and span["dur"] >= 0
            while open_until and open_until[-1] <= span["ts"] + 0.2:
                open_until.pop()
            assert not open_until or span["ts"] + span["dur"] <= open_until[-1] + 0.2, span
            open_until.append(span["ts"] + span["dur"])


def test_a_conversation(parts: SimpleNamespace, tmp_path: Path) -> None:  # noqa: F811
    """If this fails, a trace does not open, mixes the threads up, or does not show what was late or dropped."""
    trace = Trace()
    parts.generator.stalls = {10: 0.5}
    with Conversation(parts.model, backlog=0.16, trace=trace) as conversation:
        for number in range(30):
            conversation.feed(_frame(number))
            conversation.read(FRAME)
            time.sleep(0.02)
        assert _until(lambda: parts.generator.heard and parts.generator.heard[-1] == 29)
    assert conversation.stats.dropped_in
    trace.write(tmp_path / "talk.json")
    found = json.loads((tmp_path / "talk.json").read_text())
    events = found["traceEvents"]
    assert all(isinstance(event["ts"], float) for event in events if event["ph"] != "M")
    names = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    where = {(names[event["tid"]], event["name"]) for event in events if event["ph"] == "X"}
    assert {("moshi encoder", "encode"), ("moshi model", "model"), ("moshi decoder", "decode")} <= where
    assert {("MainThread", "feed"), ("MainThread", "read")} <= where
    heard = len(parts.generator.heard)
    for name in ("encode", "model", "decode"):
        assert len([event for event in events if event["name"] == name]) == heard
    nested(events)
    (stall,) = (event for event in events if event["name"] == "model" and event["dur"] > 4e5)
    assert stall["args"]["frame"] == 10
    assert sum(e["args"]["samples"] for e in events if e["name"] == "dropped") == conversation.stats.dropped_in
    counters = {event["name"] for event in events if event["ph"] == "C"}
    assert counters == {"waiting, ms", "frames between threads", "dropped, ms", "frames late", "gaps"}
    dropped = [event["args"]["in"] for event in events if event["name"] == "dropped, ms"]
    assert dropped == sorted(dropped) and dropped[-1] == conversation.stats.dropped_in / 24
    assert found["otherData"]["forgotten"] == 0 and list(tmp_path.iterdir()) == [tmp_path / "talk.json"]


def test_an_hour_is_bounded(tmp_path: Path) -> None:
    """If this fails, a long talk with --trace fills the memory or the disk."""
    trace = Trace(limit=12_000)
    for number in range(60_000):
        trace.span("frame", trace._began + number, trace._began + number + 0.5, {"number": number})
    assert trace.kept == 12_000 and trace.forgotten == 48_000
    trace.write(tmp_path / "long.json")
    assert (tmp_path / "long.json").stat().st_size < 12_000 * 150
    found = json.loads((tmp_path / "long.json").read_text())
    spans = [event for event in found["traceEvents"] if event["ph"] == "X"]
    assert [event["args"]["number"] for event in spans] == list(range(48_000, 60_000))
    assert found["otherData"]["forgotten"] == 48_000
    with pytest.raises(ValueError, match="at least one event"):
        Trace(limit=0)


def test_an_empty_trace_and_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, an early end leaves a file that does not open, or a failed write destroys the trace before."""
    path = tmp_path / "trace.json"
    Trace().write(path)
    assert json.loads(path.read_text())["traceEvents"] == []

    def full(self: Trace) -> Any:
        yield "{"
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Trace, "_json", full)
    with pytest.raises(OSError, match="No space"):
        Trace().write(path)
    assert json.loads(path.read_text())["traceEvents"] == [] and list(tmp_path.iterdir()) == [path]


def test_threads_without_a_name_and_wrapped_calls(tmp_path: Path) -> None:
    """If this fails, the loudspeaker's callback is called Dummy-3, or tracing a function changes what it does."""
    import _thread

    trace, done = Trace(), threading.Event()

    def divide(number: float, by: float) -> float:
        return number / by

    traced = trace.wrap("divide", divide)
    assert traced(6, by=3) == 2
    with pytest.raises(ZeroDivisionError):
        traced(1, 0)

    def foreign() -> None:
        trace.span("read", 0.0, 1.0)
        done.set()

    _thread.start_new_thread(foreign, ())
    assert done.wait(5)
    trace.write(tmp_path / "t.json")
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert [event["name"] for event in events if event["ph"] == "X"] == ["divide", "divide", "read"]
    assert {event["args"]["name"] for event in events if event["ph"] == "M"} == {"MainThread", "read callback"}


def test_written_while_threads_go_on(tmp_path: Path) -> None:
    """If this fails, a thread that is still at work when the program ends costs the trace."""
    trace, ended = Trace(limit=1_000), threading.Event()

    def work() -> None:
        while not ended.is_set():
            trace.counter("count", {"value": float(np.pi)})
            time.sleep(1e-4)

    worker = threading.Thread(target=work)
    worker.start()
    try:
        for _ in range(4):
            trace.write(tmp_path / "t.json")
            json.loads((tmp_path / "t.json").read_text())
    finally:
        ended.set()
        worker.join()
