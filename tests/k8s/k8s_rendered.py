"""What `kubectl apply -k` would send, and the pods that come of it."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
K8S = ROOT / "k8s"
KUBECTL = Path(sys.executable).with_name("kubectl")

Object = dict[str, Any]


@cache
def render(folder: str) -> str:
    """The YAML that Kustomize makes of a folder below k8s/."""
    done = subprocess.run(
        [KUBECTL, "kustomize", K8S / folder], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def objects(folder: str) -> list[Object]:
    """The objects of a folder below k8s/, to be changed as one likes."""
    return list(yaml.load_all(render(folder), yaml.CSafeLoader))


def name(thing: Object) -> str:
    """Kind and name, as kubectl writes them."""
    return f"{thing['kind']}/{thing['metadata']['name']}"


def named(things: list[Object], kind: str) -> dict[str, Object]:
    """The objects of a kind by name."""
    return {thing["metadata"]["name"]: thing for thing in things if thing["kind"] == kind}


@dataclass(frozen=True)
class Pod:
    """The template of a pod, with the labels that it will have."""

    where: str
    labels: dict[str, str]
    spec: Object

    @property
    def containers(self) -> list[Object]:
        return self.spec.get("containers", [])

    @property
    def ports(self) -> dict[str, int]:
        return {port["name"]: port["containerPort"] for each in self.containers for port in each.get("ports", [])}

    def matches(self, selector: Object) -> bool:
        """Whether a label selector takes it."""
        assert set(selector) <= {"matchLabels"}, selector
        return selector.get("matchLabels", {}).items() <= self.labels.items()


def pods(things: list[Object]) -> Iterator[Pod]:
    """Every pod that the objects describe, but for what the operator adds to them."""
    for thing in things:
        if thing["kind"] == "Deployment":
            yield _pod(name(thing), thing["spec"]["template"])
        elif thing["kind"] == "CronJob":
            yield _pod(name(thing), thing["spec"]["jobTemplate"]["spec"]["template"])
        elif thing["kind"] == "RayJob" and "submitterPodTemplate" in thing["spec"]:
            yield _pod(f"{name(thing)} submitter", thing["spec"]["submitterPodTemplate"])
    for where, cluster in ray_clusters(things):
        yield from ray_pods(where, cluster)


def ray_clusters(things: list[Object]) -> Iterator[tuple[str, Object]]:
    """Every Ray cluster's spec, of its own or of a job."""
    for thing in things:
        if thing["kind"] == "RayCluster":
            yield name(thing), thing["spec"]
        elif thing["kind"] == "RayJob" and "rayClusterSpec" in thing["spec"]:
            yield name(thing), thing["spec"]["rayClusterSpec"]


def ray_pods(where: str, cluster: Object) -> Iterator[Pod]:
    """Head and workers, with the labels that the operator gives them."""
    groups = [("headgroup", "head", cluster["headGroupSpec"])]
    groups += [(group["groupName"], "worker", group) for group in cluster.get("workerGroupSpecs", [])]
    for group, node, spec in groups:
        given = {"ray.io/is-ray-node": "yes", "ray.io/node-type": node, "ray.io/group": group, "ray.io/cluster": where}
        yield _pod(f"{where} {group}", spec["template"], given)


def _pod(where: str, template: Object, given: dict[str, str] | None = None) -> Pod:
    return Pod(where, template.get("metadata", {}).get("labels", {}) | (given or {}), template["spec"])
