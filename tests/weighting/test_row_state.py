"""What strategies remember beside the rows."""

from __future__ import annotations

import torch

from tests.trainer.toy import make_trainer


def test_cutting_to_the_same_pieces_forgets_nothing_and_to_others_everything() -> None:
    model = make_trainer("MoCo").model
    ((name, state),) = model.row_states.items()
    kept: torch.Tensor = getattr(model, name)
    kept.fill_(2.0)
    shapes = [row.shape for row in state.rows[0]]
    state.cut(shapes)
    assert getattr(model, name).eq(2.0).all()
    state.cut([torch.Size([3])])
    assert torch.equal(getattr(model, name), torch.zeros(len(kept), 3))
