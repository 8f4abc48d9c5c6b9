"""A random Qwen2.5-VL in its genuine format, and a small OpenAI-compatible server."""

from __future__ import annotations

import base64
import io
import json
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageStat
from tokenizers import pre_tokenizers
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2TokenizerFast, Qwen2VLImageProcessor

from reward_models.judges import spellings

SPECIAL = (
    "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def qwen_tokenizer() -> Qwen2TokenizerFast:
    """Single letters, and every spelling of yes and no as one token."""
    vocab = {symbol: k for k, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges: list[tuple[str, str]] = []
    for word in (*spellings("yes"), *spellings("no")):
        bare = word.strip()
        steps = [("Ġ", bare)] if bare != word else [(bare[:k], bare[k]) for k in range(1, len(bare))]
        merges += [step for step in steps if step not in merges]
        for first, second in steps:
            vocab.setdefault(first + second, len(vocab))
    tokenizer = Qwen2TokenizerFast(vocab=vocab, merges=merges, chat_template=TEMPLATE)
    tokenizer.add_tokens(list(SPECIAL), special_tokens=True)
    return tokenizer


def write_qwen(folder: Path) -> Path:
    """Weights, tokenizer and processor as a Qwen2.5-VL folder has them; its answers depend on the picture."""
    tokenizer = qwen_tokenizer()
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(list(SPECIAL)), strict=True))
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024, "initializer_range": 0.3,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10_000.0},
        "bos_token_id": None, "eos_token_id": ids["<|im_end|>"],
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 8, "spatial_merge_size": 2,
        "temporal_patch_size": 2, "window_size": 32, "out_hidden_size": 32, "fullatt_block_indexes": [1],
        "initializer_range": 0.3,
    }  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessor(
        patch_size=8, merge_size=2, temporal_patch_size=2, min_pixels=16 * 16, max_pixels=64 * 64
    ).save_pretrained(folder)
    return folder


class Stub:
    """What the server does, and what it was asked."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.failures: list[int] = []
        """HTTP codes to fail with, one a request, before anything works."""
        self.answer: Callable[..., dict[str, float]] = brightness
        """Token probabilities for the pictures of a request."""
        self.reply: Callable[[str], str] = lambda text: "a reply"
        """Free text for a request."""
        self.url = ""


def brightness(picture: Image.Image) -> dict[str, float]:
    """Says NO as likely as the picture is bright, in two spellings each."""
    bright = sum(ImageStat.Stat(picture).mean) / 3 / 255
    return {"NO": bright * 0.6, " no": bright * 0.3, "Yes": (1 - bright) * 0.5, "yes": (1 - bright) * 0.4, "Maybe": 0.1}


@contextmanager
def serving() -> Iterator[Stub]:
    """An OpenAI-compatible server in a thread."""
    stub = Stub()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

        def send(self, code: int, content: Any) -> None:
            body = json.dumps(content).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            self.send(200, {"data": [{"id": "judge"}]} if self.path == "/v1/models" else {})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            stub.requests.append(body)
            stub.headers.append(dict(self.headers))
            if stub.failures:
                return self.send(stub.failures.pop(0), {"error": "not now"})
            content = body["messages"][0]["content"]
            if not body.get("logprobs"):
                return self.send(200, {"choices": [{"message": {"content": stub.reply(content[0]["text"])}}]})
            coded = [part["image_url"]["url"].split(",")[1] for part in content[1:]]
            pictures = [Image.open(io.BytesIO(base64.b64decode(text))) for text in coded]
            top = [{"token": t, "logprob": math.log(max(p, 1e-12))} for t, p in stub.answer(*pictures).items()]
            self.send(200, {"choices": [{"logprobs": {"content": [{"top_logprobs": top}]}}]})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    stub.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
