"""What ``make wheels`` built. ``make test-wheels`` runs these tests, in an environment that has the wheel."""

import email
import os
import re
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.metadata import Metadata
from packaging.utils import parse_sdist_filename, parse_wheel_filename

import sinkattn

ROOT = Path(__file__).parents[1]
DIST = os.environ.get("SINKATTN_DIST", "")
VERSION = sinkattn.__version__

pytestmark = pytest.mark.skipif(not DIST, reason="`make test-wheels` runs it")


def files_in(*folders: str) -> set[str]:
    """Files of the source tree that are neither compiled nor written by a tool."""
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    paths = [path for path in paths if path.suffix not in (".so", ".pyc")]
    return {str(path.relative_to(ROOT)) for path in paths}


@pytest.fixture(scope="module")
def wheel():
    (path,) = Path(DIST).glob(f"sinkattn-{VERSION}-{sys.implementation.cache_tag.replace('cpython-', 'cp')}-*.whl")
    with zipfile.ZipFile(path) as file:
        yield file


@pytest.fixture(scope="module")
def sdist():
    with tarfile.open(Path(DIST, f"sinkattn-{VERSION}.tar.gz")) as file:
        yield file


def test_imported_package_is_the_one_of_the_wheel(wheel):
    package = Path(sinkattn.__file__).parent
    assert package.is_relative_to(sys.prefix)
    libraries = [name for name in wheel.namelist() if name.endswith(".so")]
    assert len(libraries) == 2
    for name in libraries:
        assert (package.parent / name).read_bytes() == wheel.read(name)


def test_wheel_has_the_package_two_libraries_and_metadata(wheel):
    names = {name for name in wheel.namelist() if not name.endswith("/")}
    metadata = {name for name in names if name.startswith(f"sinkattn-{VERSION}.dist-info/")}
    libraries = {f"sinkattn/_C{sysconfig.get_config_var('EXT_SUFFIX')}", "sinkattn/_ops.abi3.so"}
    assert names - metadata == files_in("sinkattn") | libraries


def test_tag_names_a_manylinux_platform(wheel):
    """auditwheel gives that tag to a wheel whose libraries need nothing that such a platform lacks, except torch's."""
    (tag,) = parse_wheel_filename(Path(wheel.filename).name)[3]
    assert tag.interpreter == tag.abi
    assert tag.platform.startswith("manylinux_2_")


def test_source_distribution_has_what_the_build_and_the_tests_need(sdist):
    names = {member.name.partition("/")[2] for member in sdist if member.isfile()}
    written = {name for name in names if name.startswith("sinkattn.egg-info/")} | {"PKG-INFO", "setup.cfg"}
    alone = {"LICENSE", "MANIFEST.in", "README.md", "constraints.txt", "pyproject.toml", "setup.py"}
    assert names - written == files_in("sinkattn", "csrc", "tests") | alone
    assert parse_sdist_filename(Path(sdist.name).name)[0] == "sinkattn"


def test_metadata_is_valid_and_of_this_version(wheel, sdist):
    in_wheel = wheel.read(f"sinkattn-{VERSION}.dist-info/METADATA")
    in_sdist = sdist.extractfile(f"sinkattn-{VERSION}/PKG-INFO").read()
    for text in (in_wheel, in_sdist):
        metadata = Metadata.from_email(text, validate=True)
        assert str(metadata.version) == VERSION
        assert metadata.license_expression == "Apache-2.0"
    assert email.message_from_bytes(in_wheel).get_payload() == email.message_from_bytes(in_sdist).get_payload()


def test_no_time_or_process_of_the_build_is_in_the_files(wheel, sdist):
    """The same sources give the same bytes: times are SOURCE_DATE_EPOCH, names do not depend on temporary files."""
    assert len({member.date_time for member in wheel.infolist()}) == 1
    assert len({member.mtime for member in sdist}) == 1
    assert {(member.uid, member.gid, member.uname) for member in sdist} == {(0, 0, "")}
    operators = wheel.read("sinkattn/_ops.abi3.so")
    assert b"tmpxft" not in operators
    # nvcc writes "name of the file", "hash", and "process id" if there is no external definition to name.
    assert re.search(rb"_18_ring_cache_cuda_cu_[0-9a-f]{8}_\d", operators) is None
