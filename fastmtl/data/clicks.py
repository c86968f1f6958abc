"""Generated impressions with known probabilities of click and conversion, of any number, without storing them.

A row is a function of its number and a seed, so that a million rows or ten billion take the same memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastmtl.errors import UsageError

__all__ = ["ClickRows", "click_features"]

USERS, ITEMS, WATCHED, GROUPS = 100_000, 50_000, 5, 20
# Weyl constants of splitmix64, as signed numbers.
_STEP, _MIX1, _MIX2 = -7046029254386353131, -4658895280553007687, -7723592293110705685


class ClickRows(Dataset[tuple[dict[str, Tensor], dict[str, Tensor]]]):
    """Impressions of items to users, with the labels ``click`` and ``conversion``: a click that led to a purchase.

    The logit of a click is ``b + s_u + s_v + a_u . c_v`` of a user u and an item v, that of a conversion after a click
    ``b' + rho (s_u + s_v) + sqrt(1 - rho^2) (t_u + t_v)``, with independent normal s, t, a and c that the embeddings of
    users and items can learn. Items are seen with the frequencies of a power law. Both labels are those of all
    impressions, and ``conversion`` is 1 only where ``click`` is. A batch is one vectorised fetch.

    Args:
        rows: The number of impressions.
        first: The number of the first one: sets that do not overlap have other impressions of the same users and items.
        seed: Another seed makes other users and items.
        rho: How much the reasons for a click and for a conversion have in common, from -1 to 1.
        users, items: How many there are.

    Raises:
        UsageError: An argument is out of range.
    """

    def __init__(
        self, rows: int, *, first: int = 0, seed: int = 0, rho: float = 0.7, users: int = USERS, items: int = ITEMS
    ) -> None:
        for name, value, least in (("rows", rows, 1), ("first", first, 0), ("users", users, 1), ("items", items, 1)):
            if value < least:
                raise UsageError(f"{name} must be at least {least}, got {value}.")
        if not -1 <= rho <= 1:
            raise UsageError(f"rho must be from -1 to 1, got {rho}.")
        self.rows, self.first, self.seed, self.rho, self.users, self.items = rows, first, seed, rho, users, items

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return one row."""
        inputs, labels = self.__getitems__([index])
        return {name: column[0] for name, column in inputs.items()}, {task: y[0] for task, y in labels.items()}

    def __getitems__(self, indices: Sequence[int]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the features (b, ...) by name, and labels (b, 1) by task."""
        row = self._numbers(indices)
        user, item = self._pair(row)
        click, conversion = self._probabilities(user, item)
        clicked = self._uniform(row, 3) < click
        converted = clicked & (self._uniform(row, 4) < conversion)
        watched = torch.stack([self._item(self._uniform(user * WATCHED + k, 5)) for k in range(WATCHED)], 1)
        # Some users have watched less.
        length = (self._uniform(user, 6) * (WATCHED + 1)).long()
        inputs = {
            "user": user,
            "item": item,
            "group": (self._uniform(user, 7) * GROUPS).long(),
            "watched": torch.where(torch.arange(WATCHED) < length[:, None], watched, -1),
            "price": self._normal(item, 8).float(),
        }
        return inputs, {"click": clicked.float()[:, None], "conversion": converted.float()[:, None]}

    def probabilities(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Return the probabilities (b,) of a click, of a conversion after one, and of both, by name."""
        click, conversion = self._probabilities(*self._pair(self._numbers(indices)))
        return {"click": click, "conversion after click": conversion, "conversion": click * conversion}

    def _numbers(self, indices: Sequence[int]) -> Tensor:
        return torch.as_tensor(indices, dtype=torch.int64) + self.first

    def _pair(self, row: Tensor) -> tuple[Tensor, Tensor]:
        return (self._uniform(row, 1) * self.users).long(), self._item(self._uniform(row, 2))

    def _item(self, uniform: Tensor) -> Tensor:
        """Return items with density falling as 1 / (1 + item)."""
        return (((self.items + 1) ** uniform.clamp(max=1 - 1e-12)) - 1).long().clamp(max=self.items - 1)

    def _probabilities(self, user: Tensor, item: Tensor) -> tuple[Tensor, Tensor]:
        taste = sum(self._normal(user, 20 + k) * self._normal(item, 30 + k) for k in range(2))
        common = 0.6 * (self._normal(user, 10) + self._normal(item, 11))
        own = 0.6 * (self._normal(user, 12) + self._normal(item, 13))
        after = self.rho * common + math.sqrt(1 - self.rho**2) * own
        return (common + 0.5 * taste - 1.5).sigmoid(), (after - 1.0).sigmoid()

    def _uniform(self, number: Tensor, stream: int) -> Tensor:
        """Return float64 numbers from 0 to 1, of splitmix64: the same for a number, a stream and the seed."""
        bits = (number + 1) * _STEP + _wrapped((self.seed * 1000 + stream) * _MIX2)
        bits = (bits ^ _shifted(bits, 30)) * _MIX1
        bits = (bits ^ _shifted(bits, 27)) * _MIX2
        bits = bits ^ _shifted(bits, 31)
        return _shifted(bits, 11).double() * 2.0**-53

    def _normal(self, number: Tensor, stream: int) -> Tensor:
        return torch.special.ndtri(self._uniform(number, stream).clamp(1e-12, 1 - 1e-12))


def _wrapped(number: int) -> int:
    """Return a number modulo 2^64, as a signed one."""
    return (number + 2**63) % 2**64 - 2**63


def _shifted(bits: Tensor, places: int) -> Tensor:
    """Return 64 bits moved to the right, with zeros behind them."""
    return (bits >> places) & ((1 << (64 - places)) - 1)


def click_features(users: int = USERS, items: int = ITEMS, dim: int = 16, sparse: bool = False) -> list[object]:
    """Return the description of the features, for ``fastmtl.model.FeatureEncoder``; items share one table."""
    from fastmtl.model import Bag, Categorical, Numeric

    return [
        Categorical("user", users, dim, sparse=sparse),
        Categorical("item", items, dim, table="items", sparse=sparse),
        Categorical("group", GROUPS, 8),
        Bag("watched", items, dim, table="items", sparse=sparse),
        Numeric("price"),
    ]
