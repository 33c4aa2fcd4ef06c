"""Exceptions that end a rank, translated into the exit-code contract in one place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist

from opensora.errors import OpenSoraError, OutOfMemoryError, PeerLostError

_LOST_PEER_SIGNS = (
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "connection refused",
    "socket closed",
    "timed out waiting",
    "wait timeout",
    "nccl communicator was aborted",
    "remote process exited",
    "rendezvous",
)
"""How gloo, NCCL and the rendezvous store say that another rank is gone."""


@contextlib.contextmanager
def translated(where: str = "") -> Iterator[None]:
    """Turn foreign exceptions into ours.

    Raises:
        OutOfMemoryError: host or device memory is used up.
        PeerLostError: a collective failed because another rank is gone.
    """
    try:
        yield
    except OpenSoraError:
        raise
    except (torch.OutOfMemoryError, MemoryError) as error:
        summary = torch.cuda.memory_summary() if torch.cuda.is_available() else ""
        raise OutOfMemoryError(
            f"out of memory{where}: {error}\n{summary}".rstrip(),
            hint="lower the batch size of this bucket, or set parallel.activation_checkpointing=full",
        ) from error
    except (dist.DistError, RuntimeError) as error:
        text = str(error).lower()
        if isinstance(error, dist.DistError) or any(sign in text for sign in _LOST_PEER_SIGNS):
            first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise PeerLostError(f"another rank is gone{where}: {first_line}") from error
        if "alloc" in text and "memory" in text:  # the CPU allocator raises a plain RuntimeError
            raise OutOfMemoryError(
                f"out of memory{where}: {error}", hint="lower the batch size of this bucket"
            ) from error
        raise
