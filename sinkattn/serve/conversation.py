"""`Conversation`: the stream of a chat, and which messages of a request it has already."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple

from sinkattn.hf.chat.encoder import MessageEncoder
from sinkattn.hf.pool.pool import StreamPool
from sinkattn.hf.pool.stream import Stream

Role = Literal["user", "assistant"]


@dataclass(frozen=True)
class Message:
    """A message of a request."""

    role: Role
    text: str

    @cached_property
    def digest(self) -> str:
        """Stands for the text when it is compared. Spaces around a reply do not matter, as clients cut them off."""
        text = self.text.strip() if self.role == "assistant" else self.text
        return hashlib.sha256(text.encode()).hexdigest()


class Turn(NamedTuple):
    """A message that is in a stream."""

    role: Role
    digest: str
    """Of its text: with it a message of a request is compared."""
    begin: int
    """Its first token in the stream."""

    def is_of(self, message: Message) -> bool:
        """Whether it is this message."""
        return self.role == message.role and self.digest == message.digest


class Conversation:
    """A stream with whole messages in sight, which are compared with those of requests.

    A request has the messages of a conversation from its beginning, or from any point on. It continues a stream if all
    that the stream has in sight is among them: then the model sees the last of these messages, whether they are fed to
    this stream or anew.

    Args:
        stream: opened with the encoder's prefix and ``evict="message"``.
        opener: of it.
    """

    def __init__(self, stream: Stream, opener: ChatOpener) -> None:
        self.stream, self._opener = stream, opener
        self.encoder, self._window = opener.encoder, opener.window
        self._turns: list[Turn] = []
        """Those of which something is in sight, or may be again after a rollback, the oldest first."""
        self._num_forgotten = 0
        """Messages before these."""

    @property
    def kind(self) -> object:
        """See `Content`."""
        return self._opener.kind

    def num_known(self, messages: Sequence[Message]) -> int | None:
        """How many of these messages, from the first one on, the stream has or has forgotten; None if others."""
        if not any(turn.is_of(message) for turn in self._turns[-1:] for message in messages):
            return None  # so it is for most streams, and to know what is in sight takes longer
        begin = self._first_seen
        is_all = not self._num_forgotten and not begin
        return _num_known(self._turns, messages, least=len(self._turns) - begin, is_all=is_all)

    def rewind(self, messages: Sequence[Message]) -> int | None:
        """As `num_known`, but the last reply, or the last exchange, may be others: these are forgotten.

        None if the stream cannot forget them, and for other messages; ValueError for those that cannot be added. The
        stream is as before then. It may wait for a step of the pool.
        """
        known = self.num_known(messages)
        for count in range(1, min(3, len(self._turns))):
            if known is not None:
                break
            # All that are noted are compared, as older ones may be in sight again then.
            kept = self._turns[:-count]
            known = _num_known(kept, messages, least=len(kept), is_all=not self._num_forgotten)
            if known is not None:
                for message in messages[known:]:
                    self._opener.ids(message)  # or it could not be added afterwards
                try:
                    self.stream.rollback(len(self.stream) - self._turns[-count].begin)
                except RuntimeError:
                    return None  # more than its headroom
                self._turns = kept
        return known

    def add(self, messages: Sequence[Message]) -> None:
        """Append messages; raises ValueError for one that is too long or has special tokens, before any is added."""
        if messages and self._turns and self._turns[-1].role == messages[0].role:
            raise ValueError(f"expected messages in turns, got one of the {messages[0].role} after another")
        self.add_encoded([(message, self._opener.ids(message)) for message in messages])

    def add_encoded(self, messages: Sequence[tuple[Message, list[int]]]) -> None:
        """Append messages with their ids."""
        for message, ids in messages:
            self._note(message, len(self.stream))
            self.stream.feed(
                ids,
                begins_message=self._opener.begins_message(message),
                num_following=len(self.encoder.before_reply) if message.role == "user" else 0,
                wait=False,
            )

    def begin_reply(self) -> None:
        """Append what a reply begins with; then it can be generated, and `end_reply` follows."""
        self._note(Message("assistant", ""), len(self.stream))
        self.stream.feed(self.encoder.before_reply, begins_message=self.encoder.replies_stand_alone, wait=False)

    def end_reply(self, text: str) -> bool:
        """See `Content`."""
        self._turns[-1] = self._turns[-1]._replace(digest=Message("assistant", text).digest)
        self.stream.feed(self.encoder.end, begins_message=False, wait=False)
        return bool(self.encoder.end)

    def fork(self) -> Conversation:
        """See `Content`."""
        fork = Conversation(self.stream.fork(), self._opener)
        fork._turns, fork._num_forgotten = [*self._turns], self._num_forgotten
        return fork

    def notes(self) -> dict[str, Any]:
        """See `Content`."""
        return {
            "system": self._opener.system,
            "turns": [[*turn] for turn in self._turns],
            "forgotten": self._num_forgotten,
        }

    @classmethod
    def restored(cls, stream: Stream, opener: ChatOpener, notes: dict[str, Any]) -> Conversation:
        """That of a stream and its `notes`."""
        conversation = cls(stream, opener)
        conversation._turns = [Turn(*turn) for turn in notes["turns"]]
        conversation._num_forgotten = notes["forgotten"]
        return conversation

    def in_sight(self) -> list[dict[str, Any]]:
        """See `Content`."""
        begin, count = self._first_seen, len(self.stream.prefix)
        first = len(self.stream) - len(self.stream.in_sight) + count
        begins = [max(turn.begin, first) for turn in self._turns[begin:]]
        ends = [*begins[1:], len(self.stream)]
        seen: list[dict[str, Any]] = [{"role": "system", "tokens": count}] if count else []
        for turn, start, end in zip(self._turns[begin:], begins, ends, strict=False):
            seen.append({"role": turn.role, "tokens": end - start})
        return seen

    def back_to(self, length: int) -> None:
        """See `Content`."""
        self.stream.rollback(len(self.stream) - length)
        self._turns = [turn for turn in self._turns if turn.begin < length]

    @property
    def _first_seen(self) -> int:
        """Index of the first turn of which something is in sight."""
        begin = len(self.stream) - len(self.stream.in_sight) + len(self.stream.prefix)
        ends = [turn.begin for turn in self._turns[1:]]
        return sum(end <= begin for end in ends)

    def _note(self, message: Message, begin: int) -> None:
        """Note a message that begins, and forget those that no rollback can bring back into sight."""
        self._turns.append(Turn(message.role, message.digest, begin))
        num_old = sum(turn.begin <= begin - 2 * self._window for turn in self._turns[1:])
        self._turns, self._num_forgotten = self._turns[num_old:], self._num_forgotten + num_old


@dataclass(frozen=True)
class ChatOpener:
    """Begins conversations with a system prompt.

    Args:
        system: the system prompt; None for what the chat template writes without one.
        encoder: of the messages, made with this system prompt.
        window: of the streams, in tokens.
    """

    system: str | None
    encoder: MessageEncoder
    window: int
    inputs: ClassVar[str] = "messages"

    @property
    def kind(self) -> object:
        """See `Opener`."""
        return "chat", self.system

    @property
    def stop_ids(self) -> frozenset[int]:
        """See `Opener`."""
        return self.encoder.special_ids

    def open(self, pool: StreamPool, messages: Sequence[Message]) -> Conversation:
        """A conversation with the last of these messages, as many as can be in sight when a reply to them begins."""
        fitting = self._fitting(messages)  # before a stream is opened, as this may raise an error
        if not self.begins_message(messages[0]) and len(fitting) == len(messages) - 1:
            raise ValueError("expected a message of the user first, as this model's chat template writes no other")
        conversation = Conversation(pool.open(self.encoder.prefix, evict="message"), self)
        if forgotten := messages[: len(messages) - len(fitting)]:
            # The one before those in sight is noted, so that another chat which merely ends alike does not continue it.
            conversation._num_forgotten = len(forgotten) - 1
            conversation._note(forgotten[-1], len(conversation.stream))
        conversation.add_encoded(fitting)
        return conversation

    def ids(self, message: Message) -> list[int]:
        """Ids of a message; raises ValueError for one that is too long, or has special tokens."""
        ids, most = self._encoded(message), self.window - len(self.encoder.before_reply) - len(self.encoder.end) - 1
        if message.role == "user" and len(ids) > most:
            raise ValueError(f"expected up to {most} tokens in each, so that it is in sight as a whole, got {len(ids)}")
        return ids

    def _encoded(self, message: Message) -> list[int]:
        encoder = self.encoder
        if message.role == "user":
            return encoder.question(message.text)
        return [*encoder.before_reply, *encoder.reply(message.text), *encoder.end]

    def begins_message(self, message: Message) -> bool:
        """Whether a message can be in sight without the one before it."""
        return message.role == "user" or self.encoder.replies_stand_alone

    def _fitting(self, messages: Sequence[Message]) -> list[tuple[Message, list[int]]]:
        """The last of these messages that can be in sight at a time, at least one, with their ids."""
        room, fitting, count = self.window - len(self.encoder.before_reply) - 1, list[tuple[Message, list[int]]](), 1
        for message in reversed(messages):
            ids = self._encoded(message) if fitting else self.ids(message)
            room -= len(ids)
            if room < 0 and fitting:
                break
            fitting.append((message, ids))
            if self.begins_message(message):
                count = len(fitting)
        return fitting[:count][::-1]


def _num_known(turns: Sequence[Turn], messages: Sequence[Message], *, least: int, is_all: bool) -> int | None:
    """Index of the message that follows these turns; ``is_all``: nothing was before them.

    Messages may begin after some of the turns, but have the ``least`` last ones.
    """
    ends = [len(turns)] if is_all else range(len(messages), least - 1, -1)
    return next((end for end in ends if end <= len(messages) and _ends_with(messages[:end], turns)), None)


def _ends_with(messages: Sequence[Message], turns: Sequence[Turn]) -> bool:
    """Whether these turns, or as many of them as there are messages, are the last messages."""
    return all(turn.is_of(message) for turn, message in zip(reversed(turns), reversed(messages), strict=False))
