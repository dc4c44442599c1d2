"""The dashboard shows what is measured, and the tracking server works as it is started."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from k8s_rendered import named, objects
from msr_dist.ray_metrics import GAUGES


@pytest.fixture
def dashboard():
    (file,) = named(objects("overlays/gpu"), "ConfigMap")["msr-dist-dashboard"]["data"].values()
    return json.loads(file)


def queries(dashboard) -> list[str]:
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


def test_grafana_finds_the_dashboard():
    labels = named(objects("overlays/gpu"), "ConfigMap")["msr-dist-dashboard"]["metadata"]["labels"]
    assert labels["grafana_dashboard"] == "1"


def test_the_panels_show_all_that_is_measured(dashboard):
    shown = set(re.findall(r"ray_msr_dist_(\w+)", " ".join(queries(dashboard))))
    assert shown == {*GAUGES, "scenario_auc", "table_occupancy"}
    numbers = [panel["id"] for panel in dashboard["panels"]]
    assert len(numbers) == len(set(numbers))


def test_no_two_panels_lie_over_each_other(dashboard):
    taken = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells


def test_queries_and_variables_fit(dashboard):
    known = {variable["name"] for variable in dashboard["templating"]["list"]}
    for query in queries(dashboard):
        assert set(re.findall(r"\$(\w+)", query)) <= known
        assert query.count("(") == query.count(")")
        assert query.count("{") == query.count("}")
    assert {panel["datasource"]["uid"] for panel in dashboard["panels"]} == {"${prometheus}"}


@pytest.fixture
def tracking_server(tmp_path):
    """The server as the manifest starts it, but for host, port and folder; its port."""
    (container,) = named(objects("overlays/gpu"), "Deployment")["mlflow"]["spec"]["template"]["spec"]["containers"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {"--host": "127.0.0.1", "--port": port, "--workers": 1}
    options = [option for option in container["args"] if option.partition("=")[0] not in own]
    assert len(options) == len(container["args"]) - len(own)
    (mount,) = container["volumeMounts"]
    variables = {
        each["name"]: each["value"].replace(f"{mount['mountPath']}/", f"{tmp_path}/") for each in container["env"]
    }
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", *options, *(f"{key}={value}" for key, value in own.items())],
            env=os.environ | variables,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            begun = time.monotonic()
            while _status(port, container["readinessProbe"]["httpGet"]["path"], f"10.1.2.3:{port}") != 200:
                assert process.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() - begun < 200
                time.sleep(0.5)
            yield port
            assert (tmp_path / "mlflow.db").is_file()
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)


def _status(port: int, path: str, host: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET", path, headers={"Host": host})
        return connection.getresponse().status
    except ConnectionRefusedError:
        return 0
    finally:
        connection.close()


def test_the_tracking_server_answers_the_jobs_and_nobody_else(tracking_server):
    path = "/api/2.0/mlflow/experiments/search?max_results=1"
    (uri,) = {
        found
        for job in named(objects("overlays/gpu"), "RayJob").values()
        for found in re.findall(r"tracking.uri=http://(\S+)", job["spec"]["entrypoint"])
    }
    assert _status(tracking_server, path, uri) == 200
    assert _status(tracking_server, path, "evil.example") == 403
