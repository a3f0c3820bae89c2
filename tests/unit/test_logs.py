"""Logs for people and for programs."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from lifl.logs import FORMAT_VARIABLE, is_json, report, say

PROGRAM = """
import logging
from lifl.logs import configure_logging
configure_logging("gateway", "gateway: %(message)s", logging.INFO)
log = logging.getLogger("lifl.test")
log.info("joined %s\\nas %d", "node-ä", 3)
try:
    1 / 0
except ZeroDivisionError:
    log.exception("no good")
log.debug("not this")
"""


def run(log_format: str) -> list[str]:
    environment = {FORMAT_VARIABLE: log_format, "PYTHONPATH": ":".join(sys.path), "PYTHONUTF8": "1"}
    result = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, timeout=20)
    assert result.returncode == 0
    assert not result.stdout
    return result.stderr.decode().splitlines()


def test_a_record_is_one_line_of_json() -> None:
    first, second = map(json.loads, run("json"))
    assert first.pop("time").endswith("+00:00")
    assert first == {
        "level": "info",
        "process": "gateway",
        "logger": "lifl.test",
        "message": "joined node-ä\nas 3",
    }
    assert second["level"] == "error"
    assert "ZeroDivisionError" in second["exception"]


def test_people_read_text() -> None:
    lines = run("text")
    assert lines[0] == "gateway: joined node-ä"
    assert "Traceback (most recent call last):" in lines


def test_what_a_process_says_without_loggers_has_the_same_form(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(FORMAT_VARIABLE, raising=False)
    say("agent", "beginning anew")
    assert capsys.readouterr().err == "agent: beginning anew\n"
    monkeypatch.setenv(FORMAT_VARIABLE, "json")
    assert is_json()
    say("agent", "beginning anew")
    assert json.loads(capsys.readouterr().err)["message"] == "beginning anew"
    report("gateway", ValueError("no good"))
    record = json.loads(capsys.readouterr().err)
    assert (record["level"], record["message"]) == ("error", "no good")
    assert record["exception"].endswith("ValueError: no good")
