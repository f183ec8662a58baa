"""Bodies of requests, as OpenAI's API has them. What is not supported is refused rather than ignored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from sinkattn.serve.conversation import Message
from sinkattn.serve.errors import ApiError

SessionId = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[\w.:@-]+$")]
"""By which a client names a session; part of paths."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TextPart(_Strict):
    """A part of a message."""

    type: Literal["text", "input_text", "output_text"]
    text: str


class ChatMessage(_Strict):
    """A message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None
    refusal: None = None

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
    verbosity: None = None


class InputMessage(ChatMessage):
    """An item of the input of a response."""

    type: Literal["message"] = "message"
    id: str | None = None
    status: str | None = None


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
    # Without effect on a reply.
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None

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
    session_id: SessionId | None = None
    append: bool = False
    """Whether what is given follows what the session has, rather than begins with it."""


class ChatRequest(Completing):
    """Body of ``POST /v1/chat/completions``."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None

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
    """The system prompt of the field ``name``, and the other messages; raises ApiError for another order."""
    system = messages[0].text if messages[0].role in ("system", "developer") else None
    rest = messages if system is None else messages[1:]
    expected = [("user", "assistant")[index % 2] for index in range(len(rest))]
    if [message.role for message in rest] != expected or not len(rest) % 2:
        raise ApiError(
            400,
            f"{name}: expected a system prompt or none, then messages of user and assistant in turns, the last one of "
            f"the user, got {', '.join(message.role for message in messages)[:200]}",
            param=name,
        )
    return system, [Message("user" if each.role == "user" else "assistant", each.text) for each in rest]


class CompletionRequest(Completing):
    """Body of ``POST /v1/completions``."""

    prompt: Annotated[str, Field(min_length=1)] | Annotated[list[int], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: None = None

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
