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
        "Install them first (pip install 'torch>=2.10' pybind11 ninja), then build against that torch: "
        "pip install --no-build-isolation -e ."
    )

HEADERS = [str(path) for path in sorted(Path("csrc").glob("*.h"))]
FLAGS = {
    "cxx": ["-O3", "-std=c++17", "-g0", "-fvisibility=hidden", "-ffp-contract=off", "-Wall"],
    "nvcc": ["-O3", "-std=c++17", "-Xcompiler=-fvisibility=hidden", "--fmad=false"],
}


def cuda_toolkit() -> tuple[Path, tuple[int, int]] | None:
    """Directory and version of the toolkit to build the CUDA part with, or None to leave that part out."""
    wanted = os.environ.get("SINKATTN_CUDA", "")
    if wanted not in ("", "0", "1"):
        sys.exit(f"sinkattn: SINKATTN_CUDA: expected 0 or 1, got {wanted!r}")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which(f"{home}/bin/nvcc" if home else "nvcc")
    if wanted == "0" or (nvcc is None and wanted == ""):
        return None
    if nvcc is None:
        sys.exit("sinkattn: SINKATTN_CUDA=1, but there is no nvcc on PATH or in CUDA_HOME")
    # nvcc may be a link or a wrapper script; asked for a dry run, it tells where its toolkit is.
    command = f"'{nvcc}' --version; '{nvcc}' --dryrun -E -x cu {os.devnull} 2>&1"
    answer = subprocess.run(command, shell=True, capture_output=True, text=True).stdout
    found = re.search(r"release (\d+)\.(\d+).*TOP=([^\n]+)", answer, re.DOTALL)
    version = (int(found[1]), int(found[2])) if found else (0, 0)
    majors = {str(version[0]), (torch.version.cuda or str(version[0])).split(".")[0]}
    if version >= (12, 0) and len(majors) == 1 and not torch.version.hip:
        return Path(found[3]).resolve(), version
    problem = f"{nvcc} (CUDA {version[0]}.{version[1]}) does not fit torch {torch.__version__}"
    if wanted == "1":
        sys.exit(f"sinkattn: SINKATTN_CUDA=1, but {problem}")
    print(f"sinkattn: building without CUDA: {problem}", file=sys.stderr)
    return None


def extensions() -> list[Extension]:
    operators = cpp_extension.CppExtension(
        "sinkattn._ops", ["csrc/ops.cpp", "csrc/ring_cache.cpp"], depends=HEADERS, extra_compile_args=FLAGS
    )
    operators.define_macros = [("TORCH_TARGET_VERSION", "0x020a000000000000")]
    operators.py_limited_api = True  # it holds no Python symbol at all
    bindings = Extension("sinkattn._C", ["csrc/bindings.cpp"], depends=HEADERS, extra_compile_args=FLAGS, language="c++")
    bindings.include_dirs = [pybind11.get_include()]
    bindings.define_macros = [
        ("SINKATTN_TORCH_VERSION", f'"{torch.__version__}"'),
        ("SINKATTN_TORCH_ABI", '"2.10"'),
        ("SINKATTN_COMPILER", "__VERSION__"),
    ]
    if cuda := cuda_toolkit():
        home, version = cuda
        # A CPU build of torch neither looks for the toolkit nor knows any architecture. It lacks the libraries that
        # CUDAExtension links, too, so what that class adds is said here.
        cpp_extension.CUDA_HOME = str(home)
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0+PTX" if version >= (12, 8) else "8.0;9.0+PTX")
        operators.sources.append("csrc/ring_cache.cu")
        operators.include_dirs.append(f"{home}/include")
        operators.library_dirs += [str(path) for path in (home / "lib64", home / "lib", *home.glob("targets/*/lib"))]
        operators.libraries += ["cudart_static", "dl", "pthread", "rt"]
        bindings.define_macros += [("SINKATTN_WITH_CUDA", None), ("SINKATTN_CUDA_TOOLKIT", '"{}.{}"'.format(*version))]
    return [operators, bindings]


class BuildExt(cpp_extension.BuildExtension):
    def finalize_options(self) -> None:
        super().finalize_options()
        # Kept, so that an editable install, too, compiles only what has changed.
        self.build_temp = f"build/temp.{self.plat_name}-{sys.implementation.cache_tag}"

    def build_extensions(self) -> None:
        # ring_cache.cpp and ring_cache.cu would otherwise share one object file.
        names = self.compiler.object_filenames
        self.compiler.object_filenames = lambda sources, *args, **options: [
            name.removesuffix(".o") + Path(source).suffix + ".o"
            for source, name in zip(sources, names(sources, *args, **options), strict=True)
        ]
        super().build_extensions()


class Develop(Command):
    description = "editable install against the torch of this environment"
    user_options = (("uninstall", "u", "remove it"),)

    def initialize_options(self) -> None:
        self.uninstall = False

    def finalize_options(self) -> None: ...

    def run(self) -> None:
        verb = ["uninstall", "-y", "sinkattn"] if self.uninstall else ["install", "--no-build-isolation", "-e", "."]
        subprocess.run([sys.executable, "-m", "pip", *verb], check=True)


# Torch looks for ninja on PATH, where an interpreter called by its path does not put its own scripts.
os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExt, "develop": Develop})
