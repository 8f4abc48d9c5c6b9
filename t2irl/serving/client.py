"""The client's side of a reward server: requests with a bounded number of tries, answers that are checked."""

from __future__ import annotations

import http.client
import json
import math
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

import numpy as np

from t2irl.serving.wire import MEDIA, pack

BUSY = (408, 429, 500, 502, 503, 504)
"""HTTP codes that may be another one in a moment."""
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 8.0
"""Seconds before the second try; each later pause is twice as long, up to the longest."""
LARGEST_ANSWER = 64 * 2**20


class ServerError(Exception):
    """The server is gone, refuses, or is not what it was. The message names it."""


@dataclass(frozen=True)
class Address:
    """Where a server is, and how to speak with it."""

    url: str
    token: str | None
    timeout: float
    """Seconds until a request without an answer counts as failed."""
    retry_for: float
    """Seconds, from the first failure, in which a request is tried again."""

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ValueError("expected an address such as http://localhost:8400")
        _ = parts.port  # raises ValueError for one that is no port

    def ask(self, path: str, body: bytes | None, given_up: threading.Event) -> dict[str, Any]:
        """One answer, after as many tries as its time allows. Raises ServerError.

        `given_up` is set by another request of the same batch that has failed for good.
        """
        started, pause, reason = time.monotonic(), FIRST_PAUSE, ""
        while True:
            try:
                return self._once(path, body)
            except _TryAgain as error:
                reason = str(error)
            left = started + self.retry_for - time.monotonic()
            if left <= 0 or given_up.wait(min(pause, left)):
                break
            pause = min(2 * pause, LONGEST_PAUSE)
        raise ServerError(
            f"{self.url}{path}: no usable answer within {self.retry_for:g} s (the last try: {reason}). Is the server running?"
        )

    def _once(self, path: str, body: bytes | None) -> dict[str, Any]:
        parts = urlsplit(self.url)
        make = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        # Straight to the server: a proxy for the outside world knows nothing of it.
        connection = make(str(parts.hostname), parts.port, timeout=self.timeout)
        headers = {"Connection": "close", "Content-Type": MEDIA}
        if self.token is not None:
            headers["Authorization"] = f"Bearer {self.token}"
        try:
            connection.request("GET" if body is None else "POST", parts.path.rstrip("/") + path, body, headers)
            answer = connection.getresponse()
            said = answer.read(LARGEST_ANSWER)
        except (OSError, http.client.HTTPException) as error:
            raise _TryAgain(str(error) or repr(error)) from error
        finally:
            connection.close()
        if answer.status != 200:
            words = f"HTTP {answer.status} {answer.reason}: {_reason(said)}"
            if answer.status in BUSY:
                raise _TryAgain(words)
            raise ServerError(f"{self.url}{path} refused the request ({words})")
        try:
            found = json.loads(said)
        except ValueError as error:  # cut off within the answer
            raise _TryAgain(f"the answer is not JSON: {error}") from error
        if not isinstance(found, dict):
            raise ServerError(f"{self.url}{path} answered {str(found)[:60]!r}; is that a t2irl reward server?")
        return found


class _TryAgain(Exception):
    """What may go better in a moment."""


def _reason(body: bytes) -> str:
    text = body[:500].decode("utf-8", "replace").strip()
    try:
        return str(json.loads(text)["error"])
    except (ValueError, KeyError, TypeError):
        return text


@dataclass(frozen=True)
class ServedReward:
    """A reward of a server, as its manifest names it."""

    name: str
    type: str
    hash: str
    may_skip: bool
    request_bytes: int
    """Most that a request may hold."""


def find_reward(address: Address, name: str | None) -> ServedReward:
    """The reward of that name, or the only one. Raises ServerError."""
    found = address.ask("/manifest", None, threading.Event())
    try:
        table = {
            str(key): ServedReward(
                str(key), str(r["type"]), str(r["hash"]), bool(r["may_skip"]), int(found["limits"]["request_bytes"])
            )
            for key, r in found["rewards"].items()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ServerError(f"{address.url}/manifest names no rewards; is that a t2irl reward server?") from error
    if name is None and len(table) != 1:
        raise ServerError(f"{address.url} serves {len(table)} rewards ({', '.join(table)}); name one with reward: NAME")
    if name is not None and name not in table:
        raise ServerError(f"{address.url} has no reward {name!r}; it serves {', '.join(table)}")
    return table[name or next(iter(table))]


def score(
    address: Address, reward: ServedReward, pictures: np.ndarray, prompts: Sequence[str], batch_size: int, parallel: int,
    encoding: Literal["raw", "png"],
) -> list[float]:  # fmt: skip
    """A score for each of (B, H, W, 3) uint8 pictures, NaN where the reward does not apply. Raises ServerError.

    Every request says which model it means, and every answer says which one gave it: no score of another one gets through.
    """
    fitting = max(reward.request_bytes // 2 // max(pictures[0].nbytes, 1), 1) if len(pictures) else 1
    step = min(batch_size, fitting)
    given_up = threading.Event()

    def part(start: int) -> list[float]:
        chosen = slice(start, start + step)
        body = pack(pictures[chosen], prompts[chosen], [reward.name], {reward.name: reward.hash}, encoding)
        try:
            return _checked(address.ask("/score", body, given_up), address, reward, len(pictures[chosen]))
        except ServerError:
            given_up.set()
            raise

    with ThreadPoolExecutor(parallel, "ask") as pool:
        work = [pool.submit(part, start) for start in range(0, len(pictures), step)]
        try:
            return [value for future in work for value in future.result()]
        finally:
            given_up.set()  # an interrupted run does not wait for tries to come
            for future in work:
                future.cancel()


def _checked(answer: dict[str, Any], address: Address, reward: ServedReward, count: int) -> list[float]:
    """The scores of an answer, if they are scores of this reward for so many pictures."""
    try:
        values, given = answer["scores"][reward.name], answer["hashes"][reward.name]
        scores = [math.nan if value is None else float(value) for value in values]
    except (KeyError, TypeError, ValueError) as error:
        raise ServerError(f"{address.url}/score answered without scores of {reward.name!r}: {error!r}") from error
    if given != reward.hash:
        raise ServerError(f"{address.url}: {reward.name!r} is now {given}, at the start it was {reward.hash}")
    if len(scores) != count:
        raise ServerError(f"{address.url}/score gave {len(scores)} scores for {count} pictures")
    return scores
