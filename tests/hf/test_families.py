"""Every family of transformers that can be built tiny: accepted and correct, or refused with a reason.

``pytest tests/hf/test_families.py --write-models-table`` writes the results to docs/models.md.
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

What `sinkattn.enable` does with each family that transformers {{version}} can build. `tests/hf/test_families.py`
measures it on tiny models with random weights, {S} sinks and a window of {W}, in fp32. The last four columns are RMS
errors, relative to the spread of the logits:

* short: compared with the unpatched model, on {S + W} tokens;
* gathered: with one active attention layer, compared with the unpatched model on only the tokens that a query sees;
* chunks: chunks of 1 and of 7 tokens, compared with one call;
* no sinks: with 0 sinks, compared with the unpatched model under a sliding-window mask.

"-": the comparison does not apply to the family.

Paths: "generic": a ring in place of each cache layer. "hybrid": rings for the attention layers, transformers' own
states for the other layers. "expanded MLA": rings of the keys and values that the latents expand to. "adapter":
sinkattn's own attention forward. "re-encode": absolute positions, so the context is encoded again when it is full, and
"gathered" compares with the unpatched model on that context.

| family | rotary embedding | path | short | gathered | chunks | no sinks |
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
