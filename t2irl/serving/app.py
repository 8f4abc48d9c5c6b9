"""The HTTP side of a reward server: who may ask, how much, and for how long. Needs fastapi."""

from __future__ import annotations

import asyncio
import hmac
import math
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect

from t2irl.errors import UserError
from t2irl.serving.batching import Batcher
from t2irl.serving.served import Served
from t2irl.serving.wire import JSON, MEDIA, Limits, Question, WireError, decode, unpack

DECODERS = 2
"""Threads that decode pictures."""


@dataclass(frozen=True)
class Settings:
    """How a server behaves."""

    limits: Limits
    timeout: float
    """Seconds in which a body must have arrived, and after that seconds until it must be scored."""
    queue_bytes: int
    """Bodies and pictures held at once, over all requests; what comes on top is sent away with 503."""
    batch_size: int
    wait: float
    """Seconds that a batch which is not full waits for more."""
    token: str | None = None


class Room:
    """Bytes that requests hold."""

    def __init__(self, size: int):
        self.size, self.taken = size, 0

    @contextmanager
    def hold(self, size: int) -> Iterator[None]:
        """Hold some bytes. Raises WireError when there is no room now."""
        if self.taken + size > self.size:
            raise WireError(503, f"busy: {self.taken} of {self.size} bytes are taken; ask again in a moment")
        self.taken += size
        try:
            yield
        finally:
            self.taken -= size


def make_app(served: Served, settings: Settings) -> FastAPI:
    """The application: /health, /manifest and /score."""
    batcher = Batcher(served.score, settings.batch_size, settings.wait)
    decoders, room = ThreadPoolExecutor(DECODERS, "decode"), Room(settings.queue_bytes)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker = asyncio.create_task(batcher.run())
        yield
        worker.cancel()
        batcher.close()
        decoders.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(title="t2irl rewards", openapi_url=None, lifespan=lifespan)

    @app.exception_handler(WireError)
    async def refused(request: Request, error: WireError) -> JSONResponse:
        # What was not read of a body would be taken for the next request.
        return JSONResponse({"error": str(error)}, error.status, {"Connection": "close"})

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "waiting": len(batcher.waiting), "batches": batcher.batches[-10:]}

    @app.get("/manifest")
    async def manifest(request: Request) -> dict[str, Any]:
        _check_token(request, settings.token)
        return served.manifest() | {"limits": asdict(settings.limits)}

    @app.post("/score")
    async def score(request: Request) -> JSONResponse:
        _check_token(request, settings.token)
        media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media not in (MEDIA, JSON):
            raise WireError(415, f"content type {media!r}: expected {MEDIA} or {JSON}")
        with room.hold(_length(request, settings.limits)):
            body = await _body(request, settings)
            question = unpack(body, media, settings.limits)
            names = _names(question, served)
            with room.hold(question.decoded_bytes):
                pictures = await asyncio.get_running_loop().run_in_executor(decoders, decode, question)
                return await _answer(batcher.score(pictures, question.header.prompts, names), names)

    async def _answer(work: Any, names: tuple[str, ...]) -> JSONResponse:
        try:
            scores = await asyncio.wait_for(work, settings.timeout)
        except asyncio.TimeoutError as error:
            raise WireError(503, f"not scored within {settings.timeout:g} s; ask again in a moment") from error
        except UserError as error:
            raise WireError(422, str(error)) from error
        known = {name: [None if math.isnan(x) else x for x in scores[name]] for name in names}
        return JSONResponse({"scores": known, "hashes": {name: served.hashes[name] for name in names}})

    return app


def _check_token(request: Request, token: str | None) -> None:
    given = request.headers.get("authorization", "")
    if token is not None and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
        raise WireError(401, "wrong or missing token; send `Authorization: Bearer TOKEN`")


def _length(request: Request, limits: Limits) -> int:
    """What the body is said to hold."""
    said = request.headers.get("content-length", "")
    if not said.isdigit():
        raise WireError(411, "Content-Length is missing")
    if int(said) > limits.request_bytes:
        raise WireError(
            413, f"a body of {said} bytes: at most {limits.request_bytes} are taken; ask about fewer pictures"
        )
    return int(said)


async def _body(request: Request, settings: Settings) -> bytes:
    """All of the body, within the time for it."""
    try:
        return await asyncio.wait_for(request.body(), settings.timeout)
    except asyncio.TimeoutError as error:
        raise WireError(408, f"the body did not arrive within {settings.timeout:g} s") from error
    except ClientDisconnect as error:
        raise WireError(400, "the connection ended within the body") from error


def _names(question: Question, served: Served) -> tuple[str, ...]:
    """The rewards asked for, if they are what the client takes them for."""
    header = question.header
    names = tuple(dict.fromkeys(header.rewards or served.hashes))
    if unknown := [name for name in (*names, *header.expect) if name not in served.hashes]:
        raise WireError(404, f"no reward {unknown[0]!r} here; there is {', '.join(served.hashes)}")
    for name, wanted in header.expect.items():
        if wanted != served.hashes[name]:
            raise WireError(409, f"reward {name!r} is {served.hashes[name]} here, not {wanted}")
    return names
