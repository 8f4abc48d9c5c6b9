"""Vision-language models as judges: how likely the first word of their answer about a picture is YES, and how likely NO.

The model is frozen and run here (`LocalJudge`), or anywhere behind an OpenAI-compatible interface (`ServerJudge`).
"""

from __future__ import annotations

import base64
import inspect
import io
import json
import math
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

SEED_INSTRUCTION = Path(__file__).parent / "recipes" / "artifact_instruction.md"
"""A question about artifacts, before any tuning."""
LEAST_MASS = 0.2
"""YES and NO together must be at least this likely; below, the judge has not answered."""
WAIT = 1.0
"""Seconds before the second try of a request; each later pause is twice as long."""


def spellings(word: str) -> tuple[str, ...]:
    """The ways in which an answer may begin with a word: upper, title and lower case, with and without a space before."""
    return tuple(space + way for way in (word.upper(), word.title(), word.lower()) for space in ("", " "))


def cleanliness(log_yes: Tensor, log_no: Tensor, least: float = LEAST_MASS) -> tuple[Tensor, Tensor]:
    """P(no) / (P(no) + P(yes)) from log-probabilities (B,) of any dtype, -inf included: (B,) float64 in [0, 1].

    1 is free of artifacts (arXiv 2601.03468, section 4; there a model that says neither gets 1). Here a picture about which
    P(yes) + P(no) is below `least` gets 0, so that silence is never worth seeking. The second result, (B,) bool, says which
    pictures were answered.
    """
    log_yes, log_no = log_yes.double(), log_no.double()
    mass = log_yes.exp() + log_no.exp()
    answered = (mass >= least) & (mass > 0)
    difference = torch.where(answered, log_no - log_yes, float("-inf"))
    return torch.sigmoid(difference), answered


def to_pictures(images: Tensor, jpeg: bool = False) -> list[Image.Image]:
    """(B, 3, H, W) in [0, 1] -> 8-bit pictures; with `jpeg` as they are after JPEG of quality 95."""
    pixels = images.detach().float().clamp(0, 1).mul(255).round().to("cpu", torch.uint8).permute(0, 2, 3, 1)
    pictures = [Image.fromarray(x.contiguous().numpy()) for x in pixels]
    return [_through_jpeg(x) for x in pictures] if jpeg else pictures


def _through_jpeg(picture: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=95)
    buffer.seek(0)
    return Image.open(buffer).convert("RGB")


class Judge(Protocol):
    """Something that looks at pictures and answers."""

    def log_answers(self, pictures: Sequence[Image.Image], instruction: str) -> Tensor:
        """Log-probability of YES and of NO in any spelling as the first token, for each picture alone: (B, 2) float64."""
        ...

    def log_words(self, pictures: Sequence[Image.Image], instruction: str, words: Sequence[str]) -> Tensor:
        """Log-probability that the answer begins as each of some words does, in any spelling: (B, words) float64.

        The words must begin with different letters, since a token may be a part of one.
        """
        ...

    def log_choices(self, shown: Sequence[Sequence[Image.Image]], instruction: str, words: Sequence[str]) -> Tensor:
        """As `log_words`, about several pictures shown together, in this order, in each question: (questions, words) float64.

        All questions show equally many pictures.
        """
        ...

    def reply(self, request: str, pictures: Sequence[Image.Image], seed: int, temperature: float, length: int) -> str:
        """Free text about some pictures, shown together, or about none; at most `length` tokens."""
        ...


class LocalJudge:
    """A vision-language model of the Qwen2.5-VL class in a transformers folder, frozen, on `device`."""

    def __init__(self, model: Any, tokenizer: Any, image_processor: Any, template: str | None, device: torch.device):
        self.model = model.eval().requires_grad_(False).to(device)
        self.tokenizer, self.image_processor, self.template, self.device = tokenizer, image_processor, template, device
        self.pad: int = model.config.image_token_id
        self._answers = [_single_tokens(tokenizer, word) for word in ("yes", "no")]
        self._typed = "mm_token_type_ids" in inspect.signature(model.forward).parameters

    @classmethod
    def load(
        cls, folder: Path, device: torch.device, dtype: torch.dtype = torch.bfloat16, max_pixels: int | None = None
    ) -> LocalJudge:
        """Read a folder. `max_pixels`: larger pictures are shrunk; None for the folder's own limit.

        Raises OSError or ValueError saying what is missing or wrong.
        """
        missing = [n for n in ("config.json", "preprocessor_config.json") if not (folder / n).is_file()]
        if missing:
            raise FileNotFoundError(f"not the folder of a vision-language model: it lacks {', '.join(missing)}")
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        if type(config) not in AutoModelForImageTextToText._model_mapping or not hasattr(config, "image_token_id"):
            raise ValueError(
                f"config.json says model_type = {config.model_type!r}, which transformers cannot ask about pictures; "
                "expected one such as qwen2_5_vl"
            )
        limit = {} if max_pixels is None else {"max_pixels": max_pixels}
        return cls(
            AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True, dtype=dtype),
            AutoTokenizer.from_pretrained(folder, local_files_only=True),
            AutoImageProcessor.from_pretrained(folder, local_files_only=True, **limit),
            chat_template(folder),
            device,
        )

    def log_answers(self, pictures: Sequence[Image.Image], instruction: str) -> Tensor:
        """See `Judge`; one forward pass for pictures of equal size."""
        return self._log_tokens([[picture] for picture in pictures], instruction, self._answers)

    def log_words(self, pictures: Sequence[Image.Image], instruction: str, words: Sequence[str]) -> Tensor:
        """See `Judge`."""
        return self.log_choices([[picture] for picture in pictures], instruction, words)

    def log_choices(self, shown: Sequence[Sequence[Image.Image]], instruction: str, words: Sequence[str]) -> Tensor:
        """See `Judge`; one forward pass for questions whose pictures are equally large."""
        first = [
            sorted(
                {self.tokenizer.encode(way, add_special_tokens=False)[0] for way in spellings(word) if way[0] != " "}
            )
            for word in words
        ]
        return self._log_tokens(shown, instruction, first)

    @torch.no_grad()
    def _log_tokens(
        self, shown: Sequence[Sequence[Image.Image]], instruction: str, tokens: Sequence[list[int]]
    ) -> Tensor:
        """Log-probability of any of several lists of first tokens, (questions, lists)."""
        found = torch.empty(len(shown), len(tokens), dtype=torch.float64)
        sizes = [tuple(picture.size for picture in pictures) for pictures in shown]
        for size in dict.fromkeys(sizes):  # equal sizes need no padding
            rows = [k for k, other in enumerate(sizes) if other == size]
            inputs = self._inputs(instruction, [list(shown[k]) for k in rows])
            logits = self.model(**inputs, logits_to_keep=1).logits[:, -1].double()
            log_probs = logits.log_softmax(-1)
            found[rows] = torch.stack([log_probs[:, ids].logsumexp(-1) for ids in tokens], 1).cpu()
        return found

    @torch.no_grad()
    def reply(self, request: str, pictures: Sequence[Image.Image], seed: int, temperature: float, length: int) -> str:
        """See `Judge`."""
        inputs = self._inputs(request, [list(pictures)])
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            tokens = self.model.generate(
                **inputs, do_sample=temperature > 0, temperature=temperature or None, max_new_tokens=length
            )
        return self.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    def _inputs(self, text: str, batch: Sequence[list[Image.Image]]) -> dict[str, Tensor]:
        """What the network takes: the text, then the pictures of each row, which are equally many and large."""
        content = [{"type": "text", "text": text}, *({"type": "image"} for _ in batch[0])]
        chat = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            chat_template=self.template,
            add_generation_prompt=True,
            tokenize=False,
        )
        row, more = self.tokenizer(chat).input_ids, {}
        if batch[0]:
            flat = [picture for pictures in batch for picture in pictures]
            seen = self.image_processor(images=flat, return_tensors="pt")
            more = {"pixel_values": seen["pixel_values"].to(self.model.dtype), "image_grid_thw": seen["image_grid_thw"]}
            counts = (seen["image_grid_thw"].prod(-1) // self.image_processor.merge_size**2).tolist()
            row = with_room(row, self.pad, counts[: len(batch[0])])
        ids = torch.tensor([row] * len(batch))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **more}
        if self._typed:
            inputs["mm_token_type_ids"] = (ids == self.pad).int()
        return {name: x.to(self.device) for name, x in inputs.items()}


def with_room(row: list[int], pad: int, counts: Sequence[int]) -> list[int]:
    """A row of tokens with each picture's placeholder as often as the picture has tokens. Raises ValueError."""
    if row.count(pad) != len(counts):
        raise ValueError(
            f"the chat template left {row.count(pad)} places for {len(counts)} pictures; use the folder of an "
            "instruction-tuned vision-language model with its chat template"
        )
    left = iter(counts)
    return [t for token in row for t in ([token] * next(left) if token == pad else [token])]


def _single_tokens(tokenizer: Any, word: str) -> list[int]:
    """Ids of the spellings that are one token. Raises ValueError when none is."""
    coded = [tokenizer.encode(way, add_special_tokens=False) for way in spellings(word)]
    found = sorted({ids[0] for ids in coded if len(ids) == 1})
    if not found:
        raise ValueError(f"the tokenizer has no single token for any spelling of {word!r}")
    return found


def chat_template(folder: Path) -> str | None:
    """The chat template of a folder; None for the tokenizer's own."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if (folder / "chat_template.json").is_file():
        return json.loads((folder / "chat_template.json").read_text(encoding="utf-8"))["chat_template"]
    return None


class ServerJudge:
    """A model behind an OpenAI-compatible server such as vLLM. Raises OSError, with the address, when that does not work."""

    def __init__(
        self, url: str, model: str | None = None, key: str | None = None, timeout: float = 60, tries: int = 5,
        parallel: int = 8, top: int = 20,
    ):  # fmt: skip
        """`url` ends in /v1. `model`: None for the only one there. `top`: how many tokens' probabilities to ask for."""
        self.url, self.key, self.timeout, self.tries = url.rstrip("/"), key, timeout, tries
        self.parallel, self.top = parallel, top
        offered = [entry["id"] for entry in self._call("models")["data"]]
        if model is None and len(offered) != 1:
            raise OSError(f"{self.url} offers {len(offered)} models ({', '.join(offered)}); name one of them")
        if model is not None and model not in offered:
            raise OSError(f"{self.url} has no model {model!r}; it offers {', '.join(offered) or 'none'}")
        self.model = model or offered[0]

    def log_answers(self, pictures: Sequence[Image.Image], instruction: str) -> Tensor:
        """See `Judge`; a spelling that is not among the `top` likeliest tokens counts as impossible."""
        rows = [
            [_log_sum([p for token, p in found if token in spellings(word)]) for word in ("yes", "no")]
            for found in self._likeliest([[picture] for picture in pictures], instruction)
        ]
        return torch.tensor(rows, dtype=torch.float64).view(-1, 2)

    def log_words(self, pictures: Sequence[Image.Image], instruction: str, words: Sequence[str]) -> Tensor:
        """See `Judge`."""
        return self.log_choices([[picture] for picture in pictures], instruction, words)

    def log_choices(self, shown: Sequence[Sequence[Image.Image]], instruction: str, words: Sequence[str]) -> Tensor:
        """See `Judge`; beginnings that are not among the `top` likeliest tokens count as impossible."""
        rows = [
            [
                _log_sum([p for token, p in found if token.strip() and word.startswith(token.strip().lower())])
                for word in words
            ]
            for found in self._likeliest(shown, instruction)
        ]
        return torch.tensor(rows, dtype=torch.float64).view(-1, len(words))

    def _likeliest(self, shown: Sequence[Sequence[Image.Image]], instruction: str) -> list[list[tuple[str, float]]]:
        with ThreadPoolExecutor(self.parallel) as pool:
            return list(pool.map(lambda pictures: self._first_tokens(pictures, instruction), shown))

    def _first_tokens(self, pictures: Sequence[Image.Image], instruction: str) -> list[tuple[str, float]]:
        """Tokens that the answer may begin with, and their log-probabilities."""
        wanted = {"max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": self.top}
        choice = self._chat(instruction, pictures, wanted)
        try:
            return [
                (entry["token"], float(entry["logprob"])) for entry in choice["logprobs"]["content"][0]["top_logprobs"]
            ]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise OSError(
                f"{self.url} gave no log-probabilities of tokens, which this judge needs (top_logprobs)"
            ) from error

    def reply(self, request: str, pictures: Sequence[Image.Image], seed: int, temperature: float, length: int) -> str:
        """See `Judge`."""
        choice = self._chat(request, pictures, {"max_tokens": length, "temperature": temperature, "seed": seed})
        return str(choice["message"]["content"]).strip()

    def _chat(self, text: str, pictures: Sequence[Image.Image], settings: dict[str, Any]) -> dict[str, Any]:
        shown = [{"type": "image_url", "image_url": {"url": _data_url(picture)}} for picture in pictures]
        content = [{"type": "text", "text": text}, *shown]
        found = self._call(
            "chat/completions", {"model": self.model, "messages": [{"role": "user", "content": content}], **settings}
        )
        try:
            return found["choices"][0]
        except (KeyError, IndexError, TypeError) as error:
            raise OSError(f"{self.url} answered without `choices`; expected an OpenAI-compatible server") from error

    def _call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """Ask, and again after a pause where that may help: no connection, no answer in time, too busy, broken answers."""
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        data = None if body is None else json.dumps(body).encode()
        reason = ""
        for number in range(self.tries):
            if number:
                time.sleep(WAIT * 2 ** (number - 1))
            try:
                request = urllib.request.Request(f"{self.url}/{path}", data, headers)
                with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                    return json.loads(answer.read())
            except urllib.error.HTTPError as error:
                said = error.read()[:300].decode("utf-8", "replace")
                reason = f"HTTP {error.code} {error.reason}: {said}"
                if error.code < 500 and error.code not in (408, 429):
                    raise OSError(f"{self.url}/{path} refused the request ({reason})") from error
            except (OSError, ValueError) as error:  # timeouts and refused connections are OSErrors
                reason = str(error)
        raise OSError(
            f"{self.url}/{path}: no usable answer in {self.tries} tries (the last one: {reason}). Is the server running?"
        )


def _log_sum(values: Sequence[float]) -> float:
    """Log of the sum of exponentials; -inf for none."""
    return math.log(sum(map(math.exp, values))) if values else float("-inf")


def _data_url(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
