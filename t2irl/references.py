"""Reference images: pictures that a prompt's images are compared with, looked up, checked at the start, read when needed.

Either an index says which files belong to which prompt, or every picture of a folder serves every prompt.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from pydantic import PositiveInt, model_validator
from pydantic_core import PydanticCustomError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from t2irl.adversary.memory import Memory, Tensors, in_equal_batches
from t2irl.config import Strict
from t2irl.errors import DataError
from t2irl.utils import distributed

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
"""What counts as a picture in a folder."""
SHOWN = 8
"""Problems spelled out in a message; the rest are counted."""
PICTURE_MEMORY = 256 * 2**20
"""Bytes of decoded pictures kept."""
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
"""What Pillow raises for a bad file."""


class ReferenceImages:
    """The reference images of a run's prompts. `notes` holds what the user should know, one sentence each."""

    class Config(Strict):
        """Where they are. Exactly one of `index` and `folder`."""

        index: Path | None = None
        """Which files belong to which prompt: JSON {prompt: [file, ...]}, or, if the name ends in .jsonl, lines such as
        {"prompt": "a red circle", "files": ["a.png"]}. `scripts/make_references.py` writes one."""
        root: Path | None = None
        """Folder that files of the index are relative to; null: the index's own."""
        folder: Path | None = None
        """A style folder: each picture in it, or below it, serves every prompt."""
        limit: PositiveInt | None = None
        """Only so many prompts of the index, from its start; null: all."""
        per_prompt: PositiveInt | None = None
        """At most so many reference images of a prompt, from the start of its list; null: all."""
        at_least: PositiveInt = 1
        """A prompt with fewer reference images is refused."""

        @model_validator(mode="after")
        def _one_source(self) -> ReferenceImages.Config:
            if (self.index is None) == (self.folder is None):
                given = "neither" if self.index is None else "both"
                raise PydanticCustomError(
                    "references", "Give either `index` (a file) or `folder`; {given} is there", {"given": given}
                )
            for name in ("root", "limit"):
                if self.folder is not None and getattr(self, name) is not None:
                    raise PydanticCustomError(
                        "references", "`{name}` belongs to an `index`; a `folder` has no such thing", {"name": name}
                    )
            if self.per_prompt is not None and self.per_prompt < self.at_least:
                raise PydanticCustomError(
                    "references",
                    "per_prompt = {most} is below at_least = {least}: every prompt would be refused",
                    {"most": self.per_prompt, "least": self.at_least},
                )
            return self

    def __init__(self, files: Mapping[str, tuple[Path, ...]], notes: Sequence[str] = ()):
        self._files, self.notes = dict(files), tuple(notes)
        self._pictures = Memory(PICTURE_MEMORY)

    @classmethod
    def load(cls, config: Config, prompts: Iterable[str], key: str, may_lack: bool = False) -> ReferenceImages:
        """Look up and check the reference images of `prompts`. `key` names the config's place in messages.

        `may_lack`: prompts without any are fine. Called on all processes; raises DataError with the problems of all of
        them on each, so none waits for another.
        """
        try:
            files, problems = _look_up(config, dict.fromkeys(prompts), key, may_lack)
            notes, unusable = _check(files, key)
            problems += unusable
        except DataError as error:
            files, notes, problems = {}, [], [str(error)]
        everyone = list(dict.fromkeys(p for found in distributed.gather_objects(problems) for p in found))
        if everyone:
            more = [f"... and {len(everyone) - SHOWN} more"] if len(everyone) > SHOWN else []
            raise DataError("\n".join([*everyone[:SHOWN], *more]))
        for note in notes if distributed.rank() == 0 else ():
            warnings.warn(note, stacklevel=2)
        return cls(files, notes)

    def of(self, prompt: str) -> tuple[Path, ...]:
        """The files of a prompt, in the index's order; none if it has none."""
        return self._files.get(prompt, ())

    def picture(self, path: Path, size: int | None = None) -> Tensor:
        """A picture, upright and RGB, as uint8: (3, size, size), short side resized and centre cut out, or, without a
        size, (3, H, W) as it is. Raises DataError.
        """
        found = self._pictures.get((path, size))
        if found is None:
            found = (_read(path, size),)
            self._pictures.put((path, size), found)
        return found[0]

    def pictures(self, paths: Sequence[Path], size: int | None = None) -> list[Tensor]:
        """Several of them."""
        return [self.picture(path, size) for path in paths]


class FeatureCache:
    """Features of reference images, each computed once: kept in memory, and on disk by the content of the file.

    `encode`: (B, 3, H, W) float32 in [0, 1] -> tensors of B rows. `name` must change whenever `encode` does, such as a hash
    of its weights.
    """

    def __init__(
        self,
        encode: Callable[[Tensor], Tensors],
        name: str,
        read: Callable[[Sequence[Path]], Sequence[Tensor]],
        folder: Path | None,
        memory: int = 2**30,
    ):
        """`read`: paths -> pictures (3, H, W) uint8. `folder`: on disk, None for memory only. `memory`: bytes kept at most."""
        self.encode, self.read = encode, read
        self.folder = None if folder is None else folder / hashlib.sha256(name.encode()).hexdigest()[:16]
        self._memory, self._digests = Memory(memory), dict[Path, str]()
        self.computed = 0

    def of(self, paths: Sequence[Path]) -> Tensors:
        """Features of some pictures, one row each, on the CPU. Raises DataError for an unreadable one."""
        wanted = [(self._digest(path), path) for path in paths]
        rows = {digest: row for digest in dict(wanted) if (row := self._known(digest)) is not None}
        fresh = {digest: path for digest, path in wanted if digest not in rows}
        if fresh:
            self.computed += len(fresh)
            found = in_equal_batches(lambda x: self.encode(x.float().div(255)), self.read(list(fresh.values())))
            for digest, row in zip(fresh, found, strict=True):
                rows[digest] = row
                self._to_disk(digest, row)
                self._memory.put(digest, row)
        return tuple(torch.stack(parts) for parts in zip(*(rows[digest] for digest, _ in wanted), strict=True))

    def _digest(self, path: Path) -> str:
        if path not in self._digests:
            try:
                self._digests[path] = hashlib.sha256(path.read_bytes()).hexdigest()
            except OSError as error:
                raise DataError(f"reference image {path}: cannot be read: {error.strerror or error}") from error
        return self._digests[path]

    def _known(self, digest: str) -> Tensors | None:
        row = self._memory.get(digest)
        if row is None and (row := self._from_disk(digest)) is not None:
            self._memory.put(digest, row)
        return row

    def _file(self, folder: Path, digest: str) -> Path:
        return folder / digest[:2] / f"{digest}.safetensors"

    def _from_disk(self, digest: str) -> Tensors | None:
        if self.folder is None:
            return None
        try:
            stored = load_file(self._file(self.folder, digest))
            return tuple(stored[str(k)] for k in range(len(stored)))
        except (OSError, SafetensorError, KeyError):  # not there, or cut short by a crash: computed anew
            return None

    def _to_disk(self, digest: str, row: Tensors) -> None:
        if self.folder is None:
            return
        file = self._file(self.folder, digest)
        partial = file.with_name(f"{file.name}.{os.getpid()}.tmp")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file({str(k): x for k, x in enumerate(row)}, partial)
            partial.replace(file)
        except OSError as error:
            raise DataError(
                f"the cache of features {self.folder} cannot be written: {error.strerror or error}"
            ) from error


# --------------------------------------------------------------------------------------------------- looking things up
def _look_up(
    config: ReferenceImages.Config, prompts: Iterable[str], key: str, may_lack: bool
) -> tuple[dict[str, tuple[Path, ...]], list[str]]:
    """Files of each prompt, and what is wrong with their number."""
    if config.folder is not None:
        style = tuple(_folder_files(config.folder, f"{key}.folder = {config.folder}"))[: config.per_prompt]
        where, lists = f"{key}.folder = {config.folder}", dict.fromkeys(prompts, style)
        short = (
            [f"{where}: {len(style)} pictures, at_least = {config.at_least}"] if len(style) < config.at_least else []
        )
        return lists, short
    assert config.index is not None
    where = f"{key}.index = {config.index}"
    root = config.root if config.root is not None else config.index.parent
    known = dict(list(_read_index(config.index, where).items())[: config.limit])
    files, problems = {}, []
    cut = f" among its first {config.limit}" if config.limit is not None else ""
    for prompt in prompts:
        found = known.get(prompt, [])
        if not found and may_lack:
            continue
        files[prompt] = tuple(root / name for name in found[: config.per_prompt])
        if not found:
            problems.append(f"{where}: no reference images for the prompt {prompt!r}{cut}")
        elif len(found) < config.at_least:
            problems.append(f"{where}: {len(found)} reference images for {prompt!r}, at_least = {config.at_least}")
        twice = {name for name in found if found.count(name) > 1}
        problems += [f"{where}: {name} stands twice for {prompt!r}" for name in sorted(twice)]
    return files, problems


def _folder_files(folder: Path, where: str) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"{where}: no such folder (relative to {Path.cwd()})")
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not found:
        raise DataError(f"{where}: no pictures there; expected files that end in {', '.join(SUFFIXES)}")
    return found


def _read_index(file: Path, where: str) -> dict[str, list[str]]:
    """Prompt -> file names. Raises DataError."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(
            f"{where}: no such file (relative to {Path.cwd()}). scripts/make_references.py draws reference images and "
            "writes their index"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{where}: cannot be read as UTF-8 text: {error}") from error
    if file.suffix.lower() == ".jsonl":
        pairs: list[tuple[str, Any]] = []
        for number, line in enumerate(text.splitlines(), 1):
            entry = _json(line, f"{where}, line {number}")
            if not isinstance(entry, dict) or not {"prompt", "files"} <= set(entry):
                raise DataError(f'{where}, line {number}: expected {{"prompt": "...", "files": ["..."]}}')
            pairs.append((entry["prompt"], entry["files"]))
    else:
        content = _json(text, where)
        if not isinstance(content, _Pairs):
            raise DataError(f'{where}: expected {{"a prompt": ["a file", ...], ...}}')
        pairs = content.pairs
    index: dict[str, list[str]] = {}
    for prompt, files in pairs:
        if not isinstance(prompt, str) or not isinstance(files, list) or not all(isinstance(f, str) for f in files):
            raise DataError(f"{where}: the entry of {prompt!r} is not a text with a list of file names")
        if prompt.strip() in index:
            raise DataError(f"{where}: the prompt {prompt.strip()!r} stands there twice; join its files in one entry")
        index[prompt.strip()] = files
    return index


class _Pairs(dict[str, Any]):
    """A JSON object that remembers keys which stand there twice."""

    def __init__(self, pairs: list[tuple[str, Any]]):
        super().__init__(pairs)
        self.pairs = pairs


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_Pairs)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: is not JSON ({error})") from error


# ------------------------------------------------------------------------------------------------------------ pictures
def _check(files: Mapping[str, Sequence[Path]], key: str) -> tuple[list[str], list[str]]:
    """Notes and problems of all files: headers and ends are read, pixels are not."""
    odd: dict[str, list[Path]] = {}
    problems = []
    for path in dict.fromkeys(p for found in files.values() for p in found):
        try:
            mode, wrong = _inspect(path)
        except FileNotFoundError:
            problems.append(f"{key}: {path}: no such file")
            continue
        except UNREADABLE as error:
            problems.append(f"{key}: {path}: cannot be read as a picture: {error}")
            continue
        if wrong:
            problems.append(f"{key}: {path}: {wrong}")
        elif mode != "RGB":
            odd.setdefault(mode, []).append(path)
    notes = [f"{key}: {len(p)} pictures are {m}, such as {p[0]}; they are read as RGB" for m, p in odd.items()]
    return notes, problems


def _inspect(path: Path) -> tuple[str, str | None]:
    """A picture's mode, and what makes it unusable. Raises what Pillow raises."""
    stat = path.stat()  # looked into again only if it has changed
    return _look_into(path, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=1 << 17)
def _look_into(path: Path, changed: int, size: int) -> tuple[str, str | None]:
    with path.open("rb") as file:
        head = file.read(32)
        file.seek(max(size - 65_536, 0))
        tail = file.read()
    with Image.open(path) as image:
        mode, kind = image.mode, image.format
        alpha = "A" in mode.replace("LAB", "") or "transparency" in image.info
    end = {"PNG": b"IEND", "JPEG": b"\xff\xd9"}.get(kind or "")
    if end is not None and end not in tail:
        return mode, f"the file is cut short (a {kind} without its end)"
    if alpha:
        return mode, f"it has transparency ({mode}); put it on a background and save it as RGB"
    if mode.startswith(("I", "F")) or (kind == "PNG" and head[24] == 16):
        return mode, f"it has more than 8 bits a channel ({mode}); save it as 8-bit RGB"
    return mode, None


def _read(path: Path, size: int | None) -> Tensor:
    """Decode a picture; see `ReferenceImages.picture`."""
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened).convert("RGB")
    except UNREADABLE as error:
        raise DataError(f"reference image {path}: cannot be read: {error}") from error
    if size is not None:
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
