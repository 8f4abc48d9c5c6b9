"""`t2irl serve-reward`: what it serves, what it refuses, how it ends."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="needs the extra `serve`")

from t2irl.cli import main
from t2irl.errors import ConfigError
from t2irl.serving.client import Address, find_reward, score
from t2irl.serving.identity import content_hash, reward_hash
from t2irl.serving.served import load_rewards
from tests.reward_server import HERE, serving


def test_hashes_speak_of_content(tmp_path: Path) -> None:
    from t2irl.rewards.tiny_clip import TinyClip

    def tiny(name: str, **more: Any) -> str:
        return reward_hash(TinyClip.Config.model_validate({"path": tmp_path / name, **more}))

    for name in ("a", "b"):
        (tmp_path / name / "deep").mkdir(parents=True)
        (tmp_path / name / "deep" / "weights").write_bytes(b"123")
    assert tiny("a") == tiny("b") == tiny("a", weight=3)
    (tmp_path / "b" / "deep" / "weights").write_bytes(b"124")
    assert tiny("a") != tiny("b")
    before = content_hash(tmp_path / "a")
    (tmp_path / "a" / "deep" / "weights").rename(tmp_path / "a" / "weights")
    assert content_hash(tmp_path / "a") != before


def test_any_config_with_rewards_can_be_served(tmp_path: Path) -> None:
    configs = [Path("configs/tiny/demo.yaml")]
    everything = load_rewards(configs, [], None)
    assert list(everything) and set(load_rewards(configs, [], [next(iter(everything))])) == {next(iter(everything))}
    more = tmp_path / "more.yaml"
    more.write_text("rewards: {viv: {type: vividness}, clip: {type: tiny_clip, path: x}}\n")
    found = load_rewards([*configs, more], ["--rewards.clip.path", "assets/tiny-clip"], None)
    assert found["clip"].path == Path("assets/tiny-clip") and set(found) == {*everything, "viv", "clip"}
    with pytest.raises(
        ConfigError, match=r"rewards.viv.weihgt = 2 \(--rewards.viv.weihgt\): unknown key. Did you mean"
    ):
        load_rewards([more], ["--rewards.viv.weihgt", "2"], None)
    with pytest.raises(ConfigError, match="--only pick: no such entry; rewards has viv, clip"):
        load_rewards([more], [], ["pick"])
    more.write_text("seed: 1\n")
    with pytest.raises(ConfigError, match=r"rewards is missing in .*more\.yaml"):
        load_rewards([more], [], None)


REFUSED: dict[str, tuple[str, list[str], int, str]] = {
    "open door": ("type: vividness", ["--host", "0.0.0.0"], 2, "a token is needed"),
    "no token": ("type: vividness", ["--token-env", "NOT_THERE_AT_ALL"], 2, "NOT_THERE_AT_ALL"),
    "port": ("type: vividness", ["--port", "70000"], 2, "70000"),
    "device": ("type: vividness", ["--device", "tpu"], 2, "--device tpu"),
    "batch": ("type: vividness", ["--batch-size", "0"], 2, "above 0"),
    "learns": ("type: adversarial_clip", [], 2, "learns"),
    "sets": ("{type: posthoc_discriminator, references: {folder: assets}}", [], 2, "whole sets"),
    "references": ("{type: dino_similarity, references: {folder: assets}}", [], 2, "--prompts"),
    "weights": ("{type: tiny_clip, path: nowhere}", [], 2, "nowhere"),
    "type": ("type: vividnes", [], 2, "Did you mean 'vividness'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_commands_are_refused(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reward, options, code, words = REFUSED[case]
    config = tmp_path / "served.yaml"
    config.write_text(f"rewards: {{mine: {reward if reward.startswith('{') else '{' + reward + '}'}}}\n")
    port = [] if "--port" in options else ["--port", "0"]
    assert main(["serve-reward", str(config), *port, *options]) == code
    said = capsys.readouterr().err
    assert words in said and "error: " in said


def test_a_port_that_is_taken_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "served.yaml"
    config.write_text("rewards: {mine: {type: vividness}}\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve-reward", str(config), "--port", str(port)]) == 4
    assert f"--port {port}: cannot listen there" in capsys.readouterr().err


def test_it_ends_when_told_to_and_answers_what_is_under_way(tmp_path: Path) -> None:
    """A picture whose scoring has begun still gets its score."""
    with serving(tmp_path, {"odd": {"type": f"{HERE}:Odd", "pause": 0.7}}) as server:
        address = Address(server.url, None, 10, 0)
        reward, found = find_reward(address, None), []
        asking = threading.Thread(
            target=lambda: found.extend(score(address, reward, np.full((1, 8, 8, 3), 51, np.uint8), ["a"], 1, 1, "raw"))
        )
        asking.start()
        time.sleep(0.3)
        os.kill(server.process.pid, signal.SIGTERM)
        asking.join()
        assert found == [pytest.approx(0.2)]
        assert server.process.wait(10) in (0, -signal.SIGTERM)
