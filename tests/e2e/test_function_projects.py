"""A project from nothing to a folded update, by the wheel in an environment that does not know the repository."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from tests.conftest import ROOT
from tests.e2e.node_harness import MARK, Watch

pytestmark = pytest.mark.timeout(240)

_STEP_S = 120


class Installed:
    """A virtual environment with the wheel, which borrows other packages, but not LIFL, from the tests' own."""

    def __init__(self, directory: Path) -> None:
        base = getattr(sys, "_base_executable", sys.executable)
        # bcc comes from the system's packages, as it does in the environment of the tests.
        make = [base, "-m", "venv", "--system-site-packages", "--without-pip", str(directory)]
        subprocess.run(make, check=True, timeout=_STEP_S)
        self.bin = directory / "bin"
        packages = next(directory.glob("lib/python*/site-packages"))
        # A .pth file adds directories; those that .pth files in these directories name are not followed, and the
        # one that leads to the repository is such a file.
        (packages / "borrowed.pth").write_text(
            f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n"
        )

    @property
    def environment(self) -> dict[str, str]:
        """The variables of its processes: nothing leads to the repository or to this user's settings."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if name in ("PATH", "TMPDIR", MARK, "XDG_RUNTIME_DIR")
        }
        own = {"PATH": f"{self.bin}:{kept['PATH']}", "HOME": str(self.bin.parent), "PYTHONDONTWRITEBYTECODE": "1"}
        own["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
        return kept | own

    def install(self, wheel: Path) -> None:
        pip = [sys.executable, "-m", "pip", "--python", str(self.bin / "python"), "--disable-pip-version-check"]
        arguments = ["install", "--quiet", "--no-deps", "--no-index", "--no-compile", str(wheel)]
        subprocess.run([*pip, *arguments], check=True, timeout=_STEP_S, env=self.environment)

    def run(self, *command: str, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
        result = subprocess.run(
            [str(self.bin / command[0]), *command[1:]],
            cwd=cwd,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=_STEP_S,
            check=False,
        )
        assert result.returncode == code, f"{command}: {result.stdout}\n{result.stderr}"
        return result

    @contextmanager
    def node(self, project: Path) -> Iterator[dict[str, Any]]:
        """`func run` in a project, and what it says of where it listens."""
        command = [str(self.bin / "func"), "run", "--address", "127.0.0.1:0", "--data-plane", "unix", "-o", "json"]
        process = subprocess.Popen(command, cwd=project, env=self.environment, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            yield json.loads(process.stdout.readline())
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 130
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(30)
            process.stdout.close()


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    directory = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(directory)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, timeout=_STEP_S)
    environment = Installed(directory / "environment")
    environment.install(next(directory.glob("*.whl")))
    return environment


def model(seed: int) -> dict[str, np.ndarray[Any, Any]]:
    random = np.random.default_rng(seed)
    return {"a": random.normal(size=(30, 40)).astype(np.float32), "b": random.normal(size=17).astype(np.float32)}


def test_nothing_that_is_installed_lies_in_the_repository(installed: Installed, tmp_path: Path) -> None:
    program = (
        "import json, sys, lifl, lifl.cli, lifl_gateway, lifl_ebpf, lifl_knative, lifl.templates;"
        "from importlib.metadata import distribution;"
        "paths = [getattr(module, '__file__', None) or '' for module in sys.modules.values()];"
        "print(json.dumps([paths, str(distribution('lifl').locate_file('')), sys.path]))"
    )
    files, distribution, path = json.loads(installed.run("python", "-c", program, cwd=tmp_path).stdout)

    environment = installed.bin.parent
    borrowed = Path(sysconfig.get_path("purelib"))
    assert Path(distribution).is_relative_to(environment)
    assert [file for file in files if "/lifl" in file and not Path(file).is_relative_to(environment)] == []
    in_repository = [file for file in (*files, *path) if file and Path(file).is_relative_to(ROOT)]
    assert [file for file in in_repository if not Path(file).is_relative_to(borrowed)] == []


@pytest.mark.parametrize("template", ["fedavg", "median"])
def test_a_new_project_passes_its_own_tests(installed: Installed, tmp_path: Path, template: str) -> None:
    created = installed.run("func", "create", "-t", template, "mean", cwd=tmp_path)
    assert created.stderr == f"Created python function in {tmp_path / 'mean'}\n"

    result = installed.run("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=tmp_path / "mean")

    assert " passed" in result.stdout
    assert "skipped" not in result.stdout


def test_its_tests_notice_a_function_whose_result_depends_on_the_tree(
    installed: Installed, tmp_path: Path
) -> None:
    installed.run("func", "create", "mean", cwd=tmp_path)
    function = tmp_path / "mean/function/mean.py"
    counted = function.read_text().replace("weight=update.num_samples", "weight=next(POSITION)")
    function.write_text(f"{counted}\n\nimport itertools\n\nPOSITION = itertools.count(1.0)\n")

    result = installed.run("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=tmp_path / "mean", code=1)

    assert "tests/test_any_tree.py::test_every_tree_makes_the_same_model" in result.stdout


def test_a_new_project_runs_with_its_environment_and_folds_updates(installed: Installed, tmp_path: Path) -> None:
    installed.run("func", "create", "mean", cwd=tmp_path)
    project = tmp_path / "mean"
    installed.run("func", "config", "envs", "add", "--name", "POWER", "--value", "2", cwd=project)
    function = project / "function/mean.py"
    powered = function.read_text().replace(
        "update.num_samples", 'update.num_samples ** float(os.environ["POWER"])'
    )
    function.write_text(f"{powered}\n\nimport os\n")
    for seed in range(3):
        safetensors.numpy.save_file(model(seed), project / f"{seed}.safetensors")

    with Watch(), installed.node(project) as node:
        first = ["func", "invoke", "--create", "--goal", "2", "--file", "1.safetensors", "--samples", "1"]
        assert json.loads(installed.run(*first, "-o", "json", cwd=project).stdout)["status"] == "accepted"
        second = ["func", "invoke", "--file", "2.safetensors", "--samples", "3", "-o", "json"]
        assert json.loads(installed.run(*second, cwd=project).stdout)["status"] == "accepted"
        fetch = (
            "import sys; from lifl import Client\n"
            "with Client(sys.argv[1], 'mean', 'reader') as client:\n"
            "    model = client.wait_for_round(after=1, timeout=20)\n"
            "    open('model', 'wb').write(model.data)"
        )
        installed.run("python", "-c", fetch, f"http://{node['address']}", cwd=project)

    result = safetensors.numpy.load_file(project / "model")
    for name, tensor in model(1).items():
        np.testing.assert_allclose(result[name], (tensor + 9 * model(2)[name]) / 10, rtol=1e-6, atol=1e-7)
