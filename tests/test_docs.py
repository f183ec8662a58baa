"""The documentation is right: its code runs, its commands and links exist, it quotes messages that there are."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import documents
import pytest
import transformers
from chat_models import CHATML, tiny_model, with_template
from documents import DOCS, PAGES, ROOT, SITE

import sinkattn
from sinkattn import hf, ops
from sinkattn.cli import build_parser
from sinkattn.hf import load

TUTORIAL = DOCS / "tutorial.md"
WITH_CODE = [page for page in PAGES if documents.blocks(page, "python") and page != TUTORIAL]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture(scope="session")
def any_model(tokenizer, tmp_path_factory):
    """A folder with a tiny random model that chats, in place of what pages load from the hub."""
    folder = tmp_path_factory.mktemp("any_model")
    tokenizer = with_template(tokenizer, CHATML)
    tokenizer.eos_token = "<|end|>"
    tiny_model(tokenizer, max_position_embeddings=32768).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def offline(any_model, monkeypatch, tmp_path):
    """Load that model whatever name a page gives; data sets and files are small ones in a folder that is dropped."""

    def in_place_of(load_it):
        return lambda name=None, *args, **options: load_it(name and any_model, *args, **options)

    for owner, attribute in (
        (transformers.AutoModelForCausalLM, "from_pretrained"),
        (transformers.AutoTokenizer, "from_pretrained"),
        (load, "load"),
    ):
        monkeypatch.setattr(owner, attribute, in_place_of(getattr(owner, attribute)))
    question = {"question": "Which?", "choices": {"label": ["A", "B"], "text": ["this", "that"]}, "answerKey": "B"}
    data_sets = SimpleNamespace(load_dataset=lambda *args, **options: [question])
    monkeypatch.setitem(sys.modules, "datasets", data_sets)  # importing it takes seconds
    monkeypatch.chdir(tmp_path)
    Path("moby_dick.txt").write_text("Call me Ishmael. " * 6000)


@pytest.fixture
def served(tokenizer, monkeypatch):
    """Lead OpenAI's clients to a tiny server, whatever address a page gives."""
    openai = pytest.importorskip("openai")
    from tiny_server import running_server, tiny_server

    with running_server(tiny_server(with_template(tokenizer, CHATML), name="SmolLM2-135M-Instruct")) as running:
        client = running.client()
        monkeypatch.setattr(openai, "OpenAI", lambda **options: client)
        yield


@pytest.mark.parametrize("page", WITH_CODE, ids=name)
def test_the_code_of_a_page_runs(page, offline, request):
    if page.name == "serve.md":
        request.getfixturevalue("served")
    for printed, shown in documents.run(page)[1]:
        assert printed == shown


def test_code_that_does_not_run_is_noticed(offline, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\nx = 1\n```\n\nand\n\n```python\nprint(x)\nprint(y)\n```\n")
    with pytest.raises(NameError) as error:
        documents.run(page)
    assert error.traceback[-1].lineno + 1 == 9
    page.write_text("```python\nprint(1)\n```\n\n```text\n2\n```\n")
    assert documents.run(page)[1] == [("1\n", "2\n")]


def losses_in(output: str) -> list[float]:
    return [float(x) for line in output.splitlines() if line.startswith("loss:") for x in re.findall(r"\d+\.\d+", line)]


def facts_in(output: str) -> list[str]:
    """Lines with counts, which are the same on every machine."""
    return [line for line in output.splitlines() if re.match(r"\d+ tokens|bytes|steps", line)]


@pytest.mark.slow
def test_the_tutorial_shows_what_its_code_prints_and_finds_what_it_says():
    pytest.importorskip("peft")
    names, outputs = documents.run(TUTORIAL)
    assert len(outputs) == 6
    for printed, shown in outputs:
        # Rounding, on another machine too, moves losses after many steps of the optimizer a little.
        assert losses_in(shown) == pytest.approx(losses_in(printed), abs=0.1)
        assert facts_in(shown) == facts_in(printed)
    assert sum(len(losses_in(shown)) for _, shown in outputs) == 6 + 5 + 5 + 6

    # Reading takes constant memory, and learning lowers the loss of pieces of the same tokens.
    assert len(set(names["sizes"])) == 1
    assert sum(names["learned"][10:19]) < sum(names["losses"][10:19]) - 2
    assert names["from_nothing"][0] > 6 > 1.5 > names["from_nothing"][-1]
    # Answers leave the learner's stream alone.
    assert names["learner"].cache.tokens_seen == names["ids"].shape[1]
    assert sum(answer.startswith(" ERROR timeout user=") for answer in names["answers"]) >= 3


def check_command(words: list[str], targets: set[str]) -> None:
    """Raises SystemExit or AssertionError for a command that does not exist."""
    if words[0] == "sinkattn":
        build_parser().parse_args(words[1:])
    elif words[0] == "make":
        verbs = [word for word in words[1:] if "=" not in word and not word.startswith(("-", "build/"))]
        assert targets.issuperset(verbs), " ".join(words)
    for word in words:
        if word.endswith(".py") and word.startswith(("bench/", "tests/", "examples/")):
            assert (ROOT / word).is_file(), word


@pytest.fixture(scope="module")
def targets():
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("page", [page for page in PAGES if documents.blocks(page, "sh")], ids=name)
def test_the_commands_of_a_page_exist(page, targets, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("FILE").write_text("{}")
    for words in documents.commands(page):
        check_command(words, targets)


@pytest.mark.parametrize(
    "line",
    ["sinkattn generate --no-such-option", "echo a | sinkattn evil ppl > x", "make no-such-verb", "python bench/no.py"],
)
def test_a_command_that_does_not_exist_is_noticed(line, targets, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"```sh\nmake test\n{line}  # a comment\n```\n")
    good, *_, bad = documents.commands(page)
    check_command(good, targets)
    with pytest.raises((SystemExit, AssertionError)):
        check_command(bad, targets)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_the_extras_of_a_page_exist(page):
    extras = set(re.findall(r"^([a-z]+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    assert extras.issuperset(re.findall(r"sinkattn\[([a-z]+)\]", page.read_text()))


def broken_links(page: Path) -> list[documents.Link]:
    broken = []
    for link in documents.links(page):
        path, _, anchor = link.target.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in documents.anchors(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    assert broken_links(page) == []


def test_a_broken_link_is_noticed(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A b\n\n# `A` b\n\n[](#a-b) [](#a-b-1) [](page.md#a-b) [](#c)\n\n| a |\n|---|\n| ![](none.png) |\n"
    )
    assert [(link.target, link.line) for link in broken_links(page)] == [("#c", 5), ("none.png", 9)]


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 150


def figures_in(text: str) -> list[str]:
    return re.findall(r"(?<![\w.,])\d[\d,]*\.?\d*(?![\w.])", text)


def test_the_figures_of_the_readme_are_measured_ones():
    rows = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("|")]
    figures = set(figures_in(" ".join(rows)))
    assert len(figures) > 30
    assert figures_in("37.1 | (1.37 to 1,023) 1.0") == ["37.1", "1.37", "1,023", "1.0"]
    assert figures <= set(figures_in("".join((DOCS / page).read_text() for page in ("benchmarks.md", "evaluation.md"))))


def test_every_page_of_the_site_is_in_a_table_of_contents():
    index = "".join(block.code for block in documents.blocks(DOCS / "index.md", "{toctree}"))
    listed = {DOCS / "index.md"} | {DOCS / line for line in index.splitlines() if line.endswith((".md", ".rst"))}
    listed |= {DOCS / "api" / line.strip() for line in (DOCS / "api" / "index.rst").read_text().splitlines()}
    assert {*SITE, *DOCS.rglob("*.rst")} <= listed


def test_every_public_name_has_its_place_in_the_reference():
    pages = "".join(page.read_text() for page in (DOCS / "api").glob("*.rst"))
    documented = re.findall(r"^\.\. auto\w+:: sinkattn\.([\w.]+)", pages, re.MULTILINE)
    assert len(set(documented)) == len(documented)
    public = {*sinkattn.__all__}
    public |= {f"hf.{each}" for each in hf.__all__ if each not in public}
    public |= {f"ops.{each}" for each in ops.__all__ if each not in public}
    modules = {"ops", "reference", *(each for each in documented if each.startswith(("evaluate", "hf.load")))}
    assert set(documented) == public | modules


def test_troubleshooting_quotes_messages_that_there_are():
    messages = documents.messages(ROOT / "sinkattn")
    quoted = [
        quote for heading in documents.headings(DOCS / "troubleshooting.md") for quote in re.findall("`(.+)`", heading)
    ]
    assert len(quoted) >= 20
    assert [quote for quote in quoted if not any(quote in message for message in messages)] == []
    assert not any("expected a model that is not one" in message for message in messages)
