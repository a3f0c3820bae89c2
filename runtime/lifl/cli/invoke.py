"""`func invoke`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from lifl.cli.common import (
    CommandError,
    find_node,
    node_options,
    note,
    output_option,
    print_json,
    program,
    read_token,
)
from lifl.errors import InvalidModel, InvalidProject, Refused, Unavailable

if TYPE_CHECKING:
    from lifl.client import Client

_NOISE = 0.01
"""Standard deviation of what --random adds to each weight of the global model."""


@click.command("invoke")
@click.option("-j", "--job", envvar="FUNC_JOB", help="Job to send to. [default: the project's name]")
@click.option(
    "-f",
    "--file",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="The update: a safetensors file with the job's tensors.",
)
@click.option("--random", is_flag=True, help="Send the job's global model with some noise as the update.")
@click.option("--client", metavar="ID", help="Client to send as. [default: a new one each time]")
@click.option("--samples", type=click.FloatRange(min=0, min_open=True), default=1.0, help="Weight of the update.")
@click.option("--round", "round_number", type=click.IntRange(min=1), help="Round. [default: the open one]")
@click.option("--create", is_flag=True, help="Make the job first, with --file as its initial model.")
@click.option(
    "--goal", type=click.IntRange(min=1), default=1, show_default=True, help="Updates of a round, for --create."
)
@click.option("--function", "function_name", help="For --create. [default: the project's function]")
@node_options
@output_option
def command(
    job: str | None,
    file: Path | None,
    random: bool,
    client: str | None,
    samples: float,
    round_number: int | None,
    create: bool,
    goal: int,
    function_name: str | None,
    url: str | None,
    token_file: Path | None,
    path: Path,
    state_directory: Path | None,
    output: str,
) -> int:
    """Send a model update to a job, and print what became of it.

    The exit code is 1 if the update came late.

    \b
    Examples:
      func invoke --create --file model.safetensors        # a new job, and a first update
      func invoke --random --samples 120
      func invoke --job digits --file update.safetensors --client hospital-3 --round 7
    """
    if not file and not random:
        raise CommandError(
            "nothing to send",
            [
                (f"{program()} invoke --file model.safetensors", "send a file"),
                (f"{program()} invoke --random", "send the global model with some noise"),
            ],
        )
    if create and not file:
        raise CommandError(
            "a new job needs an initial model",
            [(f"{program()} invoke --create --file model.safetensors", "make it from a file")],
        )
    if file and random and not create:
        raise CommandError("--file and --random together need --create: the file is then the initial model")

    from lifl.project import load_project

    if job is None or (create and function_name is None):
        try:
            project = load_project(path)
        except InvalidProject as error:
            missing = "--job" if job is None else "--function"
            raise CommandError(
                f"{missing} is not given, and the project does not tell: {error}",
                [(f"{program()} status", "the jobs that exist")],
            ) from None
        job, function_name = job or project.name, function_name or project.function

    import uuid

    from lifl.client import Client

    client = client or f"func-{uuid.uuid4().hex[:12]}"
    content = _read(file) if file else b""
    node = find_node(url, path, state_directory)
    try:
        with Client(node, job, client, token=read_token(token_file), retries=2) as link:
            if create:
                assert function_name is not None
                _create(link, function_name, goal, content)
            number = round_number or _open_round(link)
            update = _randomised(bytearray(link.fetch_model().data)) if random else content
            submission = link.submit(update, num_samples=samples, round=number)
    except Unavailable as error:
        if url is None and (namespace := _deployed_in(path)):
            raise CommandError(f"{error}. The function is deployed in namespace '{namespace}'", _REMOTE) from None
        raise
    if output == "json":
        reply = {"job": job, "client": client, "status": submission.status, "round": submission.round}
        print_json(reply)
    elif submission.status == "late":
        click.echo(f"late: round {number} of job {job} is over; round {submission.round} is open")
    else:
        click.echo(f"{submission.status}: round {submission.round} of job {job}, client {client}")
    return 1 if submission.status == "late" else 0


_REMOTE = (
    ("kubectl -n lifl-system port-forward service/lifl-gateway 8080", "reach the cluster's gateways from here"),
    ("func invoke --url http://127.0.0.1:8080 --token-file FILE ...", "and send to them"),
    ("func run", "or run the function on this machine"),
)


def _deployed_in(path: Path) -> str | None:
    """Namespace in which func.yaml says that the function runs; None if it does not say, or cannot be read."""
    from lifl.project import load_project

    try:
        return load_project(path).config.deploy.namespace
    except InvalidProject:
        return None


def _read(file: Path) -> bytes:
    from lifl.tensors import split

    try:
        content = file.read_bytes()
    except OSError as error:
        raise CommandError(f"'{file}' cannot be read: {error.strerror}") from None
    try:
        split(content)
    except InvalidModel as error:
        raise CommandError(f"'{file}' is no safetensors file: {error}") from None
    return content


def _create(link: Client, function: str, goal: int, model: bytes) -> None:
    """Make the job and give it its model, unless it is there already."""
    state = link.create_job(function=function, goal=goal)
    if state.get("round"):
        note(f"Job {link.job} is there already, in round {state['round']}")
        return
    state = link.upload_model(model)
    note(f"Job {link.job} created: function {function}, goal {goal}, round {state.get('round', 1)} open")


def _open_round(link: Client) -> int:
    number = link.round()
    if number == 0:
        raise Refused(409, "No round is open", f"job {link.job} has no model yet")
    return number


def _randomised(data: bytearray) -> bytearray:
    """Add noise to every floating-point tensor of safetensors bytes, in place."""
    import numpy as np

    from lifl.tensors import NUMPY_DTYPES, bfloat16_to_float32, float32_to_bfloat16, split

    layout, payload = split(data)
    start = len(data) - len(payload)
    del payload
    generator = np.random.default_rng()
    for spec in layout.tensors:
        if spec.dtype == "BF16":
            bits = np.frombuffer(data, np.uint16, spec.count, start + spec.offset)
            noise = generator.standard_normal(spec.count, np.float32) * np.float32(_NOISE)
            bits[:] = float32_to_bfloat16(bfloat16_to_float32(bits) + noise)
        elif spec.dtype in ("F16", "F32", "F64"):
            values = np.frombuffer(data, NUMPY_DTYPES[spec.dtype], spec.count, start + spec.offset)
            values += (generator.standard_normal(spec.count, np.float32) * _NOISE).astype(values.dtype)
    return data
