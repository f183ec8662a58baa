"""Every family of transformers that can be built tiny: admitted and right, or refused and saying why.

``pytest tests/hf/test_families.py --write-models-table`` writes docs/models.md from what came out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path

import pytest
import transformers
from families import FAMILIES, build
from measures import Differences, S, W, measure

import sinkattn
from sinkattn.hf import UnsupportedModelError

TABLE = Path(__file__).parents[2] / "docs" / "models.md"
# Twice what comes out. Chunks of a gated delta rule are themselves off by 2e-6.
BUDGETS = Differences(short=2e-6, gathered=2e-6, chunks=5e-6, sliding=2e-6)
HEADER = f"""# Models

What `sinkattn.enable` makes of each family that transformers {{version}} can build, found out by
`tests/hf/test_families.py` on tiny models of random weights with {S} sinks and a window of {W}, in fp32. The last four
columns are differences, as a fraction of the spread of the outputs: on a short input, from the model as it was; with
all attention layers but one silent, from the model as it was on nothing but the tokens that a query sees; token by
token and in chunks of 7, from one call; without sinks, from the model as it was under a sliding mask. "-": the
comparison says nothing about that family.

Paths: "generic": rings in place of all caches. "hybrid": rings for the attention layers, transformers' own states for
the others. "expanded MLA": rings of the keys and values that latents expand to. "adapter": an attention forward of our
own. "re-encode": absolute positions, so the context is encoded anew when it is full, and "gathered" is the model as it
was on that context.

| family | rotary embedding | path | short | gathered | cut into calls | no sinks |
|---|---|---|---|---|---|---|
"""

Row = tuple[str, ...]


@pytest.fixture(scope="module")
def found(request) -> Iterator[dict[str, Row]]:
    """Rows of the table as they are found; written at the end if that was asked for."""
    rows: dict[str, Row] = {}
    yield rows
    if request.config.getoption("--write-models-table"):
        assert rows.keys() == FAMILIES.keys(), "the table is written only if all families were tried and passed"
        lines = (f"| {' | '.join((family, *row))} |\n" for family, row in sorted(rows.items()))
        TABLE.write_text(HEADER.format(version=transformers.__version__) + "".join(lines))


def committed() -> dict[str, Row]:
    lines = [line for line in TABLE.read_text().splitlines() if line.startswith("| ")][1:]
    rows = [tuple(cell.strip() for cell in line.strip("|").split(" | ")) for line in lines]
    return {family: tuple(row) for family, *row in rows}


def kind_of(row: Row) -> Row:
    """Rotary embedding and path: what two versions of transformers agree on."""
    rotary, path, *_ = row
    return rotary, path.partition(":")[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family, found, request):
    expected = FAMILIES[family]
    if expected.refusal is None:
        differences, rotary = measure(family)
        for got, allowed in zip(astuple(differences), astuple(BUDGETS), strict=True):
            assert got is None or got < allowed, differences
        figures = ("-" if value is None else f"{value:.1e}" for value in astuple(differences))
        row = (rotary, expected.path, *figures)
    else:
        with pytest.raises(UnsupportedModelError, match=expected.refusal) as error:
            sinkattn.enable(build(family), S, W)
        message = str(error.value).partition(": ")[2].partition("\n")[0].replace("|", "/")
        row = ("-", f"refused: {message}", *("-" * 4))
    found[family] = row
    if not request.config.getoption("--write-models-table"):
        assert kind_of(row) == kind_of(committed()[family])


def test_the_table_lists_exactly_these_families(request):
    if request.config.getoption("--write-models-table"):
        pytest.skip("the table is being written")
    assert committed().keys() == FAMILIES.keys()
