"""The models of the variants, and what the library's models do not have."""
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.layers import SwiGLU
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import register_parametrization

from benchmarks.trials.variants import SIZES, Variant, run_name
from faster_kan import FasterKANLayer
from models_kan import TAGS, ModelSpec, options_of
from vision_kan.checkpoints.read import CHECKPOINT, load_file
from vision_kan.common.errors import UserError
from vision_kan.common.seeds import seed_everything
from vision_kan.kernels import BASES, rswaf_basis
from vision_kan.kernels.backend import autocast_dtype
from vision_kan.layers.function_layer import BASE_FLOPS, Flops
from vision_kan.layers.group_kan import GroupActivation
from vision_kan.models.weight_init import init_mimetic

MODEL = {**TAGS["cifar10"].kwargs, "weight_init": "reset"}      # PyTorch's initialisation
WEIGHTS_ONLY = {"frozen", "gain", "weight_init"}      # options that change no architecture


def build(variant: Variant, seed: int, num_classes: int, functions: Path | None = None, batch: Tensor | None = None) -> nn.Module:
    """The model of a variant. What it shares with the MLP twin has the twin's random weights.

    Its options beside those of the model. act: another fixed activation in the MLP. gated: SwiGLU. frozen: learned functions that
    are not trained here, see `_load_functions`. phi_qkv, phi_out: a learned function before the qkv map, or after the second map.
    phi2_scale: see `ScaledActivation`. gain: of a full-edge layer's initial weights. whiten: see `_Whitened`.
    weight_init=mimetic: of the attention, in the twin's weights, too.

    functions: folder of the runs that have learned functions. batch: normalised images [B, 3, 32, 32] for calibration."""
    options = dict(variant.options)
    act, gated, frozen, phi_qkv, phi_out, phi2_scale, gain, whiten, weight_init = (
        options.pop(key, None) for key in ("act", "gated", "frozen", "phi_qkv", "phi_out", "phi2_scale", "gain", "whiten",
                                           "weight_init"))
    settings = {**MODEL, "num_classes": num_classes, "drop_path_rate": variant.recipe["drop_path"]}
    if "mlp_ratio" in options:
        settings["mlp_ratio"] = options.pop("mlp_ratio")
    if act:
        options["act_layer"] = {"relu": nn.ReLU, "relu2": SquaredReLU, "silu": nn.SiLU}[act]
    if gated:
        options["mlp_layer"] = swiglu
    seed_everything(seed)
    twin: Any = timm.create_model(f"{SIZES[variant.size]}_ViT", **settings)
    if weight_init == "mimetic":
        seed_everything(seed, 3)
        init_mimetic(twin)
    seed_everything(seed, 1)
    model: Any = timm.create_model(variant.model, **settings, **options)
    own = model.state_dict()
    model.load_state_dict({key: value for key, value in twin.state_dict().items()
                           if key in own and own[key].shape == value.shape}, strict=False)
    for block in model.blocks:
        if phi_qkv:
            block.attn.qkv = _PhiLinear(GroupActivation(block.attn.qkv.in_features, base="identity"), block.attn.qkv)
        if phi_out:
            block.mlp.drop2 = GroupActivation(block.mlp.fc2.out_features, base="identity")
        if phi2_scale:
            block.mlp.phi2 = ScaledActivation(block.mlp.phi2, trained=phi2_scale == "learned")
    for layer in model.modules() if gain else ():
        if isinstance(layer, FasterKANLayer):
            layer.spline_linear.weight.data *= gain
    for layer in model.modules() if whiten else ():
        if isinstance(layer, FasterKANLayer):
            register_parametrization(layer.spline_linear, "weight", _Whitened(layer.rbf.grid, layer.rbf.h, whiten))
    if phi2_scale and batch is not None:
        calibrate(model, batch)
    if frozen:
        _load_functions(model, frozen, functions, variant.recipe["epochs"])
    return model


def spec_of(variant: Variant, num_classes: int) -> ModelSpec:
    """The model as timm creates it. One that it cannot create has a name that it does not know."""
    own = {"mlp_ratio", *options_of(variant.model)}
    only_here = [f"{key}={value}" for key, value in variant.options.items() if value and key not in own | WEIGHTS_ONLY]
    kwargs = {**TAGS["cifar10"].kwargs, "num_classes": num_classes,
              **{key: value for key, value in variant.options.items() if key in own}}
    return ModelSpec(" with ".join([variant.model, *only_here]), kwargs)


# ---------------------------------------------------------------- feed-forwards
def swiglu(in_features: int, hidden_features: int, act_layer: Any = None, **kwargs) -> SwiGLU:
    """timm's SwiGLU in the place of an MLP: three maps of two thirds of the hidden width have as many weights. With its second
    bias of the hidden layer it has a third more biases (0.17% of a block's parameters at width 96)."""
    return SwiGLU(in_features, hidden_features * 2 // 3, **kwargs)


class SquaredReLU(nn.Module):
    """relu(u)^2 (Primer, arXiv:2109.08668)."""

    def __init__(self, inplace: bool = False):
        super().__init__()

    def forward(self, u: Tensor) -> Tensor:
        return F.relu(u).square()


class _PhiLinear(nn.Linear):
    """A linear map behind a learned function."""

    def __init__(self, phi: GroupActivation, linear: nn.Linear):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None)
        self.load_state_dict(linear.state_dict())
        self.phi = phi

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.phi(x))


class ScaledActivation(GroupActivation):
    """phi(u) = base(u) + sum_k C[g, k] B_k(s_g u): the base sees the input as it is, so that it begins as the MLP.

    s [groups] begins at 1 over the input's deviation (`calibrate`), so that the grid covers the input. trained: learn it."""

    def __init__(self, phi: GroupActivation, trained: bool):
        super().__init__(phi.channels, groups=len(phi.coefficients), base="identity", grid_min=phi.points[0],
                         grid_max=phi.points[-1], num_grids=len(phi.points), h=phi.h, function=phi.function)
        self.outer_base = phi.base
        self.input_scale = nn.Parameter(torch.ones(len(phi.coefficients)), requires_grad=trained)

    def forward(self, u: Tensor) -> Tensor:
        dtype = autocast_dtype(u)
        with torch.autocast(u.device.type, enabled=False):      # the identity is added and subtracted, which bfloat16 would round
            x = u.float()
            scaled = (x.unflatten(-1, (len(self.input_scale), -1)) * self.input_scale[:, None]).flatten(-2)
            return (BASES[self.outer_base](x) + (super().forward(scaled) - scaled)).to(dtype)

    def flops(self, tokens: int) -> Flops:
        return Flops(0, super().flops(tokens).elementwise + BASE_FLOPS[self.outer_base] * tokens * self.channels)


@torch.no_grad()
def calibrate(model: nn.Module, batch: Tensor) -> None:
    """Set every `ScaledActivation`'s factors to 1 over the deviation of its whole input on a batch."""
    def measure(layer: ScaledActivation, args: tuple[Tensor]) -> None:
        layer.input_scale.fill_(1 / args[0].std())

    hooks = [layer.register_forward_pre_hook(measure) for layer in model.modules() if isinstance(layer, ScaledActivation)]
    training = model.training
    model.eval()(batch)
    model.train(training)
    for hook in hooks:
        hook.remove()


class _Whitened(nn.Module):
    """Spline weights [O, I*G] as combinations of functions that are orthonormal for a standard normal input.

    The optimizer then works on v [O, I*G], W = v M for each input. zca: M = (E[B B'] + r)^-1/2; pca: the functions
    are the eigenvectors of E[B B'], smooth ones first."""

    def __init__(self, grid: Tensor, h: float, kind: str, ridge: float = 1e-3):
        super().__init__()
        nodes, weights = np.polynomial.hermite_e.hermegauss(200)
        basis = rswaf_basis(torch.from_numpy(nodes), grid.double(), h)
        gram = basis.T @ (torch.from_numpy(weights / weights.sum())[:, None] * basis)
        values, vectors = torch.linalg.eigh(gram)
        m = (values + ridge * values.mean()).rsqrt()[:, None] * vectors.T
        m = vectors @ m if kind == "zca" else m
        self.register_buffer("m", m.float(), persistent=False)
        self.register_buffer("inverse", torch.linalg.inv(m).float(), persistent=False)

    def forward(self, v: Tensor) -> Tensor:
        return (v.view(len(v), -1, len(self.m)) @ self.m).flatten(1)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return (weight.view(len(weight), -1, len(self.m)) @ self.inverse).flatten(1)


def _load_functions(model: nn.Module, kind: str, folder: Path | None, epochs: int) -> None:
    """Load the coefficients that `gkan` runs in `folder` have learned, and freeze them.

    mean: phi2's, averaged over blocks, groups and all those runs: one fixed activation for the network.
    own: every block's and group's function, those of the first run alone."""
    files = sorted(folder.glob(f"{run_name('gkan', epochs, '*')}/{CHECKPOINT}")) if folder else []
    states = [state["model"] for state in map(load_file, files) if state["epoch"] == epochs - 1]
    if not states:
        raise UserError("mean-shape and frozen take functions that gkan runs of as many epochs have learned: run --variants gkan "
                        "first")
    own = model.state_dict()
    for key in own:
        if key.endswith(".coefficients"):
            if kind == "mean":
                every = [s[k] for s in states for k in s if k.endswith("phi2.coefficients")]
                own[key] = torch.cat(every).mean(0, keepdim=True).expand_as(own[key]).clone()
            else:
                own[key] = states[0][key]
    model.load_state_dict(own)
    for module in model.modules():
        if isinstance(module, GroupActivation):
            module.coefficients.requires_grad_(False)
