"""A judge: one chat model behind any OpenAI-compatible endpoint.

The `openai` client does the waiting: it retries busy and broken servers and dropped connections with growing pauses
and heeds ``Retry-After``. Here its failures become messages that say what to do, and an answer without words is an
error, never a verdict.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from mitigate.errors import ConfigError, DataError, MitigateError

if TYPE_CHECKING:
    from openai import APIStatusError, OpenAI, OpenAIError

Message = dict[str, Any]
"""One message of a chat, as the endpoint takes it: ``{"role": "user", "content": "..."}``."""

_KEPT = "verdicts given so far are kept; the same command goes on from there"


@dataclass(frozen=True)
class Reply:
    """What a judge said, and the name the server gave of the model that said it."""

    text: str
    judge: str


@dataclass(frozen=True)
class Judge:
    """A chat model that grades answers.

    Parameters
    ----------
    url
        Base address of the endpoint, such as ``http://localhost:8000/v1``.
    model
        Name of the model as the endpoint knows it.
    key_env
        Environment variable that holds the API key; servers that need none are asked without it being set.
    retries
        How often a request is sent again if the server is busy, fails or does not answer.
    timeout
        Seconds to wait for an answer.
    temperature
        Of the judge's sampling.
    parallel
        Requests under way at the same time.

    Raises
    ------
    ConfigError
        If the address is none, or carries a secret, which would end up in every record.
    """

    url: str
    model: str
    key_env: str = "OPENAI_API_KEY"
    retries: int = 6
    timeout: float = 120.0
    temperature: float = 0.0
    parallel: int = 4

    def __post_init__(self) -> None:
        """Check the parameters."""
        try:
            parts = urlsplit(self.url)
            secret = parts.username is not None or bool(parts.query)
            usable = parts.scheme in ("http", "https") and bool(parts.hostname)
        except ValueError:
            secret, usable = False, False
        if secret:  # not quoted: it may hold a password
            raise ConfigError(
                f"judge_url must not hold a user name, a password or a query: it is recorded with the results; "
                f"put the key into the environment variable {self.key_env}"
            )
        if not usable:
            raise ConfigError(f"judge_url={self.url!r} must be an address such as http://localhost:8000/v1")
        if not self.model:
            raise ConfigError("judge_model is empty; give the name of the model as the endpoint knows it")
        if self.retries < 0:
            raise ConfigError(f"judge_retries={self.retries} must not be negative")

    def ask(self, messages: list[Message]) -> str:
        """Return what the judge says; as `reply`."""
        return self.reply(messages).text

    def reply(self, messages: list[Message]) -> Reply:
        """Return what the judge says, word for word, and the name the server reports of it.

        Raises
        ------
        ConfigError
            If the endpoint refuses the key, or does not know the model or the address.
        DataError
            If there is still no answer after the retries, or an answer without words.
        """
        client = self._client
        import openai  # after the line that says how to install it

        chat: Any = messages
        try:
            found = client.chat.completions.create(model=self.model, messages=chat, temperature=self.temperature)
        except openai.APIStatusError as error:
            raise self._refused(error) from None
        except (openai.OpenAIError, ValueError) as error:  # ValueError: a body that is no JSON
            raise self._silent(error) from None
        return self._read(found)

    @cached_property
    def _client(self) -> OpenAI:
        try:
            from openai import OpenAI
        except ImportError:
            raise ConfigError(
                "a judge is asked through the package openai, which is not installed: pip install 'mitigate[judge]'"
            ) from None
        if not (self._key.isascii() and self._key.isprintable()):  # it could not be sent, and the reason would quote it
            raise ConfigError(f"{self}: the key in the environment variable {self.key_env} must be plain letters")
        # The client wants some key; a server that needs none ignores it.
        return OpenAI(base_url=self.url, api_key=self._key or "none", max_retries=self.retries, timeout=self.timeout)

    @property
    def _key(self) -> str:
        return os.environ.get(self.key_env, "").strip()  # files often end in a line end

    def _read(self, found: Any) -> Reply:
        # Servers differ, and the client does not check what it is sent: every part may be missing or of another kind.
        choices = getattr(found, "choices", None)
        if not isinstance(choices, list) or not choices:
            raise DataError(f"{self} sent no choices; is this the address of a chat model? {_KEPT}")
        message = getattr(choices[0], "message", None)
        text = getattr(message, "content", None)
        if not isinstance(text, str) or not text.strip():
            reason = getattr(choices[0], "finish_reason", None)
            raise DataError(f"{self} sent an empty answer (finish_reason {reason!r}); {_KEPT}")
        name = getattr(found, "model", None)
        return Reply(text, name if isinstance(name, str) and name else self.model)

    def _refused(self, error: APIStatusError) -> MitigateError:
        status = error.status_code
        if status in (401, 403):  # what the server says is not shown: it may quote the key
            state = "the key in it was refused" if self._key else "which is not set"
            return ConfigError(
                f"{self} refused access (HTTP {status}); it needs a key in the environment variable "
                f"{self.key_env}: {state}"
            )
        said = self._said(error)
        if status == 404:
            return ConfigError(f"{self} does not exist (HTTP 404: {said}); check judge_url and judge_model")
        if status == 429 or status >= 500:
            return DataError(
                f"{self} is busy or broken (HTTP {status}: {said}), also after {self.retries} retries; "
                f"wait, or raise judge_retries\n{_KEPT}"
            )
        return DataError(f"{self} did not take the request (HTTP {status}: {said}); {_KEPT}")

    def _said(self, error: APIStatusError) -> str:
        body = error.body
        message = body.get("message") if isinstance(body, dict) else None
        text = " ".join(str(message or error.message).split())[:200]
        return text.replace(self._key, "***") if self._key else text

    def _silent(self, error: OpenAIError | ValueError) -> DataError:
        import openai

        if isinstance(error, openai.APITimeoutError):
            what = f"did not answer within {self.timeout:g} s, also after {self.retries} retries; is it overloaded?"
        elif isinstance(error, openai.APIConnectionError):
            what = f"cannot be reached, also after {self.retries} retries; is the server running?"
        else:
            what = "answered with something that is no chat completion; is this the address of a chat model?"
        return DataError(f"{self} {what}\n{_KEPT}")

    def __str__(self) -> str:
        return f"the judge {self.model!r} at {self.url}"


class Judged(Protocol):
    """A benchmark whose answers a judge grades: the options all of them share."""

    @property
    def name(self) -> str:
        """Name of the benchmark."""

    @property
    def judge_url(self) -> str | None:
        """Base address of the endpoint."""

    @property
    def judge_model(self) -> str | None:
        """Name of the model."""

    @property
    def judge_key_env(self) -> str:
        """Environment variable of the key."""

    @property
    def judge_retries(self) -> int:
        """How often a request is sent again."""


def judge_of(benchmark: Judged) -> Judge:
    """Return the judge a benchmark's options name; nothing is sent.

    Raises
    ------
    ConfigError
        If they name none, with the options to give.
    """
    if not benchmark.judge_url or not benchmark.judge_model:
        raise ConfigError(
            f"a judge grades the answers of {benchmark.name}: give benchmark.judge_url=http://HOST/v1 and "
            f"benchmark.judge_model=NAME of an OpenAI-compatible endpoint (its key in ${benchmark.judge_key_env})"
        )
    return Judge(
        benchmark.judge_url, benchmark.judge_model, key_env=benchmark.judge_key_env, retries=benchmark.judge_retries
    )
