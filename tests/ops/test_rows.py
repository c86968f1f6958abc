"""The helpers of the tests on rows: what they move to a device keeps its layout and comes back."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.ops.rows import on_device


def test_tensors_keep_strides_offsets_and_sharing() -> None:
    memory = torch.arange(24.0)
    given = [memory[1:13].view(3, 4).T, None, memory[2:6], torch.ones(()).expand(2, 3), torch.zeros(0)]
    seen: list[Tensor | None] = []

    def kernel(tensors: list[Tensor | None], times: int) -> Tensor:
        seen.extend(tensors)
        assert tensors[2] is not None
        tensors[2].mul_(times)
        return tensors[2].clone()

    result = on_device(kernel, "cpu")(given, 10)
    for own, other in zip(given, seen, strict=True):
        assert (own is None) == (other is None)
        if own is not None and other is not None:
            assert own.stride() == other.stride()
            assert own.storage_offset() == other.storage_offset()
    assert torch.equal(result, torch.tensor([20.0, 30.0, 40.0, 50.0]))
    assert torch.equal(memory[:8], torch.tensor([0.0, 1.0, 20.0, 30.0, 40.0, 50.0, 6.0, 7.0]))
