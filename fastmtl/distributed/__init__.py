"""Training in several processes, each with its part of every batch: the same updates as one process's."""

from __future__ import annotations

from fastmtl.distributed.loading import shard
from fastmtl.distributed.peers import Alone, Peers, find_peers, join, leave, together

__all__ = ["Alone", "Peers", "find_peers", "join", "leave", "shard", "together"]
