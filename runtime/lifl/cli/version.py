"""`func version`."""

from __future__ import annotations

import click

from lifl.cli.common import output_option, print_json, print_yaml

_PACKAGES = (
    "click",
    "cloudevents",
    "flask",
    "kubernetes",
    "llvmlite",
    "msgspec",
    "numpy",
    "ruamel.yaml",
    "safetensors",
    "torch",
)


@click.command("version")
@click.option("-v", "--verbose", is_flag=True, help="Print the versions of what LIFL builds on, too.")
@output_option("human", "json", "yaml")
def command(verbose: bool, output: str) -> None:
    """Print the version.

    \b
    Examples:
      func version
      func version -v
      func version -o json
      func version -o yaml
    """
    import platform
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as version_of

    def find(package: str) -> str | None:
        try:
            return version_of(package)
        except PackageNotFoundError:
            return None

    from lifl.func_yaml.config import SPEC_VERSION

    facts = {"version": f"v{find('lifl') or '0.0.0'}", "func_yaml": SPEC_VERSION}
    if verbose or output != "human":
        facts |= {"python": platform.python_version(), "kernel": platform.release(), "machine": platform.machine()}
        facts |= {package: version for package in _PACKAGES if (version := find(package))}
    if output == "json":
        print_json(facts)
    elif output == "yaml":
        print_yaml(facts)
    elif verbose:
        width = max(map(len, facts))
        for name, value in facts.items():
            click.echo(f"{name:<{width}}  {value}")
    else:
        click.echo(facts["version"])
