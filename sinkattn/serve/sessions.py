"""`Sessions`: the sessions of all clients of a server, for their requests."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

from sinkattn.serve.content import Content, Input, Opener
from sinkattn.serve.errors import ApiError
from sinkattn.serve.session import Session, session_of
from sinkattn.serve.session_table import SessionTable
from sinkattn.serve.uninterrupted import uninterrupted


class Sessions(SessionTable):
    """What requests do with the sessions of a server; each client sees its own ones only."""

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
        own = session_of(response)
        known = [x for x in self.of(owner) if response in x.responses]
        if not any(x.id == own for x in known) and self._is_known(owner, own):
            async with self.held(owner, own) as session:  # it is loaded if it is saved
                known += [session] if response in session.responses else []
        # The one that ends there, if there is one, needs no copy. Copies that have a name stay as they are.
        for session in sorted(known, key=lambda x: (x.num_tokens != x.responses[response], x.id != own))[:1]:
            is_free = not session.is_used and (session.id == own or not session.is_named)
            if is_free and session.responses[response] == session.num_tokens:
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
        async with self.held(owner, id) as session:
            # Nobody uses a new id yet, so this does not wait. Two requests that wait, each with a session that the
            # other one wants, would wait for ever.
            if self._is_known(owner, new_id):
                raise ApiError(409, f"session_id: there is a session {new_id!r} already", param="session_id")
            async with self._locked(owner, new_id) as fork:
                if self._store is not None:
                    await self._store.claim(owner, new_id)
                await self._make_room(owner)
                await uninterrupted(self._copy(session, fork))
                self._note(fork, is_unsaved=True)
        return fork

    async def _copy(self, session: Session[Any], fork: Session[Any]) -> None:
        assert session.content is not None
        fork.content = await self._with_room(session.content.fork)
        fork.responses = {**session.responses}
