"""What commands load for their arguments."""

import io
import sys

import pytest

from sinkattn.cli.arguments import check_folder, open_text
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
    [("file", "is no folder"), ("file/new", "file is no folder"), ("full", "expected a new or empty folder")],
)
def test_a_folder_to_save_to_is_new_or_empty(name, message, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    (tmp_path / "empty").mkdir()
    for each in (None, tmp_path / "empty", tmp_path / "new" / "folder"):
        check_folder(each)
    assert not (tmp_path / "new").exists()
    with pytest.raises(UserError, match=message):
        check_folder(tmp_path / name)
