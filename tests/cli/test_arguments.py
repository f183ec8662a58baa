"""What commands load for their arguments."""

import io
import sys

from sinkattn.cli.arguments import open_text
from sinkattn.evaluate.text import Pipe, StandardLibrary


def test_open_text_by_name(tmp_path):
    file = tmp_path / "long.txt"
    file.write_text("one line\n", encoding="utf-8")
    assert isinstance(open_text(None, sys.stdin), StandardLibrary)
    assert isinstance(open_text("-", io.StringIO("a")), Pipe)
    assert open_text(str(file), sys.stdin).path == file
