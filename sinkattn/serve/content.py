"""`Content`: what is in a session, a chat or a plain text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol, TypeVar

from sinkattn.hf.pool.pool import StreamPool
from sinkattn.hf.pool.stream import Stream

Input = TypeVar("Input", contravariant=True)


class Content(Protocol[Input]):
    """A stream, and how it compares with the inputs of requests: messages, or ids."""

    stream: Stream

    @property
    def kind(self) -> object:
        """Requests of an equal kind may continue it: the same system prompt, or text without messages."""

    def num_known(self, inputs: Sequence[Input]) -> int | None:
        """How many of these, from the first one on, the stream has or has forgotten; None if it has others."""

    def rewind(self, inputs: Sequence[Input]) -> int | None:
        """As `num_known`, but may forget the last of what it has; raises ValueError for what cannot follow.

        It may wait for a step of the pool.
        """

    def add(self, inputs: Sequence[Input]) -> None:
        """Append these; raises ValueError for what is not possible, before any is added."""

    def begin_reply(self) -> None:
        """Append what a reply begins with; then it can be generated, and `end_reply` follows."""

    def end_reply(self, text: str) -> bool:
        """Append what a reply ends with, if there is anything, and return whether there is; ``text`` is its text."""

    def fork(self) -> Content[Input]:
        """A copy, which goes on from here. It may wait for a step of the pool."""

    def back_to(self, length: int) -> None:
        """Forget what came after so many tokens, where a reply ended; raises RuntimeError if that is not possible."""

    def notes(self) -> dict[str, Any]:
        """What has to be known besides the stream to make the same of it again, JSON."""

    def in_sight(self) -> list[dict[str, Any]]:
        """What of it the model sees, the oldest first: roles and numbers of tokens."""


class Opener(Protocol[Input]):
    """Begins contents of one kind."""

    inputs: ClassVar[str]
    """What errors call the inputs."""

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end a reply, besides the end tokens of the model."""

    @property
    def kind(self) -> object:
        """That of the contents."""

    def open(self, pool: StreamPool, inputs: Sequence[Input]) -> Content[Input]:
        """Contents with these inputs, or those of them that are not forgotten at once.

        Raises PoolFullError, or ValueError for what is not possible.
        """
