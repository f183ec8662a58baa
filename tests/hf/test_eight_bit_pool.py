"""A `StreamPool` over rings of 8 bits: its streams are those of the model alone, wherever they have been in between."""

from functools import cache

import pytest
import torch
from hf_models import build
from pool_streams import HEADROOM, Record, S, W, some_ids

import sinkattn
from sinkattn import PromptLookup, StreamPool
from sinkattn.hf.pool.moved import tensors_in


@cache
def model_of(family, cache_dtype, **overrides):
    """Shared: do not change it."""
    return sinkattn.enable(build(family, **overrides), S, W, HEADROOM, cache_dtype=cache_dtype)


def generated(stream, record, count):
    for token in stream.generate(count):
        record.generate(token)


@pytest.mark.parametrize(("family", "cache_dtype"), [("gemma3_text", "int8"), ("llama", "fp8"), ("falcon_h1", "int8")])
def test_streams_are_those_of_the_model_alone(family, cache_dtype, tmp_path):
    """Of different sinks, while they are parked in host memory and on disk, forked, rolled back and saved."""
    model = model_of(family, cache_dtype)
    pool = StreamPool(model, 1, max_parked=1, max_on_disk=3, park_folder=tmp_path, max_prefix=5)
    entries = []
    for seed in range(3):
        prefix, ids = some_ids(2 * seed, seed), some_ids(17, seed + 5)
        stream, record = pool.open(prefix), Record(prefix=prefix)
        for each in (stream, record):
            each.feed(ids)
        entries.append((stream, record))
    for _ in range(2):
        for stream, record in entries:
            generated(stream, record, 3)
            record.check(model)
            if pool.is_batched:  # a state cannot be rolled back
                for each in (stream, record):
                    each.rollback(2)
    stream, record = entries[2]
    stream.save(tmp_path / "saved")
    fork, loaded = stream.fork(), pool.load(tmp_path / "saved")
    want = [*stream.generate(9)]
    assert [*fork.generate(9)] == want
    assert [*loaded.generate(9)] == want
    record.ids += want
    loaded.save(tmp_path / "saved")
    other = StreamPool(model, 1, max_prefix=9).load(tmp_path / "saved")  # with slots for more sinks
    generated(other, record, 5)
    record.check(model)
    whole = model_of(family, None)
    with pytest.raises(ValueError, match=f"path: cache_dtype: expected None, .* got {cache_dtype}"):
        StreamPool(whole, 1, max_prefix=5).load(tmp_path / "saved")


def test_messages_drafts_and_parking_change_no_token(tmp_path):
    """Of streams that evict whole messages: alone, taking turns on one row, and with drafts that are checked."""
    model = model_of("llama", "int8")

    def talk(num_rows, **options):
        pool = StreamPool(model, num_rows, max_parked=1, max_on_disk=9, park_folder=tmp_path, max_prefix=4, **options)
        streams = [pool.open(some_ids(seed + 2, seed), evict="message") for seed in range(3)]
        said = []
        for turn in range(5):
            for seed, stream in enumerate(streams):
                stream.feed(some_ids(5, 10 * turn + seed))
                said += stream.generate(4)
        return said

    want = talk(3)
    assert talk(1) == want
    assert talk(2, speculation=PromptLookup(num_tokens=2, max_ngram=1)) == want


def test_memory_of_rows():
    """On the device for every row, with slots for the longest prefix; nothing of a stream stays in its row."""
    model = model_of("llama", "int8")
    pool = StreamPool(model, 3, max_parked=1, max_prefix=5)
    stream = pool.open(some_ids(5))
    stream.feed(some_ids(30))
    assert pool.nbytes == 3 * 2 * 2 * 2 * ((W + HEADROOM) * (8 + 4) + 5 * 8 * 4)  # layers, heads; keys and values
    memory = pool._memory
    held = tensors_in(memory.copy(stream._state.memory).contents)
    assert sum(x.nbytes for x in held) == pool.nbytes / 3
    assert all(x.float().any() for x in held)
    row = stream._state.memory.row
    stream.close()
    rings = [layer.ring for layer in memory._cache.layers]
    assert not any(x[row].view(torch.uint8).any() for ring in rings for x in ring.tensors.values())
