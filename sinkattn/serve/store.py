"""`Store`: saved sessions in a folder, which a server finds again when it starts anew."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from sinkattn.hf.pool.pool import StreamPool
from sinkattn.hf.pool.stream import Stream
from sinkattn.serve.errors import ApiError

SUFFIX = ".session.safetensors"


class Store:
    """Files of sessions, each with the client and the id in its name, as a digest.

    Args:
        folder: of the files; made if need be.
        pool: of the streams.
    """

    def __init__(self, folder: Path, pool: StreamPool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._pool = folder, pool

    def __contains__(self, key: tuple[str, str]) -> bool:
        return self._path(*key).is_file()

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
        return self._folder / (hashlib.sha256(f"{owner}\0{id}".encode()).hexdigest() + SUFFIX)
