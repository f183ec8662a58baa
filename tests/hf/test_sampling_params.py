"""Parameters of sampling: what is refused, and what a generation configuration gives."""

import pytest
import torch
from transformers import GenerationConfig

import sinkattn
from sinkattn import SamplingParams


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature: expected 0 or more, got -1"),
        ({"temperature": float("nan")}, "temperature: expected 0 or more, got nan"),
        ({"temperature": "1"}, "temperature: expected 0 or more, got '1'"),
        ({"top_k": 1.5}, "top_k: expected 0 or more, got 1.5"),
        ({"top_p": 0}, "top_p: expected more than 0 and at most 1, got 0"),
        ({"min_p": 1.5}, "min_p: expected 0 to 1, got 1.5"),
        ({"repetition_penalty": 0}, "repetition_penalty: expected more than 0, got 0"),
        ({"presence_penalty": None}, "presence_penalty: expected a number, got None"),
        ({"frequency_penalty": float("inf")}, "frequency_penalty: expected a number, got inf"),
        ({"logit_bias": {-1: 2.0}}, r"logit_bias: expected a mapping of ids to numbers or -inf, got \{-1: 2.0\}"),
        ({"logit_bias": {1: float("nan")}}, "logit_bias: expected a mapping"),
        ({"logit_bias": {1: float("inf")}}, "logit_bias: expected a mapping"),
        ({"processors": abs}, "processors: expected a list of logits processors, got <built-in"),
        ({"grammar": 3}, "grammar: expected a JSON schema or a Lark grammar, got 3"),
        ({"seed": 2**64}, "seed: expected None, or .* got 18446744073709551616"),
        ({"seed": 0.5}, "seed: expected None, or .* got 0.5"),
        ({"logprobs": -1}, "logprobs: expected None, or 0 or more, got -1"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**options)


def test_what_is_accepted():
    params = SamplingParams(
        temperature=torch.tensor(0.5).item(), top_k=3, logit_bias={1: float("-inf")}, seed=2**64 - 1, logprobs=0
    )
    assert sinkattn.hf.SamplingParams is SamplingParams
    assert (params.is_greedy, params.needs_ids) == (False, False)
    assert SamplingParams().is_greedy
    for name in ("repetition", "presence", "frequency"):
        assert SamplingParams(**{f"{name}_penalty": 0.5}).needs_ids


def test_a_generation_configuration():
    def of(config, **overrides):
        return SamplingParams.from_generation_config(config, **overrides)

    assert of(None) == of(GenerationConfig()) == SamplingParams()
    assert of(GenerationConfig(repetition_penalty=1.1)) == SamplingParams(repetition_penalty=1.1)
    assert of(GenerationConfig(top_k=7)) == SamplingParams(), "`generate` does not sample by it"
    sampled = GenerationConfig(do_sample=True, top_p=0.9)
    assert of(sampled) == SamplingParams(temperature=1.0, top_k=50, top_p=0.9), "the defaults of `generate`"
    every = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.1, "repetition_penalty": 1.05}
    assert of(GenerationConfig(do_sample=True, **every)) == SamplingParams(**every)
    assert of(sampled, top_p=1.0, seed=3) == SamplingParams(temperature=1.0, top_k=50, seed=3)
    assert of(sampled, temperature=0.0).is_greedy
