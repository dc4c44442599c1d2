"""Tracking with MLflow that can neither stop nor slow a run. The only home of mlflow.

Rank 0 appends every value to RUN/metrics.jsonl the moment it is logged, one line per call:

    {"step": 20, "time": 1712345678.123, "metrics": {"train/loss": 0.41, "train/lr": "NaN"}}

(JSON has no NaN and no infinity: these stand as the strings NaN, Infinity and -Infinity.) A thread of the tracker's
own reads that file and delivers it to MLflow every few seconds; it also imports mlflow, which takes seconds.
RUN/tracking.json remembers, for each MLflow that the run was tracked with, the id of its run there and how far the file
was delivered. So live delivery, catching up after an outage, and replay by a resumed run are the same act. A batch that
was delivered but not yet remembered when the process died is sent again with the same timestamps; MLflow keeps one of
equal points.
"""

import json
import logging
import math
import os
import re
import subprocess
import threading
import time
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self, TypeVar

import psutil
from pydantic import Field, field_validator

from msr_dist.config import Config
from msr_dist.files import write_whole

_log = logging.getLogger(__name__)

VALUES_FILE = "metrics.jsonl"
STATE_FILE = "tracking.json"
Status = Literal["FINISHED", "FAILED", "KILLED"]

_SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks")
# MLflow's own limits.
_METRICS_PER_CALL = 1000
_PARAMS_PER_CALL = 100
_PARAM_LENGTH = 6000
_TAG_LENGTH = 8000
_KEY_LENGTH = 250

_LONGEST_PAUSE = 60.0
"""Seconds between two attempts at an MLflow that does not answer."""


class TrackingConfig(Config):
    """Where the values of a run go besides its folder."""

    enabled: bool = True
    """Track with MLflow; the run's folder keeps the values anyway."""
    uri: str | None = None
    """A server (http://HOST:PORT) or a database (sqlite:////ABSOLUTE/mlflow.db); by default mlflow.db in the folder of
    all runs. A relative sqlite path starts there too: the working directory of a worker is not the driver's."""
    experiment: str = Field(default="msr-dist", min_length=1, max_length=500)
    artifacts: str | None = None
    """Where an experiment that this run creates keeps its files; by default beside the sqlite file, or as the server
    decides."""
    every: float = Field(default=3.0, gt=0)
    """Seconds between two deliveries."""
    timeout: int = Field(default=5, ge=1)
    """Seconds that a server may take to answer a request."""
    close_timeout: float = Field(default=30.0, ge=0)
    """Seconds that the end of a run may wait for the last delivery."""
    system_every: float = Field(default=10.0, ge=0)
    """Seconds between two samples of the machine's load; 0 takes none."""
    each_rank: bool = False
    """Keep what every rank takes (STAGE/rank-3/memory_bytes, step_seconds, loader_wait_seconds), not only the most of
    any rank, and the load of every rank's machine (system/rank-3/cpu_percent, ...), not only of the first's."""

    @field_validator("uri")
    @classmethod
    def _known_store(cls, uri: str | None) -> str | None:
        if uri is None or uri == "databricks":
            return uri
        scheme, separator, rest = uri.partition("://")
        if not separator or scheme == "file" or uri.startswith("file:"):
            raise ValueError(
                f"{uri!r} names a folder, and MLflow no longer tracks into folders: "
                "use sqlite:////ABSOLUTE/PATH/mlflow.db, or a server, http://HOST:PORT"
            )
        if scheme.partition("+")[0] not in _SCHEMES:
            raise ValueError(f"MLflow has no store {scheme}://; known: {', '.join(_SCHEMES)}")
        if scheme.startswith("sqlite") and rest in ("", "/", "/:memory:"):
            raise ValueError(f"{uri!r} would be lost with the process: name a file, sqlite:////ABSOLUTE/PATH/mlflow.db")
        if public(uri) != uri:
            raise ValueError(
                f"{public(uri)} holds credentials, and a configuration is written down and shown: track with a server, "
                "and give MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the environment"
            )
        return uri

    def resolved_uri(self, runs: Path) -> str:
        """The URI in a form that holds in any working directory; `runs` is the folder of all runs."""
        uri = self.uri or "sqlite:///mlflow.db"
        if (path := _sqlite_path(uri)) is None:
            return uri
        return uri.replace(f":///{path}", f":///{runs.absolute() / path}", 1)

    def how_to_open(self, runs: Path) -> str:
        """What a person types, or opens, to see the runs; without credentials."""
        uri = public(self.resolved_uri(runs))
        return uri if uri.startswith(("http", "databricks")) else f"mlflow ui --backend-store-uri {uri}"


class Tracker:
    """Takes values and keeps none: what every rank but 0 has."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record `metrics` at `step`; returns within a millisecond and never raises."""

    def artifact(self, path: Path) -> None:
        """Attach the file to the run in MLflow as it is when it is delivered, soon; never raises."""

    def close(self, status: Status = "FINISHED", timeout: float | None = None) -> None:
        """Deliver what is left and end the run in MLflow, within `timeout` seconds; never raises."""

    @property
    def run_id(self) -> str | None:
        """The id of the run in MLflow, once it is known."""
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.close("FAILED" if issubclass(kind, Exception) else "KILLED")


def open_tracker(
    config: TrackingConfig,
    rank: int,
    run_dir: Path,
    params: Mapping[str, Any] | str,
    tags: Mapping[str, str] | None = None,
) -> Tracker:
    """A tracker that keeps values on rank 0, and delivers them where tracking is enabled; elsewhere it does nothing.

    It continues the run in MLflow that `run_dir` was tracked as before, if that still exists, and first delivers what
    had not reached it. Tracked with another `uri`, a run is new there, and everything in `run_dir` goes to it.

    Args:
        config: a relative or absent `uri` is taken from the folder above `run_dir`.
        rank: of this process.
        run_dir: the run's own folder; made if absent. Its name is the run's name in MLflow.
        params: nested values, or a TOML text that holds them; each leaf becomes a param named by its dotted path.
        tags: of the run; the git commit of the working directory is added.
    """
    if rank != 0:
        return Tracker()
    run_dir.mkdir(parents=True, exist_ok=True)
    spool = _Spool(run_dir / VALUES_FILE)
    if not config.enabled:
        return _KeepingTracker(spool)
    nested = tomllib.loads(params) if isinstance(params, str) else params
    uri = config.resolved_uri(run_dir.parent)
    return _LiveTracker(spool, _Store(config, uri, run_dir, flatten(nested), dict(tags or {})))


def attach(config: TrackingConfig, run_dir: Path, file: Path) -> bool:
    """Attach `file` to the run in MLflow that `run_dir` was tracked as, which may be over; never raises.

    Returns whether it is there: not where tracking is off or was, or where MLflow does not take it, which is said.
    """
    if not config.enabled:
        return False
    store = _Store(config, config.resolved_uri(run_dir.parent), run_dir, {}, {})
    try:
        return store.attach(file)
    except Exception as error:  # noqa: BLE001 - MLflow raises what its servers, drivers and sockets raise
        _log.warning("MLflow at %s does not take %s: %s", public(store.uri), file, _short(error))
        return False


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Leaves by dotted path; lists of tables count their entries, other lists are JSON; credentials are struck out."""
    flat: dict[str, str] = {}
    for key, value in nested.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{path}.")
        elif isinstance(value, Sequence) and value and all(isinstance(entry, Mapping) for entry in value):
            flat |= flatten({str(index): entry for index, entry in enumerate(value)}, f"{path}.")
        elif isinstance(value, list | tuple):
            flat[path] = public(json.dumps(value, default=str))
        else:
            flat[path] = public(str(value))
    return flat


def public(text: str) -> str:
    """`text` with the user and password of every URI in it struck out, and secrets in its query."""
    text = re.sub(r"(?<=://)[^/@\s\"']+@", "***@", text)
    return re.sub(r"(?i)([?&][\w-]*(?:password|secret|token|signature)=)[^&\s\"']+", r"\1***", text)


def git_commit(folder: Path) -> str | None:
    """The commit that is checked out in `folder`; None where there is none, or no git."""
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, timeout=5, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None


class _Point(NamedTuple):
    name: str
    value: float
    milliseconds: int
    step: int


class _Spool:
    """The file of values: appended to by any thread, read by the tracker's own."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._lock = threading.Lock()
        self._out = open(file, "ab", buffering=0)  # noqa: SIM115 - stays open as long as the tracker
        # A process that died within a line has left its beginning; ours must not continue it.
        self._torn = self._out.tell() > 0 and not _ends_line(file)

    def append(self, metrics: Mapping[str, float], step: int) -> None:
        """Raises OSError where the line cannot be written, TypeError or ValueError where it holds no numbers."""
        values = {str(name): _writable(float(value)) for name, value in metrics.items()}
        entry = {"step": int(step), "time": round(time.time(), 3), "metrics": values}
        line = json.dumps(entry, allow_nan=False).encode() + b"\n"
        with self._lock:
            if self._out.closed:
                return
            if self._torn:
                line = b"\n" + line
            self._torn = True
            written = self._out.write(line)
            self._torn = written != len(line)
            if self._torn:
                raise OSError(f"only {written} of {len(line)} bytes were written")

    def read(self, offset: int) -> tuple[list[_Point], int]:
        """Points from byte `offset` on, at least a call's worth where there are as many; and the offset after them."""
        points: list[_Point] = []
        with open(self.file, "rb") as lines:
            lines.seek(offset)
            for line in lines:
                if not line.endswith(b"\n"):
                    break
                offset += len(line)
                points += _points(line)
                if len(points) >= _METRICS_PER_CALL:
                    break
        return points, offset

    def size(self) -> int:
        """Bytes in the file."""
        return self.file.stat().st_size

    def close(self) -> None:
        """What is appended from now on is dropped; reading goes on."""
        with self._lock:
            self._out.close()


@dataclass
class _Record:
    """What is known of the run in one MLflow."""

    run_id: str | None = None
    offset: int = 0
    """Bytes of the values file that were delivered."""
    artifacts: dict[str, int] = field(default_factory=dict)
    """Files that were delivered, with their time of change then."""


class _State:
    """`tracking.json`: the artifacts of a run, and a record for each MLflow; only the tracker's thread writes it."""

    def __init__(self, file: Path, key: str) -> None:
        self._file, self._key = file, key
        try:
            raw: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
        except (OSError, ValueError) as error:
            _log.warning("%s cannot be read (%s): the run will be a new one in MLflow", file, error)
            raw = {}
        self._stores: dict[str, Any] = raw.get("stores", {})
        self.artifacts: list[str] = raw.get("artifacts", [])
        self.record = _Record(**self._stores.get(key, {}))

    def save(self) -> None:
        self._stores[self._key] = vars(self.record)
        write_whole(self._file, json.dumps({"artifacts": self.artifacts, "stores": self._stores}, indent=1) + "\n")


class _Store:
    """The run in MLflow. Slow, and may raise whatever MLflow raises: only the tracker's thread calls it."""

    def __init__(
        self, config: TrackingConfig, uri: str, run_dir: Path, params: Mapping[str, str], tags: dict[str, str]
    ) -> None:
        self.config = config
        self.uri = uri
        self.run_dir = run_dir
        self.state = _State(run_dir / STATE_FILE, _store_key(uri, run_dir))
        self._params = {_clean(name): value[:_PARAM_LENGTH] for name, value in params.items()}
        self._tags = {_clean(name): public(str(value))[:_TAG_LENGTH] for name, value in tags.items()}
        self._client: Any = None

    def open(self) -> None:
        """Find or create the run; does nothing once that has been done."""
        if self._client is not None:
            return
        self._prepare_mlflow()
        from mlflow import MlflowClient

        client = MlflowClient(self.uri)
        tags = self._tags
        if commit := git_commit(Path.cwd()) or git_commit(Path(__file__).parent):
            tags = {"mlflow.source.git.commit": commit, **tags}
        known = self._resume(client)
        if known is None:
            run = client.create_run(self._experiment(client), run_name=self.run_dir.name, tags=tags)
            self.state.record = _Record(run_id=run.info.run_id)
            self.state.save()
            known = {}
        else:
            # Params never change in MLflow: what a resumed run does differently is told by its tags.
            changed = {name: value for name, value in self._params.items() if known.get(name, value) != value}
            tags = tags | {f"resumed.{name}"[:_KEY_LENGTH]: value for name, value in changed.items()}
        self._describe(client, {name: value for name, value in self._params.items() if name not in known}, tags)
        self._client = client

    def send(self, points: Sequence[_Point]) -> None:
        from mlflow.entities import Metric

        for some in _parts(points, _METRICS_PER_CALL):
            metrics = [Metric(_clean(point.name), point.value, point.milliseconds, point.step) for point in some]
            self._send(metrics)

    def send_artifact(self, path: Path) -> None:
        self._client.log_artifact(self.state.record.run_id, str(path))

    def attach(self, path: Path) -> bool:
        """Add a file to the run as it stands, without opening it again; False where there is no such run."""
        run_id, database = self.state.record.run_id, _sqlite_path(self.uri)
        # MLflow would make a database where there is none, and find no run in it.
        if run_id is None or (database is not None and not database.exists()):
            return False
        self._prepare_mlflow()
        from mlflow import MlflowClient

        MlflowClient(self.uri).log_artifact(run_id, str(path))
        return True

    def finish(self, status: Status) -> None:
        self._client.set_terminated(self.state.record.run_id, status=status)

    def _send(self, metrics: Sequence[Any]) -> None:
        try:
            self._client.log_batch(self.state.record.run_id, metrics=metrics)
        except Exception as error:
            if not _refused(error):
                raise
            # It would be refused for ever and hold up all that follow: find the one, and go on without it.
            if len(metrics) == 1:
                _log.warning("MLflow refuses a value of %s: %s", metrics[0].key, _short(error))
                return
            self._send(metrics[: len(metrics) // 2])
            self._send(metrics[len(metrics) // 2 :])

    def _prepare_mlflow(self) -> None:
        from mlflow import environment_variables as settings
        from mlflow.telemetry import set_telemetry_client

        # mlflow's own retries take minutes; ours know that the values are safe. What the user has set, stands.
        for setting, value in (
            (settings.MLFLOW_HTTP_REQUEST_MAX_RETRIES, 0),
            (settings.MLFLOW_HTTP_REQUEST_TIMEOUT, self.config.timeout),
            (settings.MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT, "true"),
        ):
            if not setting.is_set():
                setting.set(value)
        # A training job reports to its owner alone.
        if not settings.MLFLOW_DISABLE_TELEMETRY.is_set():
            settings.MLFLOW_DISABLE_TELEMETRY.set("true")
            set_telemetry_client()
        # Its tables' creation is no news.
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)

    def _resume(self, client: Any) -> dict[str, str] | None:
        """The params that the run has already; None where there is no run to continue."""
        run_id = self.state.record.run_id
        if run_id is None:
            return None
        try:
            run = client.get_run(run_id)
        except Exception as error:
            if getattr(error, "error_code", None) != "RESOURCE_DOES_NOT_EXIST":
                raise
            run = None
        if run is None or run.info.lifecycle_stage != "active":
            _log.warning("run %s is no longer in MLflow at %s: tracking as a new one", run_id, public(self.uri))
            return None
        client.update_run(run_id, status="RUNNING")
        return dict(run.data.params)

    def _experiment(self, client: Any) -> str:
        name = self.config.experiment
        found = client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(client.create_experiment(name, artifact_location=self._artifact_location()))
            except Exception:
                # Another run may have been quicker.
                found = client.get_experiment_by_name(name)
                if found is None:
                    raise
        return str(found.experiment_id)

    def _artifact_location(self) -> str | None:
        path = _sqlite_path(self.uri)
        # mlflow's own default is a folder in the working directory, which on a worker is nobody's.
        return self.config.artifacts or (str(path.parent / "mlartifacts") if path else None)

    def _describe(self, client: Any, params: Mapping[str, str], tags: Mapping[str, str]) -> None:
        from mlflow.entities import Param, RunTag

        calls = [{"params": some} for some in _parts([Param(*pair) for pair in params.items()], _PARAMS_PER_CALL)]
        calls += [{"tags": some} for some in _parts([RunTag(*pair) for pair in tags.items()], _PARAMS_PER_CALL)]
        for call in calls:
            try:
                client.log_batch(self.state.record.run_id, **call)
            except Exception as error:
                if not _refused(error):
                    raise
                _log.warning("MLflow refuses some %s: %s", *call, _short(error))


class _KeepingTracker(Tracker):
    """Writes to the spool, in the caller's thread."""

    def __init__(self, spool: _Spool) -> None:
        self._spool = spool
        self._said_unwritten = False

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._append(metrics, step)

    def close(self, status: Status = "FINISHED", timeout: float | None = None) -> None:  # noqa: ARG002
        self._spool.close()

    def _append(self, metrics: Mapping[str, float], step: int) -> None:
        try:
            self._spool.append(metrics, step)
        except (OSError, TypeError, ValueError) as error:
            if not self._said_unwritten:
                _log.warning("values cannot be written to %s (%s): they are lost", self._spool.file, error)
            self._said_unwritten = True


class _LiveTracker(_KeepingTracker):
    """Writes to the spool in the caller's thread, and delivers from it in its own."""

    def __init__(self, spool: _Spool, store: _Store) -> None:
        super().__init__(spool)
        self._store = store
        self._step = 0
        self._artifacts: list[Path] = []
        self._status: Status = "FINISHED"
        self._stop = threading.Event()
        self._abandoned = False
        self._finished = False
        self._said_down = False
        # Daemons: a process that ends without close() must not wait for a server. Two, as a delivery may wait for long.
        self._courier = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._courier.start()
        if store.config.system_every:
            threading.Thread(target=self._watch, name="system load", daemon=True).start()

    @property
    def run_id(self) -> str | None:
        return self._store.state.record.run_id

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        if self._stop.is_set():
            return
        self._step = step
        self._append(metrics, step)

    def artifact(self, path: Path) -> None:
        self._artifacts.append(path)

    def close(self, status: Status = "FINISHED", timeout: float | None = None) -> None:
        if self._stop.is_set():
            return
        self._status = status
        self._stop.set()
        self._courier.join(self._store.config.close_timeout if timeout is None else timeout)
        self._abandoned = True
        self._spool.close()
        if not self._finished:
            level = logging.INFO if self._said_down else logging.WARNING
            _log.log(
                level,
                "MLflow at %s does not have all values of this run yet; they are in %s, and the next start of the run "
                "delivers them",
                public(self._store.uri),
                self._spool.file,
            )

    def _work(self) -> None:
        every = self._store.config.every
        pause, stopping = every, False
        while not stopping:
            stopping = self._stop.is_set()
            pause = every if self._deliver(stopping) else min(2 * pause, max(every, _LONGEST_PAUSE))
            if not stopping:
                self._stop.wait(pause)

    def _watch(self) -> None:
        load = Load()
        while not self._stop.wait(self._store.config.system_every):
            try:
                values = load.read()
            except Exception as error:  # noqa: BLE001 - a counter that cannot be read is no reason to stop a thread
                _log.debug("no sample of the machine's load: %s", error)
            else:
                self._append({f"system/{name}": value for name, value in values.items()}, self._step)

    def _deliver(self, last: bool) -> bool:
        """Whether everything that there is has been delivered."""
        try:
            self._remember_artifacts()
            self._store.open()
            self._send_values()
            try:
                self._send_artifacts()
            finally:
                if last and not self._abandoned:
                    self._store.finish(self._status)
            self._finished = last
        except Exception as error:  # noqa: BLE001 - MLflow raises what its servers, drivers and sockets raise
            if not self._said_down:
                _log.warning(
                    "MLflow at %s does not take values (%s); the run goes on, they are kept in %s and delivered later",
                    public(self._store.uri),
                    _short(error),
                    self._spool.file,
                )
            self._said_down = True
            return False
        return True

    def _send_values(self) -> None:
        state = self._store.state
        # The file may have been cut or replaced since.
        state.record.offset = min(state.record.offset, self._spool.size())
        while not self._abandoned:
            points, offset = self._spool.read(state.record.offset)
            if offset == state.record.offset:
                return
            self._store.send(points)
            # A tracker that came after us may have written the state.
            if not self._abandoned:
                state.record.offset = offset
                state.save()

    def _remember_artifacts(self) -> None:
        """Write down what is to be delivered before trying to, so that a later run may."""
        state, run_dir = self._store.state, self._store.run_dir.absolute()
        while self._artifacts:
            path = self._artifacts.pop(0).absolute()
            name = str(path.relative_to(run_dir) if path.is_relative_to(run_dir) else path)
            if name not in state.artifacts:
                state.artifacts.append(name)
                state.save()

    def _send_artifacts(self) -> None:
        state, run_dir = self._store.state, self._store.run_dir
        for name in list(state.artifacts):
            path = run_dir / name
            if self._abandoned or not path.is_file():
                continue
            changed = path.stat().st_mtime_ns
            if state.record.artifacts.get(name) != changed:
                self._store.send_artifact(path)
                state.record.artifacts[name] = changed
                state.save()


class Load:
    """The machine's load since it was last read.

    Not mlflow's SystemMetricsMonitor: that sends through the client's own blocking retries, gives up for good on the
    first failure, and its values are nowhere but in MLflow.
    """

    def __init__(self) -> None:
        self._process = psutil.Process()
        psutil.cpu_percent()

    def read(self) -> dict[str, float]:
        """Value by name; a GPU's where this process has one."""
        values = {
            "cpu_percent": psutil.cpu_percent(),
            "memory_used_gib": psutil.virtual_memory().used / 2**30,
            "process_memory_gib": self._process.memory_info().rss / 2**30,
        }
        # The configuration is read without torch; a process that trains has loaded it.
        import torch

        # Never the first to touch CUDA: that would open a context on a device that the run may not use.
        if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            free, total = torch.cuda.mem_get_info()
            values["gpu_memory_used_gib"] = (total - free) / 2**30
            with suppress(ImportError, RuntimeError):
                values["gpu_percent"] = float(torch.cuda.utilization())
        return values


T = TypeVar("T")


def _parts(entries: Sequence[T], length: int) -> Iterator[Sequence[T]]:
    return (entries[start : start + length] for start in range(0, len(entries), length))


def _points(line: bytes) -> Iterable[_Point]:
    try:
        entry = json.loads(line)
        milliseconds = round(entry["time"] * 1000)
        return [_Point(name, float(v), milliseconds, entry["step"]) for name, v in entry["metrics"].items()]
    except (ValueError, KeyError, TypeError, AttributeError):
        # The beginning of a line whose process died while it wrote.
        return []


def _writable(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _ends_line(file: Path) -> bool:
    with open(file, "rb") as content:
        content.seek(-1, os.SEEK_END)
        return content.read(1) == b"\n"


def _sqlite_path(uri: str) -> Path | None:
    """The file of a sqlite URI, None for any other store."""
    match = re.fullmatch(r"sqlite(?:\+\w+)?:///([^?]+)(?:\?.*)?", uri)
    return Path(match[1]) if match else None


def _store_key(uri: str, run_dir: Path) -> str:
    """Names the MLflow in the state file: a database by its way from there, so that both may move together."""
    path = _sqlite_path(uri)
    return f"sqlite:{os.path.relpath(path, run_dir.absolute())}" if path else public(uri)


def _clean(name: str) -> str:
    """`name` as MLflow takes it; names of our own making are so already."""
    parts = (part for part in re.sub(r"[^\w\-. /]", "_", name).split("/"))
    # MLflow reads names as paths and refuses those that a normalisation would change.
    return "/".join(part if part.strip(".") else "_" * max(1, len(part)) for part in parts)[:_KEY_LENGTH]


def _refused(error: Exception) -> bool:
    """Whether MLflow has understood the request and will never take it."""
    return getattr(error, "error_code", None) in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")


def _short(error: Exception) -> str:
    text = public(str(error)).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}" if text else type(error).__name__
