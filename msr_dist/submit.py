"""Submits the entry points in jobs/ to a Ray cluster's job server, and follows what they say.

Where the server asks for a token, Ray finds it: RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH.
"""

import asyncio
import logging
import os
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

JOBS = "jobs"
LEFT_OUT = ("/data", "/runs", "/knowledge", "/mlruns", "/mlflow.db", ".venv", ".git", "__pycache__", ".*_cache")
"""What of the working directory stays here, as .gitignore would name it, and besides what .gitignore names."""
_LOOK = 1.0
"""Seconds until a job server is asked again."""
_PATIENCE = 60.0
"""Seconds that a cluster has to become able to run a job."""


def entrypoint(job: str, arguments: Sequence[str], folder: Path) -> str:
    """The command that runs `job` of `folder` with `arguments`; ValueError where it cannot run there."""
    known = sorted(file.stem for file in (folder / JOBS).glob("*.py"))
    if job not in known:
        has = f"{JOBS}/ has {', '.join(known)}" if known else f"there is no {JOBS}/ here; go to the checkout"
        raise ValueError(f"no job {job!r}: {has}")
    for argument in arguments:
        sent = argument.endswith(".toml") and "=" not in argument and not Path(argument).is_absolute()
        if sent and not (folder / argument).is_file():
            raise ValueError(f"{argument}: no such file; give the path of a TOML configuration")
    return shlex.join(["python", f"{JOBS}/{job}.py", *arguments])


class JobServer:
    """The job server of a Ray cluster. All methods raise ValueError, one line, where it cannot be spoken to."""

    def __init__(self, address: str) -> None:
        if not address.startswith(("http://", "https://")):
            raise ValueError(f"{address}: no address of a job server; give one such as http://127.0.0.1:8265")
        self._address = address
        # Otherwise Ray lets RAY_ADDRESS count for more than the address that it is given.
        os.environ["RAY_API_SERVER_ADDRESS"] = address
        # It tells of every folder that it leaves out.
        logging.disable(logging.WARNING)
        with self._told():
            from ray.job_submission import JobSubmissionClient

            self._client = JobSubmissionClient(address)

    def submit(self, entrypoint: str, folder: Path) -> str:
        """Send `folder`, have the command `entrypoint` run in it, and return the id of that submission."""
        environment = {"working_dir": str(folder), "excludes": list(LEFT_OUT)}
        begun = time.monotonic()
        with self._told():
            while True:
                try:
                    return str(self._client.submit_job(entrypoint=entrypoint, runtime_env=environment))
                except RuntimeError as error:
                    # A cluster that has just started answers before it can run anything.
                    if "try again later" not in str(error) or time.monotonic() - begun > _PATIENCE:
                        raise
                    time.sleep(_LOOK)

    def follow(self, submission: str, show: Callable[[str], None]) -> bool:
        """Hand `show` what the job says, from its beginning until it ends; whether it has succeeded."""
        from aiohttp import ClientError

        shown = 0

        async def tail() -> None:
            nonlocal shown
            place = 0
            async for text in self._client.tail_job_logs(submission):
                place += len(text)
                if place > shown:
                    show(text[shown - place :])
                    shown = place

        heard = time.monotonic()
        while True:
            # A connection may break, as a forwarded port's does; the job does not, and is asked for again.
            try:
                info = self._info(submission)
                heard = time.monotonic()
                if info.status.is_terminal():
                    break
                with suppress(ClientError, OSError, RuntimeError):
                    asyncio.run(tail())
            except ValueError:
                if time.monotonic() - heard > _PATIENCE:
                    raise
            time.sleep(_LOOK)
        with self._told():
            show(self._client.get_job_logs(submission)[shown:])
        if info.status != "SUCCEEDED":
            show(f"{submission}: {info.status.lower()}: {(info.message or '').splitlines()[0]}\n")
        return bool(info.status == "SUCCEEDED")

    def hints(self, submission: str) -> list[str]:
        """How people follow, and stop, a job that goes on."""
        named = f"--address {self._address} {submission}"
        return [f"follow   ray job logs --follow {named}", f"stop     ray job stop {named}"]

    def _info(self, submission: str) -> Any:
        with self._told():
            return self._client.get_job_info(submission)

    @contextmanager
    def _told(self) -> Iterator[None]:
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError as error:
            wrong = "refuses the token" if error.message.startswith("Authentication failed") else "asks for a token"
            raise ValueError(
                f"{self._address} {wrong}: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
            ) from None
        except OSError as error:
            raise ValueError(f"{self._address}: no job server answers there ({type(error).__name__})") from None
        except RuntimeError as error:
            raise ValueError(f"{self._address}: {str(error).strip().splitlines()[0]}") from None
