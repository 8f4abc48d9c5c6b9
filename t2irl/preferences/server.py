"""The annotation page's server: hands out blind pairs, stores votes, and tells nobody what drew a picture."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from importlib import resources
from ipaddress import ip_address
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException, Response
from pydantic import BaseModel, ConfigDict, Field

from t2irl.preferences.guard import Guard
from t2irl.preferences.record import QUESTIONS
from t2irl.preferences.store import Answer, Vote, VoteStore, now
from t2irl.preferences.study import Item, Study

AHEAD = 8
"""Questions that a page may ask for at a time."""
RESERVED_S = 600.0
"""Seconds that a question handed out counts as being answered."""
PAGE = {"": ("page.html", "text/html"), "page.css": ("page.css", "text/css"), "page.js": ("page.js", "text/javascript")}
Name = Annotated[str, Field(min_length=1, max_length=100, pattern=r"\S")]
Id = Annotated[str, Field(min_length=1, max_length=64)]


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    rater: Name
    """As typed; only its hash is stored."""


class Hello(_Message):
    """A rater begins or comes back."""


class More(_Message):
    """A page wants questions."""

    skip: Annotated[list[Id], Field(max_length=10_000)] = []
    """Those that it has, or has answered without the answer having arrived."""
    count: Annotated[int, Field(ge=1, le=AHEAD)] = 4
    """How many more."""


class Cast(_Message):
    """An answer."""

    key: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    """Drawn by the page, the same however often it sends this."""
    item: Id
    """The question."""
    answer: Answer
    """By side."""
    ms: Annotated[int, Field(ge=0, le=10**9)]
    """From showing the pictures to the answer."""


class Undo(_Message):
    """Takes an answer back."""

    item: Id
    """The question."""


class Desk:
    """Who gets which question. Votes are in the store; what is remembered here may be forgotten at any time."""

    def __init__(self, study: Study, store: VoteStore, votes: int = 0):
        self.study, self.store, self.votes = study, store, votes
        self._lock = threading.Lock()
        self._orders: dict[int, list[Item]] = {}
        self._reserved: dict[str, dict[str, float]] = {}

    def open_items(self, rater: str) -> list[Item]:
        """What a rater may still be asked, in order."""
        number, done = self.store.number(rater), set(self.store.items_of(rater))
        if number not in self._orders:
            self._orders[number] = self.study.order(number)
        counts = self.store.counts() if self.votes else {}
        return [i for i in self._orders[number] if i.id not in done and self._wanted(i, rater, done, counts)]

    def _wanted(self, item: Item, rater: str, done: set[str], counts: dict[str, int]) -> bool:
        """With a quota: whether an item lacks votes. Checks of raters are for all, repeats for those who saw the first."""
        if not self.votes or item.gold is not None:
            return True
        if item.repeat_of is not None:
            return item.repeat_of in done
        deadline = time.monotonic()
        others = sum(end > deadline for who, end in self._reserved.get(item.id, {}).items() if who != rater)
        return counts.get(item.id, 0) + others < self.votes

    def hand_out(self, rater: str, skip: set[str], count: int) -> tuple[list[dict[str, Any]], int]:
        """The next questions as the page sees them, and how many are open in all."""
        number = self.store.number(rater)
        with self._lock:
            left = self.open_items(rater)
            chosen = [item for item in left if item.id not in skip][:count]
            if self.votes:
                for item in chosen:
                    self._reserved.setdefault(item.id, {})[rater] = time.monotonic() + RESERVED_S
        return [self.shown(item, number) for item in chosen], len(left)

    def shown(self, item: Item, number: int) -> dict[str, Any]:
        """All that a page learns of a question."""
        sides = [item.image_a, item.image_b]
        left, right = sides if self.study.left(item, number) == "a" else sides[::-1]
        return {
            "id": item.id, "prompt": item.prompt, "question": QUESTIONS[item.axis], "left": image_name(left),
            "right": image_name(right),
        }  # fmt: skip


def image_name(path: str) -> str:
    """Under which a picture is served."""
    return path.rsplit("/", 1)[-1].removesuffix(".png")


def make_app(study: Study, store: VoteStore, token: str | None, hosts: frozenset[str] | None, votes: int = 0) -> Any:
    """The ASGI application. `hosts`: names that requests may be addressed to, None for any (with a token only)."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    desk = Desk(study, store, votes)
    _add_files(app, study)

    def progress(rater: str, open_items: int) -> dict[str, int]:
        done = len(store.items_of(rater))
        return {"done": done, "total": done + open_items}

    @app.post("/api/hello")
    def hello(message: Hello) -> dict[str, Any]:
        rater = study.rater(message.rater)
        number, answered = store.number(rater), store.items_of(rater)
        known = [item for item in answered if item in study.by_id]
        last = desk.shown(study.by_id[known[-1]], number) if known else None
        return {"study": study.rater(""), "last": last, **progress(rater, len(desk.open_items(rater)))}

    @app.post("/api/next")
    def more(message: More) -> dict[str, Any]:
        rater = study.rater(message.rater)
        items, count = desk.hand_out(rater, set(message.skip), message.count)
        return {"items": items, **progress(rater, count)}

    @app.post("/api/vote")
    def vote(message: Cast) -> dict[str, Any]:
        item = study.by_id.get(message.item)
        if item is None:
            raise HTTPException(404, "no such question")
        rater = study.rater(message.rater)
        side = study.left(item, store.number(rater))
        outcome = store.cast(Vote(message.key, item.id, rater, message.answer, side, message.ms, now()))
        if outcome == "taken":
            raise HTTPException(409, "answered already, maybe in another window")
        return {"stored": True}

    @app.post("/api/undo")
    def undo(message: Undo) -> dict[str, Any]:
        item = study.by_id.get(message.item)
        if item is None:
            raise HTTPException(404, "no such question")
        rater = study.rater(message.rater)
        return {"undone": store.revoke(rater, item.id), "item": desk.shown(item, store.number(rater))}

    return Guard(app, token, hosts)


def _add_files(app: FastAPI, study: Study) -> None:
    """The page and the study's pictures."""
    files = {image_name(name): study.folder / name for i in study.items for name in (i.image_a, i.image_b)}
    pages = {name: (_page(file), kind) for name, (file, kind) in PAGE.items()}

    @app.get("/")
    @app.get("/{name}")
    def page(name: str = "") -> Response:
        if name not in pages:
            raise HTTPException(404, "no such page")
        text, kind = pages[name]
        return Response(text, media_type=f"{kind}; charset=utf-8", headers={"Cache-Control": "no-cache"})

    @app.get("/image/{name}")
    def image(name: str) -> Response:
        # Looked up among the study's pictures, never made into a path.
        if name not in files:
            raise HTTPException(404, "no such picture")
        return Response(
            files[name].read_bytes(),
            media_type="image/png",
            headers={"Cache-Control": "private, max-age=86400, immutable"},
        )


def _page(name: str) -> str:
    return (resources.files("t2irl.preferences") / name).read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------ running
def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
        found.listen(128)
    except OSError:
        found.close()
        raise
    return found


def address(host: str, port: int, token: str | None) -> str:
    """What raters open."""
    place = {"0.0.0.0": socket.gethostname(), "::": socket.gethostname()}.get(
        host, f"[{host}]" if ":" in host else host
    )
    return f"http://{place}:{port}/" + (f"?token={token}" if token else "")


def serve(study: Study, host: str, port: int, token: str | None, votes: int, say: Callable[[str], None]) -> None:
    """Serve until interrupted. Raises OSError if the address cannot be had."""
    import uvicorn

    with listen(host, port) as found, study.store() as store:
        real = found.getsockname()[1]
        hosts = frozenset({"localhost", "127.0.0.1", "[::1]", host, f"[{host}]"}) if is_loopback(host) else None
        app = make_app(study, store, token, hosts, votes)
        config = uvicorn.Config(app, log_level="warning", server_header=False, timeout_graceful_shutdown=3)
        say(address(host, real, token))
        uvicorn.Server(config).run(sockets=[found])
