"""The reward server, as a process on this machine: many clients, rude clients, and what it never does."""

from __future__ import annotations

import base64
import http.client
import io
import json
import socket
import struct
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("fastapi", reason="needs the extra `serve`")

from t2irl.serving.wire import JSON, MEDIA, pack, to_png
from t2irl.shapes import proxies
from tests.reward_server import HERE, Server, serving

TOKEN = "a long secret"
CAPTION = "a red circle on a white background"
LIMIT_MIB, MEGAPIXELS, TIMEOUT = 8, 1, 2


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Four rewards, small limits, a token."""
    rewards = {
        "viv": {"type": "vividness"}, "count": {"type": "object_count"}, "odd": {"type": f"{HERE}:Odd"},
        "slow": {"type": f"{HERE}:Odd", "pause": TIMEOUT + 1.5},
    }  # fmt: skip
    options = ["--max-request-mib", LIMIT_MIB, "--max-megapixels", MEGAPIXELS, "--timeout", TIMEOUT, "--wait-ms", 20]
    folder = tmp_path_factory.mktemp("server")
    with serving(folder, rewards, "--token-env", "SECRET", *map(str, options), SECRET=TOKEN) as found:
        yield found
        assert found.process.poll() is None, "the server is gone"


def pictures(count: int, seed: int = 0, size: int = 64) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.integers(0, 256, (count, 1, 1, 3)) * rng.random((count, size, size, 1))).astype(np.uint8)


def vividness(images: np.ndarray) -> list[float]:
    return proxies.vividness(torch.from_numpy(images).permute(0, 3, 1, 2) / 255).tolist()


def post(
    server: Server, body: bytes, media: str = MEDIA, path: str = "/score", token: str | None = TOKEN, **headers: str
) -> tuple[int, Any]:
    """Status and answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    more = {} if token is None else {"Authorization": f"Bearer {token}"}
    try:
        connection.request(
            "GET" if path != "/score" else "POST", path, body or None, {"Content-Type": media, **more, **headers}
        )
        answer = connection.getresponse()
        text = answer.read()
    finally:
        connection.close()
    return answer.status, json.loads(text) if text.startswith(b"{") else text.decode()


def question(images: np.ndarray, *names: str, prompts: list[str] | None = None, encoding: Any = "raw") -> bytes:
    return pack(images, prompts or [CAPTION] * len(images), names or ["viv"], {}, encoding)


def by_hand(files: list[bytes], **more: Any) -> bytes:
    header = {
        "prompts": [CAPTION] * len(files),
        "rewards": ["viv"],
        "pictures": [base64.b64encode(f).decode() for f in files],
    }
    return json.dumps(header | more).encode()


def framed(header: Any, rest: bytes = b"") -> bytes:
    words = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack(">I", len(words)) + words + rest


def still_right(server: Server) -> None:
    """It answers, and what it says is right."""
    images = pictures(2, 77)
    status, answer = post(server, question(images))
    assert status == 200 and answer["scores"]["viv"] == pytest.approx(vividness(images), abs=1e-6)


# ------------------------------------------------------------------------------------------------------------ answers
@pytest.mark.parametrize("encoding", ["raw", "png", "json"])
def test_scores_are_those_of_the_reward_itself(server: Server, encoding: str) -> None:
    images = pictures(5)
    if encoding == "json":
        status, answer = post(server, by_hand([to_png(x) for x in images]), JSON)
    else:
        status, answer = post(server, question(images, encoding=encoding))
    assert status == 200 and answer["scores"] == {"viv": pytest.approx(vividness(images), abs=1e-6)}
    assert answer["hashes"]["viv"] in server.said


def test_pictures_of_several_sizes_and_kinds_come_in_one_question(server: Server) -> None:
    sizes = [pictures(1, size=s)[0] for s in (64, 32, 64, 48)]
    grey = Image.fromarray(sizes[1][..., 0])
    palette = Image.fromarray(sizes[2]).quantize(8)
    files = [to_png(sizes[0]), png(grey), png(palette), to_png(sizes[3])]
    seen = [sizes[0], np.array(grey.convert("RGB")), np.array(palette.convert("RGB")), sizes[3]]
    status, answer = post(server, by_hand(files), JSON)
    assert status == 200 and answer["scores"]["viv"] == pytest.approx([vividness(x[None])[0] for x in seen], abs=1e-6)


def test_several_rewards_and_all_of_them(server: Server) -> None:
    status, answer = post(server, question(pictures(2), "viv", "count", "viv"))
    assert status == 200 and set(answer["scores"]) == {"viv", "count"}
    status, answer = post(server, b"", path="/manifest")
    assert status == 200 and set(answer["rewards"]) == {"viv", "count", "odd", "slow"}
    assert answer["rewards"]["odd"]["may_skip"] and not answer["rewards"]["viv"]["may_skip"]
    assert answer["limits"] == {"request_bytes": LIMIT_MIB * 2**20, "picture_pixels": MEGAPIXELS * 1_000_000}


def test_64_clients_at_once(server: Server) -> None:
    """Each gets the scores of its own pictures, and they are scored together."""

    def client(number: int) -> bool:
        images = pictures(1 + number % 5, 1000 + number, 64 if number % 4 else 32)
        status, answer = post(server, question(images, encoding="png" if number % 3 else "raw"))
        return status == 200 and answer["scores"]["viv"] == pytest.approx(vividness(images), abs=1e-6)

    with ThreadPoolExecutor(64) as pool:
        assert all(pool.map(client, range(192)))
    assert max(post(server, b"", path="/health", token=None)[1]["batches"]) > 5


def test_nan_is_null_and_infinity_is_refused(server: Server) -> None:
    status, answer = post(server, question(pictures(3), "odd", prompts=["a", "nan", "b"]))
    assert status == 200 and [x is None for x in answer["scores"]["odd"]] == [False, True, False]
    status, answer = post(server, question(pictures(2), "odd", prompts=["a", "inf"]))
    assert status == 422 and "'inf'" in answer["error"]


def test_what_one_client_does_wrong_is_not_the_others_fault(server: Server) -> None:
    """Good and bad prompts arrive together and share batches."""

    def client(number: int) -> bool:
        bad = number % 4 == 0
        status, answer = post(
            server, question(pictures(2, number), "count", prompts=[CAPTION, "no caption" if bad else CAPTION])
        )
        return status == 422 and "no caption" in answer["error"] if bad else status == 200

    with ThreadPoolExecutor(24) as pool:
        assert all(pool.map(client, range(48)))
    assert post(server, question(pictures(1), "odd", prompts=["bug"]))[0] == 500
    still_right(server)


# ------------------------------------------------------------------------------------------------------ rude clients
def png(picture: Image.Image, **more: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", **more)
    return buffer.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A small file of many black pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    squeeze = zlib.compressobj(9)
    rows = b"".join(squeeze.compress(bytes(1 + 3 * width)) for _ in range(height)) + squeeze.flush()
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


ONE = to_png(pictures(1)[0])
RUDE: dict[str, tuple[bytes, str, int, str]] = {
    "text": (b"hello", "text/plain", 415, "content type"),
    "pickle": (b"\x80\x04.", "application/octet-stream", 415, "content type"),
    "no type": (question(pictures(1)), "", 415, "content type"),
    "empty": (b"", MEDIA, 400, "within its header"),
    "short": (b"\0\0", MEDIA, 400, "within its header"),
    "long header": (b"\xff\xff\xff\xff{}", MEDIA, 400, "within its header"),
    "no json": (framed(b"{"), MEDIA, 400, "JSON"),
    "unknown key": (framed({"prompts": ["a"], "picturs": []}), MEDIA, 422, "picturs"),
    "no prompts": (framed({"prompts": []}), MEDIA, 422, "prompts"),
    "number prompts": (framed({"prompts": [1]}), MEDIA, 422, "string"),
    "too few pictures": (framed({"prompts": ["a", "b"], "sizes": [len(ONE)]}, ONE), MEDIA, 422, "1 pictures but 2"),
    "wrong sizes": (framed({"prompts": ["a"], "sizes": [7]}, ONE), MEDIA, 400, "add up"),
    "negative size": (framed({"prompts": ["a"], "sizes": [-1]}, ONE), MEDIA, 422, "sizes"),
    "wrong shape": (framed({"prompts": ["a"], "encoding": "raw", "shape": [1, 9, 9, 3]}, b"12"), MEDIA, 400, "243"),
    "huge shape": (framed({"prompts": ["a"], "encoding": "raw", "shape": [10**30, 9, 9, 3]}), MEDIA, 400, "means"),
    "four channels": (framed({"prompts": ["a"], "encoding": "raw", "shape": [1, 2, 2, 4]}, bytes(16)), MEDIA, 422, "shape"),
    "jpeg": (by_hand([b"\xff\xd8\xff\xe0" + bytes(90)]), JSON, 415, "PNG"),
    "no base64": (by_hand([], prompts=["a"], pictures=["***"]), JSON, 400, "base64"),
    "truncated": (by_hand([ONE[: len(ONE) // 2]]), JSON, 400, "damaged"),
    "flipped bit": (by_hand([ONE[:100] + bytes([ONE[100] ^ 1]) + ONE[101:]]), JSON, 400, "damaged"),
    "transparent": (by_hand([png(Image.new("RGBA", (4, 4)))]), JSON, 415, "transparency"),
    "16 bits": (by_hand([png(Image.new("I;16", (4, 4)))]), JSON, 415, "8-bit"),
    "100 megapixels": (by_hand([bomb(10_000, 10_000)]), JSON, 413, "10000 x 10000"),
    "many megapixels": (by_hand([bomb(1000, 1000)] * 10), JSON, 413, "30000000 bytes"),
    "no pixels": (by_hand([ONE[:16] + bytes(8) + ONE[24:]]), JSON, 413, "0 x 0"),
    "unknown reward": (question(pictures(1), "pick"), MEDIA, 404, "'pick'"),
    "other model": (pack(pictures(1), ["a"], ["viv"], {"viv": "00"}, "raw"), MEDIA, 409, "not 00"),
}  # fmt: skip


@pytest.mark.parametrize("case", RUDE)
def test_what_cannot_be_answered_is_refused(server: Server, case: str) -> None:
    body, media, status, words = RUDE[case]
    before = server.memory("VmHWM")
    found, answer = post(server, body, media)
    assert (found, words in answer["error"]) == (status, True), answer
    assert server.memory("VmHWM") - before < 64 * 2**20
    still_right(server)


@pytest.mark.parametrize("token", [None, "", "wrong", TOKEN + "x", TOKEN[:-1]])
def test_a_wrong_token_sees_nothing(server: Server, token: str | None) -> None:
    for path in ("/score", "/manifest"):
        status, answer = post(server, question(pictures(1)), path=path, token=token)
        assert status == 401 and "token" in answer["error"]
    assert post(server, b"", path="/health", token=None)[0] == 200


def raw_request(server: Server, head: str, body: bytes = b"", wait: float = 20) -> bytes:
    """What comes back for bytes as they are, until the server closes."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=wait) as s:
        s.sendall(
            f"{head}\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Type: {MEDIA}\r\n\r\n".encode() + body
        )
        found = b""
        while part := s.recv(4096):
            found += part
    return found


def test_an_oversized_body_is_refused_before_it_is_sent(server: Server) -> None:
    started = time.monotonic()
    found = raw_request(server, f"POST /score HTTP/1.1\r\nContent-Length: {2**40}")
    assert found.startswith(b"HTTP/1.1 413") and time.monotonic() - started < 1.5
    found = raw_request(server, "POST /score HTTP/1.1\r\nTransfer-Encoding: chunked", b"4\r\nabcd\r\n")
    assert found.startswith(b"HTTP/1.1 411")
    still_right(server)


def test_a_slow_client_and_one_that_leaves_hold_nobody_up(server: Server) -> None:
    body = question(pictures(4))
    heads = [f"POST /score HTTP/1.1\r\nContent-Length: {len(body)}"] * 20
    with ThreadPoolExecutor(20) as pool:
        slow = [pool.submit(raw_request, server, head, body[:100]) for head in heads]
        with socket.create_connection(("127.0.0.1", server.port)) as s:  # promises a body, sends a part, goes
            s.sendall(
                f"{heads[0]}\r\nAuthorization: Bearer {TOKEN}\r\nContent-Type: {MEDIA}\r\n\r\n".encode() + body[:50]
            )
        started = time.monotonic()
        still_right(server)
        assert time.monotonic() - started < TIMEOUT / 2
        assert all(future.result().startswith(b"HTTP/1.1 408") for future in slow)
    still_right(server)


def test_what_takes_too_long_is_told_so(server: Server) -> None:
    status, answer = post(server, question(pictures(1), "slow"))
    assert status == 503 and "not scored within" in answer["error"]
