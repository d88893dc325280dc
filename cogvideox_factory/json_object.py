"""JSON that must be one object: configs, indexes, manifests."""

import json
from pathlib import Path
from typing import Any

from cogvideox_factory.errors import UnfitError


def read_object(path: Path, *, way_out: str) -> dict[str, Any]:
    """Return the object that a file holds.

    Raises:
        UnfitError: it holds none; the message ends in `way_out`.
    """
    return parse_object(path.read_bytes(), source=str(path), way_out=way_out)


def parse_object(text: bytes | str, *, source: str, way_out: str) -> dict[str, Any]:
    """Return the object that `text`, as found in `source`, is.

    Raises:
        UnfitError: it is none; the message ends in `way_out`.
    """
    try:
        values = json.loads(text if isinstance(text, str) else text.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # also other bytes, numbers without end, and nesting without end
        raise UnfitError(f"{source} is not valid JSON: {error}. {way_out}") from error
    if not isinstance(values, dict):
        raise UnfitError(f"{source} holds a {type(values).__name__}, not a JSON object. {way_out}")
    return values
