"""The gateway's command line: what it refuses to start with."""

import subprocess
import sys

import pytest


def start(tmp_path, *arguments):
    command = [
        sys.executable,
        "-m",
        "lifl_gateway",
        "--runtime-directory",
        tmp_path,
        "--state-directory",
        tmp_path,
    ]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=20, check=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "gateway.example"])
def test_it_listens_beyond_loopback_only_with_tokens(tmp_path, host):
    finished = start(tmp_path, "--host", host)
    assert finished.returncode == 2
    assert "--token-file" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_it_names_what_is_wrong_with_a_token_file(tmp_path):
    file = tmp_path / "tokens"
    file.write_text("no-token\n")
    assert f"{file}:1" in start(tmp_path, "--token-file", file).stderr
    assert "Traceback" not in start(tmp_path, "--token-file", tmp_path / "none").stderr


def test_it_refuses_a_seat_that_is_not_there(tmp_path):
    assert start(tmp_path, "--seat", "2", "--seats", "2").returncode == 2
