"""The part of a pod that users and profiles may set: Kubernetes' own fields, bounded, with a full schema.

Everything else of a pod is the operator's. Kubernetes' whole pod schema would not fit into what `kubectl apply` can
carry, and a field that accepts anything would turn typing errors into silence.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from opensora_operator.constants import RESERVED_ENV, RESERVED_ENV_PREFIX
from opensora_operator.fields import Bounds, Length, MapKey, MaxItems, Pattern, Quantity, Rule

_DNS_LABEL = "[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
_LABEL_VALUE = "([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?"
_QUALIFIED = "([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"

ObjectName = Annotated[str, Length(1, 253), Pattern("[a-z0-9]([-a-z0-9.]*[a-z0-9])?")]
VolumeName = Annotated[str, Length(1, 63), Pattern(_DNS_LABEL)]
DataKey = Annotated[str, Length(1, 253), Pattern("[-._a-zA-Z0-9]+")]
LabelKey = Annotated[str, Length(1, 317), Pattern(_QUALIFIED)]
LabelValue = Annotated[str, Length(0, 63), Pattern(_LABEL_VALUE)]
MountPath = Annotated[str, Length(1, 1024), Pattern("/[^:\\x00-\\x1f]*")]
FileMode = Annotated[int, Bounds(0, 0o777)]
NumericId = Annotated[int, Bounds(0, 2**31 - 1)]
Weight = Annotated[int, Bounds(1, 100)]

_KEYS_ARE_NAMES = Rule(
    f"self.all(key, key.size() <= 317 && key.matches('^{_QUALIFIED}$'))",
    "keys are names such as app or example.com/app",
)
Labels = Annotated[dict[str, LabelValue], MaxItems(32), _KEYS_ARE_NAMES]
Resources = Annotated[dict[str, Quantity], MaxItems(16), _KEYS_ARE_NAMES]


@dataclass(frozen=True, kw_only=True)
class KeySelector:
    """One key of a ConfigMap or Secret."""

    name: ObjectName
    """Name of the object."""
    key: DataKey
    """Key in its data."""
    optional: bool = False
    """Go on without it where it is missing."""


@dataclass(frozen=True, kw_only=True)
class PodFieldSelector:
    """A field of the pod."""

    field_path: Annotated[str, Length(1, 256)]
    """Path, for example `status.podIP`."""


@dataclass(frozen=True, kw_only=True)
class EnvVarSource:
    """Where the value of a variable comes from; exactly one."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "[has(self.configMapKeyRef), has(self.secretKeyRef), has(self.fieldRef)].filter(given, given).size() == 1",
            "give exactly one of configMapKeyRef, secretKeyRef and fieldRef",
        ),
    )

    config_map_key_ref: KeySelector | None = None
    """A key of a ConfigMap."""
    secret_key_ref: KeySelector | None = None
    """A key of a Secret."""
    field_ref: PodFieldSelector | None = None
    """A field of the pod."""


@dataclass(frozen=True, kw_only=True)
class EnvVar:
    """An environment variable of the trainer."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            f"!(self.name in [{', '.join(repr(name) for name in RESERVED_ENV)}]) "
            f"&& !self.name.startsWith('{RESERVED_ENV_PREFIX}')",
            "this variable is set by the operator: remove it",
            "self.name + ' is set by the operator: remove it'",
        ),
        Rule("!has(self.value) || !has(self.valueFrom)", "give value or valueFrom, not both"),
    )

    name: Annotated[str, Length(1, 253), Pattern("[A-Za-z_][A-Za-z0-9_]*")]
    """Name; those that the operator sets are refused."""
    value: Annotated[str, Length(0, 8192)] | None = None
    """Value. `$(NAME)` stands for another variable."""
    value_from: EnvVarSource | None = None
    """Where the value comes from instead."""


@dataclass(frozen=True, kw_only=True)
class OptionalName:
    """A ConfigMap or Secret."""

    name: ObjectName
    """Name of the object."""
    optional: bool = False
    """Go on without it where it is missing."""


@dataclass(frozen=True, kw_only=True)
class EnvFromSource:
    """All keys of a ConfigMap or Secret as variables. What the operator sets wins over them."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule("has(self.configMapRef) != has(self.secretRef)", "give exactly one of configMapRef and secretRef"),
    )

    prefix: Annotated[str, Length(0, 253), Pattern("([A-Za-z_][A-Za-z0-9_]*)?")] = ""
    """Put before each key."""
    config_map_ref: OptionalName | None = None
    """The ConfigMap."""
    secret_ref: OptionalName | None = None
    """The Secret."""


@dataclass(frozen=True, kw_only=True)
class ResourceRequirements:
    """Resources of the trainer's container."""

    requests: Resources = field(default_factory=dict)
    """What the node must have left."""
    limits: Resources = field(default_factory=dict)
    """What the container may use."""


@dataclass(frozen=True, kw_only=True)
class KeyToPath:
    """Where a key becomes a file."""

    key: DataKey
    """Key."""
    path: Annotated[str, Length(1, 1024)]
    """Path of the file within the volume."""
    mode: FileMode | None = None
    """Permission bits of the file."""


@dataclass(frozen=True, kw_only=True)
class ConfigMapVolume:
    """Files from a ConfigMap."""

    name: ObjectName
    """Name of the ConfigMap."""
    items: Annotated[tuple[KeyToPath, ...], MaxItems(64)] = ()
    """Which keys become files; all unless given."""
    default_mode: FileMode | None = None
    """Permission bits of the files."""
    optional: bool = False
    """Go on without it where it is missing."""


@dataclass(frozen=True, kw_only=True)
class SecretVolume:
    """Files from a Secret."""

    secret_name: ObjectName
    """Name of the Secret."""
    items: Annotated[tuple[KeyToPath, ...], MaxItems(64)] = ()
    """Which keys become files; all unless given."""
    default_mode: FileMode | None = None
    """Permission bits of the files."""
    optional: bool = False
    """Go on without it where it is missing."""


@dataclass(frozen=True, kw_only=True)
class EmptyDirVolume:
    """A folder that lives as long as the pod."""

    medium: Literal["", "Memory"] = ""
    """`Memory` keeps it in memory, which counts against the container's limit."""
    size_limit: Quantity | None = None
    """The pod is evicted when it grows beyond this."""


@dataclass(frozen=True, kw_only=True)
class HostPathVolume:
    """A folder or file of the node."""

    path: MountPath
    """Path on the node."""
    type: Literal[
        "", "DirectoryOrCreate", "Directory", "FileOrCreate", "File", "Socket", "CharDevice", "BlockDevice"
    ] = ""
    """What has to be there; anything unless given."""


@dataclass(frozen=True, kw_only=True)
class ClaimVolume:
    """A PersistentVolumeClaim."""

    claim_name: ObjectName
    """Name of the claim."""
    read_only: bool = False
    """Mount it read-only."""


@dataclass(frozen=True, kw_only=True)
class NFSVolume:
    """A folder of an NFS server."""

    server: Annotated[str, Length(1, 253)]
    """Host name or address."""
    path: MountPath
    """Path that the server exports."""
    read_only: bool = False
    """Mount it read-only."""


@dataclass(frozen=True, kw_only=True)
class LocalReference:
    """An object of the same namespace."""

    name: ObjectName
    """Name of the object."""


@dataclass(frozen=True, kw_only=True)
class CSIVolume:
    """A volume that a CSI driver makes for the pod."""

    driver: ObjectName
    """Name of the driver."""
    fs_type: Annotated[str, Length(1, 63)] | None = None
    """File system; the driver's choice unless given."""
    read_only: bool = False
    """Mount it read-only."""
    volume_attributes: Annotated[dict[str, Annotated[str, Length(0, 1024)]], MaxItems(32)] = field(default_factory=dict)
    """Settings that the driver understands."""
    node_publish_secret_ref: LocalReference | None = None
    """Secret that the driver is given."""


_SOURCES = ("configMap", "secret", "emptyDir", "hostPath", "persistentVolumeClaim", "nfs", "csi")


@dataclass(frozen=True, kw_only=True)
class Volume:
    """A volume, from exactly one source."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            f"[{', '.join(f'has(self.{source})' for source in _SOURCES)}].filter(given, given).size() == 1",
            f"give exactly one of {', '.join(_SOURCES[:-1])} and {_SOURCES[-1]}",
        ),
        Rule(
            "!self.name.startsWith('opensora-')",
            "names that begin with opensora- are the operator's: choose another",
        ),
    )

    name: VolumeName
    """Name that mounts refer to."""
    config_map: ConfigMapVolume | None = None
    """Files from a ConfigMap."""
    secret: SecretVolume | None = None
    """Files from a Secret."""
    empty_dir: EmptyDirVolume | None = None
    """A folder that lives as long as the pod."""
    host_path: HostPathVolume | None = None
    """A folder or file of the node."""
    persistent_volume_claim: ClaimVolume | None = None
    """A PersistentVolumeClaim."""
    nfs: NFSVolume | None = None
    """A folder of an NFS server."""
    csi: CSIVolume | None = None
    """A volume that a CSI driver makes for the pod."""


@dataclass(frozen=True, kw_only=True)
class VolumeMount:
    """Where a volume appears in the trainer's container."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!self.mountPath.matches('^/+(tmp|dev/+shm|(etc|var/+run)/+opensora(/.*)?)/*$')",
            "the operator mounts something here: choose another path",
            "self.mountPath + ' is mounted by the operator: choose another path'",
        ),
    )

    name: VolumeName
    """Name of the volume."""
    mount_path: MountPath
    """Path in the container."""
    sub_path: Annotated[str, Length(0, 1024)] = ""
    """Path within the volume; its root unless given."""
    read_only: bool = False
    """Mount it read-only."""
    mount_propagation: Literal["None", "HostToContainer"] | None = None
    """Whether mounts that the node makes later are seen."""


@dataclass(frozen=True, kw_only=True)
class Toleration:
    """A taint of nodes that the pods accept."""

    key: Annotated[str, Length(0, 317)] = ""
    """Key of the taint; all with `operator: Exists` unless given."""
    operator: Literal["Exists", "Equal"] = "Equal"
    """How the value is compared."""
    value: LabelValue = ""
    """Value of the taint, with `Equal`."""
    effect: Literal["", "NoSchedule", "PreferNoSchedule", "NoExecute"] = ""
    """Effect of the taint; all unless given."""
    toleration_seconds: Annotated[int, Bounds(0, 604_800)] | None = None
    """With `NoExecute`: how long the pods stay; for ever unless given."""


@dataclass(frozen=True, kw_only=True)
class NodeRequirement:
    """A condition on a label or field of nodes."""

    key: LabelKey
    """Name of the label."""
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"]
    """How the values are compared."""
    values: Annotated[tuple[LabelValue, ...], MaxItems(64)] = ()
    """Values; none with `Exists` and `DoesNotExist`, one whole number with `Gt` and `Lt`."""


@dataclass(frozen=True, kw_only=True)
class NodeSelectorTerm:
    """Conditions of which all hold."""

    match_expressions: Annotated[tuple[NodeRequirement, ...], MaxItems(16)] = ()
    """Conditions on labels."""
    match_fields: Annotated[tuple[NodeRequirement, ...], MaxItems(4)] = ()
    """Conditions on fields: `metadata.name`."""


@dataclass(frozen=True, kw_only=True)
class NodeSelector:
    """Terms of which one holds."""

    node_selector_terms: Annotated[tuple[NodeSelectorTerm, ...], MaxItems(16)]
    """The terms."""


@dataclass(frozen=True, kw_only=True)
class PreferredNodeTerm:
    """A preference among nodes."""

    weight: Weight
    """How much it counts."""
    preference: NodeSelectorTerm
    """The nodes."""


@dataclass(frozen=True, kw_only=True)
class NodeAffinity:
    """Which nodes pods go to."""

    required_during_scheduling_ignored_during_execution: NodeSelector | None = None
    """Pods go nowhere else."""
    preferred_during_scheduling_ignored_during_execution: Annotated[tuple[PreferredNodeTerm, ...], MaxItems(16)] = ()
    """Pods go there if they can."""


@dataclass(frozen=True, kw_only=True)
class LabelRequirement:
    """A condition on a label."""

    key: LabelKey
    """Name of the label."""
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist"]
    """How the values are compared."""
    values: Annotated[tuple[LabelValue, ...], MaxItems(64)] = ()
    """Values; none with `Exists` and `DoesNotExist`."""


@dataclass(frozen=True, kw_only=True)
class LabelSelector:
    """Objects by their labels; an empty selector takes all."""

    match_labels: Labels = field(default_factory=dict)
    """Labels with these values."""
    match_expressions: Annotated[tuple[LabelRequirement, ...], MaxItems(16)] = ()
    """Conditions on labels."""


@dataclass(frozen=True, kw_only=True)
class PodAffinityTerm:
    """Pods, and how near to them."""

    label_selector: LabelSelector | None = None
    """Labels of the pods."""
    namespaces: Annotated[tuple[ObjectName, ...], MaxItems(16)] = ()
    """Namespaces of the pods; their own unless given."""
    namespace_selector: LabelSelector | None = None
    """Labels of the namespaces of the pods."""
    topology_key: LabelKey
    """Label of nodes: two nodes with the same value are the same place."""


@dataclass(frozen=True, kw_only=True)
class WeightedPodAffinityTerm:
    """A preference for, or against, being near pods."""

    weight: Weight
    """How much it counts."""
    pod_affinity_term: PodAffinityTerm
    """The pods."""


@dataclass(frozen=True, kw_only=True)
class PodAffinity:
    """Which pods to be near to, or away from."""

    required_during_scheduling_ignored_during_execution: Annotated[tuple[PodAffinityTerm, ...], MaxItems(8)] = ()
    """Always."""
    preferred_during_scheduling_ignored_during_execution: Annotated[
        tuple[WeightedPodAffinityTerm, ...], MaxItems(8)
    ] = ()
    """If possible."""


@dataclass(frozen=True, kw_only=True)
class Affinity:
    """Where pods go, by nodes and by other pods."""

    node_affinity: NodeAffinity | None = None
    """By nodes."""
    pod_affinity: PodAffinity | None = None
    """Near to pods."""
    pod_anti_affinity: PodAffinity | None = None
    """Away from pods."""


@dataclass(frozen=True, kw_only=True)
class SeccompProfile:
    """Which system calls are allowed."""

    type: Literal["RuntimeDefault", "Localhost", "Unconfined"]
    """Where the profile comes from."""
    localhost_profile: Annotated[str, Length(1, 1024)] | None = None
    """Path of the profile on the node, with `Localhost`."""


@dataclass(frozen=True, kw_only=True)
class PodSecurityContext:
    """Who the processes of the pod are."""

    run_as_user: NumericId | None = None
    """User id; 65532 unless given."""
    run_as_group: NumericId | None = None
    """Group id."""
    run_as_non_root: bool | None = None
    """Refuse to run as root; true unless given."""
    fs_group: NumericId | None = None
    """Group that owns the volumes."""
    fs_group_change_policy: Literal["OnRootMismatch", "Always"] | None = None
    """When the owner of the files in volumes is set."""
    supplemental_groups: Annotated[tuple[NumericId, ...], MaxItems(16)] = ()
    """Further groups."""
    seccomp_profile: SeccompProfile | None = None
    """Allowed system calls; `RuntimeDefault` unless given."""


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """Rights of the superuser, one by one."""

    add: Annotated[tuple[Annotated[str, Length(1, 32), Pattern("[A-Z_]+")], ...], MaxItems(8)] = ()
    """Rights to have, for example `IPC_LOCK` for RDMA."""


@dataclass(frozen=True, kw_only=True)
class ContainerSecurityContext:
    """What the trainer's container may do beyond the restricted defaults."""

    capabilities: Capabilities | None = None
    """Rights of the superuser; all are dropped but those added here."""
    read_only_root_filesystem: bool | None = None
    """Whether the image's files cannot be changed; they can unless given."""


@dataclass(frozen=True, kw_only=True)
class PodTemplate:
    """What is added to the pods. A run's lists are merged with its profile's, item by item where items have names."""

    labels: Labels = field(default_factory=dict)
    """Labels of the pods; the operator's own win."""
    annotations: Annotated[dict[str, Annotated[str, Length(0, 4096)]], MaxItems(32), _KEYS_ARE_NAMES] = field(
        default_factory=dict
    )
    """Annotations of the pods."""
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] | None = None
    """When the image is pulled; Kubernetes' choice unless given."""
    image_pull_secrets: Annotated[tuple[LocalReference, ...], MaxItems(16), MapKey("name")] = ()
    """Secrets for pulling the image."""
    service_account_name: ObjectName | None = None
    """Service account of the pods. No token of it is mounted."""
    env: Annotated[tuple[EnvVar, ...], MaxItems(128), MapKey("name")] = ()
    """Environment variables of the trainer."""
    env_from: Annotated[tuple[EnvFromSource, ...], MaxItems(16)] = ()
    """ConfigMaps and Secrets whose keys become variables."""
    resources: ResourceRequirements = field(default_factory=ResourceRequirements)
    """Resources of the trainer."""
    volumes: Annotated[tuple[Volume, ...], MaxItems(32), MapKey("name")] = ()
    """Volumes of the pods."""
    volume_mounts: Annotated[tuple[VolumeMount, ...], MaxItems(32), MapKey("mountPath")] = ()
    """Where they appear in the trainer's container."""
    node_selector: Labels = field(default_factory=dict)
    """Labels that nodes must have."""
    tolerations: Annotated[tuple[Toleration, ...], MaxItems(32)] = ()
    """Taints that the pods accept."""
    affinity: Affinity | None = None
    """Where pods go, by nodes and by other pods; a run's replaces its profile's."""
    security_context: PodSecurityContext | None = None
    """Who the processes of the pod are."""
    container_security_context: ContainerSecurityContext | None = None
    """What the trainer's container may do."""
    host_network: bool | None = None
    """Use the node's network, for RDMA without a device plugin."""
    runtime_class_name: ObjectName | None = None
    """Runtime class, for example `nvidia`."""
    scheduler_name: ObjectName | None = None
    """Scheduler; the cluster's own unless given."""
