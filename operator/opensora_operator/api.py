"""The API: spec and status of every kind. The only place where its fields, defaults, bounds and texts are written.

`wire.py` converts these classes from and to what the API server stores; `crd.py` makes the schema and the reference
page from them. A default stands here only if it holds for every cluster. What a profile may set is None here: the
planner takes the run's value, then the profile's, then its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from opensora_operator.constants import GROUP
from opensora_operator.fields import (
    Bounds,
    Immutable,
    Length,
    MapKey,
    MaxItems,
    Pattern,
    Quantity,
    Rule,
    Time,
)
from opensora_operator.pod_template import (
    DataKey,
    LabelKey,
    LocalReference,
    MountPath,
    ObjectName,
    PodTemplate,
)

_NEW_RUN = "start a new run to change what is trained"
_NEW_JOB = "make a new object to change what is done"

Count = Annotated[int, Bounds(0, 2**53)]
Identifier = Annotated[str, Length(1, 64), Pattern("[A-Za-z0-9]([-_.A-Za-z0-9]*[A-Za-z0-9])?")]
Image = Annotated[
    str,
    Length(1, 512),
    Pattern(
        "[a-zA-Z0-9][-._a-zA-Z0-9]*(:[0-9]+)?(/[-._a-z0-9]+)*(:[-._A-Za-z0-9]{1,128})?(@sha256:[0-9a-f]{64})?",
        "an image such as registry.example.com/team/opensora:1.4.0",
    ),
]
Uri = Annotated[
    str,
    Length(1, 1024),
    Pattern(
        "s3://[a-z0-9][-.a-z0-9]{1,61}[a-z0-9](/[^\\x00-\\x1f\\x7f]*)?|[^:\\x00-\\x1f\\x7f]+",
        "s3://bucket/path, or a path in the container",
    ),
]
ConfigFile = Annotated[str, Length(1, 1024), Pattern("[^:\\x00-\\x1f\\x7f]+\\.(py|ya?ml|json)")]
Override = Annotated[str, Length(3, 1024), Pattern("[A-Za-z_][^=\\s]*=.*")]
Prompt = Annotated[str, Length(1, 2048), Pattern("[^\\x00-\\x08\\x0a-\\x1f\\x7f]*")]
Message = Annotated[str, Length(0, 4096)]
Reason = Annotated[str, Length(1, 64), Pattern("[A-Z][A-Za-z]*")]
NodeName = ObjectName
Decimal = Annotated[str, Length(1, 32), Pattern("-?[0-9]+(\\.[0-9]+)?(e[-+]?[0-9]+)?")]
ProcsPerNode = Annotated[int | Literal["auto"], Bounds(1, 64)]


# ------------------------------------------------------------------------------------------- what several kinds share


@dataclass(frozen=True, kw_only=True)
class ProfileRef:
    """A profile."""

    kind: Literal["ClusterTrainingProfile", "TrainingProfile"] = "ClusterTrainingProfile"
    """Of the cluster, or of the namespace."""
    name: ObjectName
    """Name of the profile."""


@dataclass(frozen=True, kw_only=True)
class ConfigMapRef:
    """A key of a ConfigMap of the same namespace."""

    config_map: ObjectName
    """Name of the ConfigMap."""
    key: DataKey
    """Key in its data."""


@dataclass(frozen=True, kw_only=True)
class ConfigSource:
    """The config of the program: one source, and changes to it."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "[has(self.inline), has(self.ref), has(self.file)].filter(given, given).size() == 1",
            "give exactly one config source: inline, ref or file",
        ),
    )

    inline: Annotated[str, Length(1, 131_072)] | None = None
    """The config itself, as YAML."""
    ref: ConfigMapRef | None = None
    """A key of a ConfigMap that holds the config as YAML. It is read once, when the run starts."""
    file: ConfigFile | None = None
    """A file inside the image: `.py`, `.yaml` or `.json`."""
    overrides: Annotated[tuple[Override, ...], MaxItems(64)] = ()
    """Changes such as `optim.lr=1e-4`, applied in this order after everything else."""


@dataclass(frozen=True, kw_only=True)
class Parallelism:
    """How the model is spread over ranks; the config's values unless given."""

    sequence: Annotated[int, Bounds(1, 64)] | None = None
    """Ranks that share one sample (sequence parallelism)."""
    tensor: Annotated[int, Bounds(1, 64)] | None = None
    """Ranks that share each layer (tensor parallelism)."""
    pipeline: Annotated[int, Bounds(1, 64)] | None = None
    """Ranks that share the stack of layers (pipeline parallelism)."""


@dataclass(frozen=True, kw_only=True)
class StorageAccess:
    """How object stores are reached; the profile's unless given."""

    secret_ref: LocalReference | None = None
    """Secret whose keys become variables of the trainer: `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, …"""
    endpoint: Annotated[str, Length(8, 512), Pattern("https?://[^\\x00-\\x20\\x7f]+")] | None = None
    """Endpoint of an S3-compatible store."""


@dataclass(frozen=True, kw_only=True)
class Gang:
    """How all pods are placed together."""

    mode: Literal["Auto", "None", "Kueue", "Volcano", "Coscheduling"] | None = None
    """Who does it. `Auto` leaves it to Kueue where a queue is named, and to the scheduler otherwise. The profile's
    unless given, then `Auto`."""
    timeout_seconds: Annotated[int, Bounds(10, 86_400)] | None = None
    """How long a pod group may wait to be complete; the profile's unless given, then 600."""


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Which pods should be near to each other."""

    mode: Literal["None", "Preferred", "Required"] | None = None
    """Whether it is a wish or a condition. The profile's unless given, then `Preferred` where `key` is known."""
    key: LabelKey | None = None
    """Label of nodes that names the place, for example `topology.kubernetes.io/zone`; the profile's unless given."""
    group_by: Literal["Run", "SequenceParallel"] | None = None
    """Keep the whole run together, or each group of pods that share samples; the profile's unless given, then `Run`."""


@dataclass(frozen=True, kw_only=True)
class Scheduling:
    """Queue and placement; the profile's unless given."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!has(self.gang.mode) || self.gang.mode != 'Kueue' || has(self.queue)",
            "name the queue in scheduling.queue to use Kueue",
        ),
    )

    queue: Annotated[str, Length(1, 63), Pattern("[a-z0-9]([-a-z0-9.]*[a-z0-9])?")] | None = None
    """Kueue's local queue. The pods start when it admits the run."""
    priority_class_name: ObjectName | None = None
    """Priority class of the pods, and of the workload in the queue."""
    gang: Gang = field(default_factory=Gang)
    """How all pods are placed together."""
    topology: Topology = field(default_factory=Topology)
    """Which pods should be near to each other."""


@dataclass(frozen=True, kw_only=True)
class Condition:
    """One aspect of the state, as Kubernetes has them."""

    type: Reason
    """Which aspect."""
    status: Literal["True", "False", "Unknown"]
    """Whether it holds."""
    reason: Reason
    """Why, from a closed set."""
    message: Message = ""
    """Why, for people."""
    last_transition_time: Time
    """When `status` last changed."""
    observed_generation: Count = 0
    """Generation of the spec that it is about."""


Conditions = Annotated[tuple[Condition, ...], MaxItems(16), MapKey("type")]


# --------------------------------------------------------------------------------------------------------- TrainingRun


@dataclass(frozen=True, kw_only=True)
class Elastic:
    """Numbers of nodes that the run can do with. They change between attempts alone."""

    allowed_nodes: Annotated[tuple[Annotated[int, Bounds(1, 4096)], ...], MaxItems(16)]
    """The numbers, in any order. An attempt that finds no place is followed by one with the next smaller number."""


@dataclass(frozen=True, kw_only=True)
class Rendezvous:
    """How the ranks find each other."""

    port: Annotated[int, Bounds(1024, 65_535)] = 29_400
    """Port of rank 0."""
    timeout_seconds: Annotated[int, Bounds(10, 7200)] = 900
    """How long the pods of an attempt wait for rank 0."""


@dataclass(frozen=True, kw_only=True)
class DataCache:
    """Copies of clips that are read often."""

    path: MountPath
    """Folder in the container."""
    size_limit: Quantity | None = None
    """Largest size; the config's unless given."""


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """The clips; the config's unless given."""

    catalogue: Uri | None = None
    """Catalogue of the clips: a CSV or Parquet file (`data.path` of the config)."""
    cache: DataCache | None = None
    """Copies of clips that are read often; those of the profile's host cache unless given."""


@dataclass(frozen=True, kw_only=True)
class Checkpointing:
    """When the state is saved, and what is kept; the config's values unless given."""

    every_steps: Annotated[int, Bounds(0, 10_000_000)] | None = None
    """Steps between checkpoints; 0 saves only at the end and when asked to stop."""
    keep_last: Annotated[int, Bounds(1, 1000)] | None = None
    """Newest complete checkpoints to keep."""
    keep_every_steps: Annotated[int, Bounds(0, 10_000_000)] | None = None
    """Besides, keep every checkpoint whose step is a multiple of this; 0 keeps none."""
    sigterm_budget_seconds: Annotated[int, Bounds(1, 7200)] | None = None
    """Time after SIGTERM within which the step is finished and saved; the grace period less 30 s unless given."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Clips sampled during training; the config's values unless given."""

    every_steps: Annotated[int, Bounds(0, 10_000_000)] | None = None
    """Steps between rounds of samples; 0 switches them off."""
    prompts_ref: ConfigMapRef | None = None
    """ConfigMap with the prompts, one a line."""
    max_per_step: Annotated[int, Bounds(1, 64)] | None = None
    """Most clips of a round."""


@dataclass(frozen=True, kw_only=True)
class Backoff:
    """Pause before the next attempt. It doubles with every failure in a row."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule("self.baseSeconds <= self.maxSeconds", "backoff.baseSeconds is above backoff.maxSeconds"),
    )

    base_seconds: Annotated[int, Bounds(0, 3600)] = 10
    """Pause after the first failure."""
    max_seconds: Annotated[int, Bounds(0, 86_400)] = 300
    """Longest pause."""


@dataclass(frozen=True, kw_only=True)
class RestartPolicy:
    """How often the run is started again. All its pods restart together."""

    max_restarts: Annotated[int, Bounds(0, 1000)] = 10
    """Failures that are answered with a new attempt. The count begins anew after `healthySteps` new steps."""
    max_disruptions: Annotated[int, Bounds(0, 10_000)] = 100
    """Evictions, preemptions and lost nodes that are answered with a new attempt."""
    no_progress_attempts: Annotated[int, Bounds(1, 100)] = 3
    """The run fails after this many attempts in a row that saved no newer checkpoint."""
    healthy_steps: Annotated[int, Bounds(1, 10_000_000)] = 100
    """New steps after which earlier failures are forgiven."""
    backoff: Backoff = field(default_factory=Backoff)
    """Pause before the next attempt."""


@dataclass(frozen=True, kw_only=True)
class Watchdog:
    """When a run counts as stalled; the config's values unless given."""

    step_timeout_factor: (
        Annotated[float, Bounds(0, 1000), Rule("self >= 2.0", "watchdog.stepTimeoutFactor must be at least 2")] | None
    ) = None
    """A step may take this many times the usual step time."""
    min_seconds: Annotated[int, Bounds(1, 86_400)] | None = None
    """No step counts as stalled before this time."""
    heartbeat_seconds: Annotated[int, Bounds(5, 3600)] = 30
    """Rank 0 reports at least this often; three times this without a report is said in the condition `Progressing`."""


@dataclass(frozen=True, kw_only=True)
class Deadlines:
    """How long things may take."""

    startup_seconds: Annotated[
        int, Bounds(0, 604_800), Rule("self >= 60", "deadlines.startupSeconds must be at least 60")
    ] = 1800
    """From the start of an attempt until all its ranks have joined. Waiting in a queue does not count."""
    active_seconds: Annotated[int, Bounds(0, 31_536_000)] = 0
    """Longest time that the run's attempts take together; 0 sets no limit."""
    stuck_pod_seconds: Annotated[int, Bounds(10, 86_400)] = 120
    """How long a deleted pod may remain on a node that does not answer before it is removed by force."""


@dataclass(frozen=True, kw_only=True)
class Network:
    """Who can reach the pods."""

    policy: Literal["Isolated", "None"] = "Isolated"
    """`Isolated` lets the pods of a run receive connections from each other alone, where the cluster enforces it."""


@dataclass(frozen=True, kw_only=True)
class Cleanup:
    """What is removed, and when."""

    ttl_seconds_after_finished: Annotated[int, Bounds(0, 315_360_000)] | None = None
    """The object is deleted this long after its end, with everything it owns in the cluster; it stays unless given.
    The run directory is never touched."""
    attempt_history_limit: Annotated[int, Bounds(0, 10)] = 3
    """Jobs of ended attempts to keep, for their pods' logs."""
    pod_policy: Literal["KeepAll", "KeepFailed", "DeleteAll"] = "KeepAll"
    """Which ended pods stay when the run is over, until the object is deleted."""


@dataclass(frozen=True, kw_only=True)
class RestartRequest:
    """Start a new attempt."""

    id: Identifier
    """A new id is a new request."""
    exclude_node: NodeName | None = None
    """Node that the run avoids from now on."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """Ask the running attempt for something."""

    id: Identifier
    """A new id is a new request."""


@dataclass(frozen=True, kw_only=True)
class Requests:
    """What a person asks of the run. `status.requests` shows what is done."""

    stop: bool = False
    """Save, and end the run for good."""
    restart: RestartRequest | None = None
    """Start a new attempt."""
    checkpoint: Request | None = None
    """Save now."""
    dump: Request | None = None
    """Write the stacks of all ranks into the run directory."""


@dataclass(frozen=True, kw_only=True)
class TrainingRunSpec:
    """What to train, on what, and what to do when something happens."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "self.nodes == oldSelf.nodes || oldSelf.suspend || self.suspend "
            "|| (has(self.elastic) && self.nodes in self.elastic.allowedNodes)",
            "suspend the run before changing nodes",
        ),
        Rule(
            "!has(self.elastic) || self.nodes in self.elastic.allowedNodes",
            "nodes must be one of elastic.allowedNodes",
        ),
        Rule(
            "type(self.procsPerNode) == string || self.nodes * int(self.procsPerNode) % ("
            "(has(self.parallelism.sequence) ? self.parallelism.sequence : 1)"
            " * (has(self.parallelism.tensor) ? self.parallelism.tensor : 1)"
            " * (has(self.parallelism.pipeline) ? self.parallelism.pipeline : 1)) == 0",
            "the world size, nodes x procsPerNode, must divide by sequence x tensor x pipeline",
        ),
        Rule(
            "!has(self.checkpoint.sigtermBudgetSeconds) "
            "|| self.terminationGracePeriodSeconds >= self.checkpoint.sigtermBudgetSeconds + 30",
            "terminationGracePeriodSeconds must cover checkpoint.sigtermBudgetSeconds plus 30 s",
        ),
    )

    profile_ref: Annotated[ProfileRef | None, Immutable(_NEW_RUN)] = None
    """Profile that fills in what is left open here; the default profile, if there is one, unless given. It is read
    once, when the run starts."""
    suspend: bool = False
    """Save and give up the pods; set it to false to go on."""
    managed_by: Annotated[
        Literal["", "opensora.dev/operator", "kueue.x-k8s.io/multikueue"], Immutable("managedBy cannot be changed")
    ] = ""
    """Who acts on the run; this operator where it is empty."""
    image: Annotated[Image | None, Immutable(_NEW_RUN)] = None
    """Image of the trainer; the profile's unless given."""
    entrypoint: Annotated[Literal["train", "train_vae"], Immutable(_NEW_RUN)] = "train"
    """Which program: the diffusion model's training, or the VAE's."""
    run_uri: Annotated[Uri, Immutable(_NEW_RUN)]
    """Run directory: checkpoints, logs, metrics and samples."""
    config: Annotated[ConfigSource, Immutable(_NEW_RUN)]
    """What to train."""
    nodes: Annotated[int, Bounds(1, 4096)] = 1
    """Pods, each on a node of its own where it takes all accelerators. It changes while suspended, or within
    `elastic`."""
    procs_per_node: ProcsPerNode = "auto"
    """Ranks per pod. `auto` takes the profile's number, or one per accelerator of the pod, or 1."""
    elastic: Elastic | None = None
    """Numbers of nodes that the run can do with; `nodes` alone unless given."""
    parallelism: Parallelism = field(default_factory=Parallelism)
    """How the model is spread over ranks."""
    rendezvous: Rendezvous = field(default_factory=Rendezvous)
    """How the ranks find each other."""
    storage: StorageAccess = field(default_factory=StorageAccess)
    """How object stores are reached."""
    data: TrainingData = field(default_factory=TrainingData)
    """The clips."""
    checkpoint: Checkpointing = field(default_factory=Checkpointing)
    """Saving."""
    sampling: Sampling = field(default_factory=Sampling)
    """Clips sampled during training."""
    restart_policy: RestartPolicy = field(default_factory=RestartPolicy)
    """How often the run is started again."""
    success_policy: Literal["AllRanks", "RankZero"] = "AllRanks"
    """The run is done when all ranks are, or when rank 0 is."""
    watchdog: Watchdog = field(default_factory=Watchdog)
    """When the run counts as stalled."""
    deadlines: Deadlines = field(default_factory=Deadlines)
    """How long things may take."""
    scheduling: Scheduling = field(default_factory=Scheduling)
    """Queue and placement."""
    termination_grace_period_seconds: Annotated[int, Bounds(1, 86_400)] = 180
    """Time between SIGTERM and SIGKILL, in which the pods save."""
    network: Network = field(default_factory=Network)
    """Who can reach the pods."""
    cleanup: Cleanup = field(default_factory=Cleanup)
    """What is removed, and when."""
    batch_table_ref: LocalReference | None = None
    """BatchSearch whose result sets the batch sizes. The run waits for it."""
    pod_template: PodTemplate = field(default_factory=PodTemplate)
    """What is added to the pods."""
    requests: Requests = field(default_factory=Requests)
    """What a person asks of the run."""


RunPhase = Literal["Pending", "Queued", "Starting", "Running", "Restarting", "Suspended", "Succeeded", "Failed"]


@dataclass(frozen=True, kw_only=True)
class NodesStatus:
    """Pods of the current attempt."""

    desired: Count = 0
    """Pods that the attempt has."""
    requested: Count = 0
    """`spec.nodes` when that number was chosen; more than `desired` where an attempt found no place for all."""
    placed: Count = 0
    """Pods that have a node."""
    ready: Count = 0
    """Pods whose trainer runs."""
    summary: Annotated[str, Length(0, 32)] = ""
    """Ready and desired, for example `4/4`."""


@dataclass(frozen=True, kw_only=True)
class ResolvedStatus:
    """What was found out when the run was first seen, and holds from then on."""

    config_map: ObjectName | None = None
    """ConfigMap with the config that the pods read."""
    profile: ProfileRef | None = None
    """Profile that was used."""
    profile_generation: Count | None = None
    """Its generation at that time."""
    image: Image | None = None
    """Image of the trainer."""
    image_digest: Annotated[str, Length(0, 512)] | None = None
    """The image as the nodes pulled it."""
    procs_per_node: Annotated[int, Bounds(1, 64)] | None = None
    """Ranks per pod."""
    world_size: Count | None = None
    """Ranks of the current attempt."""
    queue: Annotated[str, Length(0, 63)] | None = None
    """Queue that the run waits in."""
    batch_table: ObjectName | None = None
    """ConfigMap with the batch sizes."""


@dataclass(frozen=True, kw_only=True)
class ProgressStatus:
    """How far the run is. Numbers are rounded, so that they change only when it matters."""

    state: Literal["Starting", "Training", "Evaluating", "Saving", "Sampling", "Stopping", "Ended"] | None = None
    """What rank 0 does."""
    step: Count | None = None
    """Optimiser steps done."""
    total_steps: Count | None = None
    """Steps in all."""
    percent: Annotated[int, Bounds(0, 100)] | None = None
    """Share of the steps that is done."""
    epoch: Count | None = None
    """Passes over the catalogue done."""
    eta_seconds: Count | None = None
    """Time to the end."""
    eta: Annotated[str, Length(0, 32)] | None = None
    """The same for people, for example `1h30m`."""
    seconds_per_step: Decimal | None = None
    """Mean of the last steps."""
    loss: Decimal | None = None
    """Loss of the last step."""
    samples_per_second: Decimal | None = None
    """Clips that all ranks train on in a second."""
    goodput_percent: Annotated[int, Bounds(0, 100)] | None = None
    """Share of the time that went into steps that count."""
    last_update: Time | None = None
    """When rank 0 last reported."""


@dataclass(frozen=True, kw_only=True)
class CheckpointStatus:
    """The newest complete checkpoint."""

    latest_step: Count | None = None
    """Its step."""
    uri: Annotated[str, Length(0, 1280)] | None = None
    """Where it is."""
    saved_at: Time | None = None
    """When the operator heard of it."""
    bytes: Count | None = None
    """Its size."""


@dataclass(frozen=True, kw_only=True)
class SamplesStatus:
    """The newest clips sampled during training."""

    last_step: Count | None = None
    """Step of the weights."""
    uri: Annotated[str, Length(0, 1280)] | None = None
    """Folder of the clips."""
    sheet: Annotated[str, Length(0, 1280)] | None = None
    """Contact sheet."""


@dataclass(frozen=True, kw_only=True)
class AttemptStatus:
    """One attempt: how it ended and because of whom."""

    number: Count
    """Number of the attempt, from 1."""
    nodes: Count = 0
    """Pods that it had."""
    started_at: Time | None = None
    """When its Job was made."""
    ran_at: Time | None = None
    """When the first of its pods was seen to run."""
    ended_at: Time | None = None
    """When its end was seen."""
    cause: Reason | None = None
    """Why it ended, from a closed set."""
    exit_code: Annotated[int, Bounds(0, 255)] | None = None
    """Exit code of the rank that failed first."""
    rank: Count | None = None
    """Rank that failed first."""
    pod: ObjectName | None = None
    """Its pod."""
    node: NodeName | None = None
    """Its node."""
    first_step: Count | None = None
    """Step that the attempt began at."""
    last_step: Count | None = None
    """Last step that it reported."""
    checkpoint_step: Count | None = None
    """Newest checkpoint at its end."""
    message: Message = ""
    """Last words of that rank."""


@dataclass(frozen=True, kw_only=True)
class RequestsStatus:
    """Requests that were acted on."""

    stop: bool = False
    """The run was asked to stop."""
    restart: Identifier | None = None
    """Newest restart that was done."""
    checkpoint: Identifier | None = None
    """Newest request to save that the run was told of."""
    dump: Identifier | None = None
    """Newest request for stacks that the run was told of."""


@dataclass(frozen=True, kw_only=True)
class TrainingRunStatus:
    """What the operator sees and has decided."""

    phase: RunPhase | None = None
    """Sum of the conditions in one word."""
    observed_generation: Count = 0
    """Generation of the spec that the status is about."""
    attempt: Count = 0
    """Number of the current attempt: every start of the pods with a new Job. It fences what is written to the run
    directory."""
    restarts: Count = 0
    """Attempts that were started because of a failure."""
    recent_restarts: Count = 0
    """Of these, the ones since the last `healthySteps` new steps: what `maxRestarts` is compared with."""
    disruptions: Count = 0
    """Attempts that were started because of an eviction, a preemption or a lost node."""
    executions: Count = 0
    """How often the pods were started, also after a suspension."""
    no_progress_attempts: Count = 0
    """Attempts in a row that saved no newer checkpoint."""
    active_seconds: Count = 0
    """Time that the attempts that have ended took together: what `deadlines.activeSeconds` is compared with."""
    backoff_until: Time | None = None
    """The next attempt starts no earlier."""
    started_at: Time | None = None
    """When the first pods ran."""
    ended_at: Time | None = None
    """When the run succeeded or failed."""
    conditions: Conditions = ()
    """All aspects of the state."""
    nodes: NodesStatus = field(default_factory=NodesStatus)
    """Pods of the current attempt."""
    job: ObjectName | None = None
    """Job of the current attempt."""
    resolved: ResolvedStatus = field(default_factory=ResolvedStatus)
    """What was found out when the run was first seen."""
    progress: ProgressStatus = field(default_factory=ProgressStatus)
    """How far the run is."""
    checkpoint: CheckpointStatus = field(default_factory=CheckpointStatus)
    """The newest complete checkpoint."""
    samples: SamplesStatus = field(default_factory=SamplesStatus)
    """The newest clips sampled during training."""
    attempts: Annotated[tuple[AttemptStatus, ...], MaxItems(10), MapKey("number")] = ()
    """The last attempts, the oldest first."""
    node_failures: Annotated[dict[str, Count], MaxItems(64)] = field(default_factory=dict)
    """How often each node was the first to fail with its hardware."""
    avoid_nodes: Annotated[tuple[NodeName, ...], MaxItems(64)] = ()
    """Nodes that the run no longer uses."""
    requests: RequestsStatus = field(default_factory=RequestsStatus)
    """Requests that were acted on."""


# ----------------------------------------------------------------------------------------------------------- SampleJob


@dataclass(frozen=True, kw_only=True)
class RunCheckpoint:
    """A checkpoint of a TrainingRun of the same namespace."""

    name: ObjectName
    """Name of the run."""
    step: Annotated[int | Literal["latest"], Bounds(0, 2**53)] = "latest"
    """Step of the checkpoint. `latest` takes the newest, and waits for the first one of a run that has none yet."""


@dataclass(frozen=True, kw_only=True)
class CheckpointSource:
    """Where the weights come from; exactly one."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule("has(self.runRef) != has(self.uri)", "give exactly one checkpoint: runRef or uri"),
    )

    run_ref: RunCheckpoint | None = None
    """A checkpoint of a run."""
    uri: Uri | None = None
    """A run directory, of which the newest checkpoint is taken. With a config source in `config`: weights, a file or a
    folder."""


@dataclass(frozen=True, kw_only=True)
class SampleConfigSource(ConfigSource):
    """Settings of sampling beyond those of the spec: at most one source, and changes to it."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "[has(self.inline), has(self.ref), has(self.file)].filter(given, given).size() <= 1",
            "give at most one config source: inline, ref or file",
        ),
    )


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """What to sample; exactly one source."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule("has(self.inline) != has(self.ref)", "give exactly one source of prompts: inline or ref"),
        Rule("!has(self.inline) || self.inline.size() > 0", "prompts.inline is empty: give at least one prompt"),
    )

    inline: Annotated[tuple[Prompt, ...], MaxItems(512)] | None = None
    """The prompts."""
    ref: ConfigMapRef | None = None
    """ConfigMap with the prompts, one a line."""


@dataclass(frozen=True, kw_only=True)
class SampleCleanup:
    """What is removed, and when."""

    ttl_seconds_after_finished: Annotated[int, Bounds(0, 315_360_000)] | None = None
    """The object is deleted this long after its end, with everything it owns in the cluster; it stays unless given.
    Clips are never touched."""


@dataclass(frozen=True, kw_only=True)
class SampleJobSpec:
    """Which clips to sample, from which weights, and where they go. Only `suspend` and `cleanup` can be changed."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule("has(self.resolution) == has(self.aspectRatio)", "resolution and aspectRatio need each other"),
        Rule(
            "!has(self.imageSize) || !has(self.resolution)", "give imageSize or resolution with aspectRatio, not both"
        ),
        Rule(
            "!has(self.imageSize) || self.imageSize.size() == 2",
            "imageSize is height and width, for example [240, 426]",
        ),
    )

    checkpoint: Annotated[CheckpointSource, Immutable(_NEW_JOB)]
    """Where the weights come from."""
    config: Annotated[SampleConfigSource, Immutable(_NEW_JOB)] = field(default_factory=SampleConfigSource)
    """Settings of sampling beyond those below; what is not given comes from the run."""
    image: Annotated[Image | None, Immutable(_NEW_JOB)] = None
    """Image of the sampler; that of the run unless given, then the profile's."""
    profile_ref: Annotated[ProfileRef | None, Immutable(_NEW_JOB)] = None
    """Profile that fills in what is left open here; that of the run unless given, then the default profile."""
    prompts: Annotated[Prompts, Immutable(_NEW_JOB)]
    """What to sample."""
    seed: Annotated[int, Bounds(0, 2**53), Immutable(_NEW_JOB)] = 1024
    """Seed of the noise."""
    num_samples: Annotated[int, Bounds(1, 64), Immutable(_NEW_JOB)] = 1
    """Clips per prompt."""
    num_frames: Annotated[int, Bounds(1, 4096), Immutable(_NEW_JOB)] | None = None
    """Frames per clip; those of the run's samples unless given."""
    image_size: Annotated[tuple[Annotated[int, Bounds(8, 8192)], ...], MaxItems(2), Immutable(_NEW_JOB)] | None = None
    """Height and width in pixels; those of the run's samples unless given."""
    resolution: Annotated[str, Length(2, 16), Pattern("[0-9]+(p|k|px)?"), Immutable(_NEW_JOB)] | None = None
    """Name of a resolution such as `240p`, with `aspectRatio`."""
    aspect_ratio: Annotated[str, Length(3, 16), Pattern("[0-9.]+:[0-9.]+"), Immutable(_NEW_JOB)] | None = None
    """Shape such as `9:16`, height to width, with `resolution`."""
    fps: Annotated[int, Bounds(1, 240), Immutable(_NEW_JOB)] | None = None
    """Frame rate; that of the run's samples unless given."""
    sampling_steps: Annotated[int, Bounds(1, 10_000), Immutable(_NEW_JOB)] | None = None
    """Steps of the scheduler; its own number unless given."""
    guidance: Annotated[float, Bounds(0, 1000), Immutable(_NEW_JOB)] | None = None
    """Strength of classifier-free guidance; the scheduler's unless given."""
    output_uri: Annotated[Uri, Immutable(_NEW_JOB)]
    """Folder of the clips."""
    workers: Annotated[int, Bounds(1, 1024), Immutable(_NEW_JOB)] = 1
    """Pods that sample at the same time."""
    procs_per_node: Annotated[ProcsPerNode, Immutable(_NEW_JOB)] = "auto"
    """Ranks per pod. `auto` takes the profile's number, or one per accelerator of the pod, or 1."""
    prompts_per_shard: Annotated[int, Bounds(1, 512), Immutable(_NEW_JOB)] = 8
    """Prompts that a pod takes before it makes room for the next."""
    retries_per_shard: Annotated[int, Bounds(0, 20), Immutable(_NEW_JOB)] = 2
    """Failures of one shard after which it is given up; the others go on."""
    suspend: bool = False
    """Give up the pods; set it to false to go on with the shards that are left."""
    storage: Annotated[StorageAccess, Immutable(_NEW_JOB)] = field(default_factory=StorageAccess)
    """How object stores are reached; as the run does unless given."""
    scheduling: Annotated[Scheduling, Immutable(_NEW_JOB)] = field(default_factory=Scheduling)
    """Queue and placement."""
    active_deadline_seconds: Annotated[int, Bounds(0, 31_536_000), Immutable(_NEW_JOB)] = 0
    """Longest time from the start of the first pod; 0 sets no limit."""
    termination_grace_period_seconds: Annotated[int, Bounds(1, 86_400), Immutable(_NEW_JOB)] = 60
    """Time between SIGTERM and SIGKILL, in which a pod finishes its clip."""
    cleanup: SampleCleanup = field(default_factory=SampleCleanup)
    """What is removed, and when."""
    pod_template: Annotated[PodTemplate, Immutable(_NEW_JOB)] = field(default_factory=PodTemplate)
    """What is added to the pods."""


JobPhase = Literal["Pending", "Waiting", "Queued", "Running", "Suspended", "Succeeded", "Failed"]


@dataclass(frozen=True, kw_only=True)
class ShardsStatus:
    """Shards of prompts."""

    total: Count = 0
    """Shards in all."""
    active: Count = 0
    """Shards that are sampled now."""
    done: Count = 0
    """Shards whose clips are all there."""
    failed: Count = 0
    """Shards that were given up."""
    summary: Annotated[str, Length(0, 32)] = ""
    """Done and total, for example `3/8`."""


@dataclass(frozen=True, kw_only=True)
class SampleOutput:
    """What became of one shard."""

    index: Count
    """Number of the shard, from 0."""
    state: Literal["Done", "Failed"]
    """How it ended."""
    uri: Annotated[str, Length(0, 1280)] | None = None
    """Folder of its clips."""
    clips: Count | None = None
    """Clips that it made."""
    exit_code: Annotated[int, Bounds(0, 255)] | None = None
    """Exit code of its last failure."""
    message: Annotated[str, Length(0, 1024)] = ""
    """Last words of its last failure."""


@dataclass(frozen=True, kw_only=True)
class SampledCheckpoint:
    """The checkpoint that is sampled, chosen once."""

    step: Count | None = None
    """Its step."""
    uri: Annotated[str, Length(0, 1280)] | None = None
    """The run directory, or the weights."""


@dataclass(frozen=True, kw_only=True)
class SampleJobStatus:
    """What the operator sees and has decided."""

    phase: JobPhase | None = None
    """Sum of the conditions in one word."""
    observed_generation: Count = 0
    """Generation of the spec that the status is about."""
    conditions: Conditions = ()
    """All aspects of the state."""
    shards: ShardsStatus = field(default_factory=ShardsStatus)
    """Shards of prompts."""
    checkpoint: SampledCheckpoint = field(default_factory=SampledCheckpoint)
    """The checkpoint that is sampled."""
    job: ObjectName | None = None
    """Job of the pods."""
    resolved: ResolvedStatus = field(default_factory=ResolvedStatus)
    """What was found out when the object was first seen."""
    outputs: Annotated[tuple[SampleOutput, ...], MaxItems(512), MapKey("index")] = ()
    """What became of each shard that ended."""
    sheet: Annotated[str, Length(0, 1280)] | None = None
    """Contact sheet of all clips."""
    started_at: Time | None = None
    """When the first pod ran."""
    ended_at: Time | None = None
    """When it succeeded or failed."""


# --------------------------------------------------------------------------------------------------------- BatchSearch


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """A shape of clips."""

    resolution: Annotated[str, Length(2, 16), Pattern("[0-9]+(p|k|px)?")]
    """Name of the resolution, for example `240p`."""
    frames: Annotated[int, Bounds(1, 4096)]
    """Number of frames."""


@dataclass(frozen=True, kw_only=True)
class BatchBounds:
    """Where the search ends."""

    max_batch: Annotated[int, Bounds(1, 65_536)] = 1024
    """Largest batch size to try."""


@dataclass(frozen=True, kw_only=True)
class BatchSearchCleanup:
    """What is removed, and when."""

    ttl_seconds_after_finished: Annotated[int, Bounds(0, 315_360_000)] | None = None
    """The object is deleted this long after its end; it stays unless given. The table stays either way."""


@dataclass(frozen=True, kw_only=True)
class BatchSearchSpec:
    """Which batch sizes to find, for which model on which hardware. Only `suspend` and `cleanup` can be changed."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!has(self.stepSeconds) || self.objective == 'EqualStepTime'", "stepSeconds needs objective EqualStepTime"
        ),
    )

    profile_ref: Annotated[ProfileRef | None, Immutable(_NEW_JOB)] = None
    """Profile that fills in what is left open here; the default profile unless given."""
    image: Annotated[Image | None, Immutable(_NEW_JOB)] = None
    """Image of the trainer; the profile's unless given."""
    config: Annotated[ConfigSource, Immutable(_NEW_JOB)]
    """The config of the training that the batch sizes are for."""
    procs_per_node: Annotated[ProcsPerNode, Immutable(_NEW_JOB)] = "auto"
    """Ranks per pod. `auto` takes the profile's number, or one per accelerator of the pod, or 1."""
    parallelism: Annotated[Parallelism, Immutable(_NEW_JOB)] = field(default_factory=Parallelism)
    """How the model is spread over ranks."""
    storage: Annotated[StorageAccess, Immutable(_NEW_JOB)] = field(default_factory=StorageAccess)
    """How object stores are reached."""
    scheduling: Annotated[Scheduling, Immutable(_NEW_JOB)] = field(default_factory=Scheduling)
    """Queue and placement."""
    buckets: Annotated[tuple[Bucket, ...], MaxItems(128), Immutable(_NEW_JOB)] = ()
    """Shapes to search for; those of the config unless given."""
    bounds: Annotated[BatchBounds, Immutable(_NEW_JOB)] = field(default_factory=BatchBounds)
    """Where the search ends."""
    headroom_percent: Annotated[int, Bounds(0, 50), Immutable(_NEW_JOB)] = 8
    """Share of the memory that stays free."""
    objective: Annotated[Literal["MaxFit", "EqualStepTime"], Immutable(_NEW_JOB)] = "MaxFit"
    """`MaxFit` takes the largest batch that fits; `EqualStepTime` the one whose step takes as long as the others'."""
    step_seconds: Annotated[float, Bounds(0.001, 86_400), Immutable(_NEW_JOB)] | None = None
    """With `EqualStepTime`, how long a step may take. Unless given, as long as at the largest batch of the bucket where
    that is shortest, or as one clip of the slowest bucket where that is longer."""
    memory_budget: Annotated[Quantity | None, Immutable(_NEW_JOB)] = None
    """Memory of a rank that may be used; that of the accelerator unless given. On a CPU it is needed."""
    parallel_trials: Annotated[int, Bounds(1, 64), Immutable(_NEW_JOB)] = 1
    """Pods that search at the same time, each one bucket."""
    trial_timeout_seconds: Annotated[int, Bounds(60, 86_400), Immutable(_NEW_JOB)] = 1800
    """Longest time that the search of one bucket takes."""
    retries_per_bucket: Annotated[int, Bounds(0, 20), Immutable(_NEW_JOB)] = 2
    """Failures of one bucket after which it is given up; the others go on."""
    suspend: bool = False
    """Give up the pods; set it to false to go on with the buckets that are left."""
    cleanup: BatchSearchCleanup = field(default_factory=BatchSearchCleanup)
    """What is removed, and when."""
    pod_template: Annotated[PodTemplate, Immutable(_NEW_JOB)] = field(default_factory=PodTemplate)
    """What is added to the pods."""


@dataclass(frozen=True, kw_only=True)
class BucketResult:
    """What was found for one bucket."""

    bucket: Annotated[str, Length(1, 32)]
    """The bucket, for example `240p/51`."""
    state: Literal["Pending", "Running", "Found", "Failed"]
    """How far the search of it is."""
    batch: Count | None = None
    """Batch size; 0 where not even one clip fits."""
    peak_bytes: Count | None = None
    """Most memory that a step took."""
    seconds: Decimal | None = None
    """Time of a step."""
    evidence: Annotated[str, Length(0, 1024)] = ""
    """What was measured: `4:3221225472:0.81` is a batch of 4 that took so many bytes and seconds a step, `8:oom` one
    that did not fit."""
    message: Annotated[str, Length(0, 1024)] = ""
    """Why it failed."""
    probe: Count = 0
    """Number of its newest probe, the Job `NAME-pNUMBER`; 0 before the first."""
    failures: Count = 0
    """Probes that failed for other reasons than memory and disruptions."""


@dataclass(frozen=True, kw_only=True)
class BatchSearchStatus:
    """What the operator sees and has decided."""

    phase: JobPhase | None = None
    """Sum of the conditions in one word."""
    observed_generation: Count = 0
    """Generation of the spec that the status is about."""
    conditions: Conditions = ()
    """All aspects of the state."""
    buckets: ShardsStatus = field(default_factory=ShardsStatus)
    """How many buckets are searched."""
    results: Annotated[tuple[BucketResult, ...], MaxItems(128), MapKey("bucket")] = ()
    """What was found for each bucket."""
    key: Annotated[str, Length(0, 64)] | None = None
    """Hash of model, image, accelerator and parallelism. Runs with the same one can use the table."""
    table: ObjectName | None = None
    """ConfigMap with the batch sizes, once all are known."""
    reused: bool = False
    """The table was there already."""
    facts: Annotated[str, Length(0, 2048)] = ""
    """What the measurements hold for, as the table has it: JSON."""
    empty_bytes: Count = 0
    """On a CPU: what a rank takes without a batch."""
    step_seconds: Decimal | None = None
    """With `EqualStepTime`: how long a step may take."""
    resolved: ResolvedStatus = field(default_factory=ResolvedStatus)
    """What was found out when the object was first seen."""
    started_at: Time | None = None
    """When the first pod ran."""
    ended_at: Time | None = None
    """When it succeeded or failed."""


# ------------------------------------------------------------------------------------------------------------ profiles


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """The accelerators of a node."""

    resource: Annotated[str, Length(1, 317), Pattern("[a-z0-9]([-a-z0-9.]*[a-z0-9])?/[-A-Za-z0-9_.]+")] = (
        "nvidia.com/gpu"
    )
    """Resource that nodes offer."""
    count: Annotated[int, Bounds(0, 64)] = 0
    """How many a pod takes; none with 0."""
    name: Annotated[str, Length(0, 64), Pattern("[-._A-Za-z0-9]*")] = ""
    """Model, for example `H200`: batch sizes found on one model are used on it alone."""


@dataclass(frozen=True, kw_only=True)
class ProfileNetwork:
    """How ranks talk to each other."""

    env: Annotated[
        dict[str, Annotated[str, Length(0, 1024)]],
        MaxItems(64),
        Rule(
            "self.all(name, name.matches('^(NCCL|GLOO|UCX|FI|TORCH_NCCL)_[A-Z0-9_]+$'))",
            "names begin with NCCL_, TORCH_NCCL_, GLOO_, UCX_ or FI_; others belong into podTemplate.env",
        ),
    ] = field(default_factory=dict)
    """Settings of the communication libraries, for example `NCCL_SOCKET_IFNAME`."""
    rdma_resources: Annotated[
        dict[Annotated[str, Length(1, 317)], Annotated[int, Bounds(1, 64)]],
        MaxItems(8),
        Rule(
            "self.all(name, name.size() <= 317 && name.matches('^[a-z0-9]([-a-z0-9.]*[a-z0-9])?/[-A-Za-z0-9_.]+$'))",
            "names are those of device plugins, for example rdma/hca",
        ),
    ] = field(default_factory=dict)
    """Network devices that each pod takes, for example `rdma/hca: 8`. The pods may then lock memory."""


@dataclass(frozen=True, kw_only=True)
class SharedMemory:
    """`/dev/shm` of the pods."""

    size_limit: Quantity | None = None
    """Largest size; half of the pod's memory limit unless given, then half of the node's."""


@dataclass(frozen=True, kw_only=True)
class HostCache:
    """A folder of the node for copies of clips, shared by the runs that come to it."""

    host_path: MountPath
    """Path on the node."""
    mount_path: MountPath = "/var/cache/opensora"
    """Path in the container."""
    size_limit: Quantity | None = None
    """Largest size of one run's copies; the config's unless given."""


@dataclass(frozen=True, kw_only=True)
class TrainingProfileSpec:
    """What a cluster's administrator knows, so that users need not."""

    description: Annotated[str, Length(0, 1024)] = ""
    """What the profile is for."""
    default: bool = False
    """Take it for objects that name no profile. A profile of the namespace wins over one of the cluster; among several
    the first by name is taken."""
    image: Image | None = None
    """Image of the trainer."""
    procs_per_node: ProcsPerNode | None = None
    """Ranks per pod; one per accelerator unless given."""
    accelerator: Accelerator = field(default_factory=Accelerator)
    """The accelerators that a pod takes."""
    network: ProfileNetwork = field(default_factory=ProfileNetwork)
    """How ranks talk to each other."""
    shared_memory: SharedMemory = field(default_factory=SharedMemory)
    """`/dev/shm` of the pods."""
    host_cache: HostCache | None = None
    """A folder of the node for copies of clips."""
    storage: StorageAccess = field(default_factory=StorageAccess)
    """How object stores are reached."""
    scheduling: Scheduling = field(default_factory=Scheduling)
    """Queue and placement."""
    pod_template: PodTemplate = field(default_factory=PodTemplate)
    """What is added to the pods."""


# --------------------------------------------------------------------------------------------------------------- kinds


MAX_NAME = 48
NAME_RULE = Rule(
    f"self.metadata.name.size() <= {MAX_NAME} && self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')",
    f"at most {MAX_NAME} characters out of a-z, 0-9 and -, a letter first and no - at the end: the names of pods are "
    "made from it",
    field="metadata.name",
)
"""Of the kinds that have pods."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of the API."""

    name: str
    plural: str
    short_names: tuple[str, ...]
    spec: type
    status: type | None
    namespaced: bool
    doc: str

    @property
    def singular(self) -> str:
        return self.name.lower()

    @property
    def crd_name(self) -> str:
        return f"{self.plural}.{GROUP}"


TRAINING_RUN = Kind(
    name="TrainingRun",
    plural="trainingruns",
    short_names=("tr",),
    spec=TrainingRunSpec,
    status=TrainingRunStatus,
    namespaced=True,
    doc="A training: pods that start, fail and restart together until it is done.",
)
SAMPLE_JOB = Kind(
    name="SampleJob",
    plural="samplejobs",
    short_names=("sj",),
    spec=SampleJobSpec,
    status=SampleJobStatus,
    namespaced=True,
    doc="Clips sampled from a checkpoint, by pods that share the prompts among them.",
)
BATCH_SEARCH = Kind(
    name="BatchSearch",
    plural="batchsearches",
    short_names=("bs",),
    spec=BatchSearchSpec,
    status=BatchSearchStatus,
    namespaced=True,
    doc="A search for the batch size of every bucket, measured on the hardware that trains.",
)
TRAINING_PROFILE = Kind(
    name="TrainingProfile",
    plural="trainingprofiles",
    short_names=("tp",),
    spec=TrainingProfileSpec,
    status=None,
    namespaced=True,
    doc="What runs of a namespace take over unless they say otherwise.",
)
CLUSTER_TRAINING_PROFILE = Kind(
    name="ClusterTrainingProfile",
    plural="clustertrainingprofiles",
    short_names=("ctp",),
    spec=TrainingProfileSpec,
    status=None,
    namespaced=False,
    doc="What runs of all namespaces take over unless they say otherwise.",
)
KINDS = (TRAINING_RUN, SAMPLE_JOB, BATCH_SEARCH, TRAINING_PROFILE, CLUSTER_TRAINING_PROFILE)
