"""`Store`: saved sessions in a folder, for servers that start anew, and for several at a time."""

from __future__ import annotations

import hashlib
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from sinkattn.hf.pool.pool import StreamPool
from sinkattn.hf.pool.saved import read_notes
from sinkattn.hf.pool.stream import Stream
from sinkattn.serve.claims import Claims
from sinkattn.serve.errors import ApiError

SUFFIX = ".session.safetensors"
# Seconds that a request waits for a session which another server has.
CLAIM_SECONDS = 30.0


class Store:
    """Files of sessions, each with the client and the id in its name, as digests.

    Several servers may share the folder: a session is at the one that has claimed it, saved or not.

    Args:
        folder: of the files; made if need be.
        pool: of the streams.
    """

    def __init__(self, folder: Path, pool: StreamPool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._pool = folder, pool
        self._claims = Claims(folder / "claims")
        self._claimed: dict[str, tuple[str, str]] = {}

    def __contains__(self, key: tuple[str, str]) -> bool:
        return self._path(*key).is_file()

    def described(self, owner: str) -> list[dict[str, Any]]:
        """The saved sessions of a client as the API has them, those first that were used last; reads their files."""
        found = list[dict[str, Any]]()
        for path in self._folder.glob(f"{_digest(owner)}-*{SUFFIX}"):
            # Of one that is deleted meanwhile or damaged nobody knows the id.
            with suppress(OSError, LookupError, TypeError, ValueError):
                session = read_notes(path)["session"]
                idle_seconds = session["idle_seconds"] + max(0.0, time.time() - path.stat().st_mtime)
                found.append({**session, "status": "saved", "is_busy": False, "idle_seconds": round(idle_seconds, 3)})
        return sorted(found, key=lambda session: session["idle_seconds"])

    def is_elsewhere(self, owner: str, id: str) -> bool:
        """Whether another server has a session, saved or not."""
        return self._claims.is_elsewhere(_name(owner, id))

    async def claim(self, owner: str, id: str) -> bool:
        """Have a session here, and not at another server, which saves it first; raises ApiError if that takes long.

        Returns whether turns that were not saved are lost, with the server that had it.
        """
        name = _name(owner, id)
        try:
            is_claimed = await self._claims.claim(name, CLAIM_SECONDS)
        except OSError as error:
            raise ApiError(507, f"server: {error}") from error
        if not is_claimed:
            message = f"session_id: {id!r} is in use at another server; try again later"
            raise ApiError(503, message, param="session_id", code="session_elsewhere", retry_after=5)
        is_new = name not in self._claimed
        self._claimed[name] = (owner, id)
        return is_new and self._claims.is_unsaved(name)

    def note(self, owner: str, id: str, *, is_unsaved: bool) -> None:
        """Note of a session that is here whether turns are not saved, for whoever has it next if this process ends."""
        self._claims.note(_name(owner, id), is_unsaved=is_unsaved)

    def release(self, owner: str, id: str) -> None:
        """Let another server have a session, of which nothing goes on here."""
        name = _name(owner, id)
        self._claimed.pop(name, None)
        self._claims.release(name, forget=(owner, id) not in self)

    def wanted(self) -> list[tuple[str, str]]:
        """Client and id of the sessions that are here, and wanted at another server."""
        return [self._claimed[name] for name in self._claims.wanted() if name in self._claimed]

    def save(self, owner: str, id: str, stream: Stream, notes: dict[str, Any]) -> None:
        """Save a stream and notes; raises OSError if that is not possible, and leaves what was saved before."""
        stream.notes.clear()
        stream.notes.update(notes)
        stream.save(self._path(owner, id))

    def load(self, owner: str, id: str) -> Stream:
        """A stream that was saved, with its notes.

        Raises PoolFullError if there is no room, ApiError if the file is of another model, or cannot be read.
        """
        try:
            return self._pool.load(self._path(owner, id))
        except (OSError, ValueError) as error:
            raise ApiError(409, f"session_id: the saved session cannot be used: {error}", param="session_id") from error

    def delete(self, owner: str, id: str) -> None:
        """Delete what was saved of a session, if anything."""
        self._path(owner, id).unlink(missing_ok=True)

    def _path(self, owner: str, id: str) -> Path:
        return self._folder / (_name(owner, id) + SUFFIX)


def _name(owner: str, id: str) -> str:
    return f"{_digest(owner)}-{_digest(id)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
