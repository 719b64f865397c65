"""The secret from which all private randomness of a run is derived.

Whoever holds it can subtract the noise. It comes from the operating system, lives in one file of mode 0600
below `private/`, appears in no configuration, log, checkpoint or release, and is destroyed when the run is
finished.
"""

import hashlib
import os
from pathlib import Path

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from privimage.errors import UserError
from privimage.storage import owner_only
from privimage.storage.files import write_whole


class RootKey:
    """32 secret bytes.

    `derive` gives independent keys for each purpose, step and rank (HKDF-SHA256, RFC 5869).
    """

    def __init__(self, secret: bytes):
        if len(secret) != 32:
            raise ValueError("a root key has 32 bytes")
        self._secret = secret

    def __repr__(self) -> str:
        return "RootKey(hidden)"

    def derive(self, purpose: str, *context: int | str, length: int = 32) -> bytes:
        """`length` bytes for one purpose and context; different contexts give independent bytes."""
        info = "\0".join((purpose, *(f"{type(part).__name__}:{part}" for part in context)))
        return HKDF(algorithm=SHA256(), length=length, salt=b"privimage", info=info.encode()).derive(
            self._secret
        )

    @property
    def name(self) -> str:
        """A public name of the key, which reveals nothing about it.

        Two runs with the same name share their key.
        """
        return self.derive("name", length=8).hex()


def insecure_fixed(number: int) -> RootKey:
    """A key that anyone can compute, for tests only: nothing that is made with it is private."""
    return RootKey(hashlib.sha256(f"privimage insecure fixed key {number}".encode()).digest())


def open_root(path: Path) -> RootKey:
    """The key kept in `path`; a new one from the operating system if there is none.

    Raises UserError for a damaged file.
    """
    if not path.exists():
        replace(path)
    owner_only.restrict(path)
    secret = path.read_bytes()
    if len(secret) != 32:
        raise UserError(
            f"{path}: damaged key; the noise that was drawn with it cannot be repeated, begin again with "
            "another run.dir"
        )
    return RootKey(secret)


def replace(path: Path) -> None:
    """Put a new key in place of one; that of another name for the same file (a hard link) stays as it is."""
    write_whole(path, os.urandom(32))


def destroy(path: Path) -> None:
    """Overwrite and remove a key. What was released stays as private as it is.

    Nobody can subtract its noise any more.
    """
    if not path.exists():
        return
    if path.stat().st_nlink == 1:  # a hard link is the key of a copy of the run
        with open(path, "r+b") as file:
            file.write(os.urandom(32))
            file.flush()
            os.fsync(file.fileno())
    path.unlink()
