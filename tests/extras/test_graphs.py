"""Graph networks of torch_geometric as encoders, on graphs of a user's data set."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastmtl import load
from fastmtl.cli import main
from fastmtl.data import find_encoder
from fastmtl.data.collate import join_inputs
from fastmtl.errors import UsageError

DATA = """
import torch
from torch_geometric.data import Data
from fastmtl.data import DatasetInfo, classes, regression

def row(index):
    generator = torch.Generator().manual_seed(index)
    nodes = 4 + index % 3
    edges = torch.stack([torch.arange(nodes), torch.arange(nodes).roll(1)])
    x = torch.randn(nodes, 5, generator=generator)
    labels = {"size": torch.tensor([float(nodes)]), "sign": torch.tensor(int(x.sum() > 0))}
    return Data(x=x, edge_index=edges), labels

def make():
    rows = [row(index) for index in range(32)]
    return DatasetInfo(
        tasks={"size": regression(), "sign": classes(2)},
        load_splits=lambda options: options.splits(train=rows, test=rows[:8]),
    )
"""


@pytest.mark.parametrize("name", ["GCN", "GAT", "GIN"])
def test_graphs_are_pooled_one_by_one(name: str) -> None:
    from torch_geometric.data import Data

    torch.manual_seed(0)
    edges = torch.tensor([[0, 1, 2], [1, 2, 0]])
    graphs = [Data(x=torch.randn(3, 4), edge_index=edges) for _ in range(3)]
    about = find_encoder(f"torch_geometric:{name}", {"hidden_channels": 8, "num_layers": 2, "in_channels": 4}).value
    encoder = about.build().eval()
    with torch.no_grad():
        whole = encoder(join_inputs(graphs, None))
        alone = torch.cat([encoder(join_inputs([graph], None)) for graph in graphs])
    assert whole.shape == (3, about.feature_dim) == (3, 8)
    torch.testing.assert_close(whole, alone)


def test_the_command_trains_on_graphs(tmp_path: Path) -> None:
    file, run = tmp_path / "graphs.py", tmp_path / "run"
    file.write_text(DATA)
    words = ["--dataset", f"{file}:make", "--encoder", "torch_geometric:GraphSAGE", "--batch-size", "8"]
    assert main(["train", *words, "--weighting", "pcgrad", "--run-dir", str(run), "--no-plot"]) == 0
    assert main(["eval", str(run)]) == 0
    model = load(run)
    assert model.state_dict()["network.encoder.network.convs.0.lin_l.weight"].shape == (64, 5)


def test_mistakes_are_one_sentence() -> None:
    with pytest.raises(UsageError, match="Did you mean 'GCN'"):
        find_encoder("torch_geometric:GCM")
    with pytest.raises(UsageError, match="pool must be"):
        find_encoder("torch_geometric:GCN", {"pool": "middle"}).value.build()


def test_inputs_that_are_no_graphs_are_refused() -> None:
    encoder = find_encoder("torch_geometric:GCN").value.build()
    with pytest.raises(UsageError, match=r"reads graphs .*, but the inputs are tensors of shape \(4, 3, 8, 8\)"):
        encoder(torch.rand(4, 3, 8, 8))
