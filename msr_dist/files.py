"""Files that are whole or absent, and folders that one process has at a time."""

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

PARTIAL = ".partial"
"""Ends the names of files and folders that are being written."""


def write_whole(file: Path, text: str) -> None:
    """Write `text` under another name, then rename: whoever reads `file` finds the old text or the new."""
    partial = file.with_name(f"{file.name}{PARTIAL}")
    partial.write_text(text)
    partial.replace(file)


@contextmanager
def whole(file: Path) -> Iterator[BinaryIO]:
    """What is written becomes `file` when the block ends, on disk, and is thrown away where it fails."""
    # A writer that was taken for dead may still be writing the same file: each has a name of its own.
    partial = file.with_name(f"{file.name}.{uuid4().hex}{PARTIAL}")
    try:
        with open(partial, "wb") as opened:
            yield opened
            opened.flush()
            os.fsync(opened.fileno())
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
    sync(file.parent)


def sync(folder: Path) -> None:
    """Bring the names within `folder` to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest_of(file: Path) -> str:
    """Sha256 of a file's bytes."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


@contextmanager
def held(file: Path, taken: str) -> Iterator[None]:
    """Keep `file` for this process, as long as it lives; a ValueError says `taken` where another process has it."""
    with open(file, "w") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(taken) from None
        yield
