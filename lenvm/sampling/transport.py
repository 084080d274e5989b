"""HTTP with retries: what is worth another try, how long to wait, and what to say when it was in vain."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

import httpx

RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})
FIRST_PAUSE = 0.5
LONGEST_PAUSE = 30.0


class RequestFailedError(Exception):
    """A request that got no answer after all attempts.

    Attributes:
        unreachable: whether the last attempt did not even reach the server.
    """

    def __init__(self, message: str, unreachable: bool = False) -> None:
        super().__init__(message)
        self.unreachable = unreachable


def error_text(response: httpx.Response) -> str:
    """The message of an error answer, in the OpenAI shape, SGLang's or plain, at most 300 characters."""
    text = response.text.strip()
    try:
        body = response.json()
    except ValueError:
        body = None
    if isinstance(body, dict):
        error = body.get("error", body)
        if isinstance(error, dict):
            error = error.get("message", text)
        text = str(error)
    return text if len(text) <= 300 else text[:297] + "..."


def pause(attempt: int, response: httpx.Response | None) -> float:
    """Seconds before attempt number `attempt` (1 = first retry): Retry-After where the server gives it in seconds,
    otherwise doubling with jitter, so that many waiting requests do not come back at once."""
    if response is not None:
        asked = response.headers.get("retry-after", "")
        if asked.isdigit():
            return min(float(asked), LONGEST_PAUSE)
    return float(min(FIRST_PAUSE * 2 ** (attempt - 1), LONGEST_PAUSE) * random.uniform(0.5, 1.0))


async def post_json(
    client: httpx.AsyncClient,
    url: str,
    body: dict[str, Any],
    retries: int,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> Any:
    """POST and return the parsed answer.

    Raises:
        RequestFailedError: on a refusal that no retry mends, or after the last attempt.
    """
    attempt = 0
    while True:
        response: httpx.Response | None = None
        try:
            response = await client.post(url, json=body)
            if response.is_success:
                return response.json()
            problem = f"HTTP {response.status_code}: {error_text(response)}"
            worth_it = response.status_code in RETRIED
        except httpx.TransportError as error:
            problem, worth_it = f"{type(error).__name__}: {error or 'no answer'}", True
        except ValueError:
            problem, worth_it = f"the answer is not JSON: {response.text[:100] if response else ''}", True
        if not worth_it:
            raise RequestFailedError(problem)
        if attempt >= retries:
            raise RequestFailedError(f"{problem} (after {attempt + 1} attempts)", unreachable=response is None)
        attempt += 1
        await sleep(pause(attempt, response))


async def get_json(client: httpx.AsyncClient, url: str) -> Any | None:
    """The parsed answer of a GET; None if there is none or it is an error."""
    try:
        response = await client.get(url)
        return response.json() if response.is_success else None
    except (httpx.HTTPError, ValueError):
        return None
