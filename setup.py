"""Builds the two compiled parts of sinkattn; everything else is declared in pyproject.toml.

    sinkattn._ops   the operators, LibTorch stable ABI (one binary for torch 2.10 and later), C++ and, with nvcc, CUDA
    sinkattn._C     slot arithmetic and build info, pybind11, no torch

SINKATTN_CUDA=0 leaves the CUDA part out, SINKATTN_CUDA=1 demands it; unset, it is built where a fitting nvcc is found.
CUDA_HOME, TORCH_CUDA_ARCH_LIST and MAX_JOBS have their usual meaning.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import ClassVar

from setuptools import Command, Extension, setup

try:
    import pybind11
    import torch
    from torch.utils import cpp_extension

    if torch.__version__ < (2, 10):
        raise ImportError(f"found torch {torch.__version__}")
except ImportError as error:
    sys.exit(
        f"sinkattn: the build needs torch (2.10 or later), pybind11 and ninja in this environment ({error}). "
        "Install them first (pip install 'torch>=2.10' 'setuptools>=77' 'pybind11>=2.13' ninja), then build against "
        "that torch: pip install --no-build-isolation -e ."
    )

CXX_FLAGS = ["-O3", "-std=c++17", "-g0", "-fvisibility=hidden", "-ffp-contract=off", "-Wall"]
# The names of temporary files end up in the library: random in /tmp, the same in every build beside the objects.
NVCC_FLAGS = ["-O3", "-std=c++17", "-Xcompiler=-fvisibility=hidden", "--fmad=false", "--objdir-as-tempdir"]


def cuda_toolkit() -> tuple[Path, tuple[int, int]] | None:
    """Directory and version of the toolkit to build the CUDA part with, or None to leave that part out."""
    wanted = os.environ.get("SINKATTN_CUDA", "")
    if wanted not in ("", "0", "1"):
        sys.exit(f"sinkattn: SINKATTN_CUDA: expected 0 or 1, got {wanted!r}")
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which(f"{home}/bin/nvcc" if home else "nvcc")
    # nvcc may be a link or a wrapper script; asked for a dry run, it tells where its toolkit is.
    answer = subprocess.getoutput(f"'{nvcc}' --version; '{nvcc}' --dryrun -E -x cu /dev/null") if nvcc else ""
    found = re.search(r"release (\d+)\.(\d+).*TOP=([^\n]+)", answer, re.DOTALL)
    version = (int(found[1]), int(found[2])) if found else (0, 0)
    # The CUDA runtime is linked in and may be older than torch's; a newer one may need a newer driver than torch does.
    fits_driver = torch.version.cuda is None or int(torch.version.cuda.split(".")[0]) >= version[0]
    if version >= (12, 0) and fits_driver and not torch.version.hip:
        return Path(found[3]).resolve(), version
    what = f"{nvcc} is of CUDA {version[0]}.{version[1]}" if nvcc else "there is no nvcc on PATH or in CUDA_HOME"
    problem = f"sinkattn: no CUDA toolkit that fits torch {torch.__version__}: {what}"
    if wanted == "1":
        sys.exit(problem)
    print(f"{problem}; building without CUDA", file=sys.stderr)
    return None


def extensions() -> list[Extension]:
    info = [("SINKATTN_TORCH_VERSION", f'"{torch.__version__}"'), ("SINKATTN_TORCH_ABI", '"2.10"')]
    sources = sorted(str(path) for path in Path("csrc").glob("*.cpp") if path.name != "bindings.cpp")
    cuda: dict[str, list[str]] = {}
    if toolkit := cuda_toolkit():
        home, version = toolkit
        # A CPU build of torch neither looks for the toolkit nor knows any architecture, and it lacks libraries that
        # CUDAExtension links: so CppExtension, with what CUDA needs said here.
        cpp_extension.CUDA_HOME = str(home)
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0+PTX" if version >= (12, 8) else "8.0;9.0+PTX")
        sources.append("csrc/ring_cache_cuda.cu")
        libraries = [f"{home}/{path}" for path in ("lib64", "lib", "targets/x86_64-linux/lib")]
        cuda = {"include_dirs": [f"{home}/include"], "library_dirs": libraries}
        cuda["libraries"] = ["cudart_static", "dl", "pthread", "rt"]
        info += [("SINKATTN_WITH_CUDA", None), ("SINKATTN_CUDA_TOOLKIT", '"{}.{}"'.format(*version))]
    info.append(("SINKATTN_COMPILER", "__VERSION__"))
    operators = {"sources": sources, "define_macros": [("TORCH_TARGET_VERSION", "0x020a000000000000")], **cuda}
    bindings = {"sources": ["csrc/bindings.cpp"], "define_macros": info, "include_dirs": [pybind11.get_include()]}
    headers = [str(path) for path in sorted([*Path("csrc").glob("*.h"), *Path("csrc").glob("*.cuh")])]
    common = {"depends": headers, "extra_compile_args": {"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS}, "language": "c++"}
    return [
        # The operators hold no Python symbol at all, hence the limited API.
        cpp_extension.CppExtension("sinkattn._ops", py_limited_api=True, **operators, **common),
        Extension("sinkattn._C", **bindings, **common),
    ]


class BuildExt(cpp_extension.BuildExtension):
    def build_extensions(self) -> None:
        # Objects are kept, so that an editable install, too, compiles only what has changed.
        self.build_temp = f"build/temp.{self.plat_name}-{sys.implementation.cache_tag}"
        super().build_extensions()


class Develop(Command):
    description = "editable install against the torch of this environment"
    user_options: ClassVar = [("uninstall", "u", "remove it")]

    def initialize_options(self) -> None:
        self.uninstall = False

    def finalize_options(self) -> None: ...

    def run(self) -> None:
        # In compat mode a clone's folder that is called sinkattn cannot hide the package from a script beside it.
        install = ["install", "--no-build-isolation", "--config-settings", "editable_mode=compat", "-e", "."]
        verb = ["uninstall", "-y", "sinkattn"] if self.uninstall else install
        subprocess.run([sys.executable, "-m", "pip", *verb], check=True)


# Torch looks for ninja on PATH, where an interpreter called by its path does not put its own scripts.
os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExt, "develop": Develop})
