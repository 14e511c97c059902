"""A model server with OpenAI's API: asked politely, so many times at most, and never by its key.

One request is one HTTP request: the client's own retries are off, since a budget has to count
them. What a server says of one row costs that row; what it says of us ends the run.
"""

import asyncio
import os
import random
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

from rsr.jobs.errors import UsageError, first_line
from rsr.jobs.refinement.outcome import Outcome, RefineStatus
from rsr.jobs.refinement.questions import Question
from rsr.jobs.refinement.replies import outcome_of_reply

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 60.0
"""Between attempts: doubled each time, shortened at random by up to a half so that requests that
failed together do not come back together. A server's Retry-After goes before it."""
PROBE_ATTEMPTS = 3
NO_KEY = "none"
"""Sent where no key is set: local servers ask for none, and the client insists on one."""


class EndpointError(Exception):
    """The server refuses all of us, or answers nobody: one line that says why."""


class BudgetSpentError(Exception):
    """No further request may be made."""


class _PassingError(Exception):
    """An attempt failed for a reason that may pass. pause_s: that the server asks for, or None."""

    def __init__(self, told: str, pause_s: float | None = None) -> None:
        super().__init__(told)
        self.pause_s = pause_s


@dataclass(slots=True)
class Budget:
    """How many requests may still be made. limit: None is as many as it takes."""

    limit: int | None
    num_requests: int = 0

    def take(self) -> None:
        """Raises `BudgetSpentError` if there is none left."""
        if self.limit is not None and self.num_requests >= self.limit:
            raise BudgetSpentError
        self.num_requests += 1


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointOptions:
    """A server and how to ask it.

    url: of the API, up to `/v1`. model: as the server calls it. key_variable: of the environment,
    that holds the key. temperature, max_tokens: None leaves them to the server. timeout_s: of one
    request. retries: after the first attempt of a row. concurrency: requests at a time.
    max_requests: that one start may make; None is as many as it takes.
    """

    url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    temperature: float | None = None
    max_tokens: int | None = None
    timeout_s: float = 600.0
    retries: int = 6
    concurrency: int = 16
    max_requests: int | None = None


class Endpoint:
    """A connection to a server; an asynchronous context manager, used by one event loop."""

    def __init__(self, options: EndpointOptions, budget: Budget) -> None:
        """Raises `UsageError` if the client is not installed or the URL is none."""
        self._options, self._budget = options, budget
        self._key = os.environ.get(options.key_variable) or NO_KEY
        self._openai = _client_library()
        require_url(options.url)
        self._client = self._openai.AsyncOpenAI(
            base_url=options.url, api_key=self._key, max_retries=0, timeout=options.timeout_s
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _where: TracebackType | None,
    ) -> None:
        await self._client.close()

    async def probe(self) -> None:
        """Raises `UsageError` if nobody listens there, or the key is refused; asks no model."""
        for attempt in range(PROBE_ATTEMPTS):
            try:
                await self._client.models.list(timeout=min(self._options.timeout_s, 30.0))
            except (self._openai.AuthenticationError, self._openai.PermissionDeniedError) as error:
                raise UsageError(self._told_key(error)) from None
            except self._openai.APITimeoutError:
                return
            except self._openai.APIConnectionError as error:
                if attempt + 1 == PROBE_ATTEMPTS:
                    told = self._told(error.__cause__ or error)
                    raise UsageError(f"--endpoint {self._options.url}: {told}") from None
                await asyncio.sleep(_pause_s(attempt, None))
            except (self._openai.OpenAIError, ValueError):
                # Not every server lists its models.
                return
            else:
                return

    async def ask(self, question: Question) -> Outcome:
        """What the oracle makes of one row, after as many attempts as that may take.

        Raises `EndpointError` if the server refuses whatever is asked, `BudgetSpentError` before a
        request too many.
        """
        for attempt in range(self._options.retries + 1):
            self._budget.take()
            try:
                return await self._ask_once(question)
            except _PassingError as error:
                failure = error
            if attempt < self._options.retries:
                await asyncio.sleep(_pause_s(attempt, failure.pause_s))
        told = f"{self._options.retries + 1} attempts failed, the last one: {failure}"
        return Outcome(RefineStatus.FAILED, detail=told)

    async def _ask_once(self, question: Question) -> Outcome:
        settings: dict[str, Any] = {}
        if self._options.temperature is not None:
            settings["temperature"] = self._options.temperature
        if self._options.max_tokens is not None:
            settings["max_completion_tokens"] = self._options.max_tokens
        try:
            reply = await self._client.chat.completions.create(
                model=self._options.model,
                messages=question.messages,
                **settings,
            )
        except self._openai.APIStatusError as error:
            return self._refused(error)
        except self._openai.APITimeoutError:
            raise _PassingError(f"no answer within {self._options.timeout_s:g} s") from None
        except (self._openai.OpenAIError, ValueError) as error:
            raise _PassingError(self._told(error.__cause__ or error)) from None
        return _outcome(reply, question.native)

    def _refused(self, error: Any) -> Outcome:
        """What an HTTP status means: the row's outcome, another attempt, or the end."""
        status, told = error.status_code, self._told(error)
        if status in (401, 403):
            raise EndpointError(self._told_key(error))
        if status == 404:
            raise EndpointError(f"{self._options.url} has no {self._options.model!r}: {told}")
        if getattr(error, "code", None) == "insufficient_quota":
            raise EndpointError(told)
        if status in (408, 409, 429) or status >= 500:
            raise _PassingError(told, _retry_after_s(error.response.headers))
        return Outcome(RefineStatus.REFUSED, detail=told)

    def _told_key(self, error: Any) -> str:
        return (
            f"--endpoint {self._options.url} refuses the key in {self._options.key_variable}: "
            f"{self._told(error)}"
        )

    def _told(self, error: BaseException) -> str:
        """The error in one line, without the key."""
        told = first_line(error) or type(error).__name__
        return told if self._key == NO_KEY else told.replace(self._key, "***")


def require_url(url: str) -> None:
    """Raises `UsageError` unless it is an HTTP address without a secret in it."""
    try:
        parts = urlsplit(url)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        is_address = False
    if not is_address:
        raise UsageError(f"--endpoint {url}: expected http://HOST:PORT/v1 or the like")
    if parts.username or parts.password or parts.query:
        raise UsageError(
            "--endpoint: a URL with a user, a password or a query would be written down with the "
            "run; put the key into the environment"
        )


def _client_library() -> Any:
    # It takes a second to import: `rsr --help` should not wait for it.
    try:
        import openai
    except ImportError as error:
        raise UsageError(
            f"the client cannot be imported ({error}): pip install 'rsr-engine[refine]'"
        ) from error
    return openai


def _outcome(reply: Any, native: str) -> Outcome:
    """What a reply makes of the row; raises `_PassingError` if it is no chat completion."""
    choices = getattr(reply, "choices", None)
    if not choices or getattr(choices[0], "message", None) is None:
        raise _PassingError("the reply is no chat completion")
    choice, usage = choices[0], getattr(reply, "usage", None)
    counts = {
        "prompt_tokens": getattr(usage, "prompt_tokens", None),
        "completion_tokens": getattr(usage, "completion_tokens", None),
    }
    if choice.finish_reason == "content_filter" or getattr(choice.message, "refusal", None):
        told = getattr(choice.message, "refusal", None) or "the server's content filter"
        return Outcome(RefineStatus.REFUSED, detail=first_line(ValueError(told)), **counts)
    is_cut_off = choice.finish_reason == "length"
    return outcome_of_reply(choice.message.content or "", native, is_cut_off=is_cut_off, **counts)


def _pause_s(attempt: int, asked_s: float | None) -> float:
    if asked_s is not None:
        return min(asked_s, LONGEST_PAUSE_S)
    longest: float = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**attempt)
    return longest * random.uniform(0.5, 1.0)


def _retry_after_s(headers: Any) -> float | None:
    """The header's seconds; None where it is missing, or a date."""
    try:
        return max(0.0, float(headers.get("retry-after")))
    except (TypeError, ValueError):
        return None
