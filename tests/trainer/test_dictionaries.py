"""Batches in dictionaries of a class of their own, whose entries are attributes too."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.trainer.toy import encoder, flat, halves, loaders, make_trainer

LABELS = {"task": torch.arange(4)}


class Attributes(dict[str, Any]):
    """Entries are attributes, and every other name is None."""

    def __init__(self, **entries: Any) -> None:
        super().__init__(**entries)
        self.__dict__ = self


class Answering(dict[str, Any]):
    __getattr__ = dict.get


class Raising(dict[str, Any]):
    """Every other name is a KeyError, also to what copies objects."""

    def __init__(self, **entries: Any) -> None:
        super().__init__(**entries)
        self.kind = "toy"

    def __getattr__(self, name: str) -> Any:
        return self[name]


@pytest.mark.parametrize("kind", [Attributes, Answering, Raising])
def test_dictionaries_with_attributes_stay_what_they_are(kind: Any) -> None:
    class OfAttributes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = encoder()

        def forward(self, inputs: Any) -> Tensor:
            assert inputs.x is inputs["x"]
            return self.inner(inputs.x)

    data = [(kind(x=x), labels) for x, labels in loaders()]
    for weighting in ("EW", "MOML"):
        trainer = make_trainer(weighting, encoder_class=OfAttributes)
        trainer.train(data, data, 1)
        plain = make_trainer(weighting)
        plain.train(loaders(), loaders(), 1)
        torch.testing.assert_close(flat(trainer.model.parameters()), flat(plain.model.parameters()))


def test_a_dictionary_in_another_object_keeps_its_entries() -> None:
    class Encoding(UserDict[str, Any]):
        pass

    tree = Encoding({"data": torch.arange(4), "x": torch.ones(4)})
    first = halves((tree, LABELS))[0][0]
    assert isinstance(first, Encoding)
    assert first["data"].tolist() == [0, 1]
    assert tree["data"].tolist() == [0, 1, 2, 3]
