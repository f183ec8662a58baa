"""The code of docs/tutorial.md runs, and prints what is shown there."""

import contextlib
import io
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
TUTORIAL = ROOT / "docs" / "tutorial.md"
BLOCK = re.compile(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", re.DOTALL)


def losses_in(output: str) -> list[float]:
    return [float(x) for line in output.splitlines() if line.startswith("loss:") for x in re.findall(r"\d+\.\d+", line)]


def facts_in(output: str) -> list[str]:
    """Lines with counts, which are the same on every machine."""
    return [line for line in output.splitlines() if re.match(r"\d+ tokens|bytes|steps", line)]


@pytest.fixture(scope="module")
def tutorial():
    """What the blocks leave in their namespace; each with what it printed and what is shown."""
    pytest.importorskip("peft")
    namespace, outputs = {}, []
    for code, shown in BLOCK.findall(TUTORIAL.read_text()):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, str(TUTORIAL), "exec"), namespace)
        outputs.append((printed.getvalue(), shown))
    return namespace, outputs


def test_what_is_shown_is_what_is_printed(tutorial):
    outputs = [(printed, shown) for printed, shown in tutorial[1] if shown]
    assert len(outputs) == 6
    for printed, shown in outputs:
        # Rounding, on another machine too, moves losses after many steps of the optimizer a little.
        assert losses_in(shown) == pytest.approx(losses_in(printed), abs=0.1)
        assert facts_in(shown) == facts_in(printed)
    assert sum(len(losses_in(shown)) for _, shown in outputs) == 6 + 5 + 5 + 6


def test_reading_takes_constant_memory_and_learning_lowers_the_loss(tutorial):
    names = tutorial[0]
    assert len(set(names["sizes"])) == 1
    reading, learning = names["losses"], names["learned"]
    # Pieces of the same tokens.
    assert sum(learning[10:19]) < sum(reading[10:19]) - 2
    assert names["from_nothing"][0] > 6 > 1.5 > names["from_nothing"][-1]


def test_answers_leave_the_learners_stream_alone(tutorial):
    names = tutorial[0]
    assert names["learner"].cache.tokens_seen == names["ids"].shape[1]
    assert sum(answer.startswith(" ERROR timeout user=") for answer in names["answers"]) >= 3


def test_the_readme_links_to_it():
    assert "](docs/tutorial.md)" in (ROOT / "README.md").read_text()
