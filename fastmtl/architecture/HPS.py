"""Hard parameter sharing."""

from __future__ import annotations

from fastmtl.architecture.abstract_arch import AbsArchitecture

__all__ = ["HPS"]


class HPS(AbsArchitecture):
    """Hard Parameter Sharing: one encoder for all tasks, one decoder each.

    Source: Caruana, "Multitask Learning: A Knowledge-Based Source of Inductive Bias", ICML 1993.
    """

    def _make_network(self) -> None:
        self.encoder = self.encoder_class()
