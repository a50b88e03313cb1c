"""Modules for graphs, molecules and cells."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from recipes.public_modules import Public
from recipes.public_modules.vision import Task


def gin() -> Public:
    """Return the graph classifier of torch_geometric's Lightning example: a Batch of graphs of several sizes."""
    from torch_geometric.data import Batch, Data
    from torch_geometric.nn import GIN, MLP, global_add_pool
    from torch_geometric.utils import to_dense_batch

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gnn = GIN(5, 8, 2, norm=None)
            self.classifier = MLP([8, 8, 3], norm=None)

        def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
            result: Tensor = self.classifier(global_add_pool(self.gnn(x, edge_index), batch))
            return result

    def loss(module: Any, data: Any) -> Tensor:
        return nn.functional.cross_entropy(module(data.x, data.edge_index, data.batch), data.y)

    def graph(size: int) -> Any:
        ring = torch.arange(size)
        return Data(torch.randn(size, 5), torch.stack([ring, ring.roll(1)]), y=torch.randint(3, (1,)))

    data = Batch.from_data_list([graph(size) for size in (4, 5, 3, 6)])
    network = Network()
    mask = torch.arange(6) < torch.tensor([[4], [5], [3], [6]])

    def dense() -> Tensor:
        return torch.zeros(4, 6, 5).masked_scatter(mask[..., None], data.x)

    names = {"to_dense_batch": to_dense_batch}
    return Public(Task(network, loss), data, lambda x: network(x[mask], data.edge_index, data.batch), dense, names)


def gcn() -> Public:
    """Return a node classifier of torch_geometric: one graph, all of whose nodes depend on each other."""
    from torch_geometric.data import Data
    from torch_geometric.nn import GCN

    ring = torch.arange(8)
    data = Data(torch.randn(8, 5), torch.stack([ring, ring.roll(1)]), y=torch.randint(3, (8,)))
    network = GCN(5, 8, 2, out_channels=3)
    module = Task(network, lambda module, data: nn.functional.cross_entropy(module(data.x, data.edge_index), data.y))
    # a whole graph is one example, and its node 0 the one that is predicted
    return Public(module, data, lambda x: network(x[0], data.edge_index)[:1], lambda: data.x[None])


def chemprop_mpnn() -> Public:
    """Return chemprop's message-passing network for molecules: one number per molecule."""
    from chemprop.data import MoleculeDatapoint, MoleculeDataset, build_dataloader
    from chemprop.models import MPNN
    from chemprop.nn import BondMessagePassing, MeanAggregation, RegressionFFN

    smiles = ["CCO", "CCN", "CCC", "COC"]
    points = [MoleculeDatapoint.from_smi(one, [float(i)]) for i, one in enumerate(smiles)]
    batch = next(iter(build_dataloader(MoleculeDataset(points), batch_size=4, shuffle=False)))
    module = MPNN(BondMessagePassing(d_h=8), MeanAggregation(), RegressionFFN(input_dim=8, hidden_dim=8))

    def with_atoms(graph: Any, atoms: Tensor) -> Any:
        graph = copy.copy(graph)
        graph.V = atoms
        return graph

    def network(atoms: Tensor) -> Tensor:
        result: Tensor = module(with_atoms(batch.bmg, atoms.flatten(0, 1)))
        return result

    return Public(module, batch, network, lambda: batch.bmg.V.view(4, 3, -1), {"with_atoms": with_atoms})


def scvi_classifier() -> Public:
    """Return scvi-tools' training plan of a classifier of cells: a dictionary of counts and labels."""
    from scvi.module import Classifier
    from scvi.train import ClassifierTrainingPlan

    network = Classifier(n_input=20, n_labels=3, n_hidden=8, logits=True)
    module = ClassifierTrainingPlan(network)
    batch = {"X": torch.rand(6, 20), "labels": torch.randint(3, (6, 1))}
    return Public(module, batch, network, lambda: batch["X"])
