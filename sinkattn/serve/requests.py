"""Bodies of requests, as OpenAI's API has them.

What would change a reply and is not supported is refused; hints and tags, which clients send by default, are taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from sinkattn.serve.conversation import Message
from sinkattn.serve.errors import ApiError

SessionId = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[\w:@-][\w.:@-]*$")]
"""By which a client names a session; part of paths."""


SYSTEM = ("system", "developer")


class _Strict(BaseModel):
    """Without unknown fields. One that is null or an empty list counts as absent: so clients write their defaults."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _without_empty(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        return {name: value for name, value in fields.items() if value is not None and value != []}


class TextPart(_Strict):
    """A part of a message."""

    type: Literal["text", "input_text", "output_text"]
    text: str
    # Without effect: what other parts of a reply that is sent back say of it, and a hint.
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None
    cache_control: dict[str, Any] | None = None


class ChatMessage(_Strict):
    """A message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    # Without effect: chat templates do not write them.
    name: str | None = None
    annotations: list[Any] | None = None
    reasoning_content: str | None = None

    @property
    def text(self) -> str:
        """Its text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class JsonSchema(_Strict):
    """The schema of a ``response_format``."""

    name: str = ""
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(_Strict):
    """What a reply has to be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @property
    def grammar(self) -> dict[str, Any] | None:
        """The schema that a reply has to fit."""
        if self.type == "json_schema":
            if self.json_schema is None:
                raise ApiError(400, "response_format.json_schema: expected a schema, got none", param="response_format")
            return self.json_schema.schema_
        return {"type": "object"} if self.type == "json_object" else None


class TextFormat(_Strict):
    """What the text of a response has to be."""

    type: Literal["text", "json_object", "json_schema"]
    name: str = ""
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class TextOptions(_Strict):
    """What a response has to be."""

    format: TextFormat | None = None
    verbosity: str | None = None


class InputMessage(ChatMessage):
    """An item of the input of a response."""

    type: Literal["message"] = "message"
    id: str | None = None
    status: str | None = None
    phase: str | None = None


class StreamOptions(_Strict):
    """What a stream of events has besides the reply."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


class Generated(_Strict):
    """What all requests for text have in common."""

    model: str
    stream: bool = False
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    logit_bias: dict[str, float] | None = None
    # Beyond OpenAI's API.
    top_k: Annotated[int, Field(ge=0)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    session_id: SessionId | None = None
    # Without effect on a reply.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None

    @field_validator("stop")
    @classmethod
    def _check_stop(cls, value: str | list[str] | None) -> str | list[str] | None:
        texts = [value] if isinstance(value, str) else value or []
        if "" in texts or len(texts) > 16:
            raise ValueError("expected up to 16 texts of one character or more")
        return value

    @property
    def stops(self) -> list[str]:
        """Texts that end a reply."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def named(self, header: str | None) -> str | None:
        """Id of the session that the request names, in its body or its header; raises ApiError if these differ."""
        if self.session_id is not None and header not in (None, self.session_id):
            raise ApiError(400, "session_id: expected that of X-Session-ID, or none", param="session_id")
        return self.session_id or header

    def sampling(self) -> dict[str, Any]:
        """Fields of `SamplingParams` that the request sets."""
        names = (
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "presence_penalty",
            "frequency_penalty",
            "repetition_penalty",
            "seed",
        )
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        if self.logit_bias:
            try:
                given["logit_bias"] = {int(token): bias for token, bias in self.logit_bias.items()}
            except ValueError:
                raise ApiError(400, "logit_bias: expected ids of tokens", param="logit_bias") from None
        return given


class Completing(Generated):
    """What the two older requests have in common."""

    stream_options: StreamOptions | None = None
    n: Literal[1] | None = None
    # Beyond OpenAI's API.
    append: bool = False
    """Whether what is given follows what the session has, rather than begins with it."""

    def named(self, header: str | None) -> str | None:
        """Id of the session that the request names, in its body or its header; raises ApiError if these differ."""
        id_ = super().named(header)
        if self.append and id_ is None:
            raise ApiError(400, "append: expected a session_id with it, got none", param="session_id")
        return id_


class ChatRequest(Completing):
    """Body of ``POST /v1/chat/completions``."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    # Without effect on a reply.
    modalities: list[Literal["text"]] | None = None
    prediction: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None

    @property
    def most_tokens(self) -> int | None:
        """Of the reply."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def sampling(self) -> dict[str, Any]:
        """Fields of `SamplingParams` that the request sets."""
        given = super().sampling()
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs: expected logprobs with it", param="logprobs")
        if self.logprobs:
            given["logprobs"] = self.top_logprobs or 0
        if self.response_format is not None and self.response_format.grammar is not None:
            given["grammar"] = self.response_format.grammar
        return given

    def parts(self) -> tuple[str | None, list[Message]]:
        """The system prompt, and the other messages; raises ApiError for an order that is not supported."""
        return parts_of("messages", self.messages)


def parts_of(name: str, messages: Sequence[ChatMessage]) -> tuple[str | None, list[Message]]:
    """The system prompt of the field ``name``, and the other messages; raises ApiError for another order.

    Several system messages at the beginning are one, with an empty line between them, and so are messages of one role
    that follow each other, as many chat templates refuse these.
    """
    count = next((index for index, each in enumerate(messages) if each.role not in SYSTEM), len(messages))
    system = _joined(messages[:count]) if count else None
    rest = messages[count:]
    if not rest or rest[-1].role != "user" or any(each.role in SYSTEM for each in rest):
        raise ApiError(
            400,
            f"{name}: expected a system prompt or none, then messages of user and assistant, the last one of the user, "
            f"got {', '.join(message.role for message in messages)[:200]}",
            param=name,
        )
    groups = ((is_user, [*each]) for is_user, each in groupby(rest, key=lambda message: message.role == "user"))
    return system, [Message("user" if is_user else "assistant", _joined(each)) for is_user, each in groups]


def _joined(messages: Sequence[ChatMessage]) -> str:
    return messages[0].text if len(messages) == 1 else "\n\n".join(each.text for each in messages if each.text)


Prompt: TypeAlias = Annotated[str, Field(min_length=1)] | Annotated[list[int], Field(min_length=1)]


class CompletionRequest(Completing):
    """Body of ``POST /v1/completions``."""

    prompt: Prompt | Annotated[list[Prompt], Field(min_length=1, max_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None

    @property
    def text(self) -> str | list[int]:
        """The prompt; several are not supported, but one in a list is."""
        prompt = self.prompt
        return prompt[0] if isinstance(prompt, list) and not isinstance(prompt[0], int) else prompt  # type: ignore[return-value]

    def sampling(self) -> dict[str, Any]:
        """Fields of `SamplingParams` that the request sets."""
        given = super().sampling()
        return given if self.logprobs is None else {**given, "logprobs": self.logprobs}


class ResponseRequest(Generated):
    """Body of ``POST /v1/responses``."""

    input: Annotated[str, Field(min_length=1)] | Annotated[list[InputMessage], Field(min_length=1)]
    instructions: str | None = None
    previous_response_id: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    text: TextOptions | None = None
    # What leaves a window leaves it as always.
    truncation: Literal["auto"] | None = None
    # Without effect on a reply.
    background: Literal[False] | None = None
    include: list[str] | None = None
    max_tool_calls: int | None = None
    reasoning: dict[str, Any] | None = None
    stream_options: StreamOptions | None = None

    def parts(self) -> tuple[str | None, list[Message]]:
        """The system prompt, and the messages; raises ApiError for an order that is not supported."""
        if isinstance(self.input, str):
            return self.instructions, [Message("user", self.input)]
        system, messages = parts_of("input", self.input)
        if system is not None and self.instructions is not None:
            raise ApiError(400, "instructions: expected none beside a system message in input", param="instructions")
        return self.instructions if system is None else system, messages

    def sampling(self) -> dict[str, Any]:
        """Fields of `SamplingParams` that the request sets."""
        given = super().sampling()
        if self.top_logprobs is not None:
            given["logprobs"] = self.top_logprobs
        form = None if self.text is None else self.text.format
        if form is not None and form.type == "json_object":
            given["grammar"] = {"type": "object"}
        elif form is not None and form.type == "json_schema":
            if form.schema_ is None:
                raise ApiError(400, "text.format.schema: expected a schema, got none", param="text.format.schema")
            given["grammar"] = form.schema_
        return given
