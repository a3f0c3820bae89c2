"""Compiling Python files for an image, whose user may write nowhere near them.

Bytecode is checked against nothing when it is loaded: the files of an image do not change, and their times, by
which it is checked otherwise, are all the same.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

_COMPILE = """
import json, py_compile, sys
for source, shown, target in json.load(sys.stdin):
    try:
        py_compile.compile(source, target, shown, True,
                           invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH, quiet=2)
    except (py_compile.PyCompileError, UnicodeDecodeError, OSError):
        pass
"""


def compile_files(python: Path, tag: str, files: Mapping[str, Path], directory: Path) -> dict[str, Path]:
    """Compile the `.py` files among `files` (path in the image to file here) into `directory`.

    `python` is an interpreter of this machine of the image's version, `tag` its cache tag, such as cpython-311.
    Returns the path in the image of each file of bytecode and where it lies here; what is no valid Python is left
    out, as templates are. The order and the seed of hashes are fixed, so that the same comes out again.
    """
    work = []
    compiled: dict[str, Path] = {}
    for number, (path, file) in enumerate(sorted(files.items())):
        if path.endswith(".py") and not file.is_symlink():
            pure = PurePosixPath(path)
            target = directory / f"{number}.pyc"
            work.append((str(file), path, str(target)))
            compiled[str(pure.parent / "__pycache__" / f"{pure.stem}.{tag}.pyc")] = target
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    subprocess.run(
        [python, "-S", "-c", _COMPILE],
        input=json.dumps(work).encode(),
        env=environment | {"PYTHONHASHSEED": "0"},
        check=True,
    )
    return {path: file for path, file in compiled.items() if file.exists()}
