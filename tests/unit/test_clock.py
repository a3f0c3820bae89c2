"""Which monotonic clock a process has."""

from __future__ import annotations

from pathlib import Path

import pytest
from lifl.clock import clock_name, monotonic_offset

OFFSETS = "monotonic   {seconds:>9} {nanoseconds:>9}\nboottime            7         0\n"


@pytest.fixture
def boot_id(tmp_path: Path) -> Path:
    (tmp_path / "boot_id").write_text("boot\n")
    return tmp_path / "boot_id"


@pytest.mark.parametrize(
    ("seconds", "nanoseconds", "offset", "name"),
    [
        (0, 0, 0, "boot"),
        (86400, 5, 86_400_000_000_005, "boot+86400000000005"),
        (-1, 500_000_000, -500_000_000, "boot-500000000"),
    ],
)
def test_the_offset_of_a_time_namespace_makes_it_another_clock(
    tmp_path: Path, boot_id: Path, seconds: int, nanoseconds: int, offset: int, name: str
) -> None:
    offsets = tmp_path / "offsets"
    offsets.write_text(OFFSETS.format(seconds=seconds, nanoseconds=nanoseconds))
    assert monotonic_offset(offsets) == offset
    assert clock_name(boot_id, offsets) == name


def test_without_time_namespaces_there_is_one_clock_for_each_boot(tmp_path: Path, boot_id: Path) -> None:
    assert monotonic_offset(tmp_path / "none") == 0
    assert clock_name(boot_id, tmp_path / "none") == "boot"


def test_a_machine_that_does_not_tell_its_boots_apart_has_no_name_for_its_clock(tmp_path: Path) -> None:
    assert clock_name(tmp_path / "none", tmp_path / "none") == ""
