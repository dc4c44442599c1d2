"""What no schema holds: the rules of Kubernetes, KubeRay and Kueue themselves, and what ours rely on.

KubeRay refuses an object that breaks its rules only in its status, after the API server has accepted it: the job is
there, and never runs. Kueue refuses it in its webhook.
"""

import re
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import yaml

from k8s_rendered import ROOT, Object, Pod, name, named, pods, ray_clusters, ray_pods

NAME_LENGTHS = {"RayCluster": 53, "RayJob": 47, "RayCronJob": 36}
MOST_GROUPS_IN_KUEUE = 17
QUEUE = "kueue.x-k8s.io/queue-name"
PRIORITY = "kueue.x-k8s.io/priority-class"
GATED = ("networkPolicy", "tlsOptions", "historyServerOptions")
SUFFIXES = {"": 1, "m": Decimal("0.001")}
SUFFIXES |= {unit: 1000**power for power, unit in enumerate("kMGTPE", 1)}
SUFFIXES |= {f"{unit}i": 1024**power for power, unit in enumerate("KMGTPE", 1)}


def quantity(text: Any) -> Decimal:
    """A Kubernetes quantity such as 500m or 8Gi as a number; ValueError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([a-zA-Z]*)", str(text))
    if not found or found[2] not in SUFFIXES:
        raise ValueError(f"{text!r} is no quantity, such as 500m or 8Gi")
    return Decimal(found[1]) * SUFFIXES[found[2]]


def ranks_of(limits: Object) -> int:
    """Ranks that a pod with these limits has room for: one per GPU, or where there is none, per core."""
    return int(quantity(limits.get("nvidia.com/gpu", limits["cpu"])))


def kuberay_faults(things: list[Object]) -> list[str]:
    """What KubeRay's operator refuses."""
    faults = []
    for thing in things:
        if thing["kind"] in NAME_LENGTHS:
            faults += [f"{name(thing)}: {fault}" for fault in _ray_name(thing)]
        if thing["kind"] == "RayJob":
            faults += [f"{name(thing)}: {fault}" for fault in _ray_job(thing["spec"])]
    for where, cluster in ray_clusters(things):
        faults += [f"{where}: {fault}" for fault in _ray_cluster(cluster)]
    return faults


def _ray_name(thing: Object) -> Iterator[str]:
    given, longest = thing["metadata"]["name"], NAME_LENGTHS[thing["kind"]]
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", given):
        yield "the name is no DNS-1035 label: a lower-case letter first, then letters, digits and dashes"
    if len(given) > longest:
        yield f"the name has {len(given)} characters, and at most {longest} leave room for the operator's suffixes"


def _ray_job(spec: Object) -> Iterator[str]:
    ends, mode = spec.get("shutdownAfterJobFinishes", False), spec.get("submissionMode", "K8sJobMode")
    selects, retries = bool(spec.get("clusterSelector")), spec.get("backoffLimit", 0)
    if spec.get("suspend") and not ends:
        yield "suspend needs shutdownAfterJobFinishes: true"
    if spec.get("ttlSecondsAfterFinished", 0) > 0 and not ends:
        yield "ttlSecondsAfterFinished needs shutdownAfterJobFinishes: true"
    if spec.get("deletionStrategy", {}).get("deletionRules") and ends:
        yield "deletionStrategy.deletionRules and shutdownAfterJobFinishes exclude each other"
    if selects == ("rayClusterSpec" in spec):
        yield "give rayClusterSpec or clusterSelector, one of them"
    if selects and (retries or spec.get("suspend")):
        yield "with clusterSelector there is neither backoffLimit nor suspend"
    if mode == "SidecarMode" and ("submitterPodTemplate" in spec or "submitterConfig" in spec):
        yield "SidecarMode has no submitterPodTemplate and no submitterConfig"
    if mode == "InteractiveMode" and retries:
        yield "InteractiveMode has no backoffLimit"
    if retries < 0:
        yield "backoffLimit is negative"
    for key in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        if spec.get(key, 1) <= 0:
            yield f"{key} has to be positive"
    try:
        environment = yaml.safe_load(spec.get("runtimeEnvYAML", "{}"))
    except yaml.YAMLError as error:
        environment = str(error)
    if not isinstance(environment, dict):
        yield f"runtimeEnvYAML is no YAML map: {environment}"


def _ray_cluster(spec: Object) -> Iterator[str]:
    scales = spec.get("enableInTreeAutoscaling", False)
    second = scales and spec.get("autoscalerOptions", {}).get("version") == "v2"
    groups = spec.get("workerGroupSpecs", [])
    for group in [{"groupName": "head", **spec["headGroupSpec"]}, *groups]:
        which, started = f"group {group['groupName']}", group.get("rayStartParams", {})
        if not group["template"]["spec"].get("containers"):
            yield f"{which} has no container"
        if group.get("resources") and {"num-cpus", "num-gpus", "memory", "resources"} & set(started):
            yield f"{which} gives resources both in rayStartParams and in resources"
        if "labels" in started:
            yield f"{which} gives labels in rayStartParams: they have a field of their own"
        if second and group["template"]["spec"].get("restartPolicy", "Never") != "Never":
            yield f"{which}: with autoscaler v2 restartPolicy is Never, or not given"
    for group in groups:
        which, least, most = f"group {group['groupName']}", group.get("minReplicas"), group.get("maxReplicas")
        if not scales and (least is None or most is None):
            yield f"{which}: without autoscaling minReplicas and maxReplicas are needed"
        if (least or 0) < 0 or (most or 0) < 0:
            yield f"{which} has negative replicas"
        if least is not None and most is not None and least > most:
            yield f"{which} has minReplicas {least}, more than maxReplicas {most}"
        if "idleTimeoutSeconds" in group and not second:
            yield f"{which}: idleTimeoutSeconds of a group needs autoscaler v2"
        if scales and group.get("suspend"):
            yield f"{which} cannot be suspended under an autoscaler"
    if spec.get("authOptions", {}).get("mode") == "token" and _version(spec.get("rayVersion", "0")) < (2, 52):
        yield f"token authentication needs rayVersion 2.52.0 or later, not {spec.get('rayVersion')}"
    for key in GATED:
        if key in spec:
            yield f"{key} sits behind a feature gate that is off"


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdigit())


def kueue_faults(things: list[Object]) -> list[str]:
    """What Kueue's webhook refuses, or would never admit."""
    faults = []
    queues, priorities = named(things, "LocalQueue"), named(things, "WorkloadPriorityClass")
    for thing in things:
        labels = thing["metadata"].get("labels", {})
        if PRIORITY in labels and labels[PRIORITY] not in priorities:
            faults.append(f"{name(thing)}: there is no WorkloadPriorityClass {labels[PRIORITY]!r}")
        if QUEUE not in labels:
            continue
        if labels[QUEUE] not in queues:
            faults.append(f"{name(thing)}: there is no LocalQueue {labels[QUEUE]!r}")
            continue
        spec = thing["spec"]
        if thing["kind"] == "RayJob":
            faults += [f"{name(thing)}: {fault}" for fault in _queued_job(spec)]
        cluster = spec.get("rayClusterSpec", spec) if thing["kind"] == "RayJob" else spec
        quota = _quota(things, queues[labels[QUEUE]])
        faults += [f"{name(thing)}: {fault}" for fault in _queued_cluster(cluster, quota)]
    for queue in queues.values():
        if queue["spec"]["clusterQueue"] not in named(things, "ClusterQueue"):
            faults.append(f"{name(queue)}: there is no ClusterQueue {queue['spec']['clusterQueue']!r}")
    for queue in named(things, "ClusterQueue").values():
        used = {flavor["name"] for group in queue["spec"]["resourceGroups"] for flavor in group["flavors"]}
        unknown = sorted(used - set(named(things, "ResourceFlavor")))
        faults += [f"{name(queue)}: there is no ResourceFlavor {flavor!r}" for flavor in unknown]
    return faults


def _queued_job(spec: Object) -> Iterator[str]:
    if not spec.get("shutdownAfterJobFinishes"):
        yield "a queued job needs shutdownAfterJobFinishes: true, or it would keep its quota"
    if "clusterSelector" in spec:
        yield "a queued job has no clusterSelector"
    if "suspend" in spec:
        yield "suspend is Kueue's to set"


def _queued_cluster(spec: Object, quota: dict[str, Decimal]) -> Iterator[str]:
    if spec.get("enableInTreeAutoscaling"):
        yield "a queued cluster has no autoscaler: enableInTreeAutoscaling: false"
    groups = spec.get("workerGroupSpecs", [])
    if len(groups) > MOST_GROUPS_IN_KUEUE:
        yield f"{len(groups)} worker groups, and Kueue takes {MOST_GROUPS_IN_KUEUE}"
    if any(group["groupName"] == "head" for group in groups):
        yield "a worker group has the name 'head', which is Kueue's for the head"
    wanted: dict[str, Decimal] = {}
    counts = [1, *(group.get("replicas", 0) for group in groups)]
    for count, pod in zip(counts, ray_pods("", spec), strict=True):
        for container in pod.containers:
            resources = container.get("resources", {})
            for resource, amount in {**resources.get("limits", {}), **resources.get("requests", {})}.items():
                wanted[resource] = wanted.get(resource, Decimal(0)) + count * quantity(amount)
    for resource, amount in wanted.items():
        if amount > quota.get(resource, 0):
            yield f"asks for {amount} of {resource}, and the queue has {quota.get(resource, 0)}: it would wait for ever"


def _quota(things: list[Object], queue: Object) -> dict[str, Decimal]:
    """What the cluster queue of a local one may give at most."""
    found: dict[str, Decimal] = {}
    cluster_queue = named(things, "ClusterQueue").get(queue["spec"]["clusterQueue"], {"spec": {}})
    for group in cluster_queue["spec"].get("resourceGroups", []):
        for flavor in group["flavors"]:
            for resource in flavor["resources"]:
                amount = quantity(resource["nominalQuota"])
                found[resource["name"]] = found.get(resource["name"], Decimal(0)) + amount
    return found


def pod_faults(things: list[Object]) -> list[str]:
    """What the Pod Security Standard `restricted`, and the API server's own checks, refuse of a pod."""
    return [f"{pod.where}: {fault}" for pod in pods(things) for fault in _pod(pod)]


def _pod(pod: Pod) -> Iterator[str]:
    context = pod.spec.get("securityContext", {})
    if not context.get("runAsNonRoot") or context.get("runAsUser") == 0:
        yield "the pod may be root: securityContext.runAsNonRoot: true"
    if context.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        yield "the pod has no seccompProfile RuntimeDefault"
    if pod.spec.get("hostNetwork") or pod.spec.get("hostPID") or pod.spec.get("hostIPC"):
        yield "the pod is in the machine's own namespaces"
    volumes = {volume["name"] for volume in pod.spec.get("volumes", [])}
    mounted = set()
    for container in pod.containers:
        which, own = f"container {container['name']}", container.get("securityContext", {})
        if own.get("allowPrivilegeEscalation") is not False or own.get("privileged"):
            yield f"{which} may gain privileges: allowPrivilegeEscalation: false"
        if own.get("capabilities", {}).get("drop") != ["ALL"]:
            yield f"{which} keeps capabilities: drop: [ALL]"
        mounts = {mount["name"] for mount in container.get("volumeMounts", [])}
        mounted |= mounts
        yield from (f"{which} mounts {volume!r}, and the pod has no such volume" for volume in sorted(mounts - volumes))
        yield from (f"{which}: {fault}" for fault in _resources(container.get("resources", {})))
    yield from (f"no container mounts the volume {volume!r}" for volume in sorted(volumes - mounted))
    for volume in pod.spec.get("volumes", []):
        if "hostPath" in volume:
            yield f"the volume {volume['name']!r} is a folder of the machine (hostPath)"


def _resources(resources: Object) -> Iterator[str]:
    requests, limits = resources.get("requests", {}), resources.get("limits", {})
    for key in ("cpu", "memory"):
        if key not in requests or key not in limits:
            yield f"resources need requests and limits of {key}"
    for key, amount in [*requests.items(), *limits.items()]:
        try:
            quantity(amount)
        except ValueError as error:
            yield f"resources.{key}: {error}"
            return
    for key in requests.keys() & limits.keys():
        if quantity(requests[key]) > quantity(limits[key]):
            yield f"asks for {requests[key]} of {key}, more than the limit {limits[key]}"


def our_faults(things: list[Object]) -> list[str]:
    """What every Ray cluster of this project needs in order to run a job and to survive it."""
    return [f"{where}: {fault}" for where, cluster in ray_clusters(things) for fault in _ours(where, cluster)]


def _ours(where: str, cluster: Object) -> Iterator[str]:
    installed = re.search(r"^ray==(.*)$", (ROOT / "requirements-common.txt").read_text(), re.MULTILINE)
    assert installed
    if cluster.get("rayVersion") != installed[1]:
        yield f"rayVersion is {cluster.get('rayVersion')}, and the image has Ray {installed[1]}"
    if cluster.get("authOptions", {}).get("mode") != "token":
        yield "no token authentication: whoever reaches the dashboard's port runs what he likes"
    if cluster["headGroupSpec"].get("rayStartParams", {}).get("num-cpus") != "0":
        yield 'ranks may run on the head: rayStartParams num-cpus: "0"'
    head, *workers = ray_pods(where, cluster)
    # With any port of our own, the operator adds none but the metrics'.
    missing = {"gcs-server": 6379, "dashboard": 8265, "metrics": 8080}.items() - head.ports.items()
    if missing:
        yield f"the head's service would lack the ports {dict(missing)}"
    for pod in (head, *workers):
        yield from (f"{pod.where.split()[-1]}: {fault}" for fault in _ray_container(pod))
    threads = next((int(each["value"]) for each in head.containers[0]["env"] if each["name"] == "OMP_NUM_THREADS"), 0)
    if not threads:
        yield "the head has no OMP_NUM_THREADS: each rank would take as many threads as the machine has cores"
    for group, pod in zip(cluster.get("workerGroupSpecs", []), workers, strict=True):
        limits = pod.containers[0]["resources"]["limits"]
        if threads * ranks_of(limits) > quantity(limits["cpu"]):
            which = f"group {group['groupName']}"
            yield f"{which}: {ranks_of(limits)} ranks with {threads} threads each, and {limits['cpu']} cores"
        least, count, most = (group.get(key, 0) for key in ("minReplicas", "replicas", "maxReplicas"))
        if not least <= count <= most:
            yield f"group {group['groupName']}: replicas {count} are not from minReplicas {least} to maxReplicas {most}"


def _ray_container(pod: Pod) -> Iterator[str]:
    container, volumes = pod.containers[0], {volume["name"]: volume for volume in pod.spec.get("volumes", [])}
    mounted = {mount["mountPath"]: volumes.get(mount["name"], {}) for mount in container.get("volumeMounts", [])}
    limits = container.get("resources", {}).get("limits", {})
    for path in ("/shared", "/tmp/ray", "/dev/shm"):
        if path not in mounted:
            yield f"nothing is mounted at {path}"
    shared, memory = mounted.get("/dev/shm", {}).get("emptyDir", {}), quantity(limits.get("memory", 0))
    size = quantity(shared.get("sizeLimit", 0))
    if shared.get("medium") != "Memory":
        yield "/dev/shm is not in memory"
    elif not 0 < size <= memory:
        yield f"/dev/shm has a sizeLimit of {shared.get('sizeLimit')}, and the container {limits.get('memory')} in all"
    # ray._private.utils.resolve_object_store_memory; with less than this, it goes to disk or refuses to start.
    elif size < min(memory * 3 / 10, max(Decimal(10**10), size * 95 / 100)):
        yield f"/dev/shm has {shared['sizeLimit']}, less than the 30 % of {limits['memory']} that Ray takes"
    for probe in ("readinessProbe", "livenessProbe"):
        if probe not in container:
            yield f"no {probe}"
    tolerated = {each["key"] for each in pod.spec.get("tolerations", [])}
    yield from (f"no toleration for {key}" for key in limits if key.endswith("/gpu") and key not in tolerated)
