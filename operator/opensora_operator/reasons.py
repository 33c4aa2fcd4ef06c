"""Conditions and reasons: the closed sets in which status and events speak, each with its meaning and its remedy."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class ConditionType(StrEnum):
    """Conditions of all kinds. `Complete` and `Failed` are sticky: an object that has one never leaves it."""

    ACCEPTED = "Accepted"
    SCHEDULED = "Scheduled"
    RUNNING = "Running"
    PROGRESSING = "Progressing"
    SUSPENDED = "Suspended"
    RESTARTING = "Restarting"
    COMPLETE = "Complete"
    FAILED = "Failed"


class Reason(StrEnum):
    """Why a condition has its state, or what an event tells."""

    # Accepted
    ACCEPTED = "Accepted"
    INVALID_SPEC = "InvalidSpec"
    PROFILE_NOT_FOUND = "ProfileNotFound"
    CONFIG_MISSING = "ConfigMissing"
    RUN_NOT_FOUND = "RunNotFound"
    NAME_CONFLICT = "NameConflict"
    REJECTED = "Rejected"
    # Scheduled
    NO_PODS = "NoPods"
    ALL_PODS_SCHEDULED = "AllPodsScheduled"
    WAITING_FOR_QUOTA = "WaitingForQuota"
    WAITING_FOR_PODS = "WaitingForPods"
    UNSCHEDULABLE = "Unschedulable"
    WAITING_FOR_CHECKPOINT = "WaitingForCheckpoint"
    # Running
    ALL_PODS_RUNNING = "AllPodsRunning"
    PULLING_IMAGES = "PullingImages"
    CONTAINER_CONFIG_ERROR = "ContainerConfigError"
    POD_NOT_READY = "PodNotReady"
    # Progressing
    STEP_ADVANCING = "StepAdvancing"
    STARTING = "Starting"
    EVALUATING = "Evaluating"
    SAVING_CHECKPOINT = "SavingCheckpoint"
    SAMPLING = "Sampling"
    STOPPING = "Stopping"
    STALLED = "Stalled"
    NO_HEARTBEAT = "NoHeartbeat"
    # Suspended
    SUSPENDED = "Suspended"
    QUEUED = "Queued"
    RESUMED = "Resumed"
    # Restarting, and causes of an attempt's end
    WORKER_FAILED = "WorkerFailed"
    DISRUPTED = "Disrupted"
    NODE_FAILURE = "NodeFailure"
    PREEMPTED = "Preempted"
    HANG = "Hang"
    OUT_OF_MEMORY = "OutOfMemory"
    DIVERGED = "Diverged"
    PEER_LOST = "PeerLost"
    STOPPED = "Stopped"
    RESIZED = "Resized"
    RESTART_REQUESTED = "RestartRequested"
    JOB_DELETED = "JobDeleted"
    NOT_STARTED = "NotStarted"
    DRAINING_PODS = "DrainingPods"
    BACKING_OFF = "BackingOff"
    ATTEMPT_STARTED = "AttemptStarted"
    # Complete
    ALL_RANKS_SUCCEEDED = "AllRanksSucceeded"
    RANK_ZERO_SUCCEEDED = "RankZeroSucceeded"
    ALL_SHARDS_SUCCEEDED = "AllShardsSucceeded"
    SEARCH_COMPLETE = "SearchComplete"
    CACHE_HIT = "CacheHit"
    # Failed
    RESTART_BUDGET_EXCEEDED = "RestartBudgetExceeded"
    DISRUPTION_BUDGET_EXCEEDED = "DisruptionBudgetExceeded"
    NO_PROGRESS = "NoProgress"
    NON_RETRYABLE_EXIT = "NonRetryableExit"
    DEADLINE_EXCEEDED = "DeadlineExceeded"
    STARTUP_DEADLINE_EXCEEDED = "StartupDeadlineExceeded"
    IMAGE_PULL_FAILED = "ImagePullFailed"
    CANCELLED = "Cancelled"
    CHECKPOINT_NOT_FOUND = "CheckpointNotFound"
    SHARDS_FAILED = "ShardsFailed"
    BUCKETS_FAILED = "BucketsFailed"
    # Events only
    NODE_AVOIDED = "NodeAvoided"
    POD_FORCED = "PodForced"
    SCALED_DOWN = "ScaledDown"


@dataclass(frozen=True)
class Explanation:
    """What a reason means, and what a person can do."""

    meaning: str
    remedy: str = "Nothing to do."


CONDITIONS: dict[ConditionType, str] = {
    ConditionType.ACCEPTED: "The spec can be used.",
    ConditionType.SCHEDULED: "Every pod of the attempt has a node.",
    ConditionType.RUNNING: "The container of every pod runs.",
    ConditionType.PROGRESSING: "Steps advance.",
    ConditionType.SUSPENDED: "Nothing should run now.",
    ConditionType.RESTARTING: "An attempt has ended and the next one has not started.",
    ConditionType.COMPLETE: "The object has done what it was made for. Sticky.",
    ConditionType.FAILED: "The object will not do what it was made for. Sticky.",
}

EXPLANATIONS: dict[Reason, Explanation] = {
    Reason.ACCEPTED: Explanation("The spec and everything it refers to is there."),
    Reason.INVALID_SPEC: Explanation(
        "The spec contradicts itself or its profile; the message names the field.",
        "Correct the field. What is immutable needs a new object.",
    ),
    Reason.PROFILE_NOT_FOUND: Explanation(
        "`profileRef` names a profile that does not exist.", "Create the profile, or make a new run with another name."
    ),
    Reason.CONFIG_MISSING: Explanation(
        "A ConfigMap, or a key of it, that the spec names does not exist.",
        "Create it in the namespace of the object; the operator looks again every 30 s.",
    ),
    Reason.RUN_NOT_FOUND: Explanation(
        "`checkpoint.runRef` names a TrainingRun that does not exist.",
        "Create it in the same namespace, or name the run directory with `checkpoint.uri`.",
    ),
    Reason.NAME_CONFLICT: Explanation(
        "An object of the name that is needed belongs to somebody else. It is left alone.",
        "Rename or remove that object, or use another name for this one.",
    ),
    Reason.REJECTED: Explanation(
        "The API server, an admission webhook or a quota refused an object; the message is theirs.",
        "Read the message: usually `podTemplate`, the profile or a quota of the namespace must change.",
    ),
    Reason.NO_PODS: Explanation("No pods exist now."),
    Reason.ALL_PODS_SCHEDULED: Explanation("Every pod has a node."),
    Reason.WAITING_FOR_QUOTA: Explanation(
        "The queue has not admitted the Job yet.", "See the queue's own state: `kubectl get workloads`."
    ),
    Reason.WAITING_FOR_PODS: Explanation("The Job's pods are being created or placed."),
    Reason.UNSCHEDULABLE: Explanation(
        "The scheduler finds no node for a pod; the message is the scheduler's.",
        "Free or add nodes, ask for less, or allow fewer nodes with `elastic.allowedNodes`.",
    ),
    Reason.WAITING_FOR_CHECKPOINT: Explanation(
        "The run to sample from has no checkpoint yet.", "Wait, or name a step or a URI that exists."
    ),
    Reason.ALL_PODS_RUNNING: Explanation("The container of every pod runs."),
    Reason.PULLING_IMAGES: Explanation(
        "A pod waits for its image; the message is the kubelet's.",
        "Check the image's name, its registry and `imagePullSecrets`.",
    ),
    Reason.CONTAINER_CONFIG_ERROR: Explanation(
        "A container cannot be made, usually since a Secret, a key or a volume is missing; the message names it.",
        "Create what is missing; the pod starts by itself.",
    ),
    Reason.POD_NOT_READY: Explanation("A pod has a node and its container does not run yet."),
    Reason.STEP_ADVANCING: Explanation("Training steps are being made."),
    Reason.STARTING: Explanation("The ranks start, meet, load the checkpoint or compile; no step is done yet."),
    Reason.EVALUATING: Explanation("The validation loss is being computed."),
    Reason.SAVING_CHECKPOINT: Explanation("A checkpoint is being saved."),
    Reason.SAMPLING: Explanation("Samples are being made."),
    Reason.STOPPING: Explanation("The ranks finish their step and save."),
    Reason.STALLED: Explanation(
        "Reports come, but the step does not advance.",
        "The ranks' own watchdog dumps stacks and ends the attempt; `dumps/` in the run directory has them.",
    ),
    Reason.NO_HEARTBEAT: Explanation(
        "No report has come for three intervals.",
        "The run may still be well: see its logs, and whether pods reach the operator's progress Service.",
    ),
    Reason.SUSPENDED: Explanation("`spec.suspend` is true.", "Set it to false to continue from the newest checkpoint."),
    Reason.QUEUED: Explanation("The queue holds the Job back, or took its place away.", "It continues when admitted."),
    Reason.RESUMED: Explanation("The object is not suspended any more."),
    Reason.WORKER_FAILED: Explanation(
        "A rank failed; `attempts` names the first one, its node and its last words.",
        "It is restarted. When it repeats, read `attempts[].message` and the rank's log.",
    ),
    Reason.DISRUPTED: Explanation(
        "A pod was evicted, drained or deleted. This does not count as a failure.",
    ),
    Reason.NODE_FAILURE: Explanation(
        "A node stopped answering, or a rank found its machine unhealthy.",
        "The next attempt starts elsewhere; look at the node.",
    ),
    Reason.PREEMPTED: Explanation("The queue or the scheduler gave the place to other work. It continues later."),
    Reason.HANG: Explanation(
        "No step was finished for far longer than usual; the watchdog ended the attempt.",
        "Stacks of all ranks are in `dumps/` of the run directory.",
    ),
    Reason.OUT_OF_MEMORY: Explanation(
        "Device or host memory ran out; `attempts` names the bucket.",
        "Lower that bucket's batch size (a BatchSearch finds it), shard more, or raise the memory limit.",
    ),
    Reason.DIVERGED: Explanation(
        "The loss or the gradient was not finite. The step was not applied.",
        "Twice at the same step means that the run itself diverges: change learning rate, data or clipping.",
    ),
    Reason.PEER_LOST: Explanation(
        "Ranks lost a peer, and nothing tells which one failed.", "See the other ranks' logs and their nodes."
    ),
    Reason.STOPPED: Explanation("The ranks were asked to stop, and saved."),
    Reason.RESIZED: Explanation("`spec.nodes` changed; the next attempt has the new size."),
    Reason.RESTART_REQUESTED: Explanation("`spec.requests.restart` asked for a new attempt."),
    Reason.JOB_DELETED: Explanation("Somebody deleted the attempt's Job. The next attempt starts by itself."),
    Reason.NOT_STARTED: Explanation(
        "The attempt did not start in time, and fewer nodes are allowed.", "The next attempt asks for fewer nodes."
    ),
    Reason.DRAINING_PODS: Explanation("Pods of an earlier attempt are still ending."),
    Reason.BACKING_OFF: Explanation("The next attempt waits for its back-off time."),
    Reason.ATTEMPT_STARTED: Explanation("The Job of an attempt was created."),
    Reason.ALL_RANKS_SUCCEEDED: Explanation("All ranks have reached the last step."),
    Reason.RANK_ZERO_SUCCEEDED: Explanation("Rank 0 has reached the last step, which `successPolicy` asks for."),
    Reason.ALL_SHARDS_SUCCEEDED: Explanation("All prompts are sampled."),
    Reason.SEARCH_COMPLETE: Explanation("Every bucket has a batch size."),
    Reason.CACHE_HIT: Explanation("An earlier search with the same key has the answer."),
    Reason.RESTART_BUDGET_EXCEEDED: Explanation(
        "More failures than `restartPolicy.maxRestarts`.", "Read `attempts`, mend the cause, and start a new run."
    ),
    Reason.DISRUPTION_BUDGET_EXCEEDED: Explanation(
        "More disruptions than `restartPolicy.maxDisruptions`.", "Ask for quieter nodes, or raise the number."
    ),
    Reason.NO_PROGRESS: Explanation(
        "`restartPolicy.noProgressAttempts` attempts failed without a newer checkpoint.",
        "The cause repeats: read `attempts`; more frequent checkpoints help when attempts are short.",
    ),
    Reason.NON_RETRYABLE_EXIT: Explanation(
        "Starting again would end the same way: wrong command line, config or data, or twice the same divergence.",
        "Correct what the message names, and start a new run.",
    ),
    Reason.DEADLINE_EXCEEDED: Explanation(
        "The object was active for longer than `deadlines.activeSeconds`.", "Start a new run with more time."
    ),
    Reason.STARTUP_DEADLINE_EXCEEDED: Explanation(
        "Not all pods ran within `deadlines.startupSeconds`; the message says what they waited for.",
        "Make room, correct what the message names, or allow fewer nodes with `elastic.allowedNodes`.",
    ),
    Reason.IMAGE_PULL_FAILED: Explanation(
        "The image cannot be pulled; the message is the kubelet's.", "Correct the image or its pull secret."
    ),
    Reason.CANCELLED: Explanation("`spec.requests.stop` ended it."),
    Reason.CHECKPOINT_NOT_FOUND: Explanation(
        "The run has ended without the checkpoint that was asked for.", "Name a step that the run has saved."
    ),
    Reason.SHARDS_FAILED: Explanation(
        "Some prompts could not be sampled; status names the shards.", "See the logs of those pods."
    ),
    Reason.BUCKETS_FAILED: Explanation(
        "Some buckets could not be measured; status names them.", "See the logs of those probe pods."
    ),
    Reason.NODE_AVOIDED: Explanation("A node is kept out of this run's next attempts.", "Look at the node."),
    Reason.POD_FORCED: Explanation(
        "A pod on a node that does not answer was removed by force. Its processes may still run; they cannot commit.",
        "Look at the node.",
    ),
    Reason.SCALED_DOWN: Explanation("The run goes on with fewer nodes, as `elastic.allowedNodes` permits."),
}
