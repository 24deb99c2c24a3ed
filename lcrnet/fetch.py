"""Files of other people by path or URL: what is fetched is checked before anything reads it.

    PATH
    PATH#sha256=HEX
    https://HOST/FILE#sha256=HEX      fetched once, to `folder()`; without its sha256 it is not fetched at all

Behind the `#` there may be more settings, joined by `&`; their meaning is their reader's (legacy.py: kind).
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from contextlib import suppress
from pathlib import Path

from lcrnet.config import UserError

TIMEOUT = 30
"""Seconds that a server may be silent."""
MOST_BYTES = 4 * 2**30
_CHUNK = 2**20


def local(source: str | os.PathLike[str], sha256: str | None = None) -> tuple[Path, dict[str, str]]:
    """(the file on this machine, the settings behind `#`). UserError names what is missing or differs."""
    text = str(source)
    remote = re.match(r"https?://", text, re.IGNORECASE)
    settings: dict[str, str] = {}
    if "#" in text and (remote or not os.path.lexists(text)):
        text, _, rest = text.rpartition("#")
        settings = dict(urllib.parse.parse_qsl(rest))
    sha256 = (settings.pop("sha256", None) or sha256 or "").lower()
    if sha256 and not re.fullmatch("[0-9a-f]{64}", sha256):
        raise UserError(f"{source}: sha256: expected 64 hexadecimal digits")
    if not remote:
        if "://" in text:
            raise UserError(f"{source}: only http and https URLs are fetched")
        if sha256:
            _check(Path(text), _digest(Path(text)), sha256)
        return Path(text), settings
    if not sha256:
        raise UserError(f"{source}: a URL needs the sha256 of its file: {text}#sha256=HEX")
    return _fetched(text, sha256), settings


def folder() -> Path:
    """Where fetched files are kept: beside $LCRNET_BUILD, else in $XDG_CACHE_HOME/lcrnet, else ~/.cache/lcrnet."""
    if built := os.environ.get("LCRNET_BUILD"):
        return Path(built).parent / "weights"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lcrnet" / "weights"


def _fetched(url: str, sha256: str) -> Path:
    file = folder() / sha256
    if file.is_file() and _digest(file) == sha256:
        return file
    half = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
            digest, size = hashlib.sha256(), 0
            with tempfile.NamedTemporaryFile(dir=file.parent, prefix=".half-", delete=False) as out:
                half = Path(out.name)
                while chunk := answer.read(_CHUNK):
                    size += len(chunk)
                    if size > MOST_BYTES:
                        raise UserError(f"{url}: more than the {MOST_BYTES} bytes that are fetched")
                    digest.update(chunk)
                    out.write(chunk)
        _check(url, digest.hexdigest(), sha256)
        os.replace(half, file)
    except (OSError, ValueError, urllib.error.URLError) as error:
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        raise UserError(f"{url}: cannot be fetched: {' '.join(str(reason).split())[:200]}") from None
    finally:
        if half:
            with suppress(OSError):
                half.unlink(missing_ok=True)
    return file


def _digest(file: Path) -> str:
    try:
        with open(file, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}") from None


def _check(name: object, found: str, sha256: str) -> None:
    if found != sha256:
        raise UserError(f"{name}: its sha256 is {found}, not {sha256}: another or a damaged file")
