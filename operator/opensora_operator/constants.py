"""Names that the operator, the CLI, the pods and the users' tools share."""

from __future__ import annotations

from enum import IntEnum

GROUP = "opensora.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"

# Labels of every child, for selectors: `kubectl logs -l opensora.dev/name=demo`.
LABEL_KIND = f"{GROUP}/kind"
"""Kind of the owner."""
LABEL_NAME = f"{GROUP}/name"
"""Name of the owner."""
LABEL_UID = f"{GROUP}/uid"
"""UID of the owner: what the operator selects by, since names are used again."""
LABEL_ATTEMPT = f"{GROUP}/attempt"
"""Number of the attempt that the child belongs to."""
ANNOTATION_CONFIG = f"{GROUP}/config"
"""Of a Job: the ConfigMap that its pods read."""
ANNOTATION_NODES = f"{GROUP}/nodes"
"""Of a Job: the pods of the gang."""
LABEL_KUEUE_QUEUE = "kueue.x-k8s.io/queue-name"
LABEL_KUEUE_PRIORITY = "kueue.x-k8s.io/priority-class"

MANAGER = "opensora-operator"
"""Field manager, `app.kubernetes.io/managed-by`, and reporting component of events."""
TRAINER = "trainer"
"""Name of the container of every pod that runs the core."""
JOB_INDEX = "batch.kubernetes.io/job-completion-index"
"""Annotation and label of a pod: its index in the Job."""

RESERVED_ENV = (
    "MASTER_ADDR",
    "MASTER_PORT",
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "JOB_COMPLETION_INDEX",
)
"""Variables that the launcher, torch or Kubernetes set; a user's value would break the rendezvous without a word."""
RESERVED_ENV_PREFIX = "OPENSORA_"


class ExitCode(IntEnum):
    """How a training process ended; the core's table, see docs/reference/exit-codes.md."""

    DONE = 0
    FAILED = 1
    USAGE = 64
    DATA = 65
    STOPPED = 75
    CONFIG = 78
    PEER_LOST = 84
    STALLED = 85
    OUT_OF_MEMORY = 86
    DIVERGED = 87
    NODE_UNHEALTHY = 88
    SUPERSEDED = 89
    INTERRUPTED = 130
