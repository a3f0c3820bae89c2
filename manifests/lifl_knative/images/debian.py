"""A base image made of the Debian packages that this machine has: no registry and no network is asked.

It holds what `python3` needs and nothing else: no shell, no package manager, no compiler. Of each package it has
the files, not what the package's scripts make at installation; the few of those that matter are made here.
"""

from __future__ import annotations

import fnmatch
import hashlib
import re
import shutil
import stat
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lifl.cli.common import CommandError, program

from lifl_knative.images.archive import Archive
from lifl_knative.images.bytecode import compile_files
from lifl_knative.images.image_python import SYSTEM_PYTHON, ImagePython

FUNCTION_USER = 65532
NODE_USER = 65533

FUNCTION_PACKAGES = ("base-files", "python3", "libstdc++6", "ca-certificates")
"""What a function's base is made of, with all that they depend on; numpy's wheel wants libstdc++."""
NODE_PACKAGES = (*FUNCTION_PACKAGES, "python3-bpfcc")

_FORMAT = "1"
"""Changes when the same packages make another base."""

# For a package's scripts, or data that nothing here reads.
_LEFT_OUT = frozenset(
    {
        "cdebconf",
        "debconf",
        "dpkg",
        "install-info",
        "libdebuginfod-common",
        "mawk",
        "media-types",
        "mime-support",
        "openssl",
        "perl-base",
        "readline-common",
        "tar",
        "tzdata",
    }
)
# Files by their path in the image. What is kept comes before what is dropped.
_KEPT = (
    "/usr/share/doc/*/copyright",
    "/usr/share/ca-certificates/*",
    "/usr/bin/python3*",
    "/etc/debian_version",
    "/etc/os-release",
    "/etc/netconfig",
)
_DROPPED = (
    "/usr/bin/*",
    "/usr/sbin/*",
    "/usr/games/*",
    "/etc/*",
    "/usr/share/*",
    "/usr/include/*",
    "/usr/lib/*/gconv/*",  # Python has codecs of its own
    "/usr/lib/*/perl*/*",
    "/usr/lib/valgrind/*",
    "/usr/lib/python3*/test/*",
    "/usr/lib/python3*/idlelib/*",
    "/usr/lib/python3*/tkinter/*",
    "/usr/lib/python3*/turtledemo/*",
    "/usr/lib/python3*/lib2to3/*",
    "/usr/lib/python3*/ensurepip/*",
    "/usr/lib/python3*/pydoc_data/*",
    "/usr/lib/python3*/config-*/*",
    "*.a",
    "/var/*",
    "/root/*",
    "/lib/systemd/*",
)
_MERGED = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
_BUNDLE = "/etc/ssl/certs/ca-certificates.crt"


@dataclass(frozen=True)
class Package:
    """A package as dpkg has it installed."""

    name: str
    architecture: str
    version: str
    provides: tuple[str, ...]
    depends: tuple[tuple[str, ...], ...]
    """Groups of alternatives, of which one is needed each; versions are dpkg's concern."""


def is_debian() -> bool:
    """Whether this machine can make such a base."""
    return shutil.which("dpkg-query") is not None and SYSTEM_PYTHON.exists()


def find_packages(wanted: Iterable[str]) -> list[Package]:
    """The packages `wanted` with all they depend on, sorted by name. Raises CommandError if one is missing."""
    if not is_debian():
        raise CommandError(
            "this machine has no Debian packages to make a base image of",
            [(f"{program()} build --base-image python:3.12-slim", "a base from a registry")],
        )
    installed = _installed()
    missing = [name for name in wanted if name not in installed]
    if missing:
        raise CommandError(
            f"the base image needs packages that are not installed here: {', '.join(missing)}",
            [
                (f"sudo apt-get install {' '.join(missing)}", "install them"),
                (f"{program()} build --base-image IMAGE", "a base from a registry that has them"),
            ],
        )
    return closure(wanted, installed)


def closure(wanted: Iterable[str], installed: Mapping[str, Package]) -> list[Package]:
    """All of `installed` that `wanted` needs, sorted by name; a name may be one that a package provides."""
    providers = {name: package for package in installed.values() for name in package.provides}
    found: dict[str, Package] = {}
    todo = list(wanted)
    while todo:
        package = installed.get(name := todo.pop()) or providers.get(name)
        if package is None or package.name in found or package.name in _LEFT_OUT:
            continue
        found[package.name] = package
        for alternatives in package.depends:
            here = [name for name in alternatives if name in installed or name in providers]
            todo += here[:1]
    return [found[name] for name in sorted(found)]


def _installed() -> dict[str, Package]:
    fields = ("Package", "Architecture", "Version", "Provides", "Pre-Depends", "Depends", "db:Status-Status")
    form = "\\t".join(f"${{{field}}}" for field in fields) + "\\n"
    output = _dpkg_query("--show", f"--showformat={form}")
    packages: dict[str, Package] = {}
    for line in output.splitlines():
        name, architecture, version, provides, before, depends, status = line.split("\t")
        if status == "installed":
            groups = tuple(_names(group) for group in f"{before},{depends}".split(","))
            provided = tuple(name for item in provides.split(",") for name in _names(item))
            packages.setdefault(name, Package(name, architecture, version, provided, groups))
    return packages


def _names(alternatives: str) -> tuple[str, ...]:
    """Names of `a (>= 1) | b:any`."""
    found = (re.match(r"[a-z0-9][-a-z0-9+.]*", item.strip()) for item in alternatives.split("|"))
    return tuple(match.group() for match in found if match)


def _dpkg_query(*arguments: str) -> str:
    return subprocess.run(["dpkg-query", *arguments], capture_output=True, check=True, text=True).stdout


def key_of(packages: Iterable[Package]) -> str:
    """A hash of what a base made of these packages contains."""
    text = "\n".join([_FORMAT, *(f"{each.name}:{each.architecture}={each.version}" for each in packages)])
    return hashlib.sha256(text.encode()).hexdigest()


# --- the root file system ------------------------------------------------------------------------------------


def write_base(
    packages: list[Package], python: ImagePython, archive_file: Path, work: Path, *, node: bool
) -> None:
    """Write the root file system as a tar archive; `work` is an empty directory for what is made meanwhile."""
    with Archive(archive_file) as archive:
        files = _files_of(packages)
        for path, file in files.items():
            archive.add_file(path, file)
        for path, file in compile_files(SYSTEM_PYTHON, python.cache_tag, files, work).items():
            archive.add_file(path, file)
        if node:
            archive.add_file("/usr/bin/test", Path("/usr/bin/test"))  # the agent's readiness is asked with it
        _add_directories(archive)
        _add_accounts(archive)
        _add_certificates(archive, files)
        archive.add_bytes("/var/lib/dpkg/status", _status_of(packages))


def _files_of(packages: Iterable[Package]) -> dict[str, Path]:
    """Path in the image and file here of all that is kept."""
    names = [f"{package.name}:{package.architecture}" for package in packages]
    files: dict[str, Path] = {}
    for line in _dpkg_query("--listfiles", *names).splitlines():
        listed = Path(line)
        if not line.startswith("/"):
            continue
        # Packages still say /lib where the file system says /usr/lib.
        path = str(listed.parent.resolve() / listed.name)
        if path in files or not _is_kept(path):
            continue
        try:
            mode = listed.lstat().st_mode
        except OSError:
            continue  # removed by whoever keeps this machine small
        if stat.S_ISREG(mode) or (stat.S_ISLNK(mode) and path.removeprefix("/") not in _MERGED):
            files[path] = listed
    return files


def _is_kept(path: str) -> bool:
    if any(fnmatch.fnmatchcase(path, pattern) for pattern in _KEPT):
        return True
    return not any(fnmatch.fnmatchcase(path, pattern) for pattern in _DROPPED)


def _add_directories(archive: Archive) -> None:
    for name in _MERGED:
        link = Path("/", name)
        if link.is_symlink():
            archive.add_link(str(link), link.readlink().as_posix())
    for path in ("/dev", "/proc", "/sys", "/run", "/etc", "/var/lib"):
        archive.add_directory(path)
    for path in ("/tmp", "/var/tmp"):  # noqa: S108 (in the image)
        archive.add_directory(path, 0o1777)
    archive.add_link("/var/run", "/run")


def _add_accounts(archive: Archive) -> None:
    accounts = {"root": 0, "function": FUNCTION_USER, "lifl": NODE_USER, "nobody": 65534}
    users = "".join(
        f"{name}:x:{number}:{number}:{name}:/tmp:/usr/sbin/nologin\n" for name, number in accounts.items()
    )
    groups = "".join(f"{name}:x:{number}:\n" for name, number in accounts.items())
    archive.add_bytes("/etc/passwd", users.encode())
    archive.add_bytes("/etc/group", groups.encode())
    archive.add_bytes("/etc/nsswitch.conf", b"passwd: files\ngroup: files\nhosts: files dns\n")


def _add_certificates(archive: Archive, files: Mapping[str, Path]) -> None:
    """The bundle of authorities as Debian has it, without any that were added to this machine."""
    authorities = sorted(path for path in files if path.startswith("/usr/share/ca-certificates/"))
    bundle = b"".join(files[path].read_bytes().rstrip() + b"\n" for path in authorities)
    archive.add_bytes(_BUNDLE, bundle)
    archive.add_link("/usr/lib/ssl/cert.pem", _BUNDLE)


def _status_of(packages: Iterable[Package]) -> bytes:
    """dpkg's own description of the packages, which is where scanners for vulnerabilities look."""
    names = [f"{package.name}:{package.architecture}" for package in packages]
    stanzas = _dpkg_query("--status", *names).strip().split("\n\n")
    return ("\n\n".join(sorted(stanzas)) + "\n").encode()
