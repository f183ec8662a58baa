"""Has a model sinks: the shipped one has, a fresh one has not; and what the verdict makes of losses."""

import io
import math

import naive
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sinkattn.evaluate import sinks
from sinkattn.evaluate.sinks import Beginning, Result
from sinkattn.evaluate.statistics import Mean
from sinkattn.evaluate.text import Pipe, TokenStream


def beginning(name, losses, margin=0.005):
    means = {count: Mean(1000, loss, margin) for count, loss in losses.items()}
    gains = {count: Mean(1000, loss - losses[0], margin) for count, loss in losses.items()}
    best = min(losses.values())
    behind = {count: Mean(1000, loss - best, None if loss == best else margin) for count, loss in losses.items()}
    return Beginning(name, means, gains, behind)


def losses_of(*values):
    return dict(zip(sinks.SINK_COUNTS, values, strict=True))


HELPED = losses_of(3.5, 2.5, 2.501, 2.504, 2.52)
FLAT = losses_of(2.5, 2.501, 2.5, 2.502, 2.505)


@pytest.mark.parametrize(
    ("first", "other", "recommended", "words"),
    [
        (losses_of(3.5, 2.5, 2.6, 2.9, 3.6), losses_of(2.5, 2.51, 2.52, 2.53, 2.6), 1, "Other first tokens do not"),
        (HELPED, FLAT, 1, "lowers the loss by 1.000 nats per token. Other first tokens do not: the sink is the token"),
        (HELPED, HELPED, 1, "Other first tokens do as well: the place makes the sink"),
        (HELPED, losses_of(3.5, 3.0, 3.0, 3.0, 3.0), 1, "Other first tokens bring 50% of that at most"),
        (losses_of(9.0, 3.0, 2.6, 2.4, 2.395), FLAT, 4, "keeping the first 4 tokens lowers the loss by 6.600"),
        (FLAT, FLAT, 0, "No attention sinks"),
    ],
)
def test_verdicts(first, other, recommended, words):
    result = Result(128, [beginning("start token", first), beginning("no start token", other)])
    assert result.recommended == recommended
    assert words in result.verdict


def test_a_gain_within_its_margin_proves_nothing():
    noisy = beginning("start token", losses_of(2.55, 2.5, 2.5, 2.5, 2.5), margin=0.08)
    text = "keeping the first 1 token lowers the loss by 0.050 nats per token"
    assert Result(128, [noisy, noisy]).verdict == f"Not sure: {text}, give or take 0.080; more tokens would tell."
    few = beginning("start token", HELPED, margin=None)
    assert Result(128, [few, few]).verdict.startswith("Not sure: keeping the first 1 token lowers the loss by 1.000")


@pytest.mark.parametrize(
    ("losses", "margin", "recommended"),
    [
        (losses_of(3.5, 2.52, 2.515, 2.5, 2.505), 0.03, 1),
        (losses_of(3.5, 2.52, 2.515, 2.5, 2.505), None, 1),
        (losses_of(3.5, 2.52, 2.515, 2.5, 2.505), 0.01, 4),
        (losses_of(3.5, 3.4, 2.6, 2.5, 2.5), 1.0, 4),  # a tenth of the gain is not a small part
        (losses_of(2.52, 2.55, 2.5, 2.5, 2.5), 0.06, 2),  # worse than no sinks
        (losses_of(2.55, 2.5, 2.5, 2.5, 2.5), 0.2, 1),  # no sinks only if they are as good
    ],
)
def test_more_sinks_are_recommended_only_if_they_were_shown_to_be_better(losses, margin, recommended):
    assert Result(128, [beginning("start token", losses, margin)]).recommended == recommended


def test_a_tokenizer_without_line_breaks_has_one_beginning_less():
    assert Result(128, [beginning("as it comes", HELPED)]).verdict.endswith("lowers the loss by 1.000 nats per token.")

    class Words:
        bos_token_id = None

        def __call__(self, piece, **options):
            return type("Encoding", (), {"input_ids": [len(word) for word in piece.split()]})

    stream = TokenStream(Pipe(io.StringIO("some words")), Words())
    assert list(sinks._beginnings(stream, stream)) == ["as it comes"]


def test_the_sink_of_the_shipped_model_is_its_start_token(model, stream):
    done = {}
    result = sinks.run(model, stream, 64, 1500, lambda name, tokens: done.update({name: tokens}))
    assert done == dict.fromkeys(("start token", "no start token", "4 line breaks"), 1500)
    assert result.recommended == 1
    assert "the sink is the token that this stream begins with" in result.verdict
    losses = [[mean.loss for mean in each.losses.values()] for each in result.beginnings]
    assert losses[0][0] - losses[0][1] > 0.5
    assert max(abs(a - losses[1][0]) for row in losses[1:] for a in row) < 0.2
    assert [layer.shape for layer in result.attention] == [(4, 4), (4, 4)]
    assert result.attention[1][0].max() > 0.4 > 0.05 > result.attention[1][1:].max()
    assert result.restarts == 0


def test_an_untrained_model_has_none(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    stream = TokenStream(Pipe(io.StringIO("some words\n" * 50)), tokenizer)
    result = sinks.run(LlamaForCausalLM(config).eval(), stream, 32, 400, lambda *progress: None)
    assert result.recommended == 0
    assert "No attention sinks" in result.verdict
    assert result.restarts >= 1


def test_mass_is_the_mean_attention_of_the_second_half(model, ids):
    mass = sinks.attention_on_first_tokens(model, iter(ids.tolist()), 32, sequences=2)
    rows = torch.stack((ids[:32], torch.cat((ids[:1], ids[32:63]))))
    with torch.no_grad():
        hidden = model.model.layers[0].input_layernorm(model.model.embed_tokens(rows))
        attention = model.model.layers[0].self_attn
        query, key = (p(hidden).unflatten(-1, (4, 32)).transpose(1, 2) for p in (attention.q_proj, attention.k_proj))
        query, key = (naive.rotate(x, torch.arange(32), model.model.rotary_emb.inv_freq).float() for x in (query, key))
        scores = query @ key.mT / math.sqrt(32) + torch.full((32, 32), -math.inf).triu(1)
        expected = scores.softmax(-1)[:, :, 16:, :4].mean((0, 2)).T
    torch.testing.assert_close(mass[0], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("total", "tokens", "message"),
    [(8, 100, "cache: expected more than 8 tokens, got 8"), (32, 32, "tokens: expected more than .* 32")],
)
def test_sizes_that_leave_nothing_to_compare_are_refused(total, tokens, message, model, stream):
    with pytest.raises(ValueError, match=message):
        sinks.run(model, stream, total, tokens, lambda *progress: None)
