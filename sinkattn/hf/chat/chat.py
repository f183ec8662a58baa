"""`Chat`: a conversation without end, of whose messages the model sees the system prompt and the last whole ones."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from sinkattn.hf.chat.encoder import MessageEncoder
from sinkattn.hf.pool.pool import StreamPool
from sinkattn.hf.pool.stream import Stream
from sinkattn.hf.sampling.params import SamplingParams
from sinkattn.hf.stream import end_ids

Role = Literal["user", "assistant", "earlier"]
"""Who a message is from; "earlier" stands for those of a stream that was loaded that are not in sight."""
# Characters of a message that are kept to show it.
EXCERPT = 200


@dataclass
class Message:
    """A message of a conversation."""

    role: Role
    begin: int
    """Its first token in the stream."""
    excerpt: str = ""
    """The beginning of its text."""


class SeenMessage(NamedTuple):
    """A message of which the model sees something."""

    role: Role
    num_tokens: int
    """Tokens in sight, those of the template among them."""
    excerpt: str


@dataclass
class Conversation:
    """A stream and what was said in it."""

    stream: Stream
    prefix: list[int]
    num_turns: int = 0
    messages: list[Message] = field(default_factory=list)
    """Those that are in sight, or may be again after `Chat.undo`."""


class Chat:
    """A chat in a stream of a pool, in constant memory and with the same work for every turn.

    The model sees the system prompt and the last messages, all of them whole: a message that does not fit any more
    leaves at once. A copy can be made of the conversation; one of the two goes on at a time.

    Args:
        pool: with a tokenizer, and with room for four streams: the conversation, its copy, one that is loaded, and its
            beginning.
        window: that of the pool's model, in tokens.
        max_reply: tokens after which a reply is cut off; a question must leave room for them in the window.
        system: the system prompt; None for what the model's chat template writes without one.
        sampling: how replies are sampled; greedy by default.

    Raises:
        ValueError: for a chat template that cannot be cut into messages (`MessageEncoder`), a system prompt that is
            longer than the pool's prefixes, a reply that is longer than the window, or a model with recurrent states or
            absolute positions.
    """

    def __init__(
        self,
        pool: StreamPool,
        window: int,
        max_reply: int,
        *,
        system: str | None = None,
        sampling: SamplingParams | None = None,
    ) -> None:
        self._pool, self._window, self._max_reply, self._sampling = pool, window, max_reply, sampling
        self._encoder = MessageEncoder(_tokenizer(pool), system)
        self._stop_ids = {*end_ids(pool.model), *self._encoder.special_ids}
        if not self._stop_ids:
            raise ValueError("chat: this model has no end token, so it cannot end a reply")
        if self._max_question < 1:
            raise ValueError(f"max_reply: expected fewer tokens than the window has, {window}, got {max_reply}")
        self._current = self._begin(self._encoder)
        self._other: Conversation | None = None
        self.reply_tokens = 0
        """Tokens of the last reply, so far."""

    @property
    def num_turns(self) -> int:
        """Questions so far, less those that were undone."""
        return self._current.num_turns

    @property
    def num_evicted(self) -> int:
        """Tokens of the conversation that the model does not see any more."""
        return len(self._current.stream) - self.num_in_sight

    @property
    def num_in_sight(self) -> int:
        """Tokens that the model sees, those of the system prompt among them."""
        return len(self._current.stream.in_sight)

    @property
    def total(self) -> int:
        """The most tokens that it can see."""
        return self.num_prefix + self._window

    @property
    def num_prefix(self) -> int:
        """Tokens of the system prompt."""
        return len(self._current.prefix)

    def in_sight(self) -> list[SeenMessage]:
        """The messages that the model sees, the oldest first."""
        end, seen = len(self._current.stream), list[SeenMessage]()
        first = self.num_prefix + self.num_evicted
        for message in reversed(self._current.messages):
            if end <= first:
                break
            seen.append(SeenMessage(message.role, end - max(message.begin, first), message.excerpt))
            end = message.begin
        return seen[::-1]

    def say(self, text: str) -> Generator[str]:
        """Say something; yields the reply, a piece, maybe empty, for each token.

        If the iterator is closed before its end, the reply ends there.

        Raises:
            ValueError: for a text that is empty, too long, or has special tokens.
        """
        ids = self._encoder.question(text)
        if len(ids) > self._max_question:
            raise ValueError(
                f"message: expected up to {self._max_question} tokens, so that it fits the window of {self._window} "
                f"with a reply of {self._max_reply}, got {len(ids)}"
            )
        return self._reply(text, ids)

    @property
    def _max_question(self) -> int:
        """Tokens of the longest question that stays in sight while it is replied to."""
        return self._window - self._max_reply - len(self._encoder.before_reply) - len(self._encoder.end)

    def _reply(self, text: str, ids: list[int]) -> Generator[str]:
        conversation, encoder = self._current, self._encoder
        stream = conversation.stream
        self.reply_tokens = 0
        self._note("user", text)
        conversation.num_turns += 1
        stream.feed(ids, num_following=len(encoder.before_reply), wait=False)
        reply = self._note("assistant")
        stream.feed(encoder.before_reply, begins_message=encoder.replies_stand_alone, wait=False)
        begin = len(stream)
        pieces = stream.generate_text(self._max_reply, stop=self._stop_ids)
        try:
            for piece in pieces:
                self.reply_tokens = len(stream) - begin
                reply.excerpt = (reply.excerpt + piece)[:EXCERPT]
                yield piece
        finally:
            pieces.close()
            stream.feed(encoder.end, begins_message=False)

    def _note(self, role: Role, text: str = "") -> Message:
        """Begin a message, and forget those that `undo` cannot bring back into sight."""
        conversation = self._current
        message = Message(role, len(conversation.stream), text.strip()[:EXCERPT])
        # What is undone, at most a window, ends where a message begins of which a window may be in sight.
        oldest = message.begin - 2 * self._window
        ends = [each.begin for each in [*conversation.messages[1:], message]]
        kept = [each for each, end in zip(conversation.messages, ends, strict=False) if end > oldest]
        conversation.messages = [*kept, message]
        return message

    def undo(self) -> None:
        """Forget the last question and its reply.

        Raises:
            RuntimeError: if there are none, or if the headroom of `sinkattn.enable` is too small; nothing is changed.
        """
        current = self._current
        questions = [index for index, each in enumerate(current.messages) if each.role == "user"]
        if not questions:
            raise RuntimeError("undo: nothing has been said that could be forgotten")
        begin = current.messages[questions[-1]].begin
        try:
            current.stream.rollback(len(current.stream) - begin)
        except RuntimeError as error:
            raise RuntimeError(
                f"undo: the last question and its reply have {len(current.stream) - begin} tokens, of which too many "
                "have taken the place of older ones"
            ) from error
        current.messages = current.messages[: questions[-1]]
        current.num_turns -= 1

    def fork(self) -> None:
        """Go on in a copy of the conversation; `back` returns to this one. An earlier copy is forgotten."""
        if self._other is not None:
            self._other.stream.close()
        self._other, current = self._current, self._current
        messages = [replace(each) for each in current.messages]
        self._current = replace(current, stream=current.stream.fork(), messages=messages)

    def back(self) -> None:
        """Go on in the other conversation, the copy or what it was made of; raises RuntimeError if there is none."""
        if self._other is None:
            raise RuntimeError("back: there is no other conversation; fork makes one")
        self._current, self._other = self._other, self._current

    def reset(self) -> None:
        """Begin a new conversation with the same system prompt."""
        self._current.stream.reset()
        self._current.messages, self._current.num_turns = [], 0

    def begin(self, system: str) -> None:
        """Begin a new conversation with another system prompt; raises ValueError as `Chat`, which changes nothing."""
        encoder = MessageEncoder(_tokenizer(self._pool), system)
        self._replace(self._begin(encoder))
        self._encoder = encoder

    def save(self, path: str | Path) -> None:
        """Save the conversation; raises OSError as `Stream.save`."""
        self._current.stream.save(path)

    def load(self, path: str | Path) -> None:
        """Go on in a conversation that was saved, with its system prompt and sampling; raises as `StreamPool.load`.

        Only the questions in sight count as turns.
        """
        stream = self._pool.load(path)
        messages = self._messages_of(stream)
        num_turns = sum(each.role == "user" for each in messages)
        self._replace(Conversation(stream, stream.prefix, num_turns, messages))

    def _messages_of(self, stream: Stream) -> list[Message]:
        """The messages that are in sight as a whole, after what comes before them."""
        end, begins = len(stream), stream.message_begins
        number = (begins[0] if begins else end) - len(stream.prefix)
        messages = [Message("earlier", len(stream.prefix))] if number else []
        ids = stream.in_sight
        for begin, next_begin in pairwise([*begins, end]):
            for role, count, text in self._encoder.read(ids[len(ids) - end + begin : len(ids) - end + next_begin]):
                messages.append(Message(role, begin, text[:EXCERPT]))
                begin += count
        return messages

    def close(self) -> None:
        """Forget the conversation and its copy, and free their memory."""
        for conversation in filter(None, (self._current, self._other)):
            conversation.stream.close()

    def _begin(self, encoder: MessageEncoder) -> Conversation:
        stream = self._pool.open(encoder.prefix, sampling=self._sampling, evict="message")
        return Conversation(stream, encoder.prefix)

    def _replace(self, conversation: Conversation) -> None:
        self._current.stream.close()
        self._current = conversation


def _tokenizer(pool: StreamPool) -> PreTrainedTokenizerBase:
    if pool.tokenizer is None:
        raise ValueError("pool: expected one with a tokenizer, got None")
    return pool.tokenizer
