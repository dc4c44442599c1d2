"""Every overlay is accepted, and a list of broken ones is not, each for its own fault.

Run with the published definitions of the custom resources beside the repository, or the schemas of KubeRay, Kueue and
the Prometheus operator go unchecked: such tests are skipped, and say so.
"""

import re
import shutil
from dataclasses import dataclass
from typing import Any

import pytest

from k8s_references import entrypoint_faults, reference_faults
from k8s_rendered import K8S, Object, named, objects, pods
from k8s_rules import kuberay_faults, kueue_faults, our_faults, pod_faults
from k8s_schemas import CRDS, is_custom, schema_faults

OVERLAYS = sorted(f"overlays/{folder.name}" for folder in (K8S / "overlays").iterdir())
SETS = ["base", *OVERLAYS]
ABSENT = {
    "condition": not CRDS.is_dir(),
    "reason": f"NOT CHECKED: no definitions of KubeRay, Kueue and Prometheus resources in {CRDS}",
}
needs_crds = pytest.mark.skipif(**ABSENT)


def rule_faults(things: list[Object]) -> list[str]:
    """Everything that schemas do not see, in objects that they have passed."""
    checks = (kuberay_faults, kueue_faults, pod_faults, our_faults, reference_faults, entrypoint_faults)
    return [fault for check in checks for fault in check(things)]


def test_the_overlays_are_those_that_the_readme_names():
    assert set(OVERLAYS) == {f"overlays/{each}" for each in ("cpu-demo", "gpu", "multi-node-gpu", "kueue")}
    said = (K8S / "README.md").read_text()
    assert [overlay for overlay in OVERLAYS if overlay not in said] == []


@pytest.mark.parametrize("folder", SETS)
def test_kubernetes_own_objects_are_valid(folder):
    things = [thing for thing in objects(folder) if not is_custom(thing)]
    assert len(things) > 5
    assert [fault for thing in things for fault in schema_faults(thing)] == []


@needs_crds
@pytest.mark.parametrize("folder", SETS)
def test_custom_resources_are_valid(folder):
    things = [thing for thing in objects(folder) if is_custom(thing)]
    assert {"RayJob"} <= {thing["kind"] for thing in things}
    assert [fault for thing in things for fault in schema_faults(thing)] == []


@pytest.mark.parametrize("folder", SETS)
def test_nothing_is_wrong_that_schemas_do_not_see(folder):
    assert rule_faults(objects(folder)) == []


@pytest.mark.parametrize("folder", SETS)
def test_every_job_has_the_cluster_that_the_overlay_patches(folder):
    things = objects(folder)
    jobs = named(things, "RayJob")
    assert set(jobs) == ({"pipeline"} if folder == "overlays/cpu-demo" else {"pipeline", "extract", "train"})
    kept = named(things, "RayCluster").get("msr-dist", jobs["pipeline"])["spec"]
    kept = kept.get("rayClusterSpec", kept)
    assert all(job["spec"]["rayClusterSpec"] == kept for job in jobs.values())
    assert len({str(job["spec"]["submitterPodTemplate"]) for job in jobs.values()}) == 1


def test_the_demo_keeps_nothing_and_the_queued_cluster_gives_way():
    assert set(named(objects("overlays/cpu-demo"), "RayCluster")) == set()
    queued = objects("overlays/kueue")
    values = {key: each["value"] for key, each in named(queued, "WorkloadPriorityClass").items()}
    label = "kueue.x-k8s.io/priority-class"
    kept = values[named(queued, "RayCluster")["msr-dist"]["metadata"]["labels"][label]]
    assert all(values[job["metadata"]["labels"][label]] > kept for job in named(queued, "RayJob").values())


def test_no_two_workers_of_the_multi_node_overlay_share_a_machine():
    cluster = named(objects("overlays/multi-node-gpu"), "RayCluster")["msr-dist"]["spec"]
    template = cluster["workerGroupSpecs"][0]["template"]["spec"]
    (rule,) = template["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert rule["topologyKey"] == "kubernetes.io/hostname"


REMOVED = object()


@dataclass(frozen=True)
class Broken:
    """One field of one object set to something wrong, and what the refusal has to say."""

    folder: str
    kind: str
    name: str
    path: str
    value: Any
    said: str
    by_schema: bool = False


CLUSTER, JOB = "RayCluster", "RayJob"
HEAD = "spec/headGroupSpec/template/spec"
WORKER = "spec/workerGroupSpecs/0/template/spec"
BASE, GPU, KUEUE = "base", "overlays/gpu", "overlays/kueue"
BROKEN = {
    # Schemas
    "a misspelt field": Broken(
        BASE, CLUSTER, "msr-dist", "spec/workerGroupSpecs/0/minReplica", 1, "'minReplica' was unexpected", True
    ),
    "a misspelt field in a pod": Broken(
        BASE,
        JOB,
        "train",
        f"spec/rayClusterSpec/{HEAD[5:]}/containers/0/imagePullPolice",
        "Always",
        "'imagePullPolice' was unexpected",
        True,
    ),
    "a misspelt field in metadata": Broken(BASE, JOB, "train", "metadata/label", {}, "'label' was unexpected", True),
    "a number where ray start wants a string": Broken(
        BASE, CLUSTER, "msr-dist", "spec/headGroupSpec/rayStartParams/num-cpus", 0, "0 is not of type 'string'", True
    ),
    "an unknown way of authentication": Broken(
        BASE, CLUSTER, "msr-dist", "spec/authOptions/mode", "tokens", "'tokens' is not one of", True
    ),
    "an amount that is none": Broken(
        BASE, CLUSTER, "msr-dist", f"{WORKER}/containers/0/resources/limits/memory", "8GB", "'8GB' does not match", True
    ),
    "a worker group without a name": Broken(
        BASE, CLUSTER, "msr-dist", "spec/workerGroupSpecs/0/groupName", REMOVED, "'groupName' is a required", True
    ),
    "an operator that does not exist (CEL)": Broken(
        BASE, JOB, "pipeline", "spec/managedBy", "someone", "the managedBy field value must be either", True
    ),
    "flavors that do not cover the resources (CEL)": Broken(
        KUEUE,
        "ClusterQueue",
        "msr-dist",
        "spec/resourceGroups/0/coveredResources",
        ["cpu"],
        "flavors must have the same number of resources",
        True,
    ),
    "an API version of yesterday": Broken(
        KUEUE, "LocalQueue", "msr-dist", "apiVersion", "kueue.x-k8s.io/v1alpha1", "there is no such kind", True
    ),
    "an unknown field of the monitor": Broken(
        GPU, "PodMonitor", "ray", "spec/podMetricsEndpoints/0/intervall", "15s", "'intervall' was unexpected", True
    ),
    "an unknown field of a core object": Broken(
        GPU, "Deployment", "mlflow", "spec/replica", 1, r"Deployment/mlflow: spec: .*'replica' was unexpected"
    ),
    "a wrong type in a core object": Broken(
        BASE, "PriorityClass", "msr-dist-head", "value", "high", "'high' is not of type 'integer'"
    ),
    # KubeRay's operator
    "too long a name": Broken(BASE, JOB, "train", "metadata/name", "t" * 48, "has 48 characters, and at most 47"),
    "a name that begins with a digit": Broken(BASE, JOB, "train", "metadata/name", "2nd", "is no DNS-1035 label"),
    "more replicas at least than at most": Broken(
        BASE, CLUSTER, "msr-dist", "spec/workerGroupSpecs/0/minReplicas", 9, "minReplicas 9, more than maxReplicas 4"
    ),
    "a time to live without an end": Broken(
        BASE, JOB, "train", "spec/shutdownAfterJobFinishes", False, "ttlSecondsAfterFinished needs shutdownAfterJob"
    ),
    "deletion rules beside the end": Broken(
        BASE,
        JOB,
        "train",
        "spec/deletionStrategy",
        {"deletionRules": [{"policy": "DeleteSelf", "condition": {"jobStatus": "SUCCEEDED", "ttlSeconds": 0}}]},
        "deletionRules and shutdownAfterJobFinishes exclude each other",
    ),
    "a template for a submitter that is a sidecar": Broken(
        BASE, JOB, "train", "spec/submissionMode", "SidecarMode", "SidecarMode has no submitterPodTemplate"
    ),
    "restarts under autoscaler v2": Broken(
        BASE, CLUSTER, "msr-dist", f"{WORKER}/restartPolicy", "Always", "with autoscaler v2 restartPolicy is Never"
    ),
    "cores given twice": Broken(
        BASE, CLUSTER, "msr-dist", "spec/headGroupSpec/resources", {"CPU": "0"}, "both in rayStartParams and in resour"
    ),
    "a token in a Ray that knows none": Broken(
        BASE, CLUSTER, "msr-dist", "spec/rayVersion", "2.51.0", "token authentication needs rayVersion 2.52.0"
    ),
    "a runtime environment that is no YAML": Broken(
        BASE, JOB, "train", "spec/runtimeEnvYAML", "env_vars: {A: [", "runtimeEnvYAML is no YAML map"
    ),
    "another job's cluster beside its own": Broken(
        BASE, JOB, "train", "spec/clusterSelector", {"ray.io/cluster": "msr-dist"}, "rayClusterSpec or clusterSelector"
    ),
    "a feature that is off": Broken(
        BASE, CLUSTER, "msr-dist", "spec/networkPolicy", {"mode": "DenyAll"}, "networkPolicy sits behind a feature gate"
    ),
    # Kueue
    "a queue that is not there": Broken(
        KUEUE, JOB, "train", "metadata/labels/kueue.x-k8s.io~1queue-name", "fast", "there is no LocalQueue 'fast'"
    ),
    "an autoscaler under Kueue": Broken(
        KUEUE, CLUSTER, "msr-dist", "spec/enableInTreeAutoscaling", True, "a queued cluster has no autoscaler"
    ),
    "more GPUs than the queue has": Broken(
        KUEUE, JOB, "train", "spec/rayClusterSpec/workerGroupSpecs/0/replicas", 5, "asks for 5 of nvidia.com/gpu, and"
    ),
    "a queue of a cluster queue that is not there": Broken(
        KUEUE, "LocalQueue", "msr-dist", "spec/clusterQueue", "gpus", "there is no ClusterQueue 'gpus'"
    ),
    "a flavor that is not there": Broken(
        KUEUE, "ResourceFlavor", "msr-dist", "metadata/name", "a100", "there is no ResourceFlavor 'msr-dist'"
    ),
    # Pods
    "a pod that may be root": Broken(
        GPU, "Deployment", "mlflow", "spec/template/spec/securityContext/runAsNonRoot", False, "the pod may be root"
    ),
    "a container with capabilities": Broken(
        BASE, CLUSTER, "msr-dist", f"{HEAD}/containers/0/securityContext/capabilities", REMOVED, "keeps capabilities"
    ),
    "a mount without a volume": Broken(
        BASE, CLUSTER, "msr-dist", f"{WORKER}/volumes/0/name", "sharde", "mounts 'shared', and the pod has no such"
    ),
    "more memory asked for than allowed": Broken(
        BASE, CLUSTER, "msr-dist", f"{WORKER}/containers/0/resources/requests/memory", "9Gi", "more than the limit 8Gi"
    ),
    "shared memory larger than the container": Broken(
        BASE, CLUSTER, "msr-dist", f"{WORKER}/volumes/2/emptyDir/sizeLimit", "80Gi", "/dev/shm has a sizeLimit of 80Gi"
    ),
    "shared memory smaller than Ray's object store": Broken(
        BASE,
        CLUSTER,
        "msr-dist",
        f"{WORKER}/volumes/2/emptyDir/sizeLimit",
        "1Gi",
        "less than the 30 % of 8Gi that Ray takes",
    ),
    "GPU pods that no GPU machine takes": Broken(
        GPU, CLUSTER, "msr-dist", f"{WORKER}/tolerations", REMOVED, "no toleration for nvidia.com/gpu"
    ),
    "more threads than cores": Broken(
        BASE,
        CLUSTER,
        "msr-dist",
        f"{HEAD}/containers/0/env/0/value",
        "4",
        "2 ranks with 4 threads each, and 2 cores",
    ),
    # Names
    "a Ray that is not the image's": Broken(
        BASE, CLUSTER, "msr-dist", "spec/rayVersion", "2.59.0", "rayVersion is 2.59.0, and the image has Ray 2.60.0"
    ),
    "a service account that is not there": Broken(
        BASE, CLUSTER, "msr-dist", f"{HEAD}/serviceAccountName", "ray", "there is no ServiceAccount 'ray'"
    ),
    "a volume claim that is not there": Broken(
        BASE,
        CLUSTER,
        "msr-dist",
        f"{HEAD}/volumes/0/persistentVolumeClaim/claimName",
        "data",
        "there is no PersistentVolumeClaim 'data'",
    ),
    "a priority that is not there": Broken(
        BASE, "PriorityClass", "msr-dist-worker", "metadata/name", "low", "there is no PriorityClass 'msr-dist-worker'"
    ),
    "a secret that nobody makes": Broken(
        BASE,
        "CronJob",
        "nightly",
        "spec/jobTemplate/spec/template/spec/containers/0/env/1/valueFrom/secretKeyRef/name",
        "ray-token",
        "nobody makes the Secret 'ray-token'",
    ),
    "a token in the open": Broken(
        BASE,
        "CronJob",
        "nightly",
        "spec/jobTemplate/spec/template/spec/containers/0/env/1",
        {"name": "RAY_AUTH_TOKEN", "value": "hunter2"},
        "RAY_AUTH_TOKEN stands there in the open",
    ),
    "an image that nobody builds": Broken(
        BASE,
        CLUSTER,
        "msr-dist",
        f"{HEAD}/containers/0/image",
        "msr-dist:latest",
        "the image 'msr-dist:latest' is none",
    ),
    "a service for other pods": Broken(
        GPU, "Service", "mlflow", "spec/selector", {"app.kubernetes.io/name": "ml-flow"}, "takes no pod"
    ),
    "a port that nobody opens": Broken(
        GPU, "PodMonitor", "ray", "spec/podMetricsEndpoints/1/port", "autoscaler", "have no port 'autoscaler'"
    ),
    "a head without its dashboard": Broken(
        BASE,
        CLUSTER,
        "msr-dist",
        f"{HEAD}/containers/0/ports/1",
        {"name": "web", "containerPort": 8265},
        "the head's service would lack the ports {'dashboard': 8265}",
    ),
    "a policy that no pod has asked for": Broken(
        BASE,
        "NetworkPolicy",
        "ray",
        "spec/ingress/1/from/0/podSelector/matchLabels/msr-dist~1submits",
        "yes",
        "takes no pod",
    ),
    "an object of no component": Broken(
        BASE, "ServiceAccount", "msr-dist", "metadata/labels/app.kubernetes.io~1component", REMOVED, "no label app.kub"
    ),
    # Commands
    "a job that is not there": Broken(
        BASE, JOB, "train", "spec/entrypoint", "python jobs/trian.py x.toml", "there is no python jobs/trian.py"
    ),
    "an option that the job does not have": Broken(
        BASE,
        JOB,
        "train",
        "spec/entrypoint",
        "python jobs/train.py jobs/configs/quickstart.toml --worker-count 2",
        r"No such option.*--worker-count",
    ),
    "a configuration that is not there": Broken(
        BASE,
        JOB,
        "train",
        "spec/entrypoint",
        "python jobs/train.py jobs/configs/quick.toml",
        "quick.toml: no such file",
    ),
    "a setting that is none": Broken(
        BASE,
        JOB,
        "train",
        "spec/entrypoint",
        "python jobs/train.py jobs/configs/quickstart.toml model.knd=star",
        "model.knd: unknown key; did you mean 'kind'",
    ),
    "more workers than cores": Broken(
        BASE,
        JOB,
        "train",
        "spec/entrypoint",
        "python jobs/train.py jobs/configs/quickstart.toml --workers 5",
        "--workers 5, and the worker groups begin with 4",
    ),
    "runs on no volume": Broken(
        BASE,
        JOB,
        "train",
        "spec/entrypoint",
        "python jobs/train.py jobs/configs/quickstart.toml runs=/data/runs",
        "runs=/data/runs: no volume is mounted there",
    ),
    "a tracking server that is not there": Broken(
        BASE,
        JOB,
        "train",
        "spec/entrypoint",
        "python jobs/train.py jobs/configs/quickstart.toml tracking.uri=http://mlflow:5000",
        "no Service answers at http://mlflow:5000",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_broken_is_refused_by_its_name(what):
    broken = BROKEN[what]
    if broken.by_schema and ABSENT["condition"]:
        pytest.skip(ABSENT["reason"])
    things = objects(broken.folder)
    changed = named(things, broken.kind)[broken.name]
    _set(changed, broken.path, broken.value)
    by_schema = schema_faults(changed) if CRDS.is_dir() or not is_custom(changed) else []
    faults = by_schema or rule_faults(things)
    assert any(re.search(broken.said, fault) or broken.said in fault for fault in faults), faults


def _set(thing: Object, path: str, value: Any) -> None:
    """As a JSON patch would."""
    *above, last = [part.replace("~1", "/") for part in path.split("/")]
    node: Any = thing
    for part in above:
        node = node[int(part) if isinstance(node, list) else part]
    key = int(last) if isinstance(node, list) else last
    if value is REMOVED:
        del node[key]
    else:
        node[key] = value


@pytest.fixture
def ours(tmp_path):
    """A copy of k8s/ with an overlay of one's own, which is rendered from the text that is given."""
    copy = shutil.copytree(K8S, tmp_path / "k8s")

    def rendered(text: str) -> list[Object]:
        folder = copy / "overlays" / "ours"
        folder.mkdir()
        (folder / "kustomization.yaml").write_text(text)
        return objects(str(folder))

    return rendered


@needs_crds
def test_the_readme_s_overlay_does_what_it_says(ours):
    (text,) = re.findall(r"```yaml\n(.*?)```", (K8S / "README.md").read_text(), re.DOTALL)
    things = ours(text)
    assert [fault for thing in things for fault in schema_faults(thing)] == []
    # All but the images is there: those are in the reader's own registry.
    faults = [fault for fault in rule_faults(things) if "the image 'registry.example.com/" not in fault]
    assert faults == []
    jobs = named(things, "RayJob")
    assert {key: re.findall(r"--workers (\d+) ", f"{job['spec']['entrypoint']} ") for key, job in jobs.items()} == {
        key: ["4"] for key in ("pipeline", "extract", "train")
    }
    groups = [job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0] for job in jobs.values()]
    assert [group["replicas"] for group in groups] == [4, 4, 4]
    images = {container["image"] for pod in pods(things) for container in pod.containers}
    assert images == {"registry.example.com/msr-dist:gpu", "registry.example.com/msr-dist-tracking:3.17.2"}


def test_mlflow_moves_to_postgresql_and_s3(ours):
    things = ours("resources: [../gpu]\ncomponents: [../../components/mlflow-postgres-s3]\n")
    assert [fault for thing in things if not is_custom(thing) for fault in schema_faults(thing)] == []
    assert rule_faults(things) == []
    assert set(named(things, "PersistentVolumeClaim")) == {"shared"}


def test_kustomize_itself_refuses_a_patch_that_hits_nothing(ours):
    with pytest.raises(AssertionError, match="workerGroupSpecs/1"):
        ours(
            "resources: [../gpu]\npatches:\n- target: {kind: RayCluster}\n"
            "  patch: '[{op: replace, path: /spec/workerGroupSpecs/1/replicas, value: 3}]'\n"
        )
