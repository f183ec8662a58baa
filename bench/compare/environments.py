"""Virtual environments of the peers that need their own packages."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent

# attention_sinks needs a tokenizers whose wheels end there.
NEWEST_PYTHON = {"attention_sinks.txt": (3, 11)}
OLDEST_PYTHON = (3, 10)


class EnvironmentFailed(Exception):
    """A peer's environment cannot be made; the message is one line."""


def python_of(requirements: str | None, cache: Path) -> Path:
    """Interpreter of the environment with these packages, which is made first if there is none yet.

    Args:
        requirements: name of a file in this folder; None for the environment that runs this.
        cache: folder of the environments.

    Raises:
        EnvironmentFailed: if there is no suitable interpreter, or packages cannot be installed.
    """
    if requirements is None:
        return Path(sys.executable)
    packages = HERE / requirements
    digest = hashlib.sha256(packages.read_bytes()).hexdigest()[:12]
    folder = cache / "environments" / f"{packages.stem}-{digest}"
    python, ready = folder / "bin" / "python", folder / "ready"
    if not ready.is_file():
        print(f"compare: environment for {packages.stem}", file=sys.stderr, flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        _run(find_python(NEWEST_PYTHON.get(requirements, sys.version_info[:2])), "-m", "venv", str(folder))
        _run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", str(packages))
        ready.touch()
    return python


def find_python(newest: tuple[int, int]) -> Path:
    """An interpreter from 3.10 to ``newest``: this one, one on the path, or one of pyenv's or uv's."""
    if OLDEST_PYTHON <= sys.version_info[:2] <= newest:
        return Path(sys.executable)
    minors = range(newest[1], OLDEST_PYTHON[1] - 1, -1)
    found = [shutil.which(f"python3.{minor}") for minor in minors]
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    uv = Path(os.environ.get("UV_PYTHON_INSTALL_DIR", Path.home() / ".local/share/uv/python"))
    for minor in minors:
        found += [*pyenv.glob(f"3.{minor}.*/bin/python"), *uv.glob(f"cpython-3.{minor}.*/bin/python3")]
    # pyenv puts scripts on the path that may be of versions that are not selected.
    for python in filter(None, found):
        if subprocess.run([python, "-c", ""], capture_output=True, check=False).returncode == 0:
            return Path(python)
    raise EnvironmentFailed(f"needs Python 3.10 to {newest[0]}.{newest[1]}, and none was found")


def _run(*command: str | Path) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        errors = [line for line in result.stderr.splitlines() if re.match("error", line, re.IGNORECASE)]
        raise EnvironmentFailed(f"installation failed: {(errors or [f'status {result.returncode}'])[0]}")
