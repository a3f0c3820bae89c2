"""`func bench` runs what it can and says what the rest would need."""

from __future__ import annotations

import pytest
from lifl.cli.common import CommandError
from lifl_bench import command
from lifl_bench.broker import parts
from lifl_bench.modes import MODES, Setting


@pytest.fixture(autouse=True)
def no_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts.shutil, "which", lambda *_, **__: None)


def test_without_broker_or_proxy_the_other_modes_are_left(capsys: pytest.CaptureFixture[str]) -> None:
    ready, notes = command._available([MODES["lifl"], MODES["broker"], MODES["grpc"]], Setting())

    assert [mode.name for mode in ready] == ["lifl", "grpc"]
    assert notes == ["mode broker left out: nats-server, nginx is not installed"]
    said = capsys.readouterr().err
    assert "Warning: mode broker left out" in said
    assert "apt-get install nats-server" in said and "apt-get install nginx-light" in said


def test_with_a_given_nats_server_only_the_proxy_is_missing() -> None:
    _, notes = command._available([MODES["lifl"], MODES["broker"]], Setting("nats://127.0.0.1:4222"))

    assert notes == ["mode broker left out: nginx is not installed"]


def test_with_no_mode_left_it_is_an_error_that_says_how_to_install() -> None:
    with pytest.raises(CommandError, match="none of the modes can run") as caught:
        command._available([MODES["broker"], MODES["broker-stock"]], Setting())

    assert ("apt-get install nginx-light", "installs nginx") in caught.value.hints
