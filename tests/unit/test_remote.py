"""The `remote` reward against the real server: what it takes over, and what it never lets through."""

from __future__ import annotations

import contextlib
import http.server
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("fastapi", reason="needs the extra `serve`")

from t2irl.errors import ConfigError, DataError, RunError
from t2irl.rewards.combine import RewardSet
from t2irl.rewards.remote import Remote
from t2irl.types import PromptGroups
from t2irl.utils import distributed
from tests.end_to_end.runs import assert_equal, base_config, metrics, saved, train
from tests.reward_server import HERE, Server, serving
from tests.tiny import make_sd3

CPU = torch.device("cpu")
ODD = f"{HERE}:Odd"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two rewards; requests of at most 64 KiB."""
    rewards = {"odd": {"type": ODD, "factor": 2.0}, "viv": {"type": "vividness"}}
    with serving(tmp_path_factory.mktemp("served"), rewards, "--max-request-mib", "0.0625") as found:
        yield found


def remote(url: str, prepared: bool = True, **settings: Any) -> Remote:
    made = Remote(Remote.Config.model_validate({"url": url, "retry_for": 0.5, **settings}), CPU)
    made.name = "far"
    if prepared:
        made.prepare([], None)  # type: ignore[arg-type]
    return made


def pictures(count: int, size: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    levels = torch.rand(count, 1, 1, 1, generator=generator) * torch.rand(count, 3, size, size, generator=generator)
    return levels.mul(255).round() / 255


def groups(*texts: str) -> PromptGroups:
    return PromptGroups.of(texts, range(len(texts)), [0] * len(texts))


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


# --------------------------------------------------------------------------------------------------------- agreement
@pytest.mark.parametrize("settings", [{}, {"encoding": "png"}, {"batch_size": 1, "parallel": 7}, {"batch_size": 500}])
def test_scores_are_those_of_the_reward_itself(server: Server, settings: dict[str, Any]) -> None:
    """In order, whatever the requests are cut into; 40 pictures are 120 KiB, more than the server takes at once."""
    images = pictures(40)
    found = remote(server.url, reward="odd", **settings).score(images, groups(*map(str, range(40))))
    assert found.dtype == torch.float32 and found.shape == (40,)
    torch.testing.assert_close(found, 2 * images.mean((1, 2, 3)), rtol=0, atol=1e-6)


def test_nothing_to_score(server: Server) -> None:
    assert remote(server.url, reward="odd").score(torch.empty(0, 3, 8, 8), groups()).shape == (0,)


def test_nan_is_refused_or_passed_on(server: Server) -> None:
    """With the prompt named (invariant 35)."""
    pixels, asked = pictures(3).mul(255).to(torch.uint8), groups("a", "nan", "b")
    from collections import Counter

    def scored(policy: str) -> Tensor:
        config = Remote.Config.model_validate({"url": server.url, "reward": "odd", "nan": policy})
        rewards = RewardSet({"far": config}, CPU, 8, Counter())
        rewards.prepare([], [], None, trained=True)  # type: ignore[arg-type]
        return rewards.score(pixels, asked)["far"]

    assert scored("skip").isnan().tolist() == [False, True, False]
    with pytest.raises(RunError, match="reward 'far' gave nan for the prompt 'nan'"):
        scored("error")


def test_what_the_server_refuses_stops_the_run_at_once(server: Server) -> None:
    reward, started = remote(server.url, reward="odd", retry_for=30), time.monotonic()
    with pytest.raises(RunError, match=r"reward far: .*422.*'inf'"):
        reward.score(pictures(2), groups("a", "inf"))
    assert time.monotonic() - started < 5


# --------------------------------------------------------------------------------------------------- wrong beginnings
def test_settings_that_cannot_work(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="url is missing"):
        Remote(Remote.Config(), CPU)
    for url in ("localhost:8400", "ftp://x", "http://", "http://a:b", "http://a/?q=1"):
        with pytest.raises(ConfigError, match="reward remote: url = "):
            remote(url, prepared=False)
    monkeypatch.delenv("SECRET", raising=False)
    with pytest.raises(ConfigError, match="token_env = SECRET"):
        remote(server.url, token_env="SECRET")
    with pytest.raises(DataError, match=r"serves 2 rewards \(odd, viv\); name one"):
        remote(server.url)
    with pytest.raises(DataError, match="has no reward 'pick'; it serves odd, viv"):
        remote(server.url, reward="pick")
    with pytest.raises(DataError, match=r"model_hash = 00, but .* serves "):
        remote(server.url, reward="odd", model_hash="00")
    assert remote(server.url, reward="odd", model_hash=remote(server.url, reward="odd").served.hash)


def test_no_server_is_an_error_within_its_time() -> None:
    started = time.monotonic()
    with pytest.raises(DataError, match=r"reward far: http://127.0.0.1:\d+/manifest: no usable answer within 0.5 s"):
        remote(f"http://127.0.0.1:{free_port()}")
    assert time.monotonic() - started < 3


@contextlib.contextmanager
def fake(answer: dict[str, Any] | bytes, pause: float = 0) -> Iterator[str]:
    """A server that lies, mumbles or sleeps."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            known = {"odd": {"type": "x", "hash": "h", "may_skip": False}}
            self.reply(json.dumps({"rewards": known, "limits": {"request_bytes": 10**6}}).encode())

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            time.sleep(pause)
            self.reply(answer if isinstance(answer, bytes) else json.dumps(answer).encode())

        def reply(self, body: bytes) -> None:
            with contextlib.suppress(OSError):
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{made.server_address[1]}"
    made.shutdown()
    made.server_close()


LIES: dict[str, tuple[Any, float, str]] = {
    "another model": (
        {"scores": {"odd": [1, 2]}, "hashes": {"odd": "other"}},
        0,
        "is now other, at the start it was h",
    ),
    "too few": ({"scores": {"odd": [1]}, "hashes": {"odd": "h"}}, 0, "gave 1 scores for 2 pictures"),
    "words": ({"scores": {"odd": ["a", 1]}, "hashes": {"odd": "h"}}, 0, "without scores"),
    "other names": ({"scores": {"viv": [1, 2]}, "hashes": {"viv": "h"}}, 0, "without scores"),
    "no json": (b"<html>", 0, "not JSON"),
    "asleep": (b"", 5, "timed out"),
}


@pytest.mark.parametrize("case", LIES)
def test_an_answer_that_is_not_one_never_becomes_a_score(case: str) -> None:
    answer, pause, words = LIES[case]
    with fake(answer, pause) as url:
        reward, started = remote(url, timeout=0.5, retry_for=0.2), time.monotonic()
        with pytest.raises(RunError, match=words):
            reward.score(pictures(2), groups("a", "b"))
        assert time.monotonic() - started < 4


# ---------------------------------------------------------------------------------------------- dead, and back again
@pytest.mark.slow
def test_a_run_outlives_its_server(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Killed in the middle, the run stops with a good checkpoint; with the server back it ends as one that never stopped.
    A request under way waits for the server; another model behind the same address is noticed, by it and by the run.
    """
    port = free_port()
    url, served = f"http://127.0.0.1:{port}", {"odd": {"type": ODD}}
    config = base_config(tmp_path, make_sd3(tmp_path / "model"))
    far = ["--rewards.bright.type=remote", f"--rewards.bright.url={url}", "--rewards.bright.retry_for=0.3"]
    near = [f"--rewards.bright.type={ODD}", f"--run_dir={tmp_path / 'near'}"]
    run, images = tmp_path / "run", pictures(3)
    assert train(config, *near) == 0
    # The eleventh call is in the second rollout: after nine the first checkpoint is written.
    with serving(tmp_path / "1", served, "--port", str(port), "--batch-size", "64", ODD_DIES_AT="11"):
        reward = remote(url, retry_for=60)
        code = train(config, *far)
    said = capfd.readouterr().err
    assert code == 4 and "no usable answer within 0.3 s" in said and "The last checkpoint is good" in said
    before = len(metrics(run))
    found: list[Tensor] = []
    waiting = threading.Thread(target=lambda: found.append(reward.score(images, groups("a", "b", "c"))))
    waiting.start()
    with serving(tmp_path / "2", served, "--port", str(port)):
        waiting.join(60)
        torch.testing.assert_close(found[0], images.mean((1, 2, 3)), rtol=0, atol=1e-6)
        assert train(config, *far) == 0
        assert before < len(metrics(run)) == len(metrics(tmp_path / "near"))
        for name in ("weights", "clock"):
            assert_equal(getattr(saved(run, 2), name), getattr(saved(tmp_path / "near", 2), name), name)
    other = {"odd": {"type": ODD, "factor": 3.0}}
    with serving(tmp_path / "3", other, "--port", str(port)):
        with pytest.raises(RunError, match=r"409.*is [0-9a-f]{64} here, not [0-9a-f]{64}"):
            reward.score(images, groups("a", "b", "c"))
        assert train(config, *far, "--iterations=3") == 3
        assert f"{url} now serves" in capfd.readouterr().err and len(saved(run, 2).weights)
        assert train(config, *far, "--iterations=3", "--rewards.bright.accept_other_model=true") == 0


PROCESS = """
import sys, time, datetime, torch, torch.distributed as dist
from t2irl.errors import RunError, UserError
from t2irl.rewards.remote import Remote
from t2irl.utils import distributed
from tests.unit.test_remote import groups, pictures
rank, store, urls = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60))
device = torch.device("cpu")
reward = Remote(Remote.Config.model_validate({"url": urls[0], "reward": "odd", "retry_for": 0.5}), device)
reward.prepare([], None)
with distributed.together(device):
    reward.score(pictures(2), groups("a", "b"))
started = time.monotonic()
if rank:
    reward.address = Remote(Remote.Config.model_validate({"url": urls[1], "retry_for": 0.5}), device).address
try:
    with distributed.together(device):
        reward.score(pictures(2), groups("a", "b"))
except RunError as error:
    print(f"{time.monotonic() - started:.1f} {error}")
    sys.exit(error.exit_code)
"""


@pytest.mark.slow
def test_all_processes_fail_when_the_server_is_dead_for_one(server: Server, tmp_path: Path) -> None:
    """Invariant 35: within the configured time, with the same words, none left waiting."""
    dead = f"http://127.0.0.1:{free_port()}"
    words = [str(tmp_path / "store"), server.url, dead]
    running = [
        subprocess.Popen([sys.executable, "-c", PROCESS, str(rank), *words], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    said = [process.communicate(timeout=100)[0] for process in running]
    assert [process.returncode for process in running] == [4, 4], said
    assert "process 1: reward remote" in said[0] and all(dead in text for text in said)
    assert all(float(text.split()[0]) < 5 for text in said)


def test_one_process_fails_as_it_is() -> None:
    """Without others nothing is changed about an error."""
    with pytest.raises(KeyError), distributed.together(CPU):
        raise KeyError("x")
    with distributed.together(CPU):
        pass
