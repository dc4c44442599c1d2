"""An object store to test against: moto's S3, in a process of its own, reachable from this machine alone."""

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.request import Request, urlopen

from pyarrow import fs

SECRET = "not-to-be-shown"
BUCKET = "bucket"


@dataclass(frozen=True)
class ObjectStore:
    endpoint: str
    log: Path

    @property
    def environment(self) -> dict[str, str]:
        """What a user would set."""
        return {
            "AWS_ACCESS_KEY_ID": "somebody",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def filesystem(self) -> fs.FileSystem:
        """Of pyarrow, to write with."""
        return fs.S3FileSystem(
            access_key="somebody", secret_key=SECRET, endpoint_override=self.endpoint, allow_bucket_creation=True
        )

    def upload(self, folder: Path, name: str) -> str:
        """The URI of a copy of `folder`, which is called `name`."""
        filesystem = self.filesystem()
        filesystem.create_dir(BUCKET)
        fs.copy_files(str(folder), f"{BUCKET}/{name}", fs.LocalFileSystem(), filesystem)
        return f"s3://{BUCKET}/{name}"

    def replace(self, uri: str, content: bytes) -> None:
        with self.filesystem().open_output_stream(uri.removeprefix("s3://")) as file:
            file.write(content)

    def remove(self, uri: str) -> None:
        self.filesystem().delete_file(uri.removeprefix("s3://"))

    @contextmanager
    def suspicious(self) -> Iterator[None]:
        """Let nobody in for a while: it knows no one."""
        self._let_in(b"0")
        try:
            yield
        finally:
            self._let_in(b"inf")

    def _let_in(self, requests: bytes) -> None:
        """Ask for no credentials in so many requests."""
        where = f"{self.endpoint}/moto-api/reset-auth"
        urlopen(Request(where, data=requests, headers={"Content-Type": "text/plain"})).close()

    def requests(self, uri: str) -> list[str]:
        """The methods of all requests so far that read something of an object."""
        return re.findall(rf"(HEAD|GET) /{uri.removeprefix('s3://')}[ ?]", self.log.read_text())


@contextmanager
def object_store(folder: Path) -> Iterator[ObjectStore]:
    log = folder / "moto.log"
    with open(log, "w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", "0"],
            stdout=subprocess.DEVNULL,
            stderr=file,
        )
    try:
        begun = time.monotonic()
        while not (running := re.search(r"Running on (http://127\.0\.0\.1:\d+)", log.read_text())):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() - begun < 120, log.read_text()
            time.sleep(0.05)
        yield ObjectStore(running[1], log)
    finally:
        process.kill()
        process.wait()
