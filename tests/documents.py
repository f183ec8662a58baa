"""The Markdown files of the documentation, and running the code in them."""

from __future__ import annotations

import ast
import contextlib
import io
import re
import shlex
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
SITE = sorted(file for file in DOCS.rglob("*.md") if file.parent.name != "real-quick")  # which `make real` writes
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("examples/*.md")), *SITE]
MARKDOWN = MarkdownIt().enable("table")
OPERATORS = {"|", "||", "&&", "&", ";"}


class Block(NamedTuple):
    """A block of code."""

    language: str
    code: str
    line: int
    shown: str | None
    """The block of text directly after it: what it prints."""


class Link(NamedTuple):
    """A link to a file or to a part of it."""

    target: str
    line: int


def _tokens(path: Path) -> list[Token]:
    return MARKDOWN.parse(path.read_text(encoding="utf-8"))


def blocks(path: Path, language: str) -> list[Block]:
    """The blocks of a language, in order."""
    tokens = _tokens(path)
    found = []
    for token, after in zip(tokens, [*tokens[1:], None], strict=True):
        if token.type == "fence" and token.info == language:
            shown = after.content if after is not None and after.type == "fence" and after.info == "text" else None
            found.append(Block(language, token.content, token.map[0] + 1, shown))
    return found


def run(path: Path) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Run the Python blocks of a page in order.

    Returns what they leave in their namespace, and what those with a text after them have printed, with that text.
    """
    namespace: dict[str, Any] = {"__name__": "__main__"}
    outputs = []
    for block in blocks(path, "python"):
        printed = io.StringIO()
        # Line numbers in tracebacks are those of the page.
        tree = ast.increment_lineno(ast.parse(block.code, str(path)), block.line)
        with contextlib.redirect_stdout(printed):
            exec(compile(tree, str(path), "exec"), namespace)
        if block.shown is not None:
            outputs.append((printed.getvalue(), block.shown))
    return namespace, outputs


def commands(path: Path) -> Iterator[list[str]]:
    """The words of each command in the shell blocks of a page, without redirections."""
    for block in blocks(path, "sh"):
        for line in block.code.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
            lexer.whitespace_split = True
            words: list[str] = []
            for word in [*lexer, ";"]:
                if word not in OPERATORS:
                    words.append(word)
                elif words:
                    yield words[: words.index(">")] if ">" in words else words
                    words = []


def links(path: Path) -> list[Link]:
    """The links and pictures of a page that are not on another host."""
    found = []
    for token in _tokens(path):
        for child in token.children or []:
            target = child.attrGet("href") or child.attrGet("src")
            if target and not re.match(r"[a-z]+:", str(target)):
                found.append(Link(str(target), token.map[0] + 1 if token.map else 0))
    return found


def headings(path: Path) -> list[str]:
    """The text of the headings of a page."""
    return [after.content for token, after in pairwise(_tokens(path)) if token.type == "heading_open"]


def anchors(path: Path) -> set[str]:
    """What links to the headings of a page end with, by GitHub's rule."""
    found: set[str] = set()
    for heading in headings(path):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        anchor = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        repeated = sum(each == anchor or re.fullmatch(rf"{re.escape(anchor)}-\d+", each) is not None for each in found)
        found.add(f"{anchor}-{repeated}" if repeated else anchor)
    return found


def messages(package: Path) -> list[str]:
    """All texts in the code of a package that are no docstrings, with "..." for the values within them."""
    found = []
    for file in package.rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                found.append(node.value)
    return found
