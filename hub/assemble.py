"""Assemble the operators as a kernel for the Kernel Hub of Hugging Face, which models load without this package.

    python hub/assemble.py build/hub

The folder gets the sources for kernel-builder (build.toml, flake.nix, csrc, torch-ext), and in build/ a variant for
this machine, to be tried with `kernels.get_local_kernel`: it has the library of the package, as it is built. Sources
are those of the package. Python files get relative imports, and the operators by the names that a build gives them.
"""

import argparse
import hashlib
import json
import platform
import re
import shutil
from pathlib import Path
from string import Template

import torch

from sinkattn import build_info

HUB = Path(__file__).parent
PACKAGE, CSRC = HUB.parent / "sinkattn", HUB.parent / "csrc"
PARTS = ("argument_checks.py", "attention_arguments.py", "reference.py", "ring_cache.py", "rope.py", "kernels", "ops")
# As in setup.py; kernel-builder chooses the standard, and sets what it needs for a library.
CXX_FLAGS = ["-O3", "-fvisibility=hidden", "-ffp-contract=off"]
CUDA_FLAGS = ["-O3", "--fmad=false"]


def assemble(folder: Path) -> Path:
    """Write the folder anew; returns the variant for this machine. Raises FileExistsError for a folder of others."""
    if folder.exists():
        if not (folder / "build.toml").is_file():
            raise FileExistsError(f"folder: expected a new one, or one that this script has written, got {folder}")
        shutil.rmtree(folder)
    (folder / "csrc").mkdir(parents=True)
    sources = [path for path in sorted(CSRC.iterdir()) if path.name != "bindings.cpp"]  # pybind11, of the package alone
    for path in sources:
        shutil.copy(path, folder / "csrc")
    (folder / "build.toml").write_text(_build_toml([f"csrc/{path.name}" for path in sources]))
    for name in ("CARD.md", "flake.nix"):
        shutil.copy(HUB / name, folder)
    python = folder / "torch-ext" / "sinkattn"
    for part in PARTS:
        for path in sorted((PACKAGE / part).glob("*.py")) or [PACKAGE / part]:
            name = path.relative_to(PACKAGE)
            (python / name).parent.mkdir(parents=True, exist_ok=True)
            (python / name).write_text(_for_the_hub(path.read_text(), name))
    shutil.copytree(HUB / "torch-ext", folder / "torch-ext", dirs_exist_ok=True)
    return _variant(folder / "build", python)


def _build_toml(sources: list[str]) -> str:
    cpu_sources = [name for name in sources if not name.endswith((".cu", ".cuh"))]
    lists = {"cpu_sources": cpu_sources, "cuda_sources": sources, "cxx_flags": CXX_FLAGS, "cuda_flags": CUDA_FLAGS}
    filled = {name: json.dumps(each, indent=2) for name, each in lists.items()}
    return Template((HUB / "build.toml.in").read_text()).substitute(filled, abi=build_info()["torch_abi_target"])


def _for_the_hub(text: str, name: Path) -> str:
    """A file of the package with relative imports, and the operators of ``_ops``, which are of this build alone."""
    dots = "." * len(name.parts)
    text = re.sub(r"^import sinkattn\.ops\.library .*\n", "", text, flags=re.MULTILINE)
    text = re.sub(r"\bfrom sinkattn(?:\.([\w.]+))? import", lambda found: f"from {dots}{found[1] or ''} import", text)
    text, num_names = re.subn(r'"sinkattn::(\w+)"', r'add_op_namespace_prefix("\1")', text)
    text, num_uses = re.subn(r"\btorch\.ops\.sinkattn\.(?=\w)", "ops.", text)
    if num_names or num_uses:
        text = text.replace(
            "import torch\n", f"import torch\n\nfrom {dots}_ops import add_op_namespace_prefix, ops\n", 1
        )
    if left := re.search(r"^\s*(?:import|from) sinkattn.*", text, re.MULTILINE):
        raise ValueError(f"{name}: expected `from sinkattn... import ...`, got {left[0]!r}")
    return text


def _variant(folder: Path, python: Path) -> Path:
    """A variant with the library of the package, in the form that kernel-builder gives to its own."""
    info = build_info()
    abi, cuda = str(info["torch_abi_target"]).replace(".", ""), str(info["cuda_toolkit"]).replace(".", "")
    # With a torch for the CPU alone, `kernels` takes only a variant for it, and the CUDA part of the library rests.
    is_for_cuda = bool(info["cuda"] and torch.version.cuda)
    backend = f"cu{cuda}" if is_for_cuda else "cpu"
    variant = folder / f"torch-stable-abi{abi}-{backend}-{platform.machine()}-{platform.system().lower()}"
    shutil.copytree(python, variant)
    shutil.copy(HUB / "variant" / "_ops.py", variant)
    shutil.copy(PACKAGE / "_ops.abi3.so", variant / "_sinkattn.abi3.so")
    digest = hashlib.sha256()
    for path in sorted(variant.rglob("*.*")):
        digest.update(path.read_bytes())
    backend_type = "cuda" if is_for_cuda else "cpu"
    metadata = {
        "name": "sinkattn",
        "id": f"_sinkattn_{backend_type}_{digest.hexdigest()[:7]}",  # the name of the module
        "version": 0,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend_type},
    }
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    return variant


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    print(f"{assemble(folder)}: try it with kernels.get_local_kernel({str(folder)!r})")


if __name__ == "__main__":
    main()
