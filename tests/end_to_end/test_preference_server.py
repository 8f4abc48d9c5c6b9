"""The annotation server under hostile requests, without a page."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from t2irl.preferences.pairs import Plan
from tests.preference_server import TOKEN, Server, votes
from tests.preferences import write_study


def test_a_server_refuses_what_it_must(start: Callable[..., Server], tmp_path: Path) -> None:
    study = write_study(tmp_path, ["a", "b"], Plan(gold=0, repeat=0))
    server = start(study.folder)
    item = study.items[0]
    good = {"rater": "x", "key": "0" * 32, "item": item.id, "answer": "left", "ms": 5}
    for path in ("/image/../study.json", "/image/..%2fstudy.json", "/image/%2e%2e%2fvotes.db", "/../pairs.jsonl", "/image//etc/passwd",
                 "/image/" + "a" * 30_000, "/pairs.jsonl", "/docs", "/openapi.json", "/%00"):  # fmt: skip
        status, body = server.request("GET", path)
        assert status in (400, 404, 414), f"{path[:40]} gave {status}"
        assert b"salt" not in body and b"model_a" not in body and b"root:" not in body
    refusals = [
        ({**good, "item": "nothing"}, 404), ({**good, "answer": "a"}, 422), ({**good, "ms": -1}, 422), ({**good, "key": "k"}, 422),
        ({**good, "rater": " "}, 422), ({**good, "rater": "x" * 101}, 422), ({**good, "more": 1}, 422), (b"{", 422), (b"[" * 9000, 400),
        ({**good, "rater": "x" * 20_000}, 413),
    ]  # fmt: skip
    for body, expected in refusals:
        assert server.request("POST", "/api/vote", body)[0] == expected, str(body)[:80]
    # A body that does not announce how long it is.
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.request(
        "POST", "/api/vote", iter([b"x" * 4096] * 8), {"Content-Type": "application/json"}, encode_chunked=True
    )
    assert connection.getresponse().status == 413
    assert server.request("GET", "/", headers={"Host": "elsewhere.example"})[0] == 421
    assert server.request("GET", "/", headers={"Host": f"localhost:{server.port}"})[0] == 200
    assert votes(study) == {}
    # The same message twice is one vote, another answer to the same question is none.
    assert [server.request("POST", "/api/vote", b)[0] for b in (good, good, {**good, "key": "1" * 32})] == [
        200,
        200,
        409,
    ]
    assert votes(study) == {(study.rater("x"), item.id): "left"}


def test_beyond_this_machine_a_token_is_needed(start: Callable[..., Server], tmp_path: Path) -> None:
    study = write_study(tmp_path, ["a"], Plan(gold=0, repeat=0))
    server = start(study.folder, "--host", "0.0.0.0", "--token", TOKEN)
    picture = "/image/" + study.items[0].image_a.split("/")[1].removesuffix(".png")
    for path in ("/", picture, f"/{'?token=' + TOKEN[:-1]}", f"{picture}?token={TOKEN}"):
        assert server.request("GET", path)[0] == 401
    assert server.request("POST", "/api/hello", {"rater": "x"})[0] == 401
    assert server.request("GET", f"/?token={TOKEN}")[0] == 303
    for headers in ({"Cookie": f"t2irl_prefs={TOKEN}"}, {"Authorization": f"Bearer {TOKEN}"}):
        assert server.request("GET", picture, headers=headers)[0] == 200
        assert server.request("POST", "/api/hello", {"rater": "x"}, headers)[0] == 200
    made_up = start(study.folder, "--host", "0.0.0.0")
    assert len(urlsplit(made_up.url).query) > 24
    assert made_up.request("GET", "/")[0] == 401


def test_a_quota_spreads_raters_over_questions(start: Callable[..., Server], tmp_path: Path) -> None:
    study = write_study(tmp_path, [f"prompt {k}" for k in range(6)], Plan(gold=0.2, repeat=0))
    server = start(study.folder, "--votes", "1")
    plain = {i.id for i in study.items if i.gold is None}
    given: Counter[str] = Counter()
    for rater in "abc":
        found = json.loads(server.request("POST", "/api/next", {"rater": rater, "count": 4})[1])["items"]
        for item in (i["id"] for i in found):
            given[item] += 1
    assert all(given[item] == 1 for item in plain), "while one rater has a question, no other gets it"
    assert {item for item in given if item not in plain} == {i.id for i in study.items if i.gold is not None}


def test_starting_fails_with_words(tmp_path: Path) -> None:
    study = write_study(tmp_path, ["a"], Plan(gold=0, repeat=0))
    cases = {
        (str(tmp_path),): "not a study", (str(study.folder), "--token", "short"): "at least 16",
        (str(study.folder), "--port", "70000"): "cannot listen", (str(study.folder), "--host", "256.1.1.1"): "cannot listen",
    }  # fmt: skip
    for arguments, words in cases.items():
        begun = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "t2irl", "prefs", "serve", *arguments], capture_output=True, text=True
        )
        assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
        assert time.monotonic() - begun < 30
