"""`StreamPool`: every stream's tokens are those of the stream alone, whoever shares the batch."""

import asyncio
import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hf_models import VOCABULARY, build, enabled, interrupted
from pool_streams import HEADROOM, Record, S, W, model_in_double, some_ids
from transformers import LogitsProcessor

import sinkattn
from sinkattn import PoolFullError, SamplingParams, StreamPool
from sinkattn.hf.pool.engine import Engine
from sinkattn.hf.pool.ids import StreamIds
from sinkattn.hf.sampling.batch_sampler import BatchSampler
from sinkattn.hf.sampling.stream_sampler import StreamSampler
from sinkattn.hf.versions import forward_cache


@torch.no_grad()
def logits_alone(model, ids, num_sinks=S):
    cache = sinkattn.SinkCache(model, num_sinks=num_sinks)
    return model(input_ids=torch.tensor([ids]), **{forward_cache(model): cache}).logits[:, -1]


def tokens_alone(model, ids, count, params=None, num_sinks=S, draws=0):
    """Tokens that a stream generates by itself, each from a run over all of its ids."""
    ids, sampler = [*ids], StreamSampler(params or SamplingParams(), vocabulary=VOCABULARY)
    sampler.draws, chosen = draws, []
    for _ in range(count):
        in_sight = torch.tensor([ids[:num_sinks] + ids[num_sinks:][-W:]])
        [token] = BatchSampler().choose(logits_alone(model, ids, num_sinks), [sampler], in_sight).read()
        ids.append(token)
        chosen.append(token)
    return chosen


def in_turn(iterators, count):
    """Tokens of several streams, one of each at a time."""
    tokens = [[] for _ in iterators]
    for _ in range(count):
        for own, iterator in zip(tokens, iterators, strict=True):
            own.append(next(iterator))
    return tokens


# Rings of one kind and of two, ALiBi, states, and re-encoding.
@pytest.mark.parametrize("family", ["llama", "gemma2", "bloom", "falcon_h1", "gpt2"])
def test_tokens_are_those_of_the_stream_alone(family):
    model = model_in_double(family)
    pool, lengths = StreamPool(model, 4, tokens_per_step=7), (1, 5, 23, 40)
    streams = [pool.open() for _ in lengths]
    for stream, length in zip(streams, lengths, strict=True):
        stream.feed(some_ids(length, length))
    got = in_turn([stream.generate(20) for stream in streams], 20)
    assert got == [tokens_alone(model, some_ids(length, length), 20) for length in lengths]
    assert [len(stream) for stream in streams] == [length + 20 for length in lengths]


def test_every_stream_samples_by_its_own_parameters():
    model = model_in_double()
    all_params = [
        SamplingParams(),
        SamplingParams(temperature=1.0, seed=1),
        SamplingParams(temperature=0.7, top_p=0.9, seed=2, repetition_penalty=1.3),
        SamplingParams(temperature=1.3, top_k=9, seed=3, presence_penalty=0.5, frequency_penalty=0.3),
    ]
    pool = StreamPool(model, 4)
    streams = [pool.open(sampling=params) for params in all_params]
    for stream in streams:
        stream.feed(some_ids(10))
    got = in_turn([stream.generate() for stream in streams], 30)
    want = [tokens_alone(model, some_ids(10), 30, params) for params in all_params]
    assert got == want
    assert len({tuple(tokens) for tokens in want}) == 4


def test_feeding_and_generating_follow_each_other():
    model = model_in_double()
    pool = StreamPool(model, 2)
    other, stream = pool.open(sampling=SamplingParams(temperature=1.0, seed=4)), pool.open()
    other.feed(some_ids(3))
    ids, drawn = some_ids(3), 0
    forever = other.generate()
    for turn in range(4):
        stream.feed(some_ids(6, turn))
        # The other one has chosen its next token ahead, before this is fed.
        other.feed(some_ids(turn, turn))
        ids += some_ids(turn, turn)
        mine = stream.generate(5)
        for got in zip(mine, forever, strict=False):
            want = tokens_alone(model, ids, 1, SamplingParams(temperature=1.0, seed=4), draws=drawn)
            assert [got[1]] == want
            ids, drawn = ids + want, drawn + 1
    assert other.in_sight == ids[:S] + ids[S:][-W:]
    assert len(stream) == 4 * 11


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_a_prefix_stays_in_sight(family):
    model = model_in_double(family)
    pool = StreamPool(model, 3, max_prefix=9)
    prefixes = [some_ids(9, 1), some_ids(5, 2), some_ids(1, 3)]
    streams = [pool.open(prefix) for prefix in prefixes]
    for stream in streams:
        stream.feed(some_ids(30, 4))
    got = in_turn([stream.generate() for stream in streams], 10)
    want = [tokens_alone(model, [*x, *some_ids(30, 4)], 10, num_sinks=max(len(x), S)) for x in prefixes]
    assert got == want
    assert streams[0].in_sight[:9] == prefixes[0]
    with pytest.raises(ValueError, match=r"prefix: expected up to 9 tokens \(max_prefix\), got 10"):
        pool.open(some_ids(10))
    with pytest.raises(ValueError, match="num_sinks: expected 0 to 500"):
        StreamPool(model, max_prefix=501)


@torch.no_grad()
def test_whole_messages_are_evicted():
    """One layer, so that the output depends on nothing but the ids in sight."""
    plain, model = (build("llama", torch.float64, num_hidden_layers=1) for _ in range(2))
    sinkattn.enable(model, S, W, HEADROOM)
    pool = StreamPool(model, 3, max_prefix=4)
    prefix, lengths = some_ids(4, 9), [3, 5, 4, 7, 2, 16, 3, 6, 1, 1, 8]
    stream, by_token = pool.open(prefix, evict="message"), pool.open(prefix)
    messages, differs = [], False
    for index, length in enumerate(lengths):
        message = some_ids(length, index)
        stream.feed(message)
        by_token.feed(message)
        for token in stream.generate(3):
            seen = [len(prefix) + sum(map(len, [*messages, message]))]
            # From the last message back as many as fit; of the last one its end.
            visible, room = [], W
            for part in reversed([*messages, message]):
                if visible and len(part) > room:
                    break
                visible, room = part[-room:] + visible, room - len(part)
                if room <= 0:
                    break
            want = int(plain(torch.tensor([prefix + visible])).logits[0, -1].argmax())
            assert token == want, (index, seen)
            message = [*message, token]
            assert stream.in_sight[-len(message[-W:]) :] == message[-W:]
        messages.append(message)
        differs |= stream.in_sight != by_token.in_sight
    assert differs


def test_streams_beyond_the_rows_are_parked_and_come_back():
    model = model_in_double()
    pool = StreamPool(model, 2, max_parked=4)
    streams = [pool.open() for _ in range(6)]
    for index, stream in enumerate(streams):
        stream.feed(some_ids(20 + index, index))
    with pytest.raises(PoolFullError, match="pool: 6 streams are open, the most that it takes"):
        pool.open()
    with pytest.raises(PoolFullError):
        streams[0].fork()
    nbytes = pool.nbytes
    got = in_turn([stream.generate() for stream in streams], 6)
    assert got == [tokens_alone(model, some_ids(20 + index, index), 6) for index in range(6)]
    assert pool.nbytes == nbytes
    streams[3].close()
    streams[0].fork()
    with pytest.raises(RuntimeError, match="stream: is closed"):
        streams[3].feed([1])


def test_nothing_of_a_closed_stream_stays_in_memory():
    pool = StreamPool(model_in_double(), 1)
    stream = pool.open()
    stream.feed(some_ids(20))
    layers = pool.scheduler.engine.memory._cache.layers
    assert all(layer.keys.any() for layer in layers)
    stream.close()
    assert not any(layer.keys.any() or layer.values.any() for layer in layers)


def test_a_closed_pool_opens_no_stream():
    with StreamPool(model_in_double(), 2) as pool:
        stream = pool.open()
    for call in (pool.open, stream.fork, lambda: stream.feed([1])):
        with pytest.raises(RuntimeError, match="is closed"):
            call()
    stream.close()
    pool.close()
    assert len(pool) == 0


def test_forks_rollbacks_and_resets():
    model = model_in_double()
    pool = StreamPool(model, 4)
    stream = pool.open(some_ids(2, 5))
    assert len(stream) == 2
    stream.feed(some_ids(30))
    ids = [*some_ids(2, 5), *some_ids(30)]
    fork = stream.fork()
    fork.feed(some_ids(20, 7))
    assert list(stream.generate(4)) == tokens_alone(model, ids, 4)
    stream.rollback(4)
    stream.feed([3])
    assert list(stream.generate(1)) == tokens_alone(model, [*ids, 3], 1)
    stream.rollback(2)
    before = stream.in_sight
    with pytest.raises(RuntimeError, match=f"stream: cannot forget 9 of {len(ids)} tokens; the headroom .* is 4"):
        stream.rollback(9)
    assert stream.in_sight == before
    stream.feed(some_ids(3, 8))
    stream.rollback(3)
    assert list(stream.generate(3)) == tokens_alone(model, ids, 3)  # the last token runs again
    assert list(fork.generate(3)) == tokens_alone(model, [*ids, *some_ids(20, 7)], 3)
    stream.reset()
    stream.feed(some_ids(3))
    assert list(stream.generate(3)) == tokens_alone(model, [*some_ids(2, 5), *some_ids(3)], 3)


def test_stops():
    model = model_in_double()
    pool = StreamPool(model, 1)
    stream = pool.open()
    stream.feed(some_ids(9))
    first, second, third = tokens_alone(model, some_ids(9), 3)
    assert list(stream.generate(stop=[third])) == [first, second]
    assert len(stream) == 11  # without what stopped it
    assert list(stream.generate(1)) == [third]
    assert list(stream.generate(0)) == []
    for arguments, message in (
        ({"max_new_tokens": -1}, "max_new_tokens: expected 0 or more, got -1"),
        ({"max_new_tokens": 2.5}, r"max_new_tokens: expected a whole number, got 2\.5"),
        ({"stop": [None]}, "stop: expected ids and texts, got None"),
        ({"stop": [torch.tensor(third)]}, r"stop: expected ids and texts, got tensor\("),
        ({"stop": ["x"]}, "stop: expected ids, as the pool has no tokenizer, got 'x'"),
    ):
        with pytest.raises(ValueError, match=message):
            stream.generate(**arguments)
    with pytest.raises(ValueError, match="tokenizer: expected one, given to StreamPool"):
        stream.generate_text()
    running = stream.generate()
    next(running)
    with pytest.raises(RuntimeError, match="stream: generates already"):
        next(stream.generate())
    running.close()
    assert len(list(stream.generate(2))) == 2
    with pytest.raises(RuntimeError, match="stream: expected tokens to go on from, got none"):
        next(StreamPool(model, 1).open().generate())
    for ids in ([VOCABULARY], [-1], [[1], [2]], [0.5], None, ["x"]):
        with pytest.raises(ValueError, match="tokens: expected"):
            stream.feed(ids)


def test_texts_that_stop(tokenizer):
    pool = StreamPool(model_in_double(), 1, tokenizer=tokenizer)
    stream = pool.open()
    stream.feed(some_ids(9))
    text = "".join(pieces(stream, 3))
    stop = text[-2:]
    for stops in (stop, [stop], [stop, "never there"]):
        assert "".join(pieces(stream, 3, stop=stops)) == text[: text.index(stop)]
    assert "".join(pieces(stream, 3, stop=text[::-1])) == text  # not one of its characters


def pieces(stream, count, **options):
    """The text that a stream would generate, after which it is as it was."""
    length, text = len(stream), list(stream.generate_text(count, **options))
    stream.rollback(len(stream) - length)
    return text


def test_threads_share_the_steps():
    model = model_in_double()
    pool, count = StreamPool(model, 8), 8
    want = [tokens_alone(model, some_ids(5 + index, index), 15) for index in range(count)]

    def talk(index):
        with pool.open() as stream:
            stream.feed(some_ids(5 + index, index))
            return list(stream.generate(15))

    with ThreadPoolExecutor(count) as threads:
        assert list(threads.map(talk, range(count), timeout=60)) == want
    assert len(pool) == 0


def test_asyncio():
    model = model_in_double()
    pool = StreamPool(model, 4)

    async def talk(index):
        stream = pool.open()
        await stream.feed_async(some_ids(5 + index, index))
        return [token async for token in stream.generate_async(10)]

    async def main():
        forever = pool.open()
        await forever.feed_async([1])
        endless = asyncio.create_task(anext_forever(forever))
        results = await asyncio.gather(*map(talk, range(3)))
        endless.cancel()
        with pytest.raises(asyncio.CancelledError):
            await endless
        return results, list(forever.generate(2))

    async def anext_forever(stream):
        async for _ in stream.generate_async():
            pass

    results, after = asyncio.run(main())
    assert results == [tokens_alone(model, some_ids(5 + index, index), 10) for index in range(3)]
    assert len(after) == 2


class Broken(LogitsProcessor):
    def __call__(self, input_ids, scores):
        raise OSError("no such file")


def test_the_fault_of_one_stream_is_not_that_of_others():
    model = model_in_double()
    pool = StreamPool(model, 3)
    good, bad = pool.open(), pool.open(sampling=SamplingParams(processors=[Broken()]))
    for stream in (good, bad):
        stream.feed(some_ids(10))
    tokens = good.generate()
    failing = bad.generate()
    first = next(tokens)
    with pytest.raises(OSError, match="no such file"):
        next(failing)
    assert [first, *(next(tokens) for _ in range(5))] == tokens_alone(model, some_ids(10), 6)
    bad.feed(some_ids(3, 1))
    assert list(bad.generate(3, sampling=SamplingParams())) == tokens_alone(model, some_ids(10) + some_ids(3, 1), 3)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_after_a_forward_that_failed(error):
    model = sinkattn.enable(build("llama", torch.float64), S, W, HEADROOM)
    pool = StreamPool(model, 2)
    stream, lost = pool.open(), pool.open()
    stream.feed(some_ids(20))
    lost.feed(some_ids(20, 1))
    with interrupted(model.model.layers[1], 0, error):
        stream.feed(some_ids(HEADROOM, 2))
    with interrupted(model.model.layers[1], 0, error):
        lost.feed(some_ids(W, 2))
    # What was fed is still to come; the forward has overwritten only tokens that nothing sees any more.
    assert list(stream.generate(3)) == tokens_alone(model, some_ids(20) + some_ids(HEADROOM, 2), 3)
    with pytest.raises(RuntimeError, match="a forward that failed has overwritten tokens that it sees"):
        next(lost.generate())
    lost.reset()
    lost.feed(some_ids(5))
    assert list(lost.generate(3)) == tokens_alone(model, some_ids(5), 3)


def test_invalid_arguments():
    model = enabled("llama", S, W)
    with pytest.raises(ValueError, match=r"model: expected a model prepared by sinkattn\.enable"):
        StreamPool(build("llama"))
    for name in ("max_streams", "max_parked", "max_prefix", "tokens_per_step"):
        with pytest.raises(ValueError, match=rf"{name}: expected . or more, got -1"):
            StreamPool(model, **{name: -1})
    with pytest.raises(ValueError, match=r"evict: expected 'token' or 'message', got 'all'"):
        StreamPool(model).open(evict="all")


def test_a_step_is_bounded():
    """A long text does not hold up the others: between two of their tokens at most `tokens_per_step` are fed."""
    model = model_in_double()
    pool = StreamPool(model, 2, tokens_per_step=5)
    talking, listening = pool.open(), pool.open()
    talking.feed(some_ids(3))
    tokens, widths = talking.generate(), []
    next(tokens)
    run = pool.scheduler.engine.memory.run

    def noted(inputs):
        widths.append(max(len(x.ids) for x in inputs))
        return run(inputs)

    pool.scheduler.engine.memory.run = noted
    feeder = threading.Thread(target=listening.feed, args=(some_ids(100),))
    feeder.start()
    got = [next(tokens) for _ in range(30)]
    feeder.join()
    assert max(widths) == 5
    assert got == tokens_alone(model, some_ids(3), 31)[1:]


@pytest.mark.parametrize("family", ["llama", "gemma2", "falcon_h1", "gpt2"])
def test_saved_streams_go_on_in_another_pool(family, tmp_path):
    model = model_in_double(family)
    params = SamplingParams(temperature=1.0, seed=5, repetition_penalty=1.2, logit_bias={3: -1.0, 5: float("-inf")})
    with StreamPool(model, 2, max_prefix=6) as pool:
        stream = pool.open(some_ids(5, 1), sampling=params)
        stream.feed(some_ids(30))
        drawn = list(stream.generate(7))
        stream.save(tmp_path / "a")
        want = list(stream.generate(20))
        seen = stream.in_sight
    ids = [*some_ids(5, 1), *some_ids(30)]
    assert drawn + want == tokens_alone(model, ids, 27, params, num_sinks=5)
    assert list(StreamPool(model, 2, max_prefix=5).load(tmp_path / "a").generate(20)) == want  # before any forward
    pool = StreamPool(model, 1, max_parked=1, max_prefix=9)
    pool.open().feed(some_ids(20))
    again = pool.load(tmp_path / "a")
    assert list(again.generate(20)) == want
    assert again.in_sight == seen
    cache = sinkattn.load_stream(model, tmp_path / "a")
    # The last token that was generated had not been fed.
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([drawn[-1:]]), **{forward_cache(model): cache}).logits[:, -1]
    # Some of a state is in single precision in any model.
    torch.testing.assert_close(logits, logits_alone(model, ids + drawn, num_sinks=5), atol=1e-5, rtol=1e-5)


def test_a_saved_stream_has_its_messages(tmp_path):
    model = model_in_double()
    pool = StreamPool(model, 2, max_prefix=4)
    stream = pool.open(some_ids(4, 1), evict="message")
    for length in (5, 6, 7, 2):
        stream.feed(some_ids(length, length))
    stream.save(tmp_path / "a")
    other = pool.load(tmp_path / "a")
    for each in (stream, other):
        each.feed(some_ids(3, 8))
    assert other.in_sight == stream.in_sight
    assert list(other.generate(9)) == list(stream.generate(9))
    assert other.in_sight == stream.in_sight


def test_a_stream_is_saved_that_was_rolled_back_into_a_long_message(tmp_path):
    """Where that message begins is forgotten by then, so that no message is known."""
    pool = StreamPool(model_in_double(), 2, max_prefix=4)
    stream = pool.open(some_ids(4, 1), evict="message")
    stream.feed(some_ids(3 * W, 2))
    stream.feed(some_ids(2, 3))
    stream.rollback(4)
    assert not stream.message_begins
    stream.save(tmp_path / "a")
    other = pool.load(tmp_path / "a")
    for each in (stream, other):
        each.feed(some_ids(3, 8))
    assert other.in_sight == stream.in_sight
    assert list(other.generate(9)) == list(stream.generate(9))


def test_files_that_a_pool_refuses(tmp_path):
    model = model_in_double()
    pool = StreamPool(model, 2, max_prefix=4)
    cache = sinkattn.SinkCache(model)
    logits_alone(model, some_ids(5))
    cache.save(tmp_path / "cache")
    with pytest.raises(ValueError, match=r"path: expected a stream of a StreamPool, got .*, which SinkCache.save"):
        pool.load(tmp_path / "cache")
    stream = pool.open(some_ids(4), sampling=SamplingParams(processors=[Broken()]))
    stream.save(tmp_path / "a")
    with pytest.raises(ValueError, match="sampling: expected the parameters again"):
        pool.load(tmp_path / "a")
    pool.load(tmp_path / "a", sampling=SamplingParams()).close()
    with pytest.raises(ValueError, match=r"path: num_sinks: expected up to 2 \(max_prefix\), got 4"):
        StreamPool(model, 2).load(tmp_path / "a", sampling=SamplingParams())
    pool.open()
    with pytest.raises(PoolFullError):
        pool.load(tmp_path / "a", sampling=SamplingParams())
    assert len(pool) == 2


def test_the_draws_of_others_are_not_changed_by_a_fault():
    model = model_in_double()
    pool, params = StreamPool(model, 2), SamplingParams(temperature=1.0, seed=3)
    good, bad = (
        pool.open(sampling=params),
        pool.open(sampling=SamplingParams(temperature=1.0, seed=1, processors=[Nowhere()])),
    )
    for stream in (good, bad):
        stream.feed(some_ids(10))
    tokens, failing = good.generate(), bad.generate()
    got = []
    for _ in range(3):
        with pytest.raises(RuntimeError, match="logits: expected finite ones"):
            next(bad.generate() if failing is None else failing)
        failing = None
        got.append(next(tokens))
    assert got == tokens_alone(model, some_ids(10), 3, params)


class Nowhere(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores * float("nan")


def test_a_suspended_iterator_goes_on_after_a_rollback():
    """Nothing is chosen from the logits after a token that was rolled back, though others run steps meanwhile."""
    model = model_in_double()
    pool = StreamPool(model, 2)
    stream, other = pool.open(), pool.open()
    for each in (stream, other):
        each.feed(some_ids(9))
    tokens, others = stream.generate(), other.generate()
    ids = some_ids(9) + [next(tokens) for _ in range(3)]
    stream.rollback(2)
    next(others)
    assert next(tokens) == ids[-2]
    stream.reset()
    next(others)
    with pytest.raises(RuntimeError, match="stream: expected tokens to go on from, got none"):
        next(tokens)
    stream.feed(some_ids(4))
    assert list(stream.generate(2)) == tokens_alone(model, some_ids(4), 2)


def test_closing_an_iterator_leaves_no_trace():
    """Draws, and the error of a token that nobody asked for, are those of a stream that has never gone ahead."""
    model = model_in_double()
    pool = StreamPool(model, 3)
    params = SamplingParams(temperature=1.0, seed=4)
    drawing, failing, other = pool.open(sampling=params), pool.open(), pool.open()
    for each in (drawing, failing, other):
        each.feed(some_ids(9))
    others, tokens = other.generate(), drawing.generate()
    ids = [*some_ids(9), next(tokens)]
    failing_tokens = failing.generate(sampling=SamplingParams(processors=[BrokenAfter(9)]))
    next(failing_tokens)
    for _ in range(2):
        next(others)  # both choose ahead, and one of them fails
    for iterator in (tokens, failing_tokens):
        iterator.close()
    failing.feed([3])  # does not fail
    assert [*ids, *drawing.generate(3)] == some_ids(9) + tokens_alone(model, some_ids(9), 4, params)


class BrokenAfter(LogitsProcessor):
    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] > self.length:
            raise OSError("no such file")
        return scores


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_token_that_cannot_be_chosen_costs_others_no_draw(temperature):
    model = model_in_double()
    pool, params = StreamPool(model, 2), SamplingParams(temperature=1.0, seed=4)
    good = pool.open(sampling=params)
    bias = dict.fromkeys(range(VOCABULARY), -torch.inf)
    bad = pool.open(sampling=SamplingParams(temperature=temperature, logit_bias=bias))
    for each in (good, bad):
        each.feed(some_ids(9))
    tokens, failing = good.generate(), bad.generate()
    got = []
    for _ in range(3):
        got.append(next(tokens))
        with pytest.raises(RuntimeError, match="a token that is not forbidden"):
            next(bad.generate())
    assert got == tokens_alone(model, some_ids(9), 3, params)
    failing.close()


def test_a_message_still_begins_where_its_first_token_runs_again():
    model = sinkattn.enable(build("llama", torch.float64, num_hidden_layers=1), 0, W, HEADROOM)
    stream = StreamPool(model, 1).open(evict="message")
    for message in (some_ids(9, 1), some_ids(6, 2), [7]):
        stream.feed(message)
    assert stream.in_sight == [*some_ids(6, 2), 7]
    token, _ = stream.generate(2)
    stream.rollback(2)
    assert list(stream.generate(1)) == [token]
    stream.feed(some_ids(8, 3), begins_message=False)
    assert stream.in_sight == [7, token, *some_ids(8, 3)]
    stream.feed(some_ids(3, 4))
    assert stream.in_sight == some_ids(3, 4)


def test_a_message_makes_room_for_a_window_at_most():
    pool = StreamPool(sinkattn.enable(build("llama", num_hidden_layers=1), 0, W, HEADROOM), 1, max_prefix=2)
    stream = pool.open(some_ids(2), evict="message")
    stream.feed(some_ids(3), num_following=W)
    with pytest.raises(ValueError, match=f"num_following: expected up to the window, {W}, got {W + 1}"):
        stream.feed(some_ids(3), num_following=W + 1)
    assert len(stream) == 5


@pytest.mark.parametrize("begins_message", [True, False])
def test_a_message_runs_with_what_it_makes_room_for(begins_message, monkeypatch):
    """In one forward, whatever leaves for it; each token is that of a plain model which sees what it sees."""
    model = sinkattn.enable(build("llama", torch.float64, num_hidden_layers=1), 0, W, HEADROOM)
    plain, pool = build("llama", torch.float64, num_hidden_layers=1), StreamPool(model, 1, max_prefix=2)
    work, run = [], pool.scheduler.engine.memory.run
    monkeypatch.setattr(
        pool.scheduler.engine.memory, "run", lambda inputs: work.append(len(inputs[0].ids)) or run(inputs)
    )
    for num_following in (2, 0):
        stream = pool.open(some_ids(2), evict="message")
        record = Record(prefix=some_ids(2), evict="message")
        work.clear()
        for turn in range(12):
            for ids, options in (
                (some_ids(4, turn), {"num_following": num_following}),
                (some_ids(2, -1 - turn), {"begins_message": begins_message}),
            ):
                stream.feed(ids, **options, wait=False)
                record.feed(ids, **options)
            for token in stream.generate(2):
                record.generate(token)
            assert stream.in_sight == record.in_sight(len(record.ids))
            stream.catch_up()
        record.check(model, plain)
        first_forwards = [8 if turn == 0 else 6 for turn in range(12)]
        assert (work == [count for first in first_forwards for count in (first, 1, 1)]) == (num_following == 2)
        stream.close()


def test_models_without_rings_evict_no_messages():
    with pytest.raises(ValueError, match=r"evict: expected 'token', as models .*, got 'message'"):
        StreamPool(model_in_double("gpt2"), 1).open(evict="message")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_empty_stream_has_nothing_to_forget(family):
    stream = StreamPool(model_in_double(family), 1).open([5])
    stream.rollback(1)
    with pytest.raises(RuntimeError, match="stream: cannot forget 1 of 0 tokens"):
        stream.rollback(1)


def wait_for_all(streams, count, pool, steps):
    """As if a thread fed each stream so many tokens."""
    for stream in streams:
        stream._state.queue.extend(some_ids(count))
        stream._state.num_feeding = 1
    with pool.scheduler.condition:
        for _ in range(steps):
            pool.scheduler._run_step()


def test_all_that_are_fed_take_turns():
    pool = StreamPool(model_in_double(), 3, tokens_per_step=4)
    streams = [pool.open() for _ in range(3)]
    wait_for_all(streams, 40, pool, 6)
    assert [len(stream._state.queue) for stream in streams] == [32] * 3


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.enable_grad, lambda: torch.autocast("cpu")])
def test_tokens_do_not_depend_on_the_modes_of_the_thread_that_runs_the_step(mode):
    model = sinkattn.enable(build("llama"), S, W, HEADROOM)
    pool = StreamPool(model, 2, max_parked=1)
    streams = [pool.open() for _ in range(3)]
    with mode():
        for index, stream in enumerate(streams):
            stream.feed(some_ids(20, index))
        got = in_turn([stream.generate() for stream in streams], 3)
    got = [[*own, *stream.generate(3)] for own, stream in zip(got, streams, strict=True)]
    assert got == [tokens_alone(model, some_ids(20, index), 6) for index in range(3)]
    assert pool.scheduler.engine._logits.dtype == torch.float32


def test_text_with_ids_that_the_model_lacks_is_refused():
    class Tokenizer:
        def __call__(self, text, **options):
            return type("Encoding", (), {"input_ids": [VOCABULARY]})

    stream = StreamPool(model_in_double(), 1, tokenizer=Tokenizer()).open()
    with pytest.raises(ValueError, match=f"tokens: expected ids from 0 to {VOCABULARY - 1}, got {VOCABULARY}"):
        stream.feed("text")
    stream.feed([1])


def test_a_pool_is_not_copied():
    pool = StreamPool(model_in_double(), 1)
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="a StreamPool can be neither copied nor pickled"):
            copied(pool)


@pytest.mark.parametrize("headroom", [0, HEADROOM])
def test_a_step_that_failed_is_repeated(headroom):
    """A token overwrites one that has left its own window."""
    model = sinkattn.enable(build("llama", torch.float64), S, W, headroom)
    pool = StreamPool(model, 2)
    streams = [pool.open() for _ in range(2)]
    for index, stream in enumerate(streams):
        stream.feed(some_ids(30, index))
    iterators = [stream.generate() for stream in streams]
    got = in_turn(iterators, 2)
    with interrupted(model.model.layers[1], 0, KeyboardInterrupt):
        while True:
            got[0].append(next(iterators[0]))
    iterators[0] = streams[0].generate()
    got = [[*own, *(next(tokens) for _ in range(8 - len(own)))] for own, tokens in zip(got, iterators, strict=True)]
    assert got == [tokens_alone(model, some_ids(30, index), 8) for index in range(2)]
    streams[0].rollback(headroom)
    assert next(iterators[0]) == [*got[0], *tokens_alone(model, some_ids(30) + got[0], 1)][8 - headroom]


def test_the_first_forward_may_fail_while_others_wait_for_a_row():
    model = sinkattn.enable(build("llama", torch.float64), S, W, HEADROOM)
    pool = StreamPool(model, 1, max_parked=1)
    first, second = pool.open(), pool.open()
    with interrupted(model.model.layers[1], 0, RuntimeError):
        first.feed(some_ids(20))
    second.feed(some_ids(5, 1))
    assert list(first.generate(3)) == tokens_alone(model, some_ids(20), 3)


def test_what_precedes_the_first_message_is_one():
    """Nothing leaves before it has to: neither what follows the prefix, nor a first message that gave the sinks."""
    pool = StreamPool(model_in_double(), 2, max_prefix=4)
    greeting = pool.open(some_ids(4), evict="message")
    greeted = list(greeting.generate(5))
    greeting.feed(some_ids(6, 1))
    assert greeting.in_sight == [*some_ids(4), *greeted, *some_ids(6, 1)]
    greeting.feed(some_ids(2, 2))
    assert greeting.in_sight == [*some_ids(4), *some_ids(6, 1), *some_ids(2, 2)]
    first = pool.open(evict="message")
    first.feed(some_ids(8))
    first.feed(some_ids(S + W - 8, 1))
    assert first.in_sight == [*some_ids(8), *some_ids(S + W - 8, 1)]
    first.feed([1])
    assert first.in_sight == [*some_ids(S), *some_ids(S + W - 8, 1), 1]


def test_ids_without_an_embedding_are_refused():
    model = build("llama", torch.float64)
    model.config.vocab_size += 8
    stream = StreamPool(sinkattn.enable(model, S, W), 1).open()
    with pytest.raises(ValueError, match=f"tokens: expected ids from 0 to {VOCABULARY - 1}, got {VOCABULARY}"):
        stream.feed([VOCABULARY])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("place", ["commit", "write"])
def test_an_interruption_after_a_forward_feeds_nothing_twice(family, place, monkeypatch):
    model = model_in_double(family)
    pool = StreamPool(model, 2)
    stream = pool.open()
    stream.feed(some_ids(20))
    owner = pool.scheduler.engine.memory if place == "commit" else StreamIds
    original, interrupted_calls = getattr(owner, place), []

    def interrupt(*arguments):
        original(*arguments)
        if not interrupted_calls:
            interrupted_calls.append(arguments)
            raise KeyboardInterrupt

    monkeypatch.setattr(owner, place, interrupt)
    with pytest.raises(KeyboardInterrupt):
        stream.feed(some_ids(3, 1))
    assert interrupted_calls
    assert list(stream.generate(9)) == tokens_alone(model, some_ids(20) + some_ids(3, 1), 9)
    assert len(stream) == 32


def test_an_interruption_before_tokens_are_counted_runs_them_again(monkeypatch):
    """Of models with a cache for each stream, which has counted them."""
    model = model_in_double("gpt2")
    pool = StreamPool(model, 2)
    stream = pool.open()
    stream.feed(some_ids(20))
    commit = Engine.commit

    def interrupt(self, segments):
        monkeypatch.setattr(Engine, "commit", commit)
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "commit", interrupt)
    with pytest.raises(KeyboardInterrupt):
        stream.feed(some_ids(3, 1))
    assert list(stream.generate(9)) == tokens_alone(model, some_ids(20) + some_ids(3, 1), 9)


def test_text_that_is_not_unicode_is_refused(tokenizer):
    stream = StreamPool(model_in_double(), 1, tokenizer=tokenizer).open()
    with pytest.raises(ValueError, match="tokens: expected text or ids"):
        stream.feed("\ud800")


def test_a_stream_saved_after_a_rollback_records_the_same_ids(tmp_path):
    pool = StreamPool(model_in_double(), 2)
    stream = pool.open()
    stream.feed(some_ids(40))
    stream.rollback(3)
    stream.save(tmp_path / "a")
    again = pool.load(tmp_path / "a")
    for mine, theirs in zip(again._state.ids.known(), stream._state.ids.known(), strict=True):
        assert mine.tolist() == theirs.tolist()
    assert again._state.ids.known()[0].tolist() == [0, 1, *range(40 - W - HEADROOM, 37)]


@pytest.mark.parametrize("seed", [-(2**63), 2**64 - 1])
def test_any_seed_is_saved(seed, tmp_path):
    pool = StreamPool(model_in_double(), 2)
    stream = pool.open(sampling=SamplingParams(temperature=1.0, seed=seed))
    stream.feed(some_ids(9))
    list(stream.generate(2))
    stream.save(tmp_path / "a")
    assert list(pool.load(tmp_path / "a").generate(9)) == list(stream.generate(9))
