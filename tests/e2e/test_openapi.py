"""A live node keeps to its own OpenAPI document: schemathesis makes requests of it and judges the answers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.node_harness import SMALL, LiveNode, create_job, run_round

# Of what the document cannot say: tensors must fit the job's model, a quorum the goal. A long poll is allowed to
# take a minute, so its length is fixed, and what schemathesis believes to have sent instead is not judged.
CONFIGURATION = """
[parameters]
"query.wait" = 0.1
[[operations]]
include-operation-id = ["createJob", "postUpdate", "putModel"]
checks.positive_data_acceptance.enabled = false
[[operations]]
include-operation-id = "getModel"
checks.negative_data_rejection.enabled = false
"""


@pytest.mark.timeout(120)
def test_a_live_node_keeps_to_its_openapi_document(shared_node: LiveNode, tmp_path: Path) -> None:
    (tmp_path / "schemathesis.toml").write_text(CONFIGURATION)
    finished = subprocess.run(
        [
            *(Path(sys.executable).with_name("schemathesis"), "run", f"{shared_node.address}/openapi.json"),
            *("--max-examples", "8", "--seed", "1", "--no-color", "--request-timeout", "20"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    # Nothing that it sent has done any harm (it finds and deletes jobs, so this one is made now).
    create_job(shared_node, "after", SMALL, goal=4)
    run_round(shared_node, "after", SMALL, 4, 1)
    shared_node.assert_all_slots_free("after")
