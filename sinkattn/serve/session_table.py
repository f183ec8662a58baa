"""`SessionTable`: which sessions a server has, and room for their streams."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from sinkattn.hf.pool.pool import StreamPool
from sinkattn.hf.pool.scheduler import PoolFullError
from sinkattn.hf.pool.stream import Stream
from sinkattn.serve.catching_up import CatchingUp
from sinkattn.serve.content import Content, Input
from sinkattn.serve.errors import ApiError
from sinkattn.serve.limits import Limits
from sinkattn.serve.session import Session
from sinkattn.serve.store import Store
from sinkattn.serve.uninterrupted import uninterrupted

LOGGER = logging.getLogger("sinkattn.serve")
# Seconds after which a client may try again when all streams are in use.
RETRY_AFTER = 5

Opened = TypeVar("Opened")


class SessionTable:
    """The sessions of all clients of a server, whose streams come and go. All methods are for one event loop.

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

    async def close_idle(self) -> None:
        """Forget the sessions that nobody has used for long, or leave them to the store."""
        for session in [*self._sessions.values()]:
            is_idle = not session.is_used and time.monotonic() - session.used_at > self._limits.idle_seconds
            if is_idle and session.content is not None:  # or it was closed while others were saved
                await self._give_up(session)

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

    def _add(self, owner: str, id: str) -> Session[Any]:
        session = self._sessions[owner, id] = Session(owner, id)
        return session

    def _is_known(self, owner: str, id: str) -> bool:
        """Whether there is a session, here, or saved, or at another server."""
        return (owner, id) in self._sessions or self._is_kept(owner, id)

    def _is_kept(self, owner: str, id: str) -> bool:
        """Whether a session is saved, or at another server."""
        is_elsewhere = self._store is not None and self._store.is_elsewhere(owner, id)
        return is_elsewhere or self._is_stored(owner, id)

    def _is_stored(self, owner: str, id: str) -> bool:
        return self._store is not None and (owner, id) in self._store

    def _note(self, session: Session[Any], *, is_unsaved: bool) -> None:
        if self._store is not None:
            self._store.note(session.owner, session.id, is_unsaved=is_unsaved)

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

    async def _replace(self, session: Session[Input], content: Content[Input]) -> None:
        """Let a session have other contents, and close those that it has."""
        old, session.content, session.responses = session.content, content, {}
        if old is not None:
            await asyncio.to_thread(old.stream.close)

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
        """Close one of the sessions that no request uses; False if there is none that can be closed.

        That which was unused for longest, one without a name if there is any.
        """
        unused = [x for x in self._sessions.values() if not x.is_used and x.content is not None]
        unnamed = [x for x in unused if not x.is_named]
        named = [] if self._store is None else unused
        session = min(unnamed or named, key=lambda x: x.used_at, default=None)
        return session is not None and await self._give_up(session)

    async def _give_up(self, session: Session[Any]) -> bool:
        """Close a session that no request uses; one with a name is left to the store, if there is one.

        False if it stays, as it cannot be saved.
        """
        if self._store is not None and session.is_named:
            return await self._leave_to_store(session)
        await self._close(session)
        return True

    async def _leave_to_store(self, session: Session[Any]) -> bool:
        """Save and close a session that no request uses; False if it stays, as it cannot be saved."""
        async with session.alone():
            try:
                await self.save(session)
            except Exception:
                LOGGER.exception("a session stays, as it cannot be saved")
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

    async def _close(self, session: Session[Any]) -> None:
        content, session.content = session.content, None
        self._forget_if_empty(session)
        if content is not None:
            await asyncio.to_thread(content.stream.close)

    def _forget_if_empty(self, session: Session[Any]) -> None:
        if session.content is None:
            session.is_closed = True
            if self._sessions.get(key := (session.owner, session.id)) is session:
                del self._sessions[key]
                if self._store is not None:
                    self._store.release(*key)
