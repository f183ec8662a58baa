"""`Claims`: at which of the servers that share a folder a session is."""

from __future__ import annotations

import asyncio
import fcntl
import os
import time
from pathlib import Path

# Seconds between two looks.
POLL = 0.05
# In a file.
SAVED, UNSAVED = b"0", b"1"


class Claims:
    """Names, each of which one server has at a time, as it has locked a file.

    A lock ends with its process, however that ends; what the process has noted in the file stays. Who wants a name that
    another server has leaves a file with this name in a folder of its own, where all servers look from time to time.
    All methods but `claim` return at once.

    Args:
        folder: of the files; on a file system with locks (flock), also between machines if servers run on several.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._wanted = folder, folder / "wanted"
        self._wanted.mkdir(parents=True, exist_ok=True)
        self._files: dict[str, int] = {}
        self._unsaved: set[str] = set()
        """Names that are noted as such."""

    def __contains__(self, name: str) -> bool:
        return name in self._files

    async def claim(self, name: str, seconds: float) -> bool:
        """Have a name, if need be after another server has released it; False if it has not done so in this time.

        Raises OSError if the file cannot be made or locked.
        """
        mark, end = self._wanted / name, time.monotonic() + seconds
        # Not in a thread: when this is cancelled, it is certain whether the name was claimed.
        while not (is_claimed := name in self._files or self._lock(name)) and time.monotonic() < end:
            mark.touch()
            await asyncio.sleep(POLL)
        mark.unlink(missing_ok=True)
        return is_claimed

    def is_unsaved(self, name: str) -> bool:
        """Whether it is noted that something of a name is not saved; after `claim`, by a process that has ended."""
        return name in self._unsaved

    def note(self, name: str, *, is_unsaved: bool) -> None:
        """Note of a name of this server whether something is not saved."""
        if is_unsaved != self.is_unsaved(name):
            os.pwrite(self._files[name], UNSAVED if is_unsaved else SAVED, 0)
            (self._unsaved.add if is_unsaved else self._unsaved.discard)(name)

    def release(self, name: str, *, forget: bool) -> None:
        """Let others have a name; ``forget``: nothing is left of it, so its file is deleted."""
        file = self._files.pop(name, None)
        self._unsaved.discard(name)
        if file is not None:
            if forget:
                self._path(name).unlink(missing_ok=True)
            os.close(file)

    def is_elsewhere(self, name: str) -> bool:
        """Whether another server has a name."""
        if name in self._files:
            return False
        try:
            file = os.open(self._path(name), os.O_RDWR)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(file)
        return False

    def wanted(self) -> list[str]:
        """Names of this server that others want."""
        try:
            return [name for name in os.listdir(self._wanted) if name in self._files]
        except OSError:  # who wants one cannot say so then, and tells its client
            return []

    def _lock(self, name: str) -> bool:
        file = os.open(self._path(name), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Else it has been deleted between the two, and others lock another file.
            if os.fstat(file).st_nlink:
                if os.pread(file, 1, 0) == UNSAVED:
                    self._unsaved.add(name)
                self._files[name], file = file, -1
        except BlockingIOError:
            pass
        finally:
            if file >= 0:
                os.close(file)
        return name in self._files

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.lock"
