"""`t2irl serve-reward`: parsing, then a server until it is told to stop."""

from __future__ import annotations

import argparse
import ipaddress
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from t2irl.cli import OVERRIDES, Parser, split
from t2irl.errors import ConfigError, RunError

if TYPE_CHECKING:
    import torch

OPTIONS = {
    "--host": True, "--port": True, "--token-env": True, "--only": True, "--prompts": True, "--device": True,
    "--batch-size": True, "--wait-ms": True, "--timeout": True, "--max-request-mib": True, "--max-megapixels": True,
    "--queue-mib": True, "--help": False,
}  # fmt: skip
"""What is not an override, and whether it takes a value."""
MIB = 2**20
LAST_WORDS = 5
"""Seconds that requests under way have at the end."""


def serve_reward(argv: Sequence[str]) -> int:
    """Run `t2irl serve-reward` with these words; returns the exit code."""
    known, overrides = split(argv, OPTIONS)
    a = _parser().parse_args(known)
    token = _token(a.token_env)
    if token is None and not _loopback(a.host):
        raise ConfigError(
            f"--host {a.host}: other machines could ask, so a token is needed; set an environment variable and name it with "
            "--token-env NAME, or leave --host out for this machine alone"
        )
    try:
        import uvicorn

        from t2irl.serving.app import Settings, make_app
    except ImportError as error:
        raise ConfigError(f"serve-reward needs {error.name}: pip install 't2irl[serve]'") from error
    from t2irl.serving.served import Served, load_rewards
    from t2irl.serving.wire import Limits

    configs = load_rewards(a.configs, overrides, a.only.split(",") if a.only else None)
    door = _open(a.host, a.port)
    served = Served(configs, _device(a.device), a.batch_size, a.prompts)
    limits = Limits(round(a.max_request_mib * MIB), round(a.max_megapixels * 1e6))
    room = max(round(a.queue_mib * MIB), 2 * limits.request_bytes)
    app = make_app(served, Settings(limits, a.timeout, room, a.batch_size, a.wait_ms / 1000, token))
    for name, reward in served.manifest()["rewards"].items():
        print(f"{name}: {reward['type']}, hash {reward['hash']}")
    host = f"[{a.host}]" if ":" in a.host else a.host
    print(f"serving on http://{host}:{door.getsockname()[1]}", flush=True)
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=LAST_WORDS
    )
    uvicorn.Server(config).run(sockets=[door])
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="t2irl serve-reward",
        description="Serve the `rewards` of a config over HTTP, for runs with `type: remote`.",
        epilog=OVERRIDES,
        allow_abbrev=False,
    )
    parser.add_argument("configs", nargs="+", type=Path, metavar="CONFIG", help="YAML files with `rewards`, merged left to right; other sections are passed over")  # fmt: skip
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen on (127.0.0.1: this machine alone); any other needs --token-env")  # fmt: skip
    parser.add_argument("--port", type=_port, default=8400, metavar="N", help="port (8400); 0 takes a free one and says which")  # fmt: skip
    parser.add_argument(
        "--token-env", metavar="NAME", help="environment variable with the token that clients must send"
    )
    parser.add_argument("--only", metavar="NAME,NAME", help="serve some of the config's rewards (all)")
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help="prompts of the run, for rewards with reference images"
    )
    parser.add_argument("--device", default="auto", metavar="DEVICE", help="auto, cpu, cuda, cuda:1 (auto)")
    parser.add_argument("--batch-size", type=_positive(int), default=32, metavar="N", help="most pictures scored together, over all clients (32)")  # fmt: skip
    parser.add_argument("--wait-ms", type=_positive(float), default=5.0, metavar="MS", help="how long a batch waits for more pictures (5)")  # fmt: skip
    parser.add_argument("--timeout", type=_positive(float), default=60.0, metavar="S", help="seconds to receive a request, and to score it (60)")  # fmt: skip
    parser.add_argument("--max-request-mib", type=_positive(float), default=256.0, metavar="MIB", help="largest request, as sent and decoded (256)")  # fmt: skip
    parser.add_argument("--max-megapixels", type=_positive(float), default=16.8, metavar="MP", help="largest picture in millions of pixels (16.8)")  # fmt: skip
    parser.add_argument("--queue-mib", type=_positive(float), default=2048.0, metavar="MIB", help="requests held in memory at once; more are sent away with 503 (2048)")  # fmt: skip
    return parser


def _positive(kind: type) -> Callable[[str], float]:
    def positive(text: str) -> float:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text!r}: expected a number above 0")
        return value

    return positive


def _port(text: str) -> int:
    if not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a port from 0 to 65535")
    return int(text)


def _token(variable: str | None) -> str | None:
    if variable is None:
        return None
    token = os.environ.get(variable, "")
    if not token.isascii() or not token.isprintable() or not token:
        raise ConfigError(f"--token-env {variable}: no such environment variable, or it is empty or not printable ASCII; set it first")  # fmt: skip
    return token


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _device(name: str) -> torch.device:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"--device {name}: {str(error).splitlines()[0]}; expected auto, cpu, cuda or cuda:N"
        ) from error
    return device


def _open(host: str, port: int) -> socket.socket:
    """The door, before models are loaded: a port that is taken is known at once."""
    try:
        return socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=1024
        )
    except OSError as error:
        raise RunError(
            f"--host {host} --port {port}: cannot listen there: {error.strerror or error}; choose another"
        ) from error
