"""The costs of questions to the coordinator are measured on a real one."""

from __future__ import annotations

from dataclasses import astuple

import pytest
from lifl_bench.simulation.coordinator_calibration import measure_questions

pytestmark = pytest.mark.timeout(120)


def test_a_request_costs_more_than_a_message_in_it(capfd: pytest.CaptureFixture[str]):
    found = measure_questions(0.0)
    assert all(0 <= each < 0.1 for each in astuple(found))
    assert min(found.request_s, found.node_request_s, found.redirect_s, found.client_s) > 2e-5
    assert found.message_s < found.request_s / 2
    assert capfd.readouterr() == ("", "")
