"""What crosses the wire between a reward server and its clients: prompts, 8-bit pictures, scores. No pickle, no torch.

A question is a body of type `MEDIA`: four bytes with the length of a JSON header (big-endian), the header, then pictures.
They are raw, `shape` (B, H, W, 3) in order, or PNG files one behind the other, `sizes` bytes each. By hand it may be plain
JSON as well, with `pictures` as base64 of PNG files.
"""

from __future__ import annotations

import base64
import binascii
import io
import itertools
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

MEDIA = "application/x-t2irl-pictures"
"""Content type of a question in bytes."""
JSON = "application/json"
"""Content type of a question by hand, and of every answer."""
PNG = b"\x89PNG\r\n\x1a\n"
PNG_COLORS = (0, 2, 3)
"""Kinds of PNG (grey, RGB, palette) that stand for 8-bit RGB without loss or choice; transparency would need a background."""


class WireError(ValueError):
    """A question that cannot be answered as it stands: an HTTP status and what is wrong."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Limits:
    """What a server takes. Larger questions are refused before anything is decoded."""

    request_bytes: int
    """Largest body, and largest sum of its pictures once decoded."""
    picture_pixels: int
    """Most pixels of one picture."""


class Header(BaseModel):
    """What is asked."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    prompts: list[str] = Field(min_length=1)
    """One for each picture."""
    rewards: list[str] | None = Field(None, min_length=1)
    """Names of the rewards to score with; null: all."""
    expect: dict[str, str] = {}
    """Hashes that those rewards must have; otherwise nothing is scored."""
    encoding: Literal["raw", "png"] = "png"
    """How the pictures follow."""
    shape: list[int] | None = None
    """With raw: B, H, W, 3."""
    sizes: list[int] | None = None
    """With png: bytes of each file."""
    pictures: list[str] | None = None
    """In a question by hand: base64 of each PNG file."""


@dataclass(frozen=True)
class Question:
    """A question whose header is sound; pictures may still be anything."""

    header: Header
    files: list[memoryview]
    """PNG files, or all pixels as one."""
    decoded_bytes: int
    """What the pictures take when decoded."""


def pack(
    pictures: np.ndarray, prompts: Sequence[str], rewards: Sequence[str], expect: Mapping[str, str],
    encoding: Literal["raw", "png"],
) -> bytes:  # fmt: skip
    """The body of a question about (B, H, W, 3) uint8 pictures."""
    header: dict[str, Any] = {
        "prompts": list(prompts), "rewards": list(rewards), "expect": dict(expect), "encoding": encoding
    }  # fmt: skip
    if encoding == "raw":
        header["shape"] = list(pictures.shape)
        follows = [np.ascontiguousarray(pictures).tobytes()]
    else:
        follows = [to_png(picture) for picture in pictures]
        header["sizes"] = [len(file) for file in follows]
    words = json.dumps(header).encode()
    return b"".join([struct.pack(">I", len(words)), words, *follows])


def to_png(picture: np.ndarray) -> bytes:
    """(H, W, 3) uint8 as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def unpack(body: bytes, media: str, limits: Limits) -> Question:
    """Read a question, and every size that it speaks of, without decoding a picture. Raises WireError."""
    if media == JSON:
        header, rest = _header(body), memoryview(b"")
        if header.pictures is None:
            raise WireError(422, "`pictures` is missing: base64 of one PNG file for each prompt")
        files = [memoryview(_base64(text)) for text in header.pictures]
    else:
        if len(body) < 4 or len(body) - 4 < struct.unpack(">I", body[:4])[0]:
            raise WireError(400, "the body ends within its header")
        start = 4 + struct.unpack(">I", body[:4])[0]
        header, rest = _header(body[4:start]), memoryview(body)[start:]
        files = _files(header, rest)
    if header.encoding == "raw" and media != JSON:
        shape = header.shape
        assert shape is not None
        count, decoded = shape[0], len(rest)
        _refuse_pixels(shape[2], shape[1], limits)
    else:
        count = len(files)
        decoded = sum(_png_pixels(file, number, limits) for number, file in enumerate(files)) * 3
    if count != len(header.prompts):
        raise WireError(422, f"{count} pictures but {len(header.prompts)} prompts; every picture needs its own")
    if decoded > limits.request_bytes:
        raise WireError(413, f"the pictures take {decoded} bytes, at most {limits.request_bytes} are taken at once")
    return Question(header, files, decoded)


def decode(question: Question) -> list[np.ndarray]:
    """The pictures of a question, (H, W, 3) uint8 each. Raises WireError for a file that is not whole."""
    header = question.header
    if header.encoding == "raw" and header.pictures is None:
        assert header.shape is not None
        return list(np.frombuffer(question.files[0], np.uint8).reshape(header.shape))
    return [_decode(file, number) for number, file in enumerate(question.files)]


def _header(words: bytes) -> Header:
    try:
        return Header.model_validate_json(words)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "the header"
        raise WireError(422 if first["loc"] else 400, f"{place}: {first['msg']}") from error


def _files(header: Header, rest: memoryview) -> list[memoryview]:
    """What follows the header, cut into files."""
    if header.encoding == "raw":
        shape = header.shape
        if shape is None or len(shape) != 4 or shape[3] != 3 or min(shape) < 1:
            raise WireError(422, f"shape = {shape}: expected [B, H, W, 3]")
        wanted = shape[0] * shape[1] * shape[2] * 3
        if len(rest) != wanted:
            raise WireError(400, f"{len(rest)} bytes of pixels follow, shape = {shape} means {wanted}")
        return [rest]
    sizes = header.sizes
    if sizes is None or min(sizes, default=0) < 1:
        raise WireError(422, f"sizes = {sizes}: expected the number of bytes of each PNG file")
    if sum(sizes) != len(rest):
        raise WireError(400, f"{len(rest)} bytes of files follow, sizes add up to {sum(sizes)}")
    starts = np.cumsum([0, *sizes]).tolist()
    return [rest[a:b] for a, b in itertools.pairwise(starts)]


def _base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise WireError(400, f"a picture is not base64: {error}") from error


def _png_pixels(file: memoryview, number: int, limits: Limits) -> int:
    """Pixels of a PNG file by its own first words."""
    if len(file) < 33 or bytes(file[:8]) != PNG or bytes(file[12:16]) != b"IHDR":
        raise WireError(415, f"picture {number} is not a PNG file")
    width, height, depth, color = struct.unpack(">IIBB", file[16:26])
    if depth > 8 or color not in PNG_COLORS:
        raise WireError(
            415, f"picture {number}: expected 8-bit RGB without transparency, got depth {depth}, kind {color}"
        )
    _refuse_pixels(width, height, limits)
    return width * height


def _refuse_pixels(width: int, height: int, limits: Limits) -> None:
    if not 0 < width * height <= limits.picture_pixels:
        raise WireError(413, f"a picture of {width} x {height}: at most {limits.picture_pixels} pixels are taken")


def _decode(file: memoryview, number: int) -> np.ndarray:
    try:
        Image.open(io.BytesIO(file), formats=("PNG",)).verify()  # checksums; the decoder would pass over some
        with Image.open(io.BytesIO(file), formats=("PNG",)) as picture:
            return np.array(picture.convert("RGB"))
    # What Pillow raises for broken files.
    except (OSError, SyntaxError, ValueError, struct.error, EOFError, IndexError) as error:
        raise WireError(400, f"picture {number} is damaged: {error}") from error
