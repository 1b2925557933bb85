"""A feed-forward that the project does not have: Chebyshev polynomials on every edge. All that the project must know of it is in
this file; test_new_feed_forward.py adds it to the table."""
from functools import partial

import torch
from torch import nn

from vision_kan.layers.feed_forward import TwoLayerKAN, widths
from vision_kan.layers.function_layer import Flops, FunctionLayer


class ToyLayer(FunctionLayer):
    """y_o = sum_ik W[o, i, k] cos(k arccos(tanh(x_i))): x [..., in_features] -> [..., out_features]."""

    def __init__(self, in_features, out_features, num_grids, device=None, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, num_grids, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.normal_(self.weight, std=self.weight[0].numel() ** -0.5)

    def polynomials(self, u):
        x = u.tanh()
        values = [torch.ones_like(x), x]
        while len(values) < self.weight.shape[2]:
            values.append(2 * x * values[-1] - values[-2])
        return torch.stack(values, -1)

    def forward(self, x):
        return nn.functional.linear(self.polynomials(x).flatten(-2), self.weight.flatten(1))

    def flops(self, tokens):
        return Flops(2 * tokens * self.weight.numel(), 3 * tokens * self.weight[0].numel())

    def grid_points(self):
        return torch.linspace(-2, 2, self.weight.shape[2], dtype=torch.float64)

    @torch.no_grad()
    def basis(self, u):
        return self.polynomials(u)

    def function_weights(self):
        return self.weight

    @torch.no_grad()
    def set_function_weights(self, weights, bias=None):
        self.weight.copy_(weights)

    def function_parameters(self):
        return [self.weight]


class ToyKAN(TwoLayerKAN):
    TITLE = "Chebyshev KAN"
    PRUNES = ("hidden", "edges")

    def __init__(self, in_features, hidden_features=None, out_features=None, act_layer=None, norm_layer=None, bias=True, drop=0.0,
                 device=None, dtype=None, *, hdim=None, num_grids=4):
        hidden = hdim or hidden_features
        super().__init__(ToyLayer(in_features, hidden, num_grids, device, dtype),
                         ToyLayer(hidden, out_features or in_features, num_grids, device, dtype), drop)

    @classmethod
    def with_options(cls, size, *, hdim_kan: int | None = None, kan_grid_points: int = 4):
        return partial(cls, hdim=hdim_kan or size.embed_dim // 4, num_grids=kan_grid_points)

    @classmethod
    def read_options(cls, blocks, dim):
        weight = blocks[0].get("layers.0.weight")
        if weight is None:
            return None
        return {"hdim_kan": widths(blocks, "layers.0.weight"), "kan_grid_points": weight.shape[2]}
