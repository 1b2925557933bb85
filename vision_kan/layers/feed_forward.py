"""The interface of feed-forwards, the bases of KANs with functions on edges and on channels, and the MLP.

A new feed-forward is a module with a subclass of `FeedForward` (often of `TwoLayerKAN` or `ChannelMLP`) and a line in
`models_kan.FEED_FORWARDS`. Then it can be trained, read back from a checkpoint, inspected, exported and counted; if it has
`PRUNES`, it can be pruned.
"""
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from timm.layers import Mlp, to_2tuple
from torch import Tensor, nn

from vision_kan.kernels import BASES
from vision_kan.layers.function_layer import GELU_FLOPS, Flops, FunctionLayer, function_layers, sum_flops


# ---------------------------------------------------------------- the two halves of a feed-forward
class Half:
    """A linear map and the functions before it: x [T, I] -> [T, O], as sum_ip W[o, i, p] f[t, i, p] + b[o].

    functions: the layer of learned functions; None: the features are the inputs."""
    functions: FunctionLayer | None
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def features(self, x: Tensor) -> Tensor:
        """f [T, I, P] of the inputs x [T, I]."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """W [O, I, P]."""
        raise NotImplementedError

    def set(self, weight: Tensor, bias: Tensor | None) -> None:
        """Write weight [O, I, P] and, if the half has one, bias [O]."""
        raise NotImplementedError

    def copy_from(self, old: "Half") -> None:
        """Copy everything but the functions from a half of the same widths."""
        raise NotImplementedError


class EdgeHalf(Half):
    """A layer with a function on every edge; its features are the basis values."""

    def __init__(self, layer: FunctionLayer, bias: Tensor | None = None):
        self.functions = self.layer = layer
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def features(self, x: Tensor) -> Tensor:
        return self.layer.basis(self.layer.normalised(x))

    @property
    def weight(self) -> Tensor:
        return self.layer.function_weights()

    @torch.no_grad()
    def set(self, weight: Tensor, bias: Tensor | None) -> None:
        self.layer.set_function_weights(weight, bias)

    def copy_from(self, old: Half) -> None:
        assert old.functions is not None
        self.layer.copy_grid(old.functions)


class ChannelHalf(Half):
    """An elementwise layer (`nn.Identity` for none) and an `nn.Linear`; its features are the layer's outputs."""

    def __init__(self, phi: nn.Module, linear: nn.Linear):
        self.functions = phi if isinstance(phi, FunctionLayer) else None
        self.phi, self.linear, self.bias = phi, linear, linear.bias

    def __call__(self, x: Tensor) -> Tensor:
        return self.linear(self.phi(x))

    def features(self, x: Tensor) -> Tensor:
        return self.phi(x)[..., None]

    @property
    def weight(self) -> Tensor:
        return self.linear.weight[..., None]

    @torch.no_grad()
    def set(self, weight: Tensor, bias: Tensor | None) -> None:
        self.linear.weight.copy_(weight[..., 0])
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias)

    def copy_from(self, old: Half) -> None:
        self.set(old.weight, old.bias)


# ---------------------------------------------------------------- feed-forwards
class FeedForward(nn.Module):
    """Base class of the entries of `models_kan.FEED_FORWARDS`.

    TITLE: its name for a model card.
    FUNCTIONS: a clause on what shares a function, for messages.
    PRUNES: what can be pruned, of `analysis.pruning.plans.KINDS`.
    HOLDS_MLP: it has an MLP's parameters under the same names, and with an MLP's weights begins as that MLP.
    AS_MLP: a clause on how exactly, for the learned functions in a report.
    FITS_MLP: `models.conversion` can fit it to an MLP.
    OWN_FLAGS: training flags whose defaults differ for it."""
    TITLE: ClassVar[str]
    FUNCTIONS: ClassVar[str] = "every edge has a function of its own"
    PRUNES: ClassVar[tuple[str, ...]] = ()
    HOLDS_MLP: ClassVar[bool] = False
    AS_MLP: ClassVar[str] = "begins as the MLP's activation"
    FITS_MLP: ClassVar[bool] = False
    OWN_FLAGS: ClassVar[Mapping[str, float]] = {}

    @classmethod
    def with_options(cls, size: Any, *args: Any, **kwargs: Any) -> Callable[..., nn.Module]:
        """The constructor that timm calls as `mlp_layer`. size: an entry of `models_kan.SIZES`.

        A subclass takes the model's options as keyword arguments, each a flag of the same name. If it returns a partial,
        `models_kan.own_options` reads the partial's keywords."""
        raise NotImplementedError

    @classmethod
    def read_options(cls, blocks: Sequence[Mapping[str, Tensor]], dim: int) -> dict[str, Any] | None:
        """Options and other arguments of the model with these weights, or None if they are of another feed-forward.

        blocks: the feed-forward's tensors in each block, by their names in it.
        dim: the width of the blocks."""
        raise NotImplementedError

    def flops(self, tokens: int) -> Flops:
        """FLOPs of the forward pass of this number of tokens."""
        raise NotImplementedError

    def halves(self) -> tuple[Half, Half]:
        """Its two linear maps, each with the functions before it; needed for `PRUNES`."""
        raise NotImplementedError


class TwoLayerKAN(FeedForward):
    """Two layers with a function on every edge in place of an MLP, dropout after each.

    drop: one rate or a pair."""

    def __init__(self, first: FunctionLayer, second: FunctionLayer, drop: float | Sequence[float] = 0.0):
        super().__init__()
        self.layers: Any = nn.ModuleList([first, second])
        self.drops = nn.ModuleList([nn.Dropout(p) for p in to_2tuple(drop)])

    def init_weights(self) -> None:
        """Initialise every parameter and the grids. timm calls it last, also after `to_empty` from meta."""
        for layer in self.layers:
            layer.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        for layer, drop in zip(self.layers, self.drops):
            x = drop(layer(x))
        return x

    def flops(self, tokens: int) -> Flops:
        return sum_flops(layer.flops(tokens) for layer in self.layers)

    def halves(self) -> tuple[Half, Half]:
        return EdgeHalf(self.layers[0]), EdgeHalf(self.layers[1])


class ChannelMLP(FeedForward):
    """y = W2 f2(W1 f1(x) + b1) + b2 in place of an MLP, with learned functions that groups of channels share. Dropout comes after
    f2 and after W2.

    NAMES: f1's and f2's, which begin the keys of their weights.
    first: f1, whose channels are the inputs. second: f2, whose channels are the hidden units.
    bias: of W1 and W2, one choice or a pair. drop: one rate or a pair."""
    FUNCTIONS = "groups of channels share their functions"
    HOLDS_MLP = True
    NAMES: ClassVar[tuple[str, str]]

    def __init__(self, first: nn.Module, second: nn.Module, in_features: int, hidden: int, out_features: int,
                 bias: bool | Sequence[bool] = True, drop: float | Sequence[float] = 0.0, **dd: Any):
        super().__init__()
        biases, drops = to_2tuple(bias), to_2tuple(drop)
        self.add_module(self.NAMES[0], first)
        self.fc1 = nn.Linear(in_features, hidden, bias=biases[0], **dd)
        self.add_module(self.NAMES[1], second)
        self.drop1 = nn.Dropout(drops[0])
        self.fc2 = nn.Linear(hidden, out_features, bias=biases[1], **dd)
        self.drop2 = nn.Dropout(drops[1])

    @property
    def functions(self) -> tuple[Any, Any]:
        """f1 and f2."""
        return getattr(self, self.NAMES[0]), getattr(self, self.NAMES[1])

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.functions
        return self.drop2(self.fc2(self.drop1(second(self.fc1(first(x))))))

    def flops(self, tokens: int) -> Flops:
        linear = Flops(2 * tokens * (self.fc1.weight.numel() + self.fc2.weight.numel()), 0)
        return sum_flops([linear, *(layer.flops(tokens) for layer in function_layers(self).values())])

    def halves(self) -> tuple[Half, Half]:
        first, second = self.functions
        return ChannelHalf(first, self.fc1), ChannelHalf(second, self.fc2)


class MLP(FeedForward):
    """DeiT's own MLP, the twin of every KAN, hidden width 4 x dim."""
    TITLE = "MLP"
    HOLDS_MLP = True

    @classmethod
    def with_options(cls, size: Any) -> Callable[..., nn.Module]:
        return Mlp      # timm's; this class only represents it in the table

    @classmethod
    def read_options(cls, blocks: Sequence[Mapping[str, Tensor]], dim: int) -> dict[str, Any] | None:
        hidden = widths(blocks, "fc1.weight")
        return {"mlp_ratio": hidden / dim} if isinstance(hidden, int) and hidden != 4 * dim else {}


_MLPS = {f"{linear}.{kind}" for linear in ("fc1", "fc2") for kind in ("weight", "bias")}


def beginnings(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, str]:
    """The parameters and buffers of learned functions that keep their initial values because `state` has only an MLP's weights
    for their feed-forwards: key -> `FeedForward.AS_MLP`."""
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, FeedForward) and module.HOLDS_MLP:
            theirs = {key.removeprefix(f"{name}.") for key in state if key.startswith(f"{name}.")}
            if "fc1.weight" in theirs and theirs <= _MLPS:
                found |= {f"{name}.{key}": module.AS_MLP for key in module.state_dict() if key not in _MLPS}
    return found


def base_of(act_layer: Callable[[], nn.Module]) -> str:
    """The key of `kernels.BASES` for an activation. Raises ValueError if there is none."""
    activation, u = act_layer(), torch.linspace(-4, 4, 65, device="cpu")
    for base, function in BASES.items():
        if torch.allclose(activation(u.clone()), function(u), rtol=0, atol=1e-6):       # it may work in place
            return base
    raise ValueError(f"the activation {activation} is not one of {', '.join(BASES)}: choose one of them (base=, --kan-base)")


def mlp_flops(mlp: Mlp, tokens: int) -> Flops:
    """FLOPs of timm's MLP. Its activation counts as GELU."""
    fc1: Any = mlp.fc1
    fc2: Any = mlp.fc2
    return Flops(2 * tokens * (fc1.weight.numel() + fc2.weight.numel()), GELU_FLOPS * tokens * fc1.out_features)


# ---------------------------------------------------------------- reading weights back
def widths(blocks: Sequence[Mapping[str, Tensor]], first_map: str) -> int | list[int]:
    """The hidden width of the feed-forwards, the outputs of their first linear map; a list if blocks differ."""
    return one_or_each([block[first_map].shape[0] for block in blocks if first_map in block])


def one_or_each(values: list[int]) -> int | list[int]:
    """The widths of the blocks as `hdim_kan`: one number if they are all the same, else a list."""
    return values[0] if len(set(values)) == 1 else values


def grid_range_of(points: Tensor) -> tuple[float, float]:
    """The first and last point of a stored grid, for --kan-grid-range."""
    return round(float(points[0]), 6), round(float(points[-1]), 6)
