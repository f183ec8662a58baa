"""`Keys`: whose request it is."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping

from sinkattn.serve.errors import ApiError


class Keys:
    """The bearer tokens that a server takes.

    Args:
        keys: token of each client by the client's name; none: everybody is one client.
    """

    def __init__(self, keys: Mapping[str, str]) -> None:
        self._digests = {name: _digest(key) for name, key in keys.items()}

    @property
    def are_needed(self) -> bool:
        """Whether there are any."""
        return bool(self._digests)

    def __len__(self) -> int:
        return len(self._digests)

    def owner(self, authorization: str | None) -> str:
        """The client that a header is of; raises ApiError for none of them. Takes as long for any wrong token."""
        if not self._digests:
            return ""
        scheme, _, token = (authorization or "").partition(" ")
        digest = _digest(token.strip())
        matching = [name for name, each in self._digests.items() if hmac.compare_digest(each, digest)]
        if scheme.lower() != "bearer" or not matching:
            raise ApiError(401, "Authorization: expected 'Bearer' and one of the server's keys", code="invalid_api_key")
        return matching[0]


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
