"""The network of the QM9 benchmarks."""

from typing import Any

import torch
from torch import Tensor, nn

from gradbal.aggregators._arguments import integer
from gradbal.nn.backbones._extras import needed

__all__ = ["MoleculeEncoder"]


class MoleculeEncoder(nn.Module):
    """Message passing over a molecule's bonds, then a pooled vector of it.

    "Neural Message Passing for Quantum Chemistry", ICML 2017, https://arxiv.org/abs/1704.01212, in
    the form of PyTorch Geometric's example, on which the papers compare: a linear layer,
    `steps` times NNConv (mean over neighbours) and a GRU, then Set2Set and a linear layer, with
    ReLU.

    Shapes: a `torch_geometric.data.Batch` with ``x [nodes, in_channels]``,
    ``edge_index [2, edges]``, ``edge_attr [edges, edge_channels]`` and ``batch [nodes]``, to
    ``[molecules, dim]``.

    Args:
        in_channels: features of an atom; 11 in QM9.
        edge_channels: features of a bond; 5 with distances in QM9, 4 without.
        dim: width, 64 in the papers.
        steps: of message passing, and of Set2Set.
        edge_dim: width inside the network that makes NNConv's weights.

    Raises:
        ModuleNotFoundError: torch_geometric is not installed.
        TypeError, ValueError: an argument that is no integer, or below 1.

    Example:
        >>> from torch_geometric.data import Batch, Data
        >>> bonds = torch.tensor([[0, 0, 1, 2], [1, 2, 0, 0]])
        >>> water = Data(torch.rand(3, 11), bonds, torch.rand(4, 5))
        >>> MoleculeEncoder(dim=8)(Batch.from_data_list([water, water])).shape
        torch.Size([2, 8])
    """

    def __init__(
        self,
        in_channels: int = 11,
        edge_channels: int = 5,
        dim: int = 64,
        *,
        steps: int = 3,
        edge_dim: int = 128,
    ) -> None:
        super().__init__()
        arguments = (in_channels, edge_channels, dim, steps, edge_dim)
        names = ("in_channels", "edge_channels", "dim", "steps", "edge_dim")
        for name, value in zip(names, arguments, strict=True):
            integer(name, value, 1)
        pyg = needed("torch_geometric.nn", "molecules", "MoleculeEncoder")
        self.steps = steps
        self.atoms = nn.Linear(in_channels, dim)
        edges = nn.Sequential(
            nn.Linear(edge_channels, edge_dim), nn.ReLU(), nn.Linear(edge_dim, dim * dim)
        )
        self.conv = pyg.NNConv(dim, dim, edges, aggr="mean")
        self.gru = nn.GRU(dim, dim)
        self.pool = pyg.aggr.Set2Set(dim, processing_steps=steps)
        self.out = nn.Linear(2 * dim, dim)

    def forward(self, data: Any) -> Tensor:
        """One vector a molecule, ``[molecules, dim]``."""
        z = torch.relu(self.atoms(data.x))
        h = z[None]
        for _ in range(self.steps):
            m = torch.relu(self.conv(z, data.edge_index, data.edge_attr))
            z, h = self.gru(m[None], h)
            z = z[0]
        return torch.relu(self.out(self.pool(z, data.batch)))
