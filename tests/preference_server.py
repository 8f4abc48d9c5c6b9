"""`t2irl prefs serve` for tests."""

from __future__ import annotations

import http.client
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from t2irl.preferences.study import Study

TOKEN = "a-token-nobody-guesses"


class Server:
    """`t2irl prefs serve` in a process of its own."""

    def __init__(self, study: Path, *options: str, port: int = 0):
        command = [sys.executable, "-m", "t2irl", "prefs", "serve", str(study), "--port", str(port), *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        words = self.process.stdout.readline().split()
        assert "open" in words, f"the server said {words}"
        self.url = words[words.index("open") + 1]
        self.port = urlsplit(self.url).port or 0

    def kill(self) -> None:
        """As a crash does."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, bytes]:
        """A request whose path is sent as it is."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        connection.putrequest(method, path, skip_host=bool(headers and "Host" in headers))
        raw = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(raw)),
            **(headers or {}),
        }.items():
            connection.putheader(name, value)
        connection.endheaders()
        connection.send(raw)
        answer = connection.getresponse()
        found = answer.status, answer.read()
        connection.close()
        return found


def votes(study: Study) -> dict[tuple[str, str], str]:
    """Standing votes by rater and item."""
    with study.store() as store:
        found = [((v.rater, v.item), v.answer) for v in store.votes()]
    assert len({key for key, _ in found}) == len(found), "a vote stands twice"
    return dict(found)
