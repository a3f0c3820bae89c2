"""The gateway keeps to its own OpenAPI document: schemathesis makes requests of it and judges the answers."""

import subprocess
import sys
from pathlib import Path

from tests.integration.gateway_harness import Node

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


def test_the_gateway_keeps_to_its_openapi_document(tmp_path):
    (tmp_path / "schemathesis.toml").write_text(CONFIGURATION)
    node = Node(tmp_path)
    node.coordinator.release_at_once = True
    try:
        finished = subprocess.run(
            [
                *(
                    Path(sys.executable).with_name("schemathesis"),
                    "run",
                    f"{node.gateway.server.url}/openapi.json",
                ),
                *("--max-examples", "10", "--seed", "1", "--no-color", "--request-timeout", "20"),
            ],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        node.close()
    assert finished.returncode == 0, finished.stdout + finished.stderr
