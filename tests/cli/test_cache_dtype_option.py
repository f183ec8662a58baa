"""``--cache-dtype``: which commands take it, and that their caches have it."""

import re

import pytest

from sinkattn import cli, ops
from sinkattn.cli import arguments, chat, serve
from sinkattn.hf.load import DEMO_MODEL, load
from sinkattn.hf.model_patch import get_patch

GENERATE = ["generate", "--device", "cpu", "--prompt", "import os", "--max-new-tokens", "3", "--window", "28"]


def test_the_choices_are_those_of_the_library():
    assert tuple(ops.EIGHT_BIT_DTYPES) == arguments.CACHE_DTYPES


def test_generate_holds_tokens_in_8_bits(capsys):
    sizes = []
    for options in ([], ["--cache-dtype", "int8"]):
        assert cli.main([*GENERATE, *options]) == 0
        sizes.append(float(re.search(r"KV cache ([\d.]+) KiB", capsys.readouterr().err)[1]))
    assert sizes == [64.0, 23.8]


def test_chat_and_serve_hold_tokens_in_8_bits(chat_model):
    args = cli.build_parser().parse_args(["chat", str(chat_model), "--window", "96", "--cache-dtype", "fp8"])
    pool, _ = chat.open_chat(*load(chat_model, device="cpu"), args)
    assert get_patch(pool.model).cache_dtype == "fp8"
    args = cli.build_parser().parse_args(["serve", str(DEMO_MODEL), "--window", "96", "--cache-dtype", "int8"])
    model, tokenizer = load(DEMO_MODEL, device="cpu")
    serve.make_server(model, tokenizer, args, {})
    assert get_patch(model).cache_dtype == "int8"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cache-dtype", "int4"], "argument --cache-dtype: invalid choice: 'int4'"),
        (
            ["--cache-dtype", "int8", "--dtype", "float32", "--follow", "-", "--learn"],
            "learn: a cache of 8 bits has no",
        ),
    ],
)
def test_what_is_refused(options, message, capsys):
    try:
        code = cli.main([*GENERATE[:3], *options])
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    assert message in capsys.readouterr().err
