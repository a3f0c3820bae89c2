"""Measuring a member's capacity when the operator asks for it, beside whatever the node does meanwhile."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Final

from lifl.cluster.member_link import MemberLink
from lifl.control.member_options import read_calibration

_LONGEST_SECONDS: Final = 900.0

log = logging.getLogger("lifl.coordinator")


def start_calibration(state_directory: Path, link: MemberLink) -> None:
    """Begin to measure in a process of its own; the next heartbeats tell what was found."""
    threading.Thread(target=_measure, args=(state_directory, link), name="calibration", daemon=True).start()


def _measure(state_directory: Path, link: MemberLink) -> None:
    command = [sys.executable, "-m", "lifl.calibration", "--state-directory", str(state_directory)]
    try:
        subprocess.run(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=_LONGEST_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("the node's capacity was not measured: %s", error)
        return
    link.call_in_loop(partial(_tell, link, read_calibration(state_directory)))


def _tell(link: MemberLink, capacity: float) -> None:
    link.capacity = capacity
