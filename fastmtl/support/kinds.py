"""Type aliases for users' objects of any type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

__all__ = ["Settings", "State", "Tree"]

# A tensor, or tensors and others in containers: inputs, labels, predictions.
Tree: TypeAlias = Any
# Arguments by name.
Settings: TypeAlias = Mapping[str, Any]
# What a state_dict() returns.
State: TypeAlias = dict[str, Any]
