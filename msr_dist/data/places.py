"""Where prepared data are: in a folder of this machine, a `Path`, or in an object store, a `Remote`.

    data = "s3://bucket/folder"     # or gs://bucket/folder, file:///folder, folder

Credentials, region and endpoint of a store come from the environment, as its own tools take them, and never from a
configuration, which is written down and shown.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import unquote

import pyarrow as pa
from pyarrow import fs
from pydantic import AfterValidator, PlainSerializer, PlainValidator

_URI = re.compile(r"(s3|gs)://([^/@:?#]+(?:/[^?#]*)?)")
_ATTEMPTS, _PATIENCE = 5, timedelta(seconds=60)
"""Of Amazon's client, about half a minute where nobody answers, and of Google's."""
_ADVICE = {
    "AWS Error": "look at the bucket's name, at AWS_ENDPOINT_URL if the store is not Amazon's, and at the credentials "
    "in the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or a role)",
    "google::cloud::Status": "look at the bucket's name, and at the credentials in the environment "
    "(GOOGLE_APPLICATION_CREDENTIALS, or a role)",
}
"""By what marks the errors of a store in pyarrow, which has no class for them."""


@dataclass(frozen=True, order=True)
class Remote:
    """A file or folder in an object store, with those of `Path`'s methods that reading data takes.

    Names are as they are in the store: nothing is percent-encoded. Only strings are kept, so that it travels to other
    processes, which find credentials in environments of their own.
    """

    scheme: str
    path: str
    """The bucket and what is below it: bucket/folder."""

    def __str__(self) -> str:
        return f"{self.scheme}://{self.path}"

    def __truediv__(self, name: str) -> "Remote":
        return Remote(self.scheme, f"{self.path}/{name}")

    @property
    def name(self) -> str:
        """The last part of its path."""
        return self.path.rpartition("/")[2]

    def absolute(self) -> "Remote":
        """Itself: it is the same from everywhere."""
        return self

    def glob(self, pattern: str) -> list["Remote"]:
        """The files of this folder whose names match `pattern`; none where there is no such folder.

        Raises:
            OSError: the store did not answer, has no such bucket, or does not let us in.
        """
        # What is absent Amazon's client says in an error of its own, and Google's in one that is like any other; but
        # if it may be absent, Amazon's says nothing of a bucket that is.
        folder = fs.FileSelector(self.path, allow_not_found=self.scheme == "gs")
        with self._store() as store:
            try:
                found = store.get_file_info(folder)
            except FileNotFoundError:
                return []
        return [self / each.base_name for each in found if each.is_file and fnmatchcase(each.base_name, pattern)]

    def is_file(self) -> bool:
        """Whether it is there; raises as `glob` does."""
        # A listing says what is amiss where there is no bucket; the question for one object does not.
        return self in Remote(self.scheme, self.path.rpartition("/")[0]).glob("*")

    def read_bytes(self) -> bytes:
        """All of the file; OSError where it cannot be read."""
        with self._store() as store, store.open_input_file(self.path) as file:
            content: bytes = file.read()
        return content

    def open(self) -> pa.NativeFile:
        """The file for reading any ranges of it, from several threads; OSError where it cannot be opened."""
        with self._store() as store:
            return store.open_input_file(self.path)

    @contextmanager
    def _store(self) -> Iterator[fs.FileSystem]:
        try:
            yield _filesystem(self.scheme, self.path.partition("/")[0])
        except FileNotFoundError:
            raise FileNotFoundError(f"{self}: no such file") from None
        except OSError as error:
            raise OSError(f"{self}: {store_failure(error) or one_line(error)}") from None


Place = Path | Remote


def place(given: Any) -> Place:
    """The place that a setting names.

    Raises:
        ValueError: it is none, or holds more than a bucket and a folder. It is not repeated: it may hold a secret.
    """
    if isinstance(given, Place):
        return given
    if not isinstance(given, str):
        raise ValueError(f"expected a folder, such as data/ml-1m or s3://bucket/ml-1m (got {given!r})")
    scheme, separator, rest = given.partition("://")
    if not separator:
        return Path(given)
    if scheme == "file" and rest.startswith("/"):
        return Path(unquote(rest))
    if (found := _URI.fullmatch(given)) is None:
        raise ValueError(
            "expected a folder, or s3://BUCKET/FOLDER or gs://BUCKET/FOLDER and nothing else: credentials and endpoint "
            "come from the environment, such as AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL"
        )
    return Remote(found[1], "/".join(filter(None, found[2].split("/"))))


def here(path: Path) -> Path:
    """`path`; ValueError where it is what has become of the URI of an object store."""
    if path.parts[:1] in (("s3:",), ("gs:",)):
        raise ValueError(
            f"expected a folder of a file system, not {path.parts[0]}//: copy with the store's own tools; only `data` "
            "of a run is read there"
        )
    return path


Data = Annotated[Place, PlainValidator(place), PlainSerializer(str, when_used="json")]
"""A setting that names data to read, wherever they are."""
Folder = Annotated[Path, AfterValidator(here)]
"""A setting that names a folder of a file system."""


def store_failure(error: Exception) -> str | None:
    """What an object store did wrong and what to look at, in one line; None where `error` is not of a store's making.

    Such as the end of a connection, after the retries of pyarrow's own; but not damage to what was read.
    """
    for mark, advice in _ADVICE.items():
        if mark in str(error):
            # Behind that, Google's client repeats itself at length.
            return f"{one_line(error).partition(' error_info=')[0]}; {advice}"
    return None


def one_line(error: Exception) -> str:
    """The message of an error in one line."""
    return " ".join(str(error).split())


@lru_cache(maxsize=8)
def _filesystem(scheme: str, bucket: str) -> fs.FileSystem:
    if scheme == "gs":
        return fs.GcsFileSystem(retry_time_limit=_PATIENCE)
    # FileSystem.from_uri would look there by itself, but try for minutes where nobody answers.
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return fs.S3FileSystem(
        endpoint_override=endpoint,
        region=None if endpoint else fs.resolve_s3_region(bucket),
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=_ATTEMPTS),
    )
