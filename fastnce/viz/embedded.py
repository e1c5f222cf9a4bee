"""Pictures inside an HTML page."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

# Tried in this order until a picture is small enough: JPEG quality, and the share of its width and height.
_REDUCTIONS = ((90, 1.0), (80, 1.0), (80, 0.7), (75, 0.5), (70, 0.35), (60, 0.25))


@dataclass(frozen=True)
class Embedded:
    """A picture as a data URI."""

    uri: str
    width: int
    height: int


def embed(path: Path, limit: int) -> Embedded:
    """The picture as it is if it takes at most `limit` bytes of the page; else smaller, as JPEG.

    The smallest of the reductions is taken where even that is larger.
    """
    data = path.read_bytes()
    with Image.open(path) as picture:
        width, height = picture.size
        if path.suffix == ".png" and _length(data) <= limit:
            return Embedded(_uri(data, "png"), width, height)
        whole = picture.convert("RGB")
    for quality, share in _REDUCTIONS:
        size = max(1, round(width * share)), max(1, round(height * share))
        buffer = io.BytesIO()
        whole.resize(size, Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=quality)
        if _length(buffer.getvalue()) <= limit:
            break
    return Embedded(_uri(buffer.getvalue(), "jpeg"), *size)


def _length(data: bytes) -> int:
    return (len(data) + 2) // 3 * 4


def _uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
