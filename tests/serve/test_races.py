"""Requests for one session that cross each other, and errors in the midst of them."""

import asyncio
import threading
import time
from contextlib import AsyncExitStack

import pytest

from sinkattn.serve.conversation import Message
from sinkattn.serve.errors import ApiError
from sinkattn.serve.store import Store
from sinkattn.serve.uninterrupted import uninterrupted

HELLO = [Message("user", "Hello")]


class Replies:
    """Requests to the sessions of a server, within one event loop."""

    def __init__(self, server):
        self.server, self.sessions, self.opener = server, server.sessions, server._opener(None)

    async def reply(self, id, messages=HELLO, *, until=None, began=None, appends=False):
        session = self.sessions.of_request("", id, self.opener, messages)
        async with self.sessions.replying(session, self.opener, messages, appends=appends) as held:
            if began is not None:
                began.set()
            if until is not None:
                await until.wait()
            held.reply = "Yes"
            await held.content.stream.feed_async(self.opener.encoder.reply("Yes"), begins_message=False)
        return held

    async def reply_and_delete(self, id):
        """A reply that goes on until an event is set, and a deletion that waits for it."""
        go, began = asyncio.Event(), asyncio.Event()
        reply = asyncio.create_task(self.reply(id, until=go, began=began))
        await began.wait()
        deletion = asyncio.create_task(self.sessions.delete("", id))
        await asyncio.sleep(0)
        return go, reply, deletion


@pytest.fixture
def race(make_server, tmp_path):
    """Runs a coroutine function with `Replies`; at the end every stream is that of a session that nobody holds."""

    def run(function):
        server = make_server(folder=tmp_path)

        async def whole():
            await function(Replies(server))
            sessions = [*server.sessions.of("")]
            assert not any(session.is_used for session in sessions)
            assert all(session.content is not None for session in sessions)
            assert len(server.pool) == len(sessions)

        asyncio.run(whole())

    return run


def test_one_that_waited_for_a_deleted_session_leaves_the_next_one_alone(race):
    async def crossing(replies):
        go, first, deletion = await replies.reply_and_delete("a")
        appending = asyncio.create_task(replies.reply("a", appends=True))
        await asyncio.sleep(0)
        go.set()
        while len(replies.sessions):
            await asyncio.sleep(0)
        again, began = asyncio.Event(), asyncio.Event()
        next_one = asyncio.create_task(replies.reply("a", until=again, began=began))
        await deletion
        await began.wait()
        assert [session.id for session in replies.sessions.of("")] == ["a"]
        again.set()
        assert await next_one is not await first
        with pytest.raises(ApiError, match="deleted"):
            await appending
        assert [session.id for session in replies.sessions.of("")] == ["a"]

    race(crossing)


def test_one_that_is_cancelled_while_it_waits_holds_nothing(race):
    async def crossing(replies):
        go, began = asyncio.Event(), asyncio.Event()
        first = asyncio.create_task(replies.reply("a", until=go, began=began))
        await began.wait()
        tasks = [
            asyncio.create_task(x)
            for x in (
                replies.reply("a"),
                replies.sessions.fork("", "a", "b"),
                replies.sessions.delete("", "a"),
                replies.sessions.kind("", "a"),
            )
        ]
        await asyncio.sleep(0.01)
        for task in tasks:
            task.cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(each, asyncio.CancelledError) for each in done)
        assert first.done() is False
        go.set()
        await first

    race(crossing)


def test_copies_of_two_sessions_to_each_other_do_not_wait_for_each_other(race):
    async def crossing(replies):
        go, first, deletion = await replies.reply_and_delete("a")
        there = asyncio.create_task(replies.sessions.fork("", "a", "b"))
        await asyncio.sleep(0)
        go.set()
        while any(session.id == "a" for session in replies.sessions.of("")):
            await asyncio.sleep(0)
        back = asyncio.create_task(replies.sessions.fork("", "b", "a"))
        done = await asyncio.wait_for(asyncio.gather(first, deletion, there, back, return_exceptions=True), 10)
        assert [getattr(x, "status", None) for x in done] == [None, None, 404, 404]

    race(crossing)


def test_what_is_uninterrupted_ends_although_it_is_cancelled_twice():
    done = threading.Event()

    async def cancelling():
        task = asyncio.create_task(uninterrupted(asyncio.to_thread(lambda: time.sleep(0.05) or done.set())))
        for _ in range(2):
            await asyncio.sleep(0.005)
            task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert done.is_set()
        with pytest.raises(OSError, match="full"):
            await uninterrupted(failing())

    async def failing():
        raise OSError("full")

    asyncio.run(cancelling())


@pytest.mark.parametrize("delay", [0, 0.001, 0.01])
def test_one_that_is_cancelled_while_its_stream_is_opened_or_continued(race, delay):
    async def crossing(replies):
        for id_ in ("a", "a", "b"):
            task = asyncio.create_task(replies.reply(id_))
            await asyncio.sleep(delay)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await replies.reply("a")

    race(crossing)


def test_what_is_loaded_or_copied_for_one_that_is_cancelled_is_not_left_open(race):
    """The thread that opens the stream goes on; `race` looks for streams without a session."""

    async def crossing(replies):
        sessions = replies.sessions

        async def look():
            async with sessions.held("", "a"):
                pass

        for delay in (0, 0.001, 0.003):
            await replies.reply("a")
            for work in (sessions.fork("", "a", f"b{delay}"), look()):
                if work.__name__ == "look":
                    await sessions.close()
                task = asyncio.create_task(work)
                await asyncio.sleep(delay)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        await asyncio.sleep(0.1)

    race(crossing)


def test_what_is_deleted_while_it_is_saved_stays_deleted(race):
    async def crossing(replies):
        await replies.reply("a")
        async with AsyncExitStack() as stack:
            session = await stack.enter_async_context(replies.sessions.held("", "a"))
            deletion = asyncio.create_task(replies.sessions.delete("", "a"))
            await asyncio.sleep(0)
            await replies.sessions.save(session)
        await deletion
        assert await replies.sessions.kind("", "a") is None

    race(crossing)


def test_one_that_is_asked_for_while_it_makes_room_comes_back(make_server, tmp_path, monkeypatch):
    """Others that need room meanwhile take that of others; no session is lost or there twice."""
    server = make_server(max_streams=3, folder=tmp_path)
    save, saved = Store.save, []

    def slow(store, owner, id, *arguments):
        saved.append(id)
        time.sleep(0.1)
        save(store, owner, id, *arguments)

    monkeypatch.setattr(Store, "save", slow)

    async def crossing():
        replies = Replies(server)
        [tokens, *_] = [(await replies.reply(id, appends=True)).num_tokens for id in "abc"]
        making = [asyncio.create_task(replies.reply(id)) for id in "de"]
        while saved != ["a", "b"]:
            assert not any(task.done() for task in making)
            await asyncio.sleep(0.001)
        asking = [asyncio.create_task(replies.reply("a", appends=True)) for _ in range(2)]
        await asyncio.gather(*making, *asking)
        assert saved[:2] == ["a", "b"]
        assert asking[1].result().num_tokens > 2 * tokens
        assert len(server.pool) == len(server.sessions) == 3
        assert sorted(x["id"] for x in await server.sessions.described("")) == [*"abcde"]
        assert not any(session.is_used for session in server.sessions.of(""))

    asyncio.run(crossing())


def test_many_at_once(race):
    """Of all kinds for the same two sessions: each ends, as it should or with an error for the client."""

    async def crossing(replies):
        sessions = replies.sessions

        async def save(id_):
            async with sessions.held("", id_) as session:
                await sessions.save(session)

        tasks = []
        for index in range(60):
            id_ = "ab"[index % 2]
            kinds = (
                lambda id_=id_: replies.reply(id_),
                lambda id_=id_, index=index: sessions.fork("", id_, f"{id_}{index}"),
                lambda id_=id_: save(id_),
                lambda id_=id_: replies.reply(id_, appends=True),
                lambda id_=id_: sessions.restore("", id_),
                lambda id_=id_: sessions.delete("", id_),
                lambda index=index: sessions.delete("", f"a{index - 8}"),
            )
            tasks.append(asyncio.create_task(kinds[index % 7]()))
            if index % 9 == 0:
                await asyncio.sleep(0.002)
        for done in await asyncio.gather(*tasks, return_exceptions=True):
            assert not isinstance(done, BaseException) or isinstance(done, ApiError), done

    race(crossing)


def test_a_saved_file_that_cannot_be_used(race, tmp_path):
    async def crossing(replies):
        session = await replies.reply("a")
        session.is_named = False
        await replies.sessions.save(session)
        assert session.is_named  # so it is not closed for others, to come back as it was saved
        [path] = tmp_path.glob("*.safetensors")
        whole, tokens = path.read_bytes(), session.num_tokens
        for broken in (b"", b"x" * 100, whole[:-10], whole[: len(whole) // 2], whole.replace(b"turns", b"other")):
            path.write_bytes(broken)
            if b"other" in broken:
                session.content.stream.notes.clear()
                session.content.stream.notes["turns"] = [1]
                session.content.stream.save(path)
            with pytest.raises(ApiError, match="cannot be used") as caught:
                await replies.sessions.restore("", "a")
            assert caught.value.status == 409
            assert session.num_tokens == tokens  # as it was
        path.write_bytes(whole)
        await replies.sessions.restore("", "a")

    race(crossing)


def test_a_full_disk_loses_the_sessions_that_it_has_no_room_for_alone(race, monkeypatch):
    async def crossing(replies):
        for id_ in "abc":
            await replies.reply(id_)
        save = replies.sessions._store.save

        def full(owner, id, *rest):
            if id == "b":
                raise OSError(28, "No space left on device")
            save(owner, id, *rest)

        monkeypatch.setattr(replies.sessions._store, "save", full)
        async with replies.sessions.held("", "b") as session:
            with pytest.raises(ApiError, match="No space left") as caught:
                await replies.sessions.save(session)
        assert caught.value.status == 507
        await replies.sessions.close()
        assert not len(replies.sessions)
        assert [await replies.sessions.kind("", id_) is not None for id_ in "abc"] == [True, False, True]

    race(crossing)


def test_an_idle_session_that_cannot_be_saved_stays(race, monkeypatch):
    async def crossing(replies):
        sessions = replies.sessions
        tokens = (await replies.reply("a")).num_tokens
        monkeypatch.setattr("sinkattn.serve.session_table.time.monotonic", lambda: 1e12)
        for error in (OSError(28, "No space left on device"), RuntimeError("anything else")):

            def fail(*arguments, error=error):
                raise error

            with monkeypatch.context() as patch:
                patch.setattr(Store, "save", fail)
                await sessions.close_idle()
            assert [session.num_tokens for session in sessions.of("")] == [tokens]
        await sessions.close_idle()
        assert not len(sessions)
        assert [x["tokens"] for x in await sessions.described("")] == [tokens]

    race(crossing)


def test_the_session_is_as_before_if_a_message_cannot_be_added(race):
    async def crossing(replies):
        session = await replies.reply("a")
        before = session.content.stream.in_sight
        for messages in (
            [*HELLO, Message("assistant", "No"), Message("user", "<|end|>")],
            [Message("user", "x " * 300)],
        ):
            with pytest.raises(ApiError):
                await replies.reply("a", messages)
            assert session.content.stream.in_sight == before

    race(crossing)


def test_no_response_is_gone_on_from_that_the_session_has_forgotten(race):
    async def crossing(replies):
        sessions = replies.sessions
        session = await replies.reply("a")
        session.note_response("first")
        more = [*HELLO, Message("assistant", "Yes"), Message("user", "And?")]
        await replies.reply("a", more)
        session.note_response("second")
        await replies.reply("a", [*more[:-1], Message("user", "Something that is longer than what was before it?")])
        with pytest.raises(ApiError, match="not known"):
            await sessions.after("", "second")
        assert (await sessions.after("", "first")).num_tokens == session.responses["first"]
        await replies.reply("a", [Message("user", "Another one, with many words, " * 3)])
        assert (await sessions.after("", "first")).id != "a"  # but the copy from above

    race(crossing)


def test_no_step_runs_in_the_event_loop(race, monkeypatch):
    """Though a text is fed at any moment between the choice of a token and its use."""

    async def crossing(replies):
        stream = (await replies.reply("a")).content.stream
        scheduler, threads = replies.server.pool.scheduler, set()
        run_step = scheduler._run_step
        monkeypatch.setattr(scheduler, "_run_step", lambda: threads.add(threading.get_ident()) or run_step())

        to_thread, left = asyncio.to_thread, [5] * 5

        async def and_feed(*call):
            done = await to_thread(*call)
            if left:
                stream.feed([left.pop()], wait=False)
            return done

        monkeypatch.setattr(asyncio, "to_thread", and_feed)
        assert len([token async for token in stream.generate_async(10)]) == 10
        assert threads
        assert threading.get_ident() not in threads

    race(crossing)
