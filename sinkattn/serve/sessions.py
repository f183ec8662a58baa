"""`Sessions`: the sessions of all clients of a server."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

from sinkattn.hf.pool.pool import StreamPool
from sinkattn.hf.pool.scheduler import PoolFullError
from sinkattn.hf.pool.stream import Stream
from sinkattn.serve.catching_up import CatchingUp
from sinkattn.serve.content import Content, Input, Opener
from sinkattn.serve.errors import ApiError
from sinkattn.serve.limits import Limits
from sinkattn.serve.session import Session, session_of
from sinkattn.serve.store import Store
from sinkattn.serve.uninterrupted import uninterrupted

LOGGER = logging.getLogger("sinkattn.serve")
# Seconds after which a client may try again when all streams are in use.
RETRY_AFTER = 5

Opened = TypeVar("Opened")


class Sessions:
    """Sessions of all clients; each sees its own ones only. All methods are for one event loop.

    Args:
        pool: of the streams.
        limits: of clients.
        restored: makes contents of a stream and their notes.
        store: where they are saved; None for nowhere.
    """

    def __init__(
        self,
        pool: StreamPool,
        limits: Limits,
        restored: Callable[[Stream, dict[str, Any]], Content[Any]],
        store: Store | None,
    ) -> None:
        self._pool, self._limits, self._restored, self._store = pool, limits, restored, store
        self._sessions: dict[tuple[str, str], Session[Any]] = {}
        self._catching_up = CatchingUp()

    def __len__(self) -> int:
        return len(self._sessions)

    def of(self, owner: str) -> list[Session[Any]]:
        """Sessions of a client, those first that were used last."""
        return sorted((x for x in self._sessions.values() if x.owner == owner), key=lambda x: -x.used_at)

    async def described(self, owner: str) -> list[dict[str, Any]]:
        """Sessions of a client as the API has them: those that are here, and then those that are only saved."""
        saved = [] if self._store is None else await asyncio.to_thread(self._store.described, owner)
        live = self.of(owner)
        ids = {session.id for session in live}
        return [*(x.described() for x in live), *(x for x in saved if x["id"] not in ids)]

    @asynccontextmanager
    async def held(self, owner: str, id: str) -> AsyncIterator[Session[Any]]:
        """A session by its id, which is loaded if it is saved, while no request uses it.

        Raises ApiError if the client has none of that id.
        """
        if self._is_known(owner, id):
            async with self._locked(owner, id) as session:
                await self._load(session)
                if session.content is not None:
                    yield session
                    return
        raise ApiError(404, f"session_id: there is no session {id!r}", param="session_id")

    @asynccontextmanager
    async def _locked(self, owner: str, id: str) -> AsyncIterator[Session[Any]]:
        """The session of an id, which begins if there is none, while no other request uses it."""
        while True:
            session = self._sessions.get((owner, id)) or self._add(owner, id)
            async with session.alone():
                if not session.is_closed:  # since this has waited; then there may be another one of this id
                    try:
                        yield session
                    finally:
                        self._forget_if_empty(session)
                    return

    async def kind(self, owner: str, id: str) -> object:
        """That of what is in a session, which is loaded if it is saved; None if there is none."""
        if not self._is_known(owner, id):
            return None
        async with self.held(owner, id) as session:
            return None if session.content is None else session.content.kind

    def of_request(self, owner: str, id: str | None, opener: Opener[Input], inputs: Sequence[Input]) -> Session[Input]:
        """The session that a request names, or else the one that it continues. `replying` follows at once."""
        return self.continued(owner, opener, inputs) if id is None else self.named(owner, id)

    def named(self, owner: str, id: str) -> Session[Any]:
        """A session by its id, which begins if there is none. `replying` follows at once."""
        session = self._sessions.get((owner, id)) or self._add(owner, id)
        session.is_named = True
        return session

    def continued(self, owner: str, opener: Opener[Input], inputs: Sequence[Input]) -> Session[Input]:
        """The session of which most is in sight among those that inputs continue, or else a new one.

        `replying` follows at once.
        """
        continued = [
            session
            for session in self.of(owner)
            if not session.is_used
            and (content := session.content) is not None
            and content.kind == opener.kind
            and content.num_known(inputs)
        ]
        best = max(continued, key=lambda x: x.num_in_sight, default=None)
        return self._add(owner, uuid.uuid4().hex) if best is None else best

    async def after(self, owner: str, response: str) -> Session[Any]:
        """A session that goes on after a response: its own one, or a copy if that has gone on since. See `response_id`.

        `replying` follows at once. Raises ApiError if the response is not known any more.
        """
        known = [x for x in self.of(owner) if response in x.responses]
        if not known and self._is_known(owner, id := session_of(response)):
            async with self.held(owner, id) as session:  # it is loaded if it is saved
                known = [session] if response in session.responses else []
        # The one that ends there, if there is one, needs no copy.
        for session in sorted(known, key=lambda x: x.num_tokens != x.responses[response])[:1]:
            if session.responses[response] == session.num_tokens and not session.is_used:
                return session
            fork = await self.fork(owner, session.id, uuid.uuid4().hex)
            async with fork.alone():
                # Unless the session has been changed before it was copied.
                if fork.content is not None and (length := fork.responses.get(response)) is not None:
                    with suppress(RuntimeError):
                        await asyncio.to_thread(fork.content.back_to, length)
                        fork.forget_responses()
                        return fork
                await self._close(fork)
        message = f"previous_response_id: {response!r} is not known, or too far back"
        raise ApiError(404, message, param="previous_response_id", code="previous_response_not_found")

    @asynccontextmanager
    async def replying(
        self,
        session: Session[Input],
        opener: Opener[Input],
        inputs: Sequence[Input],
        *,
        appends: bool,
        response: str | None = None,
    ) -> AsyncIterator[Session[Input]]:
        """A session, for this request alone while it lasts, whose stream is up to the reply to these inputs.

        Args:
            session: of the client; in its place comes another one of its id if it is closed while this waits for it.
            opener: begins a stream, if need be.
            inputs: all so far, or those from any point on that is not in sight any more.
            appends: whether they follow those of the session instead.
            response: id of the response, after which a request may go on; None for none.
        """
        async with self._locked(session.owner, session.id) as held:
            if held is not session and appends and not self._is_kept(session.owner, session.id):
                raise ApiError(409, "session_id: the session was deleted meanwhile", param="session_id")
            held.is_named |= session.is_named
            content = await uninterrupted(self._go_on(held, opener, inputs, appends=appends))
            held.reply = ""
            self._note(held, is_unsaved=True)
            content.begin_reply()
            try:
                yield held
            finally:
                held.used_at = time.monotonic()
                try:
                    if content.end_reply(held.reply):
                        self._catching_up.begin(content.stream)
                except RuntimeError:
                    await self._close(held)  # the pool has given its stream up
                else:
                    held.note_response(response)

    async def delete(self, owner: str, id: str) -> None:
        """Forget a session and what was saved of it, when no request uses it any more; raises ApiError for none."""
        if self._is_known(owner, id):
            async with self._locked(owner, id) as session:
                if self._store is not None:
                    await self._store.claim(owner, id)
                if session.content is not None or self._is_stored(owner, id):
                    if self._store is not None:
                        await uninterrupted(asyncio.to_thread(self._store.delete, owner, id))
                    await self._close(session)
                    return
        raise ApiError(404, f"session_id: there is no session {id!r}", param="session_id")

    async def save(self, session: Session[Any]) -> None:
        """Save a session that is held; raises ApiError if that is not possible."""
        if self._store is None:
            raise ApiError(400, "server: has no folder for sessions", code="no_store")
        content = session.content
        assert content is not None
        session.is_named = True  # or it could be closed, and come back as it was saved
        try:
            notes = {**content.notes(), "session": session.described(), "responses": session.responses}
            # Or what is saved next could be overwritten with what a thread that goes on has from before.
            await uninterrupted(asyncio.to_thread(self._store.save, session.owner, session.id, content.stream, notes))
        except OSError as error:
            raise ApiError(507, f"server: {error}") from error
        self._note(session, is_unsaved=session.has_lost_turns)

    async def restore(self, owner: str, id: str) -> Session[Any]:
        """Let a session be as it was saved, when no request uses it any more.

        Raises ApiError if it was not saved, or with another model.
        """
        if self._is_known(owner, id):
            async with self._locked(owner, id) as session:
                if session.content is None:
                    await self._load(session)
                elif self._is_stored(owner, id):
                    await uninterrupted(self._reload(session))
                if self._is_stored(owner, id):
                    self._note(session, is_unsaved=session.has_lost_turns)
                    return session
        raise ApiError(404, f"session_id: nothing is saved of {id!r}", param="session_id")

    async def fork(self, owner: str, id: str, new_id: str) -> Session[Any]:
        """A copy of a session, with another id; raises ApiError if there is one of that id, or no room."""
        if not self._is_known(owner, id):
            raise ApiError(404, f"session_id: there is no session {id!r}", param="session_id")
        if self._is_known(owner, new_id):
            raise ApiError(409, f"session_id: there is a session {new_id!r} already", param="session_id")
        async with self._locked(owner, new_id) as fork:
            if self._store is not None:
                await self._store.claim(owner, new_id)
            async with self.held(owner, id) as session:
                await self._make_room(owner)
                await uninterrupted(self._copy(session, fork))
            self._note(fork, is_unsaved=True)
        return fork

    async def _copy(self, session: Session[Any], fork: Session[Any]) -> None:
        assert session.content is not None
        fork.content = await self._with_room(session.content.fork)
        fork.responses = {**session.responses}

    async def close_idle(self) -> None:
        """Forget the sessions that nobody has used for long, or leave them to the store."""
        for session in [*self._sessions.values()]:
            if not session.is_used and time.monotonic() - session.used_at > self._limits.idle_seconds:
                async with session.alone():
                    await self._store_and_close(session)

    async def hand_over(self) -> None:
        """Leave to the store the sessions that another server wants, unless a request uses them."""
        for key in [] if self._store is None else self._store.wanted():
            session = self._sessions.get(key)
            if session is not None and session.content is not None and not session.is_used:
                await self._leave_to_store(session)

    async def close(self) -> None:
        """Forget all sessions, or leave them to the store, when no request uses them any more."""
        for session in [*self._sessions.values()]:
            async with session.alone():
                await self._store_and_close(session)

    async def _leave_to_store(self, session: Session[Any]) -> bool:
        """Save and close a session that no request uses; False if it stays, as it cannot be saved."""
        async with session.alone():
            try:
                await self.save(session)
            except ApiError as error:
                LOGGER.error("a session stays, as it cannot be saved: %s", error)
                return False
            await self._close(session)
            return True

    async def _store_and_close(self, session: Session[Any]) -> None:
        if self._store is not None and session.is_named and session.content is not None:
            try:
                await self.save(session)
            except Exception:
                LOGGER.exception("a session is lost")  # the others are not
        await self._close(session)

    def _note(self, session: Session[Any], *, is_unsaved: bool) -> None:
        if self._store is not None:
            self._store.note(session.owner, session.id, is_unsaved=is_unsaved)

    def _is_known(self, owner: str, id: str) -> bool:
        """Whether there is a session, here, or saved, or at another server."""
        return (owner, id) in self._sessions or self._is_kept(owner, id)

    def _is_kept(self, owner: str, id: str) -> bool:
        """Whether a session is saved, or at another server."""
        is_elsewhere = self._store is not None and self._store.is_elsewhere(owner, id)
        return is_elsewhere or self._is_stored(owner, id)

    def _is_stored(self, owner: str, id: str) -> bool:
        return self._store is not None and (owner, id) in self._store

    def _add(self, owner: str, id: str) -> Session[Any]:
        session = self._sessions[owner, id] = Session(owner, id)
        return session

    async def _go_on(
        self, session: Session[Input], opener: Opener[Input], inputs: Sequence[Input], *, appends: bool
    ) -> Content[Input]:
        """Bring the stream of a session up to the reply to inputs; the session is as before if that is not possible."""
        await self._load(session)
        if session.has_lost_turns:
            session.has_lost_turns = False
            self._note(session, is_unsaved=False)
            if appends:
                message = "append: turns since the session was saved are lost; append again to go on from there"
                raise ApiError(409, message, param="session_id", code="turns_lost")
        content, known = session.content, None
        if content is not None and content.kind != opener.kind and appends:
            raise ApiError(400, "append: expected the system prompt of the session, or none, and messages where it has")
        try:
            if content is not None and content.kind == opener.kind:
                known = 0 if appends else await asyncio.to_thread(content.rewind, inputs)
                session.forget_responses()
            session.num_reused = 0 if known is None else session.num_in_sight
            if content is not None and known is not None:
                await asyncio.to_thread(content.add, inputs[known:])
                return content
            await self._make_room(session.owner)
            begun = await self._with_room(lambda: opener.open(self._pool, inputs))
        except ValueError as error:
            raise ApiError(400, f"{opener.inputs}: {error}", param=opener.inputs) from error
        await self._replace(session, begun)
        return begun

    async def _replace(self, session: Session[Input], content: Content[Input]) -> None:
        """Let a session have other contents, and close those that it has."""
        old, session.content, session.responses = session.content, content, {}
        if old is not None:
            await asyncio.to_thread(old.stream.close)

    async def _load(self, session: Session[Any]) -> None:
        """Let an empty session have what was saved of it, if anything; raises ApiError if that is not possible."""
        store = self._store
        if session.content is None and store is not None:
            session.has_lost_turns |= await store.claim(session.owner, session.id)
            if (session.owner, session.id) in store:
                await self._make_room(session.owner)
                await uninterrupted(self._reload(session))

    async def _reload(self, session: Session[Any]) -> None:
        """Let a session have what was saved of it; raises ApiError if that cannot be used."""
        store = self._store
        assert store is not None
        stream = await self._with_room(lambda: store.load(session.owner, session.id))
        try:
            content = await asyncio.to_thread(self._restored, stream, stream.notes)
            created, responses = stream.notes["session"]["created"], {**stream.notes["responses"]}
        except (ApiError, LookupError, TypeError, ValueError) as error:
            await asyncio.to_thread(stream.close)
            message = f"session_id: the saved session cannot be used: its notes: {error}"
            raise ApiError(409, message, param="session_id") from error
        await self._replace(session, content)
        session.created, session.responses, session.is_named = created, responses, True

    async def _make_room(self, owner: str) -> None:
        """See to it that a client has no more sessions than it may have."""
        own = self.of(owner)
        if len(own) > self._limits.sessions_per_key:
            if not (idle := [x for x in own if not x.is_named and not x.is_used]):
                most = self._limits.sessions_per_key
                raise ApiError(429, f"sessions: expected up to {most} of a key; delete one first", retry_after=60)
            await self._close(idle[-1])

    async def _with_room(self, open_stream: Callable[[], Opened]) -> Opened:
        """What a function opens, for which another stream is closed if need be."""
        while True:
            try:
                return await asyncio.to_thread(open_stream)
            except PoolFullError:
                if not await self._close_one():
                    message = "server: all streams are in use; try again later"
                    raise ApiError(429, message, retry_after=RETRY_AFTER) from None

    async def _close_one(self) -> bool:
        """Close one of the sessions that no request uses; those with a name are left to the store, if there is one.

        That which was unused for longest, one without a name if there is any. False if there is none.
        """
        unused = [x for x in self._sessions.values() if not x.is_used and x.content is not None]
        unnamed = [x for x in unused if not x.is_named]
        session = min(unnamed or unused, key=lambda x: x.used_at, default=None)
        if session is None or (session.is_named and self._store is None):
            return False
        if session.is_named:
            return await self._leave_to_store(session)
        await self._close(session)
        return True

    def _forget_if_empty(self, session: Session[Any]) -> None:
        if session.content is None:
            session.is_closed = True
            if self._sessions.get(key := (session.owner, session.id)) is session:
                del self._sessions[key]
                if self._store is not None:
                    self._store.release(*key)

    async def _close(self, session: Session[Any]) -> None:
        content, session.content = session.content, None
        self._forget_if_empty(session)
        if content is not None:
            await asyncio.to_thread(content.stream.close)
