"""What a trained model has learned and what it looks at: measured on images, and drawn.

**Learned functions.** A group KAN's phi_g (group_kan.py) is seen beside the base that it began as. Of a full-edge KAN
(faster_kan.py, efficient_kan.py) every edge's function is exact from the weights alone,

    phi_oi(u) = sum_k W[o, i, k] B_k(u),

and its strength is its standard deviation under what arrives at input i. What arrives is counted in a histogram for each
channel, batch by batch: no activations are kept.

**Attention.** The maps of each block and head, and their rollout through the blocks (Abnar & Zuidema, arXiv:2005.00928).

Legend for shapes: I inputs (channels), O outputs, K basis functions of an edge, N values of u, L blocks, B images, H heads,
T tokens.
"""
import io
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from efficient_kan import EfficientKANLayer, bspline_basis
from faster_kan import FasterKANLayer
from group_kan import GroupActivation
from kernels import BASES, rswaf_basis
from models_kan import FunctionLayer
from utils import UserError, say

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from run_folder import RunFolder

EdgeLayer = FasterKANLayer | EfficientKANLayer

EDGES = 6               # of a layer that are drawn
GROUPS = 8              # likewise
DEAD_GAIN = 0.01        # below it a group or an input is dead, see `Measured`
MOST_OFF_GRID = 0.05    # share of a layer's inputs, above it training warns
FAR_WIDER = 5           # grid's width over the span of nine in ten inputs, above it a note (a standard normal on [-3, 3]: 1.8)


# ---------------------------------------------------------------- the functions, exact from the weights
def function_layers(model: nn.Module) -> dict[str, FunctionLayer]:
    """The modules with learned functions by name, in the order of the blocks; empty for an MLP."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FunctionLayer)}


def grid_of(layer: FunctionLayer) -> Tensor:
    """The points [G] between which the layer's basis is complete, in increasing order, float64 on the CPU."""
    if isinstance(layer, EfficientKANLayer):
        points = layer.grid[layer.spline_order:layer.num_grids + 1]
    else:
        points = layer.rbf.grid if isinstance(layer, FasterKANLayer) else torch.tensor(layer.points)
    return points.detach().double().cpu().sort().values     # learned ones may have passed each other


def group_functions(phi: GroupActivation, u: Tensor) -> tuple[Tensor, Tensor]:
    """The base [N], and each group's function [groups, N], of u [N]."""
    groups = len(phi.coefficients)
    with torch.no_grad():
        values = phi.reference_forward(u.to(phi.coefficients.device)[:, None].expand(-1, groups))
    return BASES[phi.base](u), values.T.cpu()


def edge_basis(layer: EdgeLayer, u: Tensor) -> Tensor:
    """[..., K]: the basis functions of an edge at u [...], the base branch's silu(u) last where the layer has one."""
    with torch.no_grad():
        if isinstance(layer, EfficientKANLayer):
            return torch.cat([bspline_basis(u, layer.grid.to(u), layer.spline_order), F.silu(u).unsqueeze(-1)], -1)
        h = layer.rbf.h.to(u) if isinstance(layer.rbf.h, Tensor) else layer.rbf.h
        basis = rswaf_basis(u, layer.rbf.grid.to(u), h)
        return basis if layer.base_linear is None else torch.cat([basis, F.silu(u).unsqueeze(-1)], -1)


def edge_weights(layer: EdgeLayer) -> Tensor:
    """W [O, I, K], float64 on the CPU."""
    with torch.no_grad():
        if isinstance(layer, EfficientKANLayer):
            parts = [layer.spline_weight * layer.spline_scaler.unsqueeze(-1), layer.base_weight.unsqueeze(-1)]
        else:
            parts = [layer.spline_linear.weight.unflatten(1, (layer.in_features, -1))]
            parts += [] if layer.base_linear is None else [layer.base_linear.weight.unsqueeze(-1)]
        return torch.cat(parts, -1).double().cpu()


# ---------------------------------------------------------------- what arrives at them
class Inputs:
    """A histogram of what arrives at a layer's functions, one for each channel, that grows batch by batch.

    `BINS` bins over four times the grid's span, the grid in the middle and its ends between two bins; what lies further
    out counts into the first and last bin. counts: int64 [I, BINS]. smallest, largest: of all, exact."""
    BINS = 512

    def __init__(self, channels: int, grid: Tensor, device: torch.device | str = "cpu"):
        self.low, self.high = float(grid[0]), float(grid[-1])
        self.start, self.width = self.low - 1.5 * (self.high - self.low), 4 * (self.high - self.low) / self.BINS
        self.counts = torch.zeros(channels, self.BINS, dtype=torch.int64, device=device)
        self.extremes = torch.tensor([math.inf, -math.inf], device=device)

    def add(self, u: Tensor) -> None:
        """u [..., I], any floating dtype."""
        u = u.detach().reshape(-1, len(self.counts))
        first = torch.arange(len(self.counts), device=u.device) * self.BINS
        for part in u.split(max(1, 2 ** 22 // len(self.counts))):
            part = part.float().nan_to_num(nan=math.inf)
            low, high = part.aminmax()
            self.extremes = torch.stack([self.extremes[0].minimum(low), self.extremes[1].maximum(high)])
            bins = ((part - self.start) / self.width).floor().clamp_(0, self.BINS - 1).long()
            self.counts += torch.bincount((bins + first).flatten(), minlength=self.counts.numel()).view_as(self.counts)

    @property
    def centres(self) -> Tensor:
        """[BINS], float64: a value for each bin."""
        return self.start + (torch.arange(self.BINS, dtype=torch.float64) + 0.5) * self.width

    @property
    def edges(self) -> Tensor:
        """[BINS + 1], float64."""
        return self.start + torch.arange(self.BINS + 1, dtype=torch.float64) * self.width

    def shares(self, parts: int = 1) -> Tensor:
        """[parts, BINS], float64: how what arrives is spread over the bins, in each of so many equal parts of the channels."""
        counts = self.counts.cpu().double().view(parts, -1, self.BINS).sum(1)
        return counts / counts.sum(1, keepdim=True).clamp(min=1)

    @property
    def off_grid(self) -> float:
        """The share of all inputs that lie beyond the first or last grid point."""
        inside = slice(3 * self.BINS // 8, 5 * self.BINS // 8)
        return 1 - float(self.shares()[0, inside].sum())

    def quantile(self, share: float) -> float:
        """The value below which this share (0 to 1) of all inputs lies, linear within a bin; no further out than the bins."""
        below = F.pad(self.shares()[0].cumsum(0), (1, 0))                           # [BINS + 1], at the edges
        last = int((below < share).sum().clamp(1, self.BINS))                       # edge at which the share is reached
        part = (share - float(below[last - 1])) / max(float(below[last] - below[last - 1]), 1e-12)
        value = float(self.edges[last - 1]) + min(1.0, max(0.0, part)) * self.width
        smallest, largest = self.extremes.tolist()
        return min(max(value, smallest), largest)


def used_width(low: float, high: float, p5: float, p95: float) -> float:
    """The share of a grid's width in which nine in ten inputs lie. Below 1 / `FAR_WIDER` the grid is far wider than they need."""
    return (p95 - p5) / (high - low)


@contextmanager
def watching(layers: Mapping[str, FunctionLayer], see: Callable[[str, FunctionLayer, Tensor], None]) -> Iterator[None]:
    """Inside, see(name, layer, u) is called with what arrives at a layer's functions, u [..., I], whenever the model computes."""
    with ExitStack() as stack:
        for name, layer in layers.items():
            if isinstance(layer, FasterKANLayer):       # its functions see what its norm makes of the layer's input
                hook = layer.layernorm.register_forward_hook(lambda _, x, u, name=name, layer=layer: see(name, layer, u))
            else:
                hook = layer.register_forward_pre_hook(lambda layer, x, name=name: see(name, layer, x[0]))
            stack.callback(hook.remove)
        yield


@dataclass
class Collected:
    """inputs: of each layer with learned functions, by its name. outputs: name -> root mean square, of each block and of its
    `attn` and `mlp`. images: how many passed."""
    inputs: dict[str, Inputs]
    outputs: dict[str, float] = field(default_factory=dict)
    images: int = 0


@torch.inference_mode()
def collect_inputs(model: nn.Module, batches: Iterable[Tensor]) -> Collected:
    """Let images [B, 3, S, S] pass, in batches, and count what arrives at the learned functions.

    The model computes in evaluation mode and is left as it was. Works for any model; one without learned functions has no
    inputs."""
    inputs: dict[str, Inputs] = {}
    squares: dict[str, list[tuple[Tensor, int]]] = {}
    images = 0

    def counted(name: str, layer: FunctionLayer, u: Tensor) -> None:
        if name not in inputs:
            inputs[name] = Inputs(u.shape[-1], grid_of(layer), u.device)
        inputs[name].add(u)

    def squared(name: str, y: Any) -> None:
        if isinstance(y, Tensor):
            squares.setdefault(name, []).append((y.detach().float().square().sum(), y.numel()))

    was_training = model.training
    with ExitStack() as stack:
        stack.callback(model.train, was_training)
        model.eval()
        stack.enter_context(watching(function_layers(model), counted))
        for name, module in model.named_modules():
            if _is_block(module):
                for part, child in (("", module), (".attn", module.attn), (".mlp", module.mlp)):
                    hook = child.register_forward_hook(lambda _, x, y, name=name + part: squared(name, y))
                    stack.callback(hook.remove)
        device = next(model.parameters()).device
        for batch in batches:
            images += len(batch)
            model.forward(batch.to(device))     # not model(): a compiled model would not see the hooks
    outputs = {name: math.sqrt(sum(float(total) for total, _ in parts) / sum(count for _, count in parts))
               for name, parts in squares.items()}
    return Collected(inputs, outputs, images)


def _is_block(module: nn.Module) -> bool:
    return isinstance(getattr(module, "attn", None), nn.Module) and isinstance(getattr(module, "mlp", None), nn.Module)


# ---------------------------------------------------------------- measured
@dataclass(frozen=True)
class Measured:
    """What a layer's functions do with what arrives.

    functions: how many. low, high, points: the grid. mean, std, smallest, largest: of the inputs; p5, p95: percentiles.
    off_grid: share of them beyond the grid.
    distance: root mean square, under the inputs of each, of function minus base (a full-edge KAN's: of the spline beside its
    base branch), the mean over the functions; furthest: the largest; None where there is no base.
    gain: of each unit, the standard deviation of what it passes on (an input of a full-edge KAN: over all its edges) relative
    to that of what arrives; units: "groups" or "inputs". dead: how many with a gain below `DEAD_GAIN`."""
    functions: int
    low: float
    high: float
    points: int
    mean: float
    std: float
    smallest: float
    largest: float
    p5: float
    p95: float
    off_grid: float
    distance: float | None
    furthest: float | None
    units: str
    gain: Tensor

    @property
    def used_width(self) -> float:
        """`used_width` of the grid."""
        return used_width(self.low, self.high, self.p5, self.p95)

    @property
    def too_wide(self) -> bool:
        return self.used_width < 1 / FAR_WIDER

    @property
    def dead(self) -> int:
        return int((self.gain < DEAD_GAIN).sum())


def measure(layer: FunctionLayer, inputs: Inputs) -> Measured:
    """A layer with learned functions under what arrived at it."""
    u, grid = inputs.centres, grid_of(layer)
    if isinstance(layer, GroupActivation):
        shares = inputs.shares(len(layer.coefficients))                             # [groups, BINS]
        base, values = group_functions(layer, u.float())
        distance: Tensor | None = group_distances(layer, inputs)
        gain = _deviation(shares, values.double()) / _deviation(shares, u)
        functions, units = len(values), "groups"
    else:
        shares = inputs.shares(len(inputs.counts))
        deviations, distance = _edge_moments(layer, shares, u)
        gain = deviations.square().sum(0).sqrt() / _deviation(shares, u)
        functions, units = deviations.numel(), "inputs"
    (mean, square), (smallest, largest) = _moments(inputs.shares(), u), inputs.extremes.tolist()
    return Measured(functions, inputs.low, inputs.high, len(grid), float(mean), math.sqrt(max(0.0, float(square - mean ** 2))),
                    smallest, largest, inputs.quantile(0.05), inputs.quantile(0.95), inputs.off_grid,
                    None if distance is None else float(distance.mean()),
                    None if distance is None else float(distance.max()), units, gain.nan_to_num(0.0, posinf=0.0))


def group_distances(phi: GroupActivation, inputs: Inputs) -> Tensor:
    """[groups]: the root mean square of phi_g - base under what arrives at the group."""
    base, values = group_functions(phi, inputs.centres.float())
    return (inputs.shares(len(values)) * (values - base).double().square()).sum(1).sqrt()


def _moments(shares: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and mean square of values [N] or [P, N] under shares [P, N]."""
    return (shares * values).sum(1), (shares * values.square()).sum(1)


def _deviation(shares: Tensor, values: Tensor) -> Tensor:
    mean, square = _moments(shares, values)
    return (square - mean.square()).clamp(min=0).sqrt()


def edge_deviations(layer: EdgeLayer, shares: Tensor, u: Tensor) -> Tensor:
    """[O, I]: the standard deviation of each edge's function where input i is u [N] with the shares [I, N]."""
    return _edge_moments(layer, shares, u)[0]


def _edge_moments(layer: EdgeLayer, shares: Tensor, u: Tensor) -> tuple[Tensor, Tensor | None]:
    """`edge_deviations`, and the root mean square of each edge's spline beside its base branch, where there is one."""
    basis, weight = edge_basis(layer, u.double()), edge_weights(layer)
    products = (basis.unsqueeze(2) * basis.unsqueeze(1)).flatten(1)                     # [N, K*K]
    second = (shares @ products).unflatten(1, (basis.shape[1], -1))                     # [I, K, K]: E[B_k B_l]
    mean = shares @ basis                                                               # [I, K]
    covariance = second - mean.unsqueeze(2) * mean.unsqueeze(1)

    def root(weight: Tensor, matrix: Tensor) -> Tensor:
        return torch.einsum("oik,ikl,oil->oi", weight, matrix, weight).clamp(min=0).sqrt()

    splines = basis.shape[1] - 1
    has_base = isinstance(layer, EfficientKANLayer) or layer.base_linear is not None
    return root(weight, covariance), root(weight[..., :splines], second[:, :splines, :splines]) if has_base else None


# ---------------------------------------------------------------- drawn
def drawn_range(layer: FunctionLayer, inputs: Inputs | None = None) -> Tensor:
    """[401]: where all but a thousandth of what arrives lies on either side; without `inputs` the grid and one unit beyond."""
    if inputs is None:
        grid = grid_of(layer)
        return torch.linspace(float(grid[0]) - 1, float(grid[-1]) + 1, 401)
    low, high = inputs.quantile(0.001), inputs.quantile(0.999)
    middle, half = (low + high) / 2, max((high - low) / 2, inputs.width)        # of a constant, something
    return torch.linspace(middle - half, middle + half, 401)


def edge_functions(layer: EdgeLayer, u: Tensor, inputs: Inputs | None = None, count: int = EDGES) -> dict[str, Tensor]:
    """The strongest edges of a layer, {"input → output": phi(u) [N]}.

    Strength is the deviation under what arrives at each input, without `inputs` as if that were spread like `u`."""
    if inputs is None:
        strength = edge_deviations(layer, torch.full((layer.in_features, len(u)), 1 / len(u), dtype=torch.float64), u)
    else:
        strength = edge_deviations(layer, inputs.shares(len(inputs.counts)), inputs.centres)
    weight, basis = edge_weights(layer), edge_basis(layer, u.double())
    chosen = strength.flatten().topk(min(count, strength.numel())).indices
    edges = [divmod(int(index), weight.shape[1]) for index in chosen]
    return {f"{i} → {o}": (basis @ weight[o, i]).to(u.dtype) for o, i in edges}


def draw_functions(axes: Axes, name: str, layer: FunctionLayer, inputs: Inputs | None = None) -> None:
    """A layer's functions, over the histogram of what arrives where that was collected."""
    if isinstance(layer, GroupActivation):
        draw_groups(axes, name, layer, inputs)
    else:
        draw_edges(axes, name, layer, inputs)


def draw_groups(axes: Axes, name: str, phi: GroupActivation, inputs: Inputs | None = None) -> None:
    """The base dashed, above it up to `GROUPS` groups' functions, those that differ most from it."""
    u = drawn_range(phi, inputs)
    base, values = group_functions(phi, u)
    distance = (values - base).square().mean(1).sqrt() if inputs is None else group_distances(phi, inputs)
    for group in sorted(distance.topk(min(GROUPS, len(values))).indices.tolist()):
        axes.plot(u.numpy(), values[group].numpy(), label=str(group), linewidth=1.2)
    axes.plot(u.numpy(), base.numpy(), "--", color="black", linewidth=1.2, label="base")
    shown = "" if len(values) <= GROUPS else f", {GROUPS} of {len(values)}, those furthest from the base"
    _finish(axes, phi, inputs, f"{name}: the groups' functions{shown}", "learned activation φ(u)", "group")


def draw_edges(axes: Axes, name: str, layer: EdgeLayer, inputs: Inputs | None = None) -> None:
    """The functions on a full-edge KAN's strongest edges."""
    u = drawn_range(layer, inputs)
    for label, values in edge_functions(layer, u, inputs).items():
        axes.plot(u.numpy(), values.numpy(), label=label, linewidth=1.2)
    _finish(axes, layer, inputs, f"{name}: strongest edges", "edge function φ(u)", "input → output")


def _finish(axes: Axes, layer: FunctionLayer, inputs: Inputs | None, title: str, ylabel: str, legend: str) -> None:
    for point in grid_of(layer).tolist():
        axes.axvline(point, color="grey", linewidth=0.5, alpha=0.5)
    axes.set_xlim(*drawn_range(layer, inputs)[[0, -1]].tolist())
    xlabel = "input u (lines: grid points)"
    if inputs is not None:
        p5, p95 = inputs.quantile(0.05), inputs.quantile(0.95)
        title += f"\n{inputs.off_grid:.1%} of the inputs off the grid"
        if (used := used_width(inputs.low, inputs.high, p5, p95)) < 1 / FAR_WIDER:
            title += f", nine in ten within {used:.0%} of its width"
        xlabel = "input u\nlines: grid points; blue: what arrives, dotted: its 5th and 95th percentile"
        for percentile in (p5, p95):
            axes.axvline(percentile, color="tab:blue", linestyle=":", linewidth=1.4)
        below = axes.twinx()
        below.stairs(inputs.shares()[0].numpy(), inputs.edges.numpy(), fill=True, color="lightsteelblue", alpha=0.6)
        below.set_ylim(0, 2.5 * float(inputs.shares()[0].max()))
        below.set_yticks([])
        axes.set_zorder(below.get_zorder() + 1)
        axes.patch.set_visible(False)
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(xlabel, fontsize=7)
    axes.set_ylabel(ylabel, fontsize=8)
    axes.legend(fontsize=7, title=legend, title_fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))


def functions_figure(layers: Mapping[str, FunctionLayer], inputs: Mapping[str, Inputs] | None = None) -> Figure:
    """A panel for each layer, two in a row."""
    rows = -(-len(layers) // 2)
    figure = Figure((11, 3.4 * rows), layout="constrained")
    for place, (name, layer) in enumerate(layers.items(), 1):
        axes = figure.add_subplot(rows, 2, place, label=name)
        draw_functions(axes, name, layer, (inputs or {}).get(name))
    return figure


def png(figure: Figure, dpi: int = 80) -> bytes:
    memory = io.BytesIO()
    figure.savefig(memory, format="png", dpi=dpi)
    return memory.getvalue()


# ---------------------------------------------------------------- attention
@torch.inference_mode()
def attention_maps(model: nn.Module, images: Tensor) -> Tensor:
    """[L, B, H, T, T], on the CPU: how much each token (row) takes from each other (column), by block and head.

    For vision transformers of timm's whose blocks all see one sequence of prefix tokens and patches.
    Raises UserError for a model without such an attention."""
    tokens = _tokens(model)
    seen: list[Tensor] = []
    modules: list[Any] = [m for m in model.modules() if hasattr(m, "fused_attn") and hasattr(m, "attn_drop")]
    was_training = model.training
    with ExitStack() as stack:
        stack.callback(model.train, was_training)
        model.eval()
        for module in modules:      # the fused kernel never has the map in memory
            stack.callback(setattr, module, "fused_attn", module.fused_attn)
            module.fused_attn = False
            stack.callback(module.attn_drop.register_forward_hook(lambda _, x, y: seen.append(y.float().cpu())).remove)
        model.forward(images.to(next(model.parameters()).device))
    maps = [map for map in seen if map.ndim == 4 and map.shape[-2:] == (tokens, tokens)]
    if not maps or any(map.shape != maps[0].shape for map in maps):
        raise UserError(f"{type(model).__name__} has no attention over one sequence of patches: only vision transformers have")
    return torch.stack(maps)


def _tokens(model: nn.Module) -> int:
    patches = getattr(getattr(model, "patch_embed", None), "num_patches", 0)
    return patches + getattr(model, "num_prefix_tokens", 0)


def attention_rollout(maps: Tensor) -> Tensor:
    """[B, T, T]: what each token of the last block takes from each of the input, of maps [L, B, H, T, T].

    The product of (A + 1)/2 over the blocks, A the mean over heads and 1 the residual connection (arXiv:2005.00928,
    equation 1)."""
    identity = torch.eye(maps.shape[-1], dtype=maps.dtype, device=maps.device)
    rollout = identity.expand(maps.shape[1], -1, -1)
    for attention in maps.mean(2):
        rollout = (attention + identity) / 2 @ rollout
    return rollout


def token_maps(model: nn.Module, attention: Tensor) -> dict[str, Tensor]:
    """Rows of attention [..., T, T] as pictures [..., h, w] over the patches: the class token's, the distillation token's
    where there is one, and in a model without a class token the mean over the patches'."""
    vit: Any = model
    prefix, grid = vit.num_prefix_tokens, vit.patch_embed.grid_size
    names = [name for name, key in (("class token", "cls_token"), ("distillation token", "dist_token"))
             if getattr(model, key, None) is not None]
    rows = {name: attention[..., index, prefix:] for index, name in enumerate(names)} or {
        "mean over patches": attention[..., prefix:, prefix:].mean(-2)}
    return {name: row.unflatten(-1, grid) for name, row in rows.items()}


def attention_panels(model: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """{title: [h, w]} for one image [3, S, S]: the rollout for each token, the first token's attention in each block (mean over
    heads), and in each head of the last block. Raises UserError as `attention_maps`."""
    maps = attention_maps(model, image[None])
    panels = {f"rollout\n{name}": picture[0] for name, picture in token_maps(model, attention_rollout(maps)).items()}
    token, blocks = next(iter(token_maps(model, maps.mean(2)[:, 0]).items()))
    _, heads = next(iter(token_maps(model, maps[-1, 0]).items()))
    panels |= {f"block {number}\n{token}": picture for number, picture in enumerate(blocks)}
    return panels | {f"block {len(blocks) - 1}\nhead {number}": picture for number, picture in enumerate(heads)}


def draw_attention(image: Tensor, panels: Mapping[str, Tensor], title: str = "", columns: int = 9) -> Figure:
    """The image [3, S, S] (0 to 1), then each panel over it, from its smallest share (dark) to its largest (bright), which its
    title has."""
    rows = -(-(len(panels) + 1) // columns)
    figure = Figure((1.45 * columns, 2.15 * rows), layout="constrained")
    picture = image.permute(1, 2, 0).clamp(0, 1).cpu().numpy()
    height, width = picture.shape[:2]
    for place, (name, values) in enumerate([(title, None), *panels.items()], 1):
        axes = figure.add_subplot(rows, columns, place)
        axes.set_axis_off()
        axes.set(xticks=[], yticks=[])      # which would be laid out even so
        span = "" if values is None else f"\n{values.min():.1%} – {values.max():.1%}"
        axes.set_title(name + span, fontsize=7.5, parse_math=False)
        if values is None:
            axes.imshow(picture)
            continue
        axes.imshow(picture.mean(-1), cmap="gray", vmin=0, vmax=1)
        axes.imshow(values.numpy(), cmap="inferno", alpha=0.65, extent=(-0.5, width - 0.5, height - 0.5, -0.5),
                    interpolation="bilinear")
    return figure


# ---------------------------------------------------------------- while training
def log_functions(model: nn.Module, images: Tensor, folder: "RunFolder", epoch: int) -> None:
    """Functions, what arrives, grid coverage and dead units into the run's TensorBoard events, and a warning on stderr where
    more than `MOST_OFF_GRID` of a layer's inputs fall off the grid. Neither the model nor any random number is touched.

    images: [B, 3, S, S] as the model takes them."""
    layers, inputs = function_layers(model), collect_inputs(model, images.split(32)).inputs
    measured = {name: measure(layers[name], inputs[name]) for name in inputs}
    blocks: dict[str, dict[str, FunctionLayer]] = {}
    for name in inputs:
        blocks.setdefault(name.split(".mlp.")[0], {})[name] = layers[name]

    def write(board: "SummaryWriter") -> None:
        for name, found in measured.items():
            board.add_scalar(f"kan_off_grid/{name}", found.off_grid, epoch)
            board.add_scalar(f"kan_dead_{found.units}/{name}", found.dead, epoch)
            if found.distance is not None:
                board.add_scalar(f"kan_distance/{name}", found.distance, epoch)
            _add_histogram(board, f"kan_inputs/{name}", inputs[name], found, epoch)
        for block, part in blocks.items():
            board.add_figure(f"kan_functions/{block}", functions_figure(part, inputs), epoch, close=False)

    folder.events(epoch, write)
    if warning := off_grid_warning(measured):
        say(f"warning: epoch {epoch}: {warning}", file=sys.stderr)


def off_grid_warning(measured: Mapping[str, Measured]) -> str:
    """A sentence on the layers of which more than `MOST_OFF_GRID` of the inputs fall off the grid, or ''."""
    far = sorted((name for name in measured if measured[name].off_grid > MOST_OFF_GRID),
                 key=lambda name: -measured[name].off_grid)
    if not far:
        return ""
    worst = measured[far[0]]
    others = f", and more than {MOST_OFF_GRID:.0%} in {len(far) - 1} of the other {len(measured) - 1} layers"
    more = others if len(far) > 1 else ""
    return (f"{worst.off_grid:.1%} of the inputs of {far[0]} fall off its grid [{worst.low:g}, {worst.high:g}]{more}: what is "
            "learned fades out there, a new run with a wider --kan-grid-range would cover them")


def wide_grid_note(measured: Mapping[str, Measured]) -> str:
    """A sentence on the layers whose grid is far wider than what arrives (`Measured.too_wide`), or ''."""
    wide = sorted((name for name in measured if measured[name].too_wide), key=lambda name: measured[name].used_width)
    if not wide:
        return ""
    worst = measured[wide[0]]
    more = f", and {len(wide) - 1} of the other {len(measured) - 1} layers have such a grid, too" if len(wide) > 1 else ""
    return (f"nine in ten inputs of {wide[0]} lie within [{worst.p5:.2g}, {worst.p95:.2g}], its grid is "
            f"[{worst.low:g}, {worst.high:g}]{more}: few of its {worst.points} points shape the function where "
            "inputs arrive, a narrower --kan-grid-range (of all layers) or more --kan-grid-points would put more there")


def _add_histogram(board: "SummaryWriter", tag: str, inputs: Inputs, found: Measured, epoch: int) -> None:
    counts = inputs.counts.sum(0).cpu()
    full = counts.nonzero().flatten()
    part = slice(int(full[0]), int(full[-1]) + 1)       # TensorBoard draws all buckets that it is given
    total = int(counts.sum())
    board.add_histogram_raw(tag, found.smallest, found.largest, total, found.mean * total,
                            (found.std ** 2 + found.mean ** 2) * total, inputs.edges[1:][part].tolist(),
                            counts[part].tolist(), epoch)


def chosen_layers(model: nn.Module, names: Sequence[str] = ()) -> dict[str, FunctionLayer]:
    """The layers with learned functions that the names begin ("blocks.3", "blocks.3.mlp.phi2"); all without names. Raises
    UserError for a name that fits none."""
    layers = function_layers(model)
    for name in names:
        if not any(_below(layer, name) for layer in layers):
            raise UserError(f"--layer {name} is no layer with learned functions: this model has "
                            f"{', '.join(layers) if len(layers) <= 4 else ', '.join([*list(layers)[:3], '...'])}"
                            if layers else f"--layer {name}: this model has no learned functions")
    return {layer: module for layer, module in layers.items() if not names or any(_below(layer, name) for name in names)}


def _below(layer: str, name: str) -> bool:
    return layer == name or layer.startswith(f"{name}.")
