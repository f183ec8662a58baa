"""What learns, as text."""

import pytest

from sinkattn.evaluate.variant import Variant, parse_rate


@pytest.mark.parametrize(
    ("text", "variant"),
    [
        ("lora", Variant("lora")),
        ("all+decay", Variant("all", decay=True)),
        ("lora+decay+reencode@0.003", Variant("lora", True, True, 0.003)),
        ("all@1e-05", Variant("all", rate=1e-5)),
    ],
)
def test_variants_as_text(text, variant):
    assert Variant.parse(text) == variant
    assert str(variant) == text


@pytest.mark.parametrize("text", ["", "adapters", "lora+", "lora+fast", "lora@", "lora+decay+decay"])
def test_other_variants_are_refused(text):
    with pytest.raises(ValueError, match="expected lora or all, then") as error:
        Variant.parse(text)
    assert str(error.value).endswith(f"got {text!r}")


@pytest.mark.parametrize("text", ["0", "-1", "x", "nan", "inf"])
def test_rates_are_more_than_0(text):
    for parse, given in ((parse_rate, text), (Variant.parse, f"lora@{text}")):
        with pytest.raises(ValueError, match=f"expected a rate, a number more than 0, got '{text}'"):
            parse(given)
    assert parse_rate("3e-4") == 3e-4
