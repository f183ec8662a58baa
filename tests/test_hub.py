"""The operators as a kernel of the Kernel Hub: loaded from a folder, in a process that has no package sinkattn."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import hub_process
import pytest
import torch
from factories import make_qkv, make_rope

import sinkattn

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def assembler():
    spec = importlib.util.spec_from_file_location("hub_assemble", ROOT / "hub" / "assemble.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def variant(assembler, tmp_path_factory):
    return assembler.assemble(tmp_path_factory.mktemp("hub") / "sinkattn")


@pytest.mark.parametrize("loader", ["by_hand", "by_kernels"])
def test_the_kernel_computes_what_the_package_computes(variant, loader, tmp_path):
    if loader == "by_kernels":
        pytest.importorskip("kernels.load")
    inputs, inv_freq = make_qkv(hub_process.NUM_TOKENS), make_rope().inv_freq
    torch.save((inputs, inv_freq), tmp_path / "tensors.pt")
    arguments = [loader, str(variant), str(tmp_path / "tensors.pt")]
    done = subprocess.run(
        [sys.executable, hub_process.__file__, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "tensors.pt")
    expected = hub_process.results(sinkattn, sinkattn.sink_attention, inputs, inv_freq)
    assert all(map(torch.equal, found, expected))
    assert len(found) == len(expected) == len(hub_process.CALLS) + 6
    specified = hub_process.results(sinkattn, sinkattn.reference.sink_attention, inputs, inv_freq)
    for x, y in zip(found, specified, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    # In the same process then the package, with the same namespace.
    assert "torch.ops.sinkattn is taken already, by a kernel" in done.stdout


def test_beside_the_package_the_kernel_is_refused(variant):
    with pytest.raises(ImportError, match="taken already, by the package sinkattn or by another copy of this kernel"):
        hub_process.load_by_hand(variant)


def test_the_folder_has_what_kernel_builder_needs(variant):
    tomllib = pytest.importorskip("tomllib")
    folder = variant.parents[1]
    build = tomllib.loads((folder / "build.toml").read_text())
    sources = {*build["torch"]["src"], *build["kernel"]["cpu"]["src"], *build["kernel"]["cuda"]["src"]}
    there = {path.relative_to(folder).as_posix() for path in folder.glob("*/*") if path.suffix in (".cpp", ".h", ".cu")}
    assert there | {"csrc/ring_cache_kernels.cuh"} == sources
    assert not [name for name in build["kernel"]["cpu"]["src"] if ".cu" in name]
    assert variant.name.startswith("torch-stable-abi210-")
    kernels = pytest.importorskip("kernels._rust")
    kernels.Build.open(folder)  # refuses what it does not know


def test_the_card_shows_what_runs():
    [code] = re.findall("```python\n(.*?)```", (ROOT / "hub" / "CARD.md").read_text(), re.DOTALL)
    namespace = {"sinkattn": sinkattn}
    exec("import torch\n" + code.partition("is on the Hub\n")[2], namespace)
    assert namespace["out"].shape == (1, 8, 3, 64)
    assert namespace["ring"].seen.tolist() == [3]


def test_the_sizes_of_a_ring_are_those_of_the_package():
    source = (ROOT / "hub" / "torch-ext" / "sinkattn" / "ops" / "library.py").read_text()
    namespace = {}
    exec(source.replace("from .._ops import add_op_namespace_prefix\n", ""), namespace)
    for sizes in ((0, 1), (4, 1020, 64)):
        ours, theirs = sinkattn.RingLayout(*sizes), namespace["RingLayout"](*sizes)
        assert (ours.ring, ours.slots) == (theirs.ring, theirs.slots)
    for sizes in ((-1, 1), (0, 0), (0, 1, -1)):
        with pytest.raises(ValueError, match=": expected "):
            namespace["RingLayout"](*sizes)


def test_the_folder_of_someone_else_is_left_alone(assembler, variant, tmp_path):
    (tmp_path / "letter.txt").write_text("Dear")
    with pytest.raises(FileExistsError, match="folder: expected a new one"):
        assembler.assemble(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]
    assert assembler.assemble(variant.parents[1]) == variant


def test_an_import_that_cannot_be_rewritten_is_refused(assembler):
    rewritten = assembler._for_the_hub(
        "from sinkattn.ops.checks import x\nfrom sinkattn import rope\n", Path("ops/a.py")
    )
    assert rewritten == "from ..ops.checks import x\nfrom .. import rope\n"
    with pytest.raises(ValueError, match="got 'import sinkattn"):
        assembler._for_the_hub("import sinkattn.rope\n", Path("ops/a.py"))
