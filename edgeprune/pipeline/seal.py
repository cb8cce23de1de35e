"""A seal on what edgeprune wrote for this user: a hash with a key that only this user has.

A run directory may come from anybody, with a record that fits its files. Who does not have the key can't make the seal.
"""

import hmac
import os
import secrets
from contextlib import suppress
from pathlib import Path

_BYTES = 32


def key_file() -> Path:
    """Where this user's key lies; made when it is first needed."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config", "edgeprune", "seal.key")


def seal(text: str) -> str:
    """The seal on a text, in hex; empty where there is no home folder to keep a key in, and then nothing holds."""
    key = _key()
    return hmac.new(key, text.encode(), "sha256").hexdigest() if len(key) == _BYTES else ""


def holds(found: object, text: str) -> bool:
    """Whether this user's edgeprune sealed this very text."""
    made = seal(text)
    return bool(made) and hmac.compare_digest(made.encode(), str(found).encode(errors="replace"))


def _key() -> bytes:
    try:
        path = key_file().expanduser()
        if not path.exists():
            _make(path)
        return path.read_bytes()
    except (OSError, RuntimeError):
        return b""


def _make(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    own = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    with os.fdopen(os.open(own, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
        file.write(secrets.token_bytes(_BYTES))
    try:
        with suppress(FileExistsError):
            os.link(own, path)  # unlike a rename, it leaves the key of a process that was first
    finally:
        own.unlink()
