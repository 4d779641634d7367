"""What the CRDs of KubeRay 1.6 allow, as far as the manifests use them, from their reference (ray.io/v1).

Pods are of core Kubernetes and left to its own schemas; a field that is not here is refused, as is one of another type.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=0, strict=True)]
Flag = Annotated[bool, Field(strict=True)]
Text = Annotated[str, Field(strict=True)]
Kubernetes = dict[str, Any]  # an object of core Kubernetes


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Metadata(Strict):
    name: Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=47)]  # KubeRay adds to it
    namespace: Text | None = None
    labels: dict[str, Text] = {}
    annotations: dict[str, Text] = {}


class AuthOptions(Strict):
    mode: Literal["disabled", "token"]
    secretName: Text | None = None


class AutoscalerOptions(Strict):
    version: Literal["v1", "v2"] | None = None
    idleTimeoutSeconds: Count | None = None
    upscalingMode: Literal["Conservative", "Default", "Aggressive"] | None = None
    resources: Kubernetes | None = None
    securityContext: Kubernetes | None = None


class HeadGroupSpec(Strict):
    serviceType: Literal["ClusterIP", "NodePort", "LoadBalancer"] | None = None
    enableIngress: Flag | None = None
    rayStartParams: dict[str, Text]
    template: Kubernetes


class WorkerGroupSpec(Strict):
    groupName: Text
    replicas: Count | None = None
    minReplicas: Count
    maxReplicas: Count
    idleTimeoutSeconds: Count | None = None
    rayStartParams: dict[str, Text]
    template: Kubernetes


class RayClusterSpec(Strict):
    rayVersion: Text
    authOptions: AuthOptions
    enableInTreeAutoscaling: Flag = False
    autoscalerOptions: AutoscalerOptions | None = None
    headGroupSpec: HeadGroupSpec
    workerGroupSpecs: list[WorkerGroupSpec]

    def templates(self) -> list[Kubernetes]:
        return [group.template for group in (self.headGroupSpec, *self.workerGroupSpecs)]


class RayJobSpec(Strict):
    entrypoint: Text
    suspend: Flag = False
    backoffLimit: Count | None = None
    activeDeadlineSeconds: Annotated[int, Field(gt=0, strict=True)]
    shutdownAfterJobFinishes: Flag
    ttlSecondsAfterFinished: Count
    submissionMode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"] = "K8sJobMode"
    submitterPodTemplate: Kubernetes
    rayClusterSpec: RayClusterSpec


class RayCluster(Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayCluster"]
    metadata: Metadata
    spec: RayClusterSpec

    @property
    def cluster(self) -> RayClusterSpec:
        return self.spec

    def templates(self) -> list[Kubernetes]:
        return self.cluster.templates()


class RayJob(Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: RayJobSpec

    @property
    def cluster(self) -> RayClusterSpec:
        return self.spec.rayClusterSpec

    def templates(self) -> list[Kubernetes]:
        return [self.spec.submitterPodTemplate, *self.cluster.templates()]


class Selector(Strict):
    matchLabels: dict[str, Text]


class ResourceFlavor(Strict):
    """Of Kueue, as ClusterQueue and LocalQueue."""

    apiVersion: Literal["kueue.x-k8s.io/v1beta2"]
    kind: Literal["ResourceFlavor"]
    metadata: Metadata


class Quota(Strict):
    name: Text
    nominalQuota: Text


class Flavor(Strict):
    name: Text
    resources: list[Quota]


class ResourceGroup(Strict):
    coveredResources: list[Text]
    flavors: list[Flavor]


class ClusterQueueSpec(Strict):
    namespaceSelector: Selector
    resourceGroups: list[ResourceGroup]


class ClusterQueue(Strict):
    apiVersion: Literal["kueue.x-k8s.io/v1beta2"]
    kind: Literal["ClusterQueue"]
    metadata: Metadata
    spec: ClusterQueueSpec


class LocalQueueSpec(Strict):
    clusterQueue: Text


class LocalQueue(Strict):
    apiVersion: Literal["kueue.x-k8s.io/v1beta2"]
    kind: Literal["LocalQueue"]
    metadata: Metadata
    spec: LocalQueueSpec


class PodMetricsEndpoint(Strict):
    port: Text
    interval: Annotated[str, Field(pattern=r"^\d+s$")]


class PodMonitorSpec(Strict):
    selector: Selector
    podMetricsEndpoints: list[PodMetricsEndpoint]


class PodMonitor(Strict):
    """Of the Prometheus Operator."""

    apiVersion: Literal["monitoring.coreos.com/v1"]
    kind: Literal["PodMonitor"]
    metadata: Metadata
    spec: PodMonitorSpec
