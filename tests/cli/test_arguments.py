"""What commands load for their arguments."""

import argparse
import io
import sys

import pytest

from sinkattn.cli.arguments import new_folder, open_text
from sinkattn.cli.errors import UserError
from sinkattn.evaluate.text import Pipe, StandardLibrary


def test_open_text_by_name(tmp_path, monkeypatch):
    file = tmp_path / "long.txt"
    file.write_text("one line\n", encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", io.StringIO("a"))
    assert isinstance(open_text(None), StandardLibrary)
    assert isinstance(open_text("-"), Pipe)
    assert open_text(str(file)).path == file
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UserError, match="stdin is closed"):
        open_text("-")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "expected a new or empty folder, got ''"),
        ("full", "expected a new or empty folder, got 'full'"),
        ("file", "cannot write to file: .*file is no folder"),
        ("file/new", "cannot write to file/new: .*file is no folder"),
    ],
)
def test_a_folder_to_save_to_is_new_or_empty(name, message, tmp_path, monkeypatch):
    for folder in ("full", "empty", "current"):
        (tmp_path / folder).mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "full" / "a").touch()
    monkeypatch.chdir(tmp_path / "current")
    if name:
        monkeypatch.chdir(tmp_path)
    for good in (tmp_path / "empty", tmp_path / "new" / "folder"):
        assert new_folder(str(good)) == good
    assert not (tmp_path / "new").exists()
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        new_folder(name)
