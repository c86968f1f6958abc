"""Hard parameter sharing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastmtl.architecture.base import AbsArchitecture

__all__ = ["HPS"]


class HPS(AbsArchitecture):
    """Hard Parameter Sharing: one encoder for all tasks, one decoder each.

    Source: Caruana, "Multitask Learning: A Knowledge-Based Source of Inductive Bias", ICML 1993.
    """

    def __init__(
        self,
        task_name: list[str],
        encoder_class: Callable[[], nn.Module],
        decoders: nn.ModuleDict,
        rep_grad: bool,
        multi_input: bool,
        device: torch.device,
        **kwargs: Any,
    ) -> None:
        super().__init__(task_name, encoder_class, decoders, rep_grad, multi_input, device, **kwargs)
        self.encoder = encoder_class()
