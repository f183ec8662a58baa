"""Both names of the cache argument, and error messages on an untested version of transformers."""

import warnings
from pathlib import Path

import families
import pytest
import torch
from hf_models import build, random_ids
from transformers import DynamicCache

import sinkattn
from sinkattn.hf import UnsupportedModelError, stream_tokens, versions

S, W = 4, 28


@pytest.fixture(params=["llama", "gpt2", "falcon"])
def model(request):
    """A model for each way to stream. Falcon's own forward ignores unknown arguments."""
    plain = families.build("falcon") if request.param == "falcon" else build(request.param)
    return sinkattn.enable(plain, S, W)


@torch.no_grad()
@pytest.mark.parametrize("name", versions.CACHE_NAMES)
def test_both_names_are_taken(model, name):
    ids = random_ids(1, 60)
    want = model(ids).logits
    cache = sinkattn.SinkCache(model)
    got = torch.cat([model(part, **{name: cache}).logits for part in ids.split(20, dim=1)], dim=1)
    torch.testing.assert_close(got, want)
    text = model.generate(ids, max_new_tokens=40, do_sample=False)
    cache = sinkattn.SinkCache(model)
    first = model.generate(ids, **{name: cache}, max_new_tokens=20, do_sample=False)
    assert torch.equal(model.generate(first, **{name: cache}, max_new_tokens=20, do_sample=False), text)


@torch.no_grad()
@pytest.mark.parametrize("name", versions.CACHE_NAMES)
def test_errors_have_the_name_that_was_used(model, name):
    ids, other = random_ids(1, 5), sinkattn.SinkCache(sinkattn.enable(build("llama"), S, W))
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=f"^{name}: this SinkCache was made for another model"):
            call(input_ids=ids, **{name: other})
        with pytest.raises(TypeError, match=f"^{name}: expected a sinkattn.SinkCache or None, got DynamicCache"):
            call(input_ids=ids, **{name: DynamicCache()})


@torch.no_grad()
def test_the_other_name_brings_no_warning_either(model, recwarn):
    cache = sinkattn.SinkCache(model)
    for name in versions.CACHE_NAMES:
        model(random_ids(1, 5), **{name: cache})
        model.generate(random_ids(1, 5), **{name: sinkattn.SinkCache(model)}, max_new_tokens=3)
    assert cache.tokens_seen == 10
    assert not [warning for warning in recwarn if "past_key_values" in str(warning.message)]


@torch.no_grad()
def test_the_name_of_today_brings_no_warning():
    ids = random_ids(1, 60)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        warnings.simplefilter("error", DeprecationWarning)
        for family in ("llama", "gpt2"):
            model = sinkattn.enable(build(family), S, W)
            cache = sinkattn.SinkCache(model)
            output = model(ids, **{versions.forward_cache(model): cache})
            assert output[versions.cache_name(output)] is cache
            model.generate(ids, **{versions.GENERATE_CACHE: sinkattn.SinkCache(model)}, max_new_tokens=3)
            list(stream_tokens(model, ids, max_new_tokens=3))
            sinkattn.disable(model)


def test_two_caches_are_one_too_many(model):
    one, other = sinkattn.SinkCache(model), sinkattn.SinkCache(model)
    with pytest.raises(ValueError, match="cache: is given twice, as past_key_values too"):
        model.generate(random_ids(1, 5), cache=one, past_key_values=other, max_new_tokens=3)
    assert one.tokens_seen == other.tokens_seen == 0


def test_a_refusal_names_versions_that_were_not_tested(monkeypatch):
    def refusal() -> str:
        with pytest.raises(UnsupportedModelError) as error:
            sinkattn.enable(build("mistral", sliding_window=16), S, W)
        return str(error.value)

    monkeypatch.setattr(versions.transformers, "__version__", versions.NEWEST_TESTED)
    tested = refusal()
    for newer in ("5.99.0.dev0", "6.0.0"):
        monkeypatch.setattr(versions.transformers, "__version__", newer)
        assert refusal() == (
            f"{tested} (transformers {newer} is installed; this sinkattn was tested with {versions.OLDEST_TESTED} to "
            f"{versions.NEWEST_TESTED})"
        )


def test_the_tested_versions_are_those_that_are_installed_for_tests():
    """A new pin of transformers must also be set as the newest tested version."""
    lines = (Path(__file__).parents[2] / "constraints.txt").read_text().splitlines()
    pins = [line.partition(";")[0] for line in lines if line.startswith("transformers==")]
    assert pins[0] == f"transformers=={versions.NEWEST_TESTED}"
