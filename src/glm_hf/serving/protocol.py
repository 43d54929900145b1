"""
What clients send, in OpenAI's form: requests with their limits, and errors that name the field that is wrong.

What a field asks for is done, or refused; none is ignored but those that only describe the client.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from glm_hf.decoding import Sampling

MOST_CHOICES = 128
MOST_STOPS = 16
SEED = 2**63 - 1

Text = Annotated[str, Field(min_length=1)]


class APIError(Exception):
    """
    An answer that is an error.

    Args:
        message: What is wrong, in a sentence.
        status: HTTP status.
        param: Field of the request that is wrong.
        code: OpenAI's word for the kind of error.
        retry_after: Seconds after which it may be tried again.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """Return the error as OpenAI's clients expect it."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class StreamOptions(BaseModel):
    """Settings of a stream."""

    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = False


class Parameters(BaseModel):
    """What all requests for text may hold."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(1.0, ge=0, le=2)
    top_p: float | None = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    n: int | None = Field(1, ge=1, le=MOST_CHOICES)
    stop: Text | Annotated[list[Text], Field(max_length=MOST_STOPS)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    seed: int | None = Field(None, ge=-SEED, le=SEED)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    presence_penalty: float | None = Field(0, ge=0, le=0)
    frequency_penalty: float | None = Field(0, ge=0, le=0)
    user: str | None = None

    @field_validator("logit_bias")
    @classmethod
    def _check_token_ids(cls, bias: dict[str, float] | None) -> dict[str, float] | None:
        if wrong := [key for key in bias or {} if not (key.isascii() and key.isdigit() and len(key) < 10)]:
            raise ValueError(f"the keys of logit_bias must be token ids, got {wrong[0][:40]!r}")
        return bias

    @property
    def stops(self) -> list[str]:
        """Texts that end an answer."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the counts of its tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, number: int) -> Sampling:
        """Return how the tokens of a choice are drawn; equal requests with a seed draw equal tokens."""
        return Sampling(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=self.top_k,
            top_p=1.0 if self.top_p is None else self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            seed=None if self.seed is None else self.seed + (number << 64),
            logit_bias={int(token_id): bias for token_id, bias in (self.logit_bias or {}).items()},
        )


class CompletionRequest(Parameters):
    """Body of `/v1/completions`; `alternatives` is ours: other answers for every blank, with their probabilities."""

    prompt: str | list[str] | list[int] | list[list[int]]
    suffix: str | None = None
    best_of: int | None = Field(None, ge=1, le=MOST_CHOICES)
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: bool | None = False
    alternatives: int = Field(0, ge=0, le=10)

    @property
    def prompts(self) -> Sequence[str | list[int]]:
        """The prompts one by one."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and all(isinstance(token_id, int) for token_id in self.prompt):
            return [[int(token_id) for token_id in self.prompt]]  # type: ignore[arg-type]
        return self.prompt  # type: ignore[return-value]


class Message(BaseModel):
    """A turn of a chat."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "user", "assistant"]
    content: str
    name: str | None = None
    refusal: None = None


class ChatRequest(Parameters):
    """Body of `/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=20)


def validation_error(errors: Sequence[Any]) -> APIError:
    """Return the first of pydantic's errors; of a field that may be of several types, the one of the type it has."""
    of_field = [error for error in errors if error["loc"][:2] == errors[0]["loc"][:2]]
    error = next((error for error in of_field if not error["type"].endswith("_type")), of_field[0])
    place = [part for part in error["loc"] if part != "body"]
    name = str(place[0]) if place and isinstance(place[0], str) else None
    if error["type"] == "json_invalid":
        return APIError("the body is not valid JSON")
    if error["type"] == "extra_forbidden":
        return APIError(f"unknown or unsupported parameter: {name}", param=name, code="unknown_parameter")
    if error["type"] == "missing":
        return APIError(f"missing parameter: {name or 'the body'}", param=name, code="missing_required_parameter")
    message = str(error["msg"]).removeprefix("Value error, ")
    reason = error.get("ctx", {}).get("error")
    return APIError(f"{name or 'the body'}: {reason or message}", param=name, code="invalid_value")
