"""What a manifest names has to be there: in the same set of objects, in the repository, or by the operator's hand."""

import importlib.util
import re
import shlex
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import click

from k8s_rendered import K8S, ROOT, Object, Pod, name, named, pods, ray_clusters, ray_pods
from k8s_rules import ranks_of
from msr_dist.config import load
from msr_dist.extract import ExtractConfig
from msr_dist.pipeline import PipelineConfig
from msr_dist.run import RunConfig

CONFIGURATIONS = {"jobs/pipeline.py": PipelineConfig, "jobs/extract.py": ExtractConfig, "jobs/train.py": RunConfig}
OTHERS = {"kuberay-operator", "prometheus"}
"""Pods that are installed by others, by app.kubernetes.io/name."""
CLUSTER_WIDE = {"Namespace", "PriorityClass", "ResourceFlavor", "ClusterQueue", "WorkloadPriorityClass"}
COMPONENT = "app.kubernetes.io/component"


def reference_faults(things: list[Object]) -> list[str]:
    """Names that lead nowhere."""
    faults = []
    for thing in things:
        metadata = thing["metadata"]
        if COMPONENT not in metadata.get("labels", {}):
            faults.append(f"{name(thing)}: no label {COMPONENT}, so that it cannot be applied by itself")
        namespaces = {None} if thing["kind"] in CLUSTER_WIDE else set(named(things, "Namespace"))
        if metadata.get("namespace") not in namespaces:
            faults.append(f"{name(thing)}: its namespace is {metadata.get('namespace')}, not one of {namespaces}")
        faults += [f"{name(thing)}: {fault}" for fault in _selected(thing, list(pods(things)))]
    for pod in pods(things):
        faults += [f"{pod.where}: {fault}" for fault in _named_by(pod, things)]
    return faults


def _named_by(pod: Pod, things: list[Object]) -> Iterator[str]:
    for kind, wanted in (
        ("ServiceAccount", [pod.spec.get("serviceAccountName")]),
        ("PriorityClass", [pod.spec.get("priorityClassName")]),
        ("PersistentVolumeClaim", [each["claimName"] for each in _found(pod.spec, "persistentVolumeClaim")]),
        ("ConfigMap", [each["name"] for key in ("configMapKeyRef", "configMapRef") for each in _found(pod.spec, key)]),
    ):
        for each in wanted:
            if each is not None and each not in named(things, kind):
                yield f"there is no {kind} {each!r}"
    yield from _secrets(pod, things)
    for container in pod.containers:
        yield from _image(container["image"])
        for probe in ("readinessProbe", "livenessProbe"):
            port = container.get(probe, {}).get("httpGet", {}).get("port", 0)
            if isinstance(port, str) and port not in pod.ports:
                yield f"{probe} asks the port {port!r}, and there is no such"
        for text in [*container.get("args", []), *container.get("command", [])]:
            yield from url_faults(text, things)


def _secrets(pod: Pod, things: list[Object]) -> Iterator[str]:
    # KubeRay makes a secret for each cluster with a token, of the cluster's name.
    made = {each["metadata"]["name"] for each in named(things, "RayCluster").values() if "authOptions" in each["spec"]}
    documented = set(re.findall(r"create secret generic (\S+)", (K8S / "README.md").read_text()))
    for key in ("secretKeyRef", "secretRef", "secret"):
        for each in _found(pod.spec, key):
            secret = each.get("name") or each.get("secretName")
            if secret in made:
                if each.get("key") != "auth_token":
                    yield f"the secret {secret!r} of the operator has the key auth_token, not {each.get('key')!r}"
            elif secret not in documented:
                yield f"nobody makes the Secret {secret!r}, and k8s/README.md does not say how"
    for container in pod.containers:
        for variable in container.get("env", []):
            if re.search(r"TOKEN|SECRET|PASSWORD", variable["name"]) and "valueFrom" not in variable:
                yield f"{variable['name']} stands there in the open: name a secret with valueFrom"


def _found(tree: Any, key: str) -> Iterator[Any]:
    """Everything under `key`, however deep."""
    if isinstance(tree, dict):
        if key in tree:
            yield tree[key]
        tree = list(tree.values())
    if isinstance(tree, list):
        for below in tree:
            yield from _found(below, key)


def _image(image: str) -> Iterator[str]:
    if image not in built_images().values():
        yield f"the image {image!r} is none that the Dockerfile says how to build: {', '.join(built_images().values())}"


def built_images() -> dict[str, str]:
    """Target of the Dockerfile -> image, as its own first lines tell people to build it."""
    return dict(re.findall(r"docker build --target (\w+) -t (\S+) ", (ROOT / "Dockerfile").read_text()))


def _selected(thing: Object, known: list[Pod]) -> Iterator[str]:
    """Selectors that take no pod, and ports by a name that no pod has."""
    spec = thing.get("spec", {})
    if thing["kind"] == "Service":
        yield from _taken({"matchLabels": spec["selector"]}, [port["targetPort"] for port in spec["ports"]], known)
    elif thing["kind"] == "Deployment":
        labels = spec["template"]["metadata"]["labels"]
        if not spec["selector"]["matchLabels"].items() <= labels.items():
            yield f"its selector {spec['selector']['matchLabels']} does not take its own pods, {labels}"
    elif thing["kind"] == "PodMonitor":
        yield from _taken(spec["selector"], [each["port"] for each in spec["podMetricsEndpoints"]], known)
    elif thing["kind"] == "NetworkPolicy":
        ports = [port["port"] for rule in spec.get("ingress", []) for port in rule.get("ports", [])]
        yield from _taken(spec["podSelector"], ports, known)
        for rule in [*spec.get("ingress", []), *spec.get("egress", [])]:
            for peer in [*rule.get("from", []), *rule.get("to", [])]:
                selector = peer["podSelector"]
                # Without MLflow's component its pods are missing, and without harm.
                if selector["matchLabels"].get("app.kubernetes.io/name") not in {*OTHERS, "mlflow"}:
                    yield from _taken(selector, [], known)


def _taken(selector: Object, ports: list[str | int], known: list[Pod]) -> Iterator[str]:
    matched = [pod for pod in known if pod.matches(selector)]
    if not matched:
        yield f"the selector {selector['matchLabels']} takes no pod"
        return
    for port in ports:
        if not any(port in (*pod.ports, *pod.ports.values()) for pod in matched):
            yield f"the pods that it selects have no port {port!r}"


def url_faults(text: str, things: list[Object]) -> Iterator[str]:
    """Addresses http://SERVICE:PORT in a command that no service answers."""
    services = {
        key: {port["port"] for port in service["spec"]["ports"]} for key, service in named(things, "Service").items()
    }
    # The operator makes a service for the head of each cluster, with the head's ports.
    for key, cluster in named(things, "RayCluster").items():
        services[f"{key}-head-svc"] = set(next(ray_pods(key, cluster["spec"])).ports.values())
    for host, port in re.findall(r"http://([\w.-]+):(\d+)", text):
        if int(port) not in services.get(host, set()):
            yield f"no Service answers at http://{host}:{port}"


def entrypoint_faults(things: list[Object]) -> list[str]:
    """Commands that their job would refuse, or that ask for more workers than there are."""
    faults = []
    clusters = dict(ray_clusters(things))
    for key, job in named(things, "RayJob").items():
        faults += [f"RayJob/{key}: {fault}" for fault in _command(job["spec"]["entrypoint"], clusters[f"RayJob/{key}"])]
        faults += [f"RayJob/{key}: {fault}" for fault in url_faults(job["spec"]["entrypoint"], things)]
    for key, job in named(things, "CronJob").items():
        container = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]
        submitted, _, command = container["args"][0].partition(" -- ")
        if not submitted.startswith("exec ray job submit --address http://"):
            faults.append(f"CronJob/{key}: does not submit a job to a cluster")
        faults += [f"CronJob/{key}: {fault}" for fault in _command(command, clusters["RayCluster/msr-dist"])]
    return faults


def _command(line: str, cluster: Object) -> Iterator[str]:
    # As the submitter's shell reads it.
    expanded = subprocess.run(
        ["/bin/sh", "-c", f"printf '%s\\n' {line}"], capture_output=True, text=True, timeout=60, check=True
    ).stdout.splitlines()
    if expanded[0] != "python" or not (ROOT / expanded[1]).is_file():
        yield f"there is no {shlex.join(expanded[:2])} in the image"
        return
    try:
        with job(expanded[1]).main.make_context(expanded[1], expanded[2:]) as context:
            given = context.params
        load(CONFIGURATIONS[expanded[1]], ROOT / given["config"], given["settings"])
    except (click.ClickException, ValueError) as error:
        yield f"{expanded[1]}: {error.format_message() if isinstance(error, click.ClickException) else error}"
        return
    ranks = _ranks(cluster)
    if given["workers"] > ranks:
        yield f"--workers {given['workers']}, and the worker groups begin with {ranks} GPUs, or cores"
    volumes = {mount["mountPath"] for pod in ray_pods("", cluster) for mount in pod.containers[0]["volumeMounts"]}
    for setting in given["settings"]:
        path = setting.partition("=")[2]
        if path.startswith("/") and not any(Path(path).is_relative_to(volume) for volume in volumes):
            yield f"{setting}: no volume is mounted there"


def _ranks(cluster: Object) -> int:
    """Workers that there is a GPU for, or where there are none a core, before any autoscaling."""
    ranks = 0
    for group in cluster["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        ranks += group.get("minReplicas", 0) * ranks_of(limits)
    return ranks


@cache
def job(file: str) -> ModuleType:
    """A job's file as a module."""
    spec = importlib.util.spec_from_file_location(f"job_{Path(file).stem}", ROOT / file)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
