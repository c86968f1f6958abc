"""Graph networks of torch_geometric as encoders: ``torch_geometric:GCN``."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from fastmtl.errors import UsageError
from fastmtl.model.info import EncoderInfo
from fastmtl.support.extras import need

__all__ = ["GraphEncoder", "geometric_encoder"]

_DEFAULTS = {"in_channels": -1, "hidden_channels": 64, "num_layers": 3}


class GraphEncoder(nn.Module):
    """A network for the nodes of graphs, and a mean over the nodes of each graph.

    Args:
        network: Takes ``x`` (nodes, channels) and ``edge_index`` (2, edges).
        feature_dim: Channels of its output.
        pool: ``"mean"``, ``"sum"`` or ``"max"`` over the nodes of a graph; ``"none"`` for features of nodes.
    """

    def __init__(self, network: nn.Module, feature_dim: int, pool: str = "mean") -> None:
        super().__init__()
        if pool not in ("mean", "sum", "max", "none"):
            raise UsageError(f"pool must be mean, sum, max or none, got {pool!r}.")
        self.network = network
        self.feature_dim = feature_dim
        self.pool = pool

    def forward(self, graphs: Any) -> Tensor:
        """Return (graphs, feature_dim), or (nodes, feature_dim) without pooling, of a batch of torch_geometric."""
        if not hasattr(graphs, "edge_index"):
            raise UsageError(
                "A network of torch_geometric reads graphs (torch_geometric.data.Data), but the inputs are "
                f"{_form(graphs)}."
            )
        given = {name: graphs[name] for name in ("edge_weight", "edge_attr") if name in graphs and self._takes(name)}
        features: Tensor = self.network(graphs.x.float(), graphs.edge_index, **given)
        if self.pool == "none":
            return features
        reduce = {"mean": "mean", "sum": "sum", "max": "amax"}[self.pool]
        index = graphs.batch.unsqueeze(1).expand_as(features)
        empty = features.new_zeros(graphs.num_graphs, features.shape[1])
        return empty.scatter_reduce(0, index, features, reduce, include_self=False)

    def _takes(self, name: str) -> bool:
        support = {"edge_weight": "supports_edge_weight", "edge_attr": "supports_edge_attr"}
        return bool(getattr(self.network, support[name], False))


def _form(inputs: object) -> str:
    if isinstance(inputs, Tensor):
        return f"tensors of shape {tuple(inputs.shape)}"
    return f"of type {type(inputs).__name__}"


def geometric_encoder(name: str, args: Mapping[str, Any]) -> EncoderInfo:
    """Return what is known of a network of torch_geometric.

    Args:
        name: A class of ``torch_geometric.nn.models`` that makes features of nodes, such as GCN, GIN or GAT.
        args: Its arguments (``hidden_channels`` is 64 and ``num_layers`` 3 if not given; ``in_channels`` are those of
            the first inputs), and ``pool``, see `GraphEncoder`.

    Raises:
        UsageError: torch_geometric is not installed, or has no such network.
    """
    models = need("torch_geometric.nn.models", "graphs", f"The encoder torch_geometric:{name}")
    base = models.basic_gnn.BasicGNN
    kinds = {key: kind for key, kind in vars(models).items() if isinstance(kind, type) and issubclass(kind, base)}
    kinds.pop("BasicGNN", None)
    if name not in kinds:
        near = difflib.get_close_matches(name, kinds, n=1, cutoff=0.5)
        hint = f"Did you mean {near[0]!r}?" if near else f"It has {', '.join(kinds)}."
        raise UsageError(f"torch_geometric has no network of nodes {name!r}. {hint}")
    settings = _DEFAULTS | dict(args)
    pool = settings.pop("pool", "mean")
    width = settings.get("out_channels") or settings["hidden_channels"]
    return EncoderInfo(build=partial(_build, name, settings, width, pool), feature_dim=width)


def _build(name: str, settings: Mapping[str, Any], width: int, pool: str) -> nn.Module:
    models = need("torch_geometric.nn.models", "graphs", f"The encoder torch_geometric:{name}")
    try:
        network = getattr(models, name)(**settings)
    except (TypeError, ValueError) as error:
        raise UsageError(f"torch_geometric:{name} cannot be made with {dict(settings)}: {error}.") from error
    return GraphEncoder(network, width, pool)
