"""What is in cluster/ without a cluster: schemas, entry points, GPUs, versions, security, and that faults are seen.

Every check takes the manifest as parsed, so that the last test can break one and see it refused.
"""

import copy
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from kuberay import ClusterQueue, LocalQueue, PodMonitor, RayCluster, RayJob, ResourceFlavor
from ray.autoscaler._private.util import prepare_config, validate_config

from mrd_ray.cli.main import LINE
from mrd_ray.config import ScoreConfig, UnlearnConfig
from mrd_ray.errors import UserError
from mrd_ray.runs.gauges import ENDED, GAUGES

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
IN_IMAGE = "/opt/mrd_ray/"  # WORKDIR of the Dockerfile
PIN = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
VERSION = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
IMAGE = f"registry.example.com/mrd-ray:{VERSION}-ray{PIN}"
COUNTERS = {ENDED, "unlearning_steps_total", "unlearning_tokens_total"}
METRICS = {f"mrd_ray_{name}" for name in GAUGES.keys() | COUNTERS}  # what a job gives to Ray, which puts ray_ before


def load(name: str) -> Any:
    """The document of a file, a list if it has several."""
    documents = list(yaml.safe_load_all((CLUSTER / name).read_text()))
    return documents if len(documents) > 1 else documents[0]


def parse(entrypoint: str) -> ScoreConfig | UnlearnConfig:
    """The settings of `python jobs/COMMAND.py FLAGS`, by the real command line."""
    python, job, *flags = shlex.split(entrypoint.replace(IN_IMAGE, f"{ROOT}/"))
    assert python == "python"
    assert (ROOT / job).is_file()
    return LINE.settings([Path(job).stem, *flags])


def per_process(config: ScoreConfig | UnlearnConfig) -> tuple[int, float, float]:
    """How many actors or workers, and CPUs and GPUs of each; all must be set where nodes come only when asked for."""
    if isinstance(config, ScoreConfig):
        return config.ray.actors, config.ray.cpus_per_process, config.ray.gpus_per_actor
    return config.ray.workers, config.ray.cpus_per_process, config.ray.gpus_per_worker


def check_room(entrypoint: str, nodes: int, cpus: float, gpus: int) -> None:
    """The nodes hold what the job asks for at most, whole GPUs are used, and CPUs are to spare for recovery."""
    processes, cpus_each, gpus_each = per_process(parse(entrypoint))
    assert processes, "no number of actors or workers: it would be that of the GPUs there are, which are none yet"
    assert gpus_each
    assert gpus % gpus_each == 0, f"{gpus} GPUs for processes of {gpus_each}"
    each = int(gpus // gpus_each)
    assert cpus > each * cpus_each, f"{cpus} CPUs for {each} processes of {cpus_each}"
    assert nodes * each >= processes, f"{nodes} nodes of {each} for {processes} processes"


# autoscaler files


def check_autoscaler(config: dict[str, Any]) -> None:
    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    docker = prepared["docker"]
    assert docker["image"] == IMAGE
    assert {"--env RAY_AUTH_MODE=token", "--cap-drop ALL"} <= set(docker["run_options"])
    assert not any(re.search(r"--user|--privileged|RAY_AUTH_TOKEN", option) for option in docker["run_options"])
    assert prepared["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}
    head, worker = (" ".join(prepared[f"{kind}_start_ray_commands"]) for kind in ("head", "worker"))
    assert "--dashboard-host=127.0.0.1 " in head
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in head
    assert "--metrics-export-port=8080" in head
    assert "--metrics-export-port=8080" in worker
    if prepared["provider"]["type"] == "local":
        assert "--num-cpus=0 --num-gpus=0" in head
        return
    assert prepared["provider"]["use_internal_ips"] is True
    assert not prepared["provider"].get("use_external_head_ip")
    assert prepared["auth"]["ssh_proxy_use_node_id"]
    assert re.search("^(aws ssm start-session|gcloud compute start-iap-tunnel) ", prepared["auth"]["ssh_proxy_command"])
    types = prepared["available_node_types"]
    for kind in types.values():
        check_network(prepared["provider"]["type"], kind["node_config"])
    name = prepared["head_node_type"]
    assert (types[name]["resources"], types[name]["max_workers"]) == ({"CPU": 0, "GPU": 0}, 0)
    for workers in (workers for other, workers in types.items() if other != name):
        assert workers["min_workers"] == 0
        assert re.search("'(MarketType|provisioningModel)': '(spot|SPOT)'", str(workers["node_config"]))
        for line in entrypoints_of_readme():
            check_room(line, workers["max_workers"], workers["resources"]["CPU"], workers["resources"]["GPU"])
        assert workers["max_workers"] <= prepared["max_workers"]


def check_network(provider: str, node: dict[str, Any]) -> None:
    """What is named is not made by Ray, whose own group and interfaces are open to the internet."""
    if provider == "aws":
        assert node["SecurityGroupIds"]
        assert node["SubnetIds"]
        assert "NetworkInterfaces" not in node
        assert ("IamInstanceProfile" in node) == ("InstanceMarketOptions" not in node)  # the head's, not the workers'
    else:
        assert node["networkInterfaces"]
        assert not any("accessConfigs" in interface for interface in node["networkInterfaces"])
        assert node["tags"]["items"]


def entrypoints_of_readme() -> list[str]:
    text = (CLUSTER / "README.md").read_text().replace("\\\n", " ")
    return [line.strip() for line in re.findall(r"-- (python jobs/.+)", text)]


# KubeRay


def validate(resource: dict[str, Any]) -> None:
    kubernetes_validate.validate(resource, "1.37", strict=True)


def pods(manifest: RayCluster | RayJob) -> Iterator[dict[str, Any]]:
    for template in manifest.templates():
        assert set(template) == {"metadata", "spec"}
        yield {"apiVersion": "v1", "kind": "Pod", **template}


def check_kuberay(document: dict[str, Any]) -> None:
    manifest = {"RayCluster": RayCluster, "RayJob": RayJob}[document["kind"]].model_validate(document)
    cluster = manifest.cluster
    assert cluster.rayVersion == PIN
    assert cluster.authOptions.mode == "token"
    assert cluster.headGroupSpec.serviceType == "ClusterIP"
    assert not cluster.headGroupSpec.enableIngress
    assert cluster.headGroupSpec.rayStartParams == {"num-cpus": "0", "num-gpus": "0"}
    for pod in pods(manifest):
        validate(pod)
        check_pod(pod)
    if (autoscaler := cluster.autoscalerOptions) is not None:
        check_container({"image": IMAGE, **autoscaler.model_dump(exclude_none=True)})
    if isinstance(manifest, RayJob):
        check_job(manifest)


def check_pod(pod: dict[str, Any]) -> None:
    assert pod["metadata"]["labels"]["app.kubernetes.io/part-of"] == "mrd-ray"  # or no network policy holds
    security = pod["spec"]["securityContext"]
    assert security["runAsNonRoot"]
    assert security["runAsUser"] > 0
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in pod["spec"]["containers"]:
        check_container(container)


def check_container(container: dict[str, Any]) -> None:
    assert container["image"] == IMAGE
    assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert container["resources"]["requests"] == container["resources"]["limits"]
    assert {"cpu", "memory"} <= set(container["resources"]["limits"])
    for variable in container.get("env", []):
        secret = re.search("TOKEN|KEY|SECRET|PASSWORD", variable["name"])
        assert not secret or set(variable.get("valueFrom", {})) == {"secretKeyRef"}, variable["name"]


def check_job(manifest: RayJob) -> None:
    assert manifest.spec.shutdownAfterJobFinishes
    (group,) = manifest.cluster.workerGroupSpecs
    elastic = manifest.cluster.enableInTreeAutoscaling
    queue = manifest.metadata.labels.get("kueue.x-k8s.io/queue-name")
    assert manifest.spec.suspend == (queue is not None)  # Kueue's to end
    gang = queue is not None or manifest.metadata.labels.get("ray.io/scheduler-name") == "volcano"
    assert elastic != gang  # a gang is of fixed size
    if elastic:
        assert group.minReplicas == 0
    else:
        assert group.replicas == group.minReplicas == group.maxReplicas
    limits = group.template["spec"]["containers"][0]["resources"]["limits"]
    check_room(manifest.spec.entrypoint, group.maxReplicas, float(limits["cpu"]), int(limits["nvidia.com/gpu"]))
    config = parse(manifest.spec.entrypoint)
    mounts = {mount["mountPath"] for mount in group.template["spec"]["containers"][0]["volumeMounts"]}
    assert any(config.run.dir.startswith(f"{mount}/") for mount in mounts)


# Kueue


def check_queue(documents: list[dict[str, Any]]) -> None:
    """The job of the same folder is in the queue, and all of its pods together have room."""
    flavor, queue, local = (
        kind.model_validate(document)
        for kind, document in zip((ResourceFlavor, ClusterQueue, LocalQueue), documents, strict=True)
    )
    job = RayJob.model_validate(load("kuberay/unlearn_kueue.yaml"))
    assert job.metadata.labels["kueue.x-k8s.io/queue-name"] == local.metadata.name
    assert local.spec.clusterQueue == queue.metadata.name
    assert queue.spec.namespaceSelector.matchLabels == {"kubernetes.io/metadata.name": local.metadata.namespace}
    (group,) = queue.spec.resourceGroups
    (only,) = group.flavors
    assert only.name == flavor.metadata.name
    quota = {one.name: quantity(one.nominalQuota) for one in only.resources}
    assert list(quota) == group.coveredResources
    workers = [(one.template, one.replicas) for one in job.cluster.workerGroupSpecs]
    wanted = dict.fromkeys(quota, 0.0)
    for template, count in [(job.spec.submitterPodTemplate, 1), (job.cluster.headGroupSpec.template, 1), *workers]:
        for container in template["spec"]["containers"]:
            for name, value in container["resources"]["requests"].items():
                wanted[name] += count * quantity(value)
    assert wanted == quota


def quantity(text: str) -> float:
    return float(text.removesuffix("Gi")) * (2**30 if text.endswith("Gi") else 1)


# monitoring


def check_metrics(expression: str) -> None:
    names = set(re.findall(r"\bray_\w+", expression))
    assert names, expression
    assert names <= {f"ray_{name}" for name in METRICS}, names


def expressions_of_grafana() -> list[str]:
    dashboard = json.loads((CLUSTER / "monitoring" / "grafana.json").read_text())
    queries = [v["query"] for v in dashboard["templating"]["list"] if v["type"] == "query"]
    return queries + [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


AUTOSCALER = ["aws.yaml", "gcp.yaml", "on_premise.yaml"]
KUBERAY = [f"kuberay/{name}.yaml" for name in ("score", "unlearn", "unlearn_kueue", "interactive")]
CHECKS: dict[str, Callable[[Any], None]] = {
    **dict.fromkeys(AUTOSCALER, check_autoscaler),
    **dict.fromkeys(KUBERAY, check_kuberay),
    "kuberay/kueue.yaml": check_queue,
    "kuberay/network_policy.yaml": validate,
    "kuberay/storage.yaml": validate,
    "monitoring/pod_monitor.yaml": PodMonitor.model_validate,
}


@pytest.mark.parametrize("name", CHECKS)
def test_manifest(name):
    CHECKS[name](load(name))


def test_no_manifest_is_left_out():
    others = {"monitoring/prometheus.yaml", "monitoring/alerts.yaml", "runtime_env.yaml"}
    assert {str(file.relative_to(CLUSTER)) for file in CLUSTER.rglob("*.yaml")} == set(CHECKS) | others


def test_readme_runs_both_jobs():
    assert {Path(shlex.split(line)[1]).stem for line in entrypoints_of_readme()} == {"score", "unlearn"}


def test_network_policy_shuts_all_else():
    spec = load("kuberay/network_policy.yaml")["spec"]
    assert spec["podSelector"] == {"matchLabels": {"app.kubernetes.io/part-of": "mrd-ray"}}
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    assert all(rule["from"] for rule in spec["ingress"])
    assert all(rule["to"] for rule in spec["egress"])


def test_claim_is_the_one_that_pods_mount():
    claims = {
        volume["persistentVolumeClaim"]["claimName"]
        for name in KUBERAY
        for template in {"RayCluster": RayCluster, "RayJob": RayJob}[load(name)["kind"]](**load(name)).templates()
        for volume in template["spec"].get("volumes", [])
    }
    assert claims == {load("kuberay/storage.yaml")["metadata"]["name"]}


def test_monitoring():
    for expression in expressions_of_grafana():
        check_metrics(expression)
    shown = " ".join(expressions_of_grafana())
    assert all(f"ray_{name}" in shown for name in METRICS)
    (group,) = load("monitoring/alerts.yaml")["groups"]
    for rule in group["rules"]:
        check_metrics(rule["expr"])
    assert load("monitoring/prometheus.yaml")["rule_files"] == ["alerts.yaml"]


def test_dockerfile():
    linted = subprocess.run(
        [Path(sys.executable).with_name("hadolint"), "--format", "json", CLUSTER / "Dockerfile"],
        capture_output=True,
        text=True,
    )
    assert json.loads(linted.stdout) == []
    lines = (CLUSTER / "Dockerfile").read_text().splitlines()
    assert [line.split()[1] for line in lines if line.startswith("USER")] == ["1000"]
    kept = {line[1:] for line in (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"}
    copied = {word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]}
    assert kept == copied
    assert all((ROOT / name).exists() for name in copied)


def test_every_image_is_the_one_of_this_version():
    files = [file for file in CLUSTER.rglob("*") if file.suffix != ".dockerignore" and file.is_file()]
    tags = {tag for file in files for tag in re.findall(r"/mrd-ray:(\S+)", file.read_text())}
    assert tags == {IMAGE.split(":")[1]}


def test_no_secrets():
    secret = r"(?i)(hf_[a-z0-9]{20}|AKIA[0-9A-Z]{16}|-----BEGIN|(token|password|secret)[\"']?\s*[:=]\s*[\"']?[\w-]{16})"
    for file in (file for file in CLUSTER.rglob("*") if file.is_file()):
        assert re.search(secret, file.read_text()) is None, file


def change(document: Any, path: str, value: Any) -> Any:
    """The document with what is at the dotted path replaced."""
    broken = json.loads(json.dumps(document))  # without YAML's aliases
    *parents, last = (int(key) if key.isdigit() else key for key in path.split("/"))
    at = broken
    for key in parents:
        at = at[key]
    at[last] = value
    return broken


JOB = "spec/rayClusterSpec"
WORKER = f"{JOB}/workerGroupSpecs/0"
POD = f"{WORKER}/template/spec"


@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        ("aws.yaml", "idle_timeout_minute", 5),
        ("aws.yaml", "available_node_types/worker/resources/GPU", 0),
        ("aws.yaml", "available_node_types/worker/max_workers", 2),
        ("aws.yaml", "provider/use_internal_ips", False),
        ("aws.yaml", "available_node_types/head/node_config/SecurityGroupIds", []),
        ("aws.yaml", "available_node_types/worker/node_config/IamInstanceProfile", {"Name": "mrd-ray-head"}),
        ("gcp.yaml", "provider/use_internal_ips", False),
        ("gcp.yaml", "available_node_types/worker/node_config/networkInterfaces/0/accessConfigs", [{}]),
        ("gcp.yaml", "available_node_types/worker/min_workers", 1),
        ("gcp.yaml", "available_node_types/head/resources/CPU", 4),
        ("gcp.yaml", "docker/run_options/0", "--env RAY_AUTH_MODE=disabled"),
        ("on_premise.yaml", "docker/image", "registry.example.com/mrd-ray:latest"),
        ("on_premise.yaml", "head_start_ray_commands/1", "ray start --head --dashboard-host=0.0.0.0"),
        ("kuberay/score.yaml", "spec/shutdownAfterJobFinish", True),
        ("kuberay/score.yaml", "spec/ttlSecondsAfterFinished", "600"),
        ("kuberay/score.yaml", "spec/entrypoint", "python /opt/mrd_ray/jobs/score.py --run.dirr /mnt/shared/r"),
        ("kuberay/score.yaml", f"{JOB}/rayVersion", "2.59.0"),
        ("kuberay/score.yaml", f"{JOB}/authOptions", {"mode": "disabled"}),
        ("kuberay/score.yaml", f"{JOB}/headGroupSpec/serviceType", "LoadBalancer"),
        ("kuberay/score.yaml", f"{WORKER}/maxReplicas", 7),
        ("kuberay/score.yaml", f"{POD}/nodeSelectors", {}),
        ("kuberay/score.yaml", f"{POD}/containers/0/securityContext", {}),
        ("kuberay/score.yaml", f"{POD}/containers/0/env/0", {"name": "HF_TOKEN", "value": "x"}),
        ("kuberay/unlearn.yaml", f"{WORKER}/minReplicas", 2),
        ("kuberay/unlearn.yaml", f"{POD}/containers/0/resources/limits/cpu", "4"),
        ("kuberay/unlearn.yaml", "metadata/labels", {}),
        ("kuberay/unlearn_kueue.yaml", "metadata/labels", {}),
        ("kuberay/unlearn_kueue.yaml", "spec/suspend", False),
        ("kuberay/unlearn_kueue.yaml", f"{JOB}/enableInTreeAutoscaling", True),
        ("kuberay/kueue.yaml", "0/metadata/name", "gpus"),
        ("kuberay/kueue.yaml", "1/spec/resourceGroups/0/flavors/0/resources/2/nominalQuota", "3"),
        ("kuberay/kueue.yaml", "1/spec/resourceGroups/0/coveredResources", ["cpu", "memory"]),
        ("kuberay/kueue.yaml", "2/spec/clusterQueue", "default"),
        ("kuberay/interactive.yaml", "spec/headGroupSpec/template/spec/securityContext/runAsNonRoot", False),
        ("kuberay/network_policy.yaml", "spec/egresses", []),
        ("kuberay/storage.yaml", "spec/accessModes", "ReadWriteMany"),
        ("monitoring/pod_monitor.yaml", "spec/podMetricsEndpoints/0/portName", "metrics"),
    ],
)
def test_broken_manifest_is_refused(name, path, value):
    with pytest.raises((AssertionError, ValueError, jsonschema.ValidationError, UserError)):
        CHECKS[name](change(load(name), path, value))


def test_unknown_metric_is_refused():
    with pytest.raises(AssertionError):
        check_metrics("rate(ray_mrd_ray_units_finished[5m])")


def test_kueue_differs_from_volcano_in_who_starts_it_only():
    volcano, kueue = load("kuberay/unlearn.yaml"), load("kuberay/unlearn_kueue.yaml")
    assert kueue["spec"].pop("suspend")
    assert volcano["spec"] == kueue["spec"]
