"""What the build made: that it loads, says truly what it holds, and needs nothing unstable of torch."""

import ast
import importlib.metadata
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import sinkattn.ops
from sinkattn import _C

PACKAGE = Path(sinkattn.__file__).parent
ROOT = Path(__file__).parents[1]
OPERATORS = ("append_", "rollback_", "reorder_", "reset_", "linearise")


def has_kernel(operator: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"sinkattn::{operator}", key)


def undefined_symbols(library: Path) -> list[str]:
    if shutil.which("nm") is None:
        pytest.skip("needs nm")
    command = ["nm", "-D", "--undefined-only", str(library)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [line.split()[-1] for line in lines]


def test_both_modules_load():
    assert _C.RingLayout(4, 8).slots == 12
    assert all(hasattr(torch.ops.sinkattn, operator) for operator in OPERATORS)


def test_build_info_is_what_is_registered():
    info = sinkattn.build_info()
    assert re.fullmatch(r"\d+\.\d+\S*", info["torch_built_with"])
    assert re.fullmatch(r"\d+\.\d+", info["torch_abi_target"])
    assert info["compiler"]
    assert info["cuda"] == (info["cuda_toolkit"] is not None)
    assert has_kernel("sink_attention_", "CPU")
    assert has_kernel("linear", "CPU")
    for operator in OPERATORS:
        assert has_kernel(operator, "CPU")
        assert has_kernel(operator, "CUDA") == info["cuda"], operator


def test_operators_need_only_the_stable_abi_of_torch():
    """One binary serves several versions of torch, with or without CUDA, and any Python."""
    symbols = undefined_symbols(PACKAGE / "_ops.abi3.so")
    unstable = [name for name in symbols if re.match(r"_ZNK?S?t?(2at|3c10|5torch)|THP|_?Py|cuda|cu[A-Z]", name)]
    assert any(name.startswith("aoti_torch_") for name in symbols)
    assert unstable == []
    assert "aoti_torch_get_current_cuda_stream" not in symbols


def test_bindings_need_nothing_of_torch():
    (bindings,) = PACKAGE.glob("_C.*.so")
    assert [name for name in undefined_symbols(bindings) if "torch" in name] == []


def test_installed_version_is_the_package_version():
    try:
        installed = importlib.metadata.version("sinkattn")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("built in place, not installed")
    assert installed == sinkattn.__version__


def test_every_imported_package_is_a_requirement():
    required = {canonicalize_name(Requirement(line).name) for line in importlib.metadata.requires("sinkattn") or []}
    installed = importlib.metadata.packages_distributions()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for name in {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"sinkattn"}:
                distributions = {canonicalize_name(each) for each in installed.get(name, [name])}
                assert distributions & required, f"{path.relative_to(PACKAGE)} imports {name}"


@pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")
def test_setup_without_torch_says_what_to_do():
    code = "import runpy, sys; sys.modules['torch'] = None; sys.argv = ['', '--version']; runpy.run_path('setup.py')"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith("sinkattn: the build needs torch")
    assert "pip install --no-build-isolation" in result.stderr
    assert "Traceback" not in result.stderr
