"""The folder of an evaluation: pictures, scores and features under names that say what they are, written whole or not at all.

manifest.json         what the pictures are made of; another seed or suite is refused
prompts.jsonl         the suite's prompts
images/<method>/<checkpoint>/<sampler>/00012_003.png    prompt 12, image 3
scores/<measure>-<settings>/<process>.jsonl             one line a picture
features/<extractor>-<settings>/<method>/...            rows of a batch of pictures
images.jsonl, table.*, report.html                      made anew from the above by every report
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from t2irl.errors import ConfigError, DataError
from t2irl.evaluation.settings import Evaluated
from t2irl.evaluation.suites.base import Picture, Prompt
from t2irl.launch import write_json
from t2irl.utils.tracking import flatten, write_atomic

FIXED = ("seed", "suite", "images", "prompts", "samplers", "subjects")
"""Parts of the manifest that cannot change once there are pictures."""


@dataclass(frozen=True)
class Drawn:
    """The pictures of one subject by one sampler: a row of the table."""

    method: str
    checkpoint: str
    sampler: str
    folder: str
    """Below `images`."""
    iteration: int
    base: bool
    """Whether this is the base model."""
    drawing: Mapping[str, Any]
    """Steps, guidance and negative prompt."""
    fingerprint: str
    """Of the weights."""
    shown_sampler: bool = False
    """Whether there are several samplers, so that the method's name has to say which."""

    @property
    def name(self) -> str:
        """The method, and the sampler where there are several: what `method` is in images.jsonl."""
        return f"{self.method} ({self.sampler})" if self.shown_sampler else self.method

    @property
    def label(self) -> str:
        """Method and checkpoint, for people."""
        return self.name if self.base else f"{self.name}, {self.checkpoint}"


class Store:
    """An evaluation's folder and what is in it."""

    def __init__(self, out: Path, seed: int, prompts: Sequence[Prompt], images: int, drawn: Sequence[Drawn]):
        self.out, self.seed, self.prompts, self.images, self.drawn = out, seed, list(prompts), images, list(drawn)

    @property
    def keys(self) -> list[tuple[int, int]]:
        """(prompt id, image) of every picture of a row, in the order in which they are drawn and scored."""
        return [(p, k) for p in range(len(self.prompts)) for k in range(self.images)]

    def picture(self, row: Drawn, key: tuple[int, int]) -> str:
        """Path of a picture below the folder."""
        return f"images/{row.folder}/{key[0]:05d}_{key[1]:03d}.png"

    def pictures(self, row: Drawn) -> list[Picture]:
        """All pictures of a row."""
        return [Picture(*key, self.out / self.picture(row, key)) for key in self.keys]

    def missing(self, row: Drawn) -> set[tuple[int, int]]:
        """The pictures of a row that are not there yet."""
        folder = self.out / "images" / row.folder
        there = {entry.name for entry in os.scandir(folder)} if folder.is_dir() else set()
        return {key for key in self.keys if Path(self.picture(row, key)).name not in there}

    def save(self, row: Drawn, key: tuple[int, int], pixels: Tensor, config: str) -> None:
        """Write one picture (3, H, W) uint8 with what it is as text in it."""
        notes = {
            "prompt": self.prompts[key[0]].text, "prompt_id": key[0], "image": key[1], "seed": self.seed,
            "method": row.method, "checkpoint": row.checkpoint, "sampler": row.sampler, "config": config, **row.drawing,
        }  # fmt: skip
        info = PngImagePlugin.PngInfo()
        for name, value in notes.items():
            # A JSON file can hold half a surrogate pair, which no encoder takes.
            info.add_itxt(
                name, value.encode("utf-8", "replace").decode() if isinstance(value, str) else json.dumps(value)
            )
        data = io.BytesIO()
        Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy()).save(data, "PNG", pnginfo=info)
        path = self.out / self.picture(row, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, data.getvalue())

    def load(self, row: Drawn, keys: Iterable[tuple[int, int]]) -> Tensor:
        """Pictures (B, 3, H, W) uint8. Raises DataError for one that is damaged."""
        return torch.stack([read_picture(self.out / self.picture(row, key)) for key in keys])

    def begin(self, settings: Evaluated, write: bool) -> str:
        """Compare with an earlier evaluation in the same folder and, with `write`, note what this one is.

        Returns the hash of what the pictures are made of. Raises ConfigError for another seed, suite or sampler, or other
        weights under a name that has pictures.
        """
        now = self._manifest(settings)
        told = hashlib.sha256(
            json.dumps({key: now[key] for key in FIXED if key != "subjects"}, sort_keys=True).encode()
        ).hexdigest()[:12]
        file = self.out / "manifest.json"
        if file.is_file():
            old = read_manifest(self.out)
            now = {**now, "samplers": old["samplers"] | now["samplers"]}
            self._refuse_changes(old, now)
            now["subjects"] = old["subjects"] | now["subjects"]
        if write:
            (self.out / "images").mkdir(parents=True, exist_ok=True)
            for part in self.out.rglob(".*.part"):  # of a process that was killed while it wrote
                part.unlink()
            lines = (json.dumps({"prompt": p.text, "tag": p.tag, "metadata": p.metadata}) for p in self.prompts)
            write_atomic(self.out / "prompts.jsonl", "".join(f"{line}\n" for line in lines).encode())
            write_json(file, now)
        return told

    def _manifest(self, settings: Evaluated) -> dict[str, Any]:
        texts = json.dumps([p.text for p in self.prompts]).encode()
        return {
            "seed": self.seed,
            "suite": settings.suite.type,
            "images": self.images,
            "prompts": f"{len(self.prompts)}, {hashlib.sha256(texts).hexdigest()[:12]}",
            "samplers": {n: s.model_dump(mode="json") for n, s in settings.samplers.items()},
            "subjects": {row.folder: asdict(row) for row in self.drawn},
            "shown": [row.folder for row in self.drawn],
        }

    def _refuse_changes(self, old: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        again = {name: entry for name, entry in old["subjects"].items() if name in now["subjects"]}
        trees = (
            {**old, "subjects": _lasting(again)},
            {**now, "subjects": _lasting({name: now["subjects"][name] for name in again})},
        )
        before, after = (flatten({key: tree[key] for key in FIXED}) for tree in trees)
        changes = [
            f"{key.replace('/', '.')}: {before[key]} -> {after.get(key)}"
            for key in before
            if before[key] != after.get(key)
        ]
        if changes:
            raise ConfigError(
                f"{self.out} holds pictures made with other settings ({'; '.join(changes)}); use another --out"
            )


def _lasting(subjects: Mapping[str, Any]) -> dict[str, Any]:
    """What must stay of the rows: how they are shown may change."""
    return {name: {k: v for k, v in entry.items() if k != "shown_sampler"} for name, entry in subjects.items()}


def read_manifest(out: Path) -> dict[str, Any]:
    """The manifest of an evaluation. Raises DataError for a folder that is none."""
    try:
        return json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(
            f"{out} holds no evaluation: manifest.json is missing. Give the --out of `t2irl eval`"
        ) from error
    except (OSError, ValueError) as error:
        raise DataError(f"{out}/manifest.json cannot be read: {error}") from error


def open_store(out: Path) -> Store:
    """The evaluation that was last asked for in a folder, without the weights it came from. Raises DataError."""
    manifest = read_manifest(out)
    try:
        lines = (out / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
        prompts = [Prompt(**{"text" if k == "prompt" else k: v for k, v in json.loads(line).items()}) for line in lines]
        drawn = [Drawn(**manifest["subjects"][folder]) for folder in manifest["shown"]]
        return Store(out, manifest["seed"], prompts, manifest["images"], drawn)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{out}: prompts.jsonl or manifest.json is damaged: {error}") from error


def read_picture(path: Path) -> Tensor:
    """(3, H, W) uint8. Raises DataError."""
    try:
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: cannot be read as a picture: {error}. Delete it and give the same command again"
        ) from error
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


def settings_key(name: str, *settings: Any) -> str:
    """`name`-<hash of what it was made with>: other settings give another name, so nothing stale is ever read."""
    text = json.dumps([s if isinstance(s, (str, int)) else s.model_dump(mode="json") for s in settings], sort_keys=True)
    return f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


class Lines:
    """Scores of one measure, one JSON line a picture, a file for each process: what is written stays, and a line that was cut off
    is as good as none.
    """

    def __init__(self, folder: Path, process: int = 0):
        self.folder, self._file = folder, folder / f"{process:04d}.jsonl"

    def read(self) -> dict[str, float]:
        """Every score by the picture's path; NaN where the measure does not apply."""
        found: dict[str, float] = {}
        for file in sorted(self.folder.glob("*.jsonl")):
            for path, score in _whole_lines(file):
                found[path] = math.nan if score is None else float(score)
        return found

    def add(self, scores: Mapping[str, float]) -> None:
        """Append scores; they are on the disk when this returns."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps([path, None if math.isnan(score) else score]) for path, score in scores.items()]
        torn = self._file.exists() and not self._file.read_bytes().endswith(b"\n")
        with self._file.open("a", encoding="utf-8") as handle:
            # One write, so that a reader never meets half of a batch but the last.
            handle.write("\n" * torn + "".join(f"{line}\n" for line in lines))
            handle.flush()
            os.fsync(handle.fileno())


def _whole_lines(file: Path) -> Iterator[tuple[str, float | None]]:
    for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            path, score = json.loads(line)
        except ValueError:  # cut off, or the end of the file
            continue
        yield path, score
