"""Formulas of the functions that a KAN has learned.

    python tools/symbolic.py CHECKPOINT [--data-path DIR | --images FOLDER] [--output FOLDER]
    python tools/symbolic.py CHECKPOINT --data-path DIR --replace TARGET.safetensors

Each function of a group KAN, or the strongest edges of each layer of a full-edge KAN, is fitted by a*f(b*u + c) + d*u + e
with f one of `FORMS`, or by a polynomial up to degree 5, weighted by the inputs that really arrive. --replace puts the
formulas of a group KAN in the place of its functions, evaluates the model before and after, and saves the nearest model
that main.py can read. Further flags are main.py's (--data-set, --batch-size, ...).
"""
import argparse
import csv
import io
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from vision_kan.common import console

console.starting(__name__)
import matplotlib

matplotlib.use("Agg")
import numpy as np
import sympy
import torch
from matplotlib import pyplot as plt
from scipy.optimize import least_squares
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset

from engine import evaluate, summary
from models_kan import FunctionLayer
from tools.common import add_model_arguments, loaders_of
from vision_kan.analysis.arriving import watching
from vision_kan.analysis.functions import EdgeLayer, edge_basis, edge_weights, function_layers, grid_of
from vision_kan.checkpoints.write import save_safetensors
from vision_kan.common import peers
from vision_kan.common.errors import UserError
from vision_kan.common.files import whole
from vision_kan.common.process import Process
from vision_kan.common.text import plain, say, to_json
from vision_kan.config.flags import SCOPE, parse_beside_main
from vision_kan.config.parser import Parser
from vision_kan.data.workers import batches
from vision_kan.kernels import rswaf_activation_reference, rswaf_basis
from vision_kan.layers.group_kan import GroupActivation
from vision_kan.run.trained import Pictures, Trained, image_files, load_trained

UNEXPLAINED = 1e-6      # of the variance: to explain more than all but this is worth nothing
DEGREE = 5              # highest of a polynomial
POINTS = 400            # at which a function is fitted
EVEN_SHARE = 0.05       # of the weight is spread evenly from the smallest to the largest input, so that rare ones count too
SAMPLES = 4096          # inputs kept of each function
RIDGE = 1e-6            # of the fit back onto the basis, relative to the mean of E[B_k^2]


# ---------------------------------------------------------------- formulas
@dataclass(frozen=True)
class Form:
    """f of a*f(b*u + c) + d*u + e. signs: of b, both where f(-x) is none of +-f(x). scaled: whether b is free, which it is
    not where f(b*x) is a multiple of f(x). shifted: likewise c, for exp(x + c)."""
    function: Callable[[Tensor], Tensor]
    symbol: Callable[[sympy.Expr], sympy.Expr]
    signs: tuple[float, ...] = (1.0,)
    scaled: bool = True
    shifted: bool = True


FORMS = {
    "gelu": Form(F.gelu, sympy.Function("gelu"), signs=(1.0, -1.0)),
    "silu": Form(F.silu, sympy.Function("silu"), signs=(1.0, -1.0)),
    "relu": Form(F.relu, sympy.Function("relu"), signs=(1.0, -1.0), scaled=False),
    "relu2": Form(lambda x: F.relu(x).square(), lambda x: sympy.Function("relu")(x) ** 2, signs=(1.0, -1.0), scaled=False),
    "abs": Form(torch.abs, sympy.Abs, scaled=False),
    "sin": Form(torch.sin, sympy.sin),
    "tanh": Form(torch.tanh, sympy.tanh),
    "exp": Form(torch.exp, sympy.exp, signs=(1.0, -1.0), shifted=False),
    "gaussian": Form(lambda x: torch.exp(-x.square()), lambda x: sympy.exp(-x ** 2)),
    "sqrt": Form(lambda x: (1 + x.square()).sqrt(), lambda x: sympy.sqrt(1 + x ** 2)),
}
_X = sympy.Symbol("x", real=True)
# What the names in a formula that are not sympy's own stand for.
DEFINITIONS = {
    "gelu": _X * (1 + sympy.erf(_X / sympy.sqrt(2))) / 2,
    "silu": _X / (1 + sympy.exp(-_X)),
    "relu": sympy.Max(0, _X),
}
U = sympy.Symbol("u", real=True)


@dataclass(frozen=True)
class Formula:
    """a*f(b*u + c) + sum_n polynomial[n] * u^n, f = FORMS[form]; form "polynomial": the sum alone.

    r2: 1 - the weighted mean square error relative to the weighted variance of the function that was fitted; 1 for a
    constant that is met. residual: the root of the weighted mean square error, in units of the function."""
    form: str
    polynomial: tuple[float, ...] = ()
    a: float = 0.0
    b: float = 1.0
    c: float = 0.0
    r2: float = math.nan
    residual: float = math.nan

    def __call__(self, u: Tensor) -> Tensor:
        """Its values at u, in u's shape, dtype and device."""
        y = torch.zeros_like(u)
        for coefficient in reversed(self.polynomial):
            y = y * u + coefficient
        return y if self.form == "polynomial" else y + self.a * FORMS[self.form].function(self.b * u + self.c)

    @property
    def complexity(self) -> int:
        """How many numbers it has that are not 0 (b: not 1), and one for f."""
        terms = sum(coefficient != 0 for coefficient in self.polynomial)
        return terms if self.form == "polynomial" else terms + 2 + (abs(self.b) != 1) + (self.c != 0)

    def expression(self, digits: int = 17) -> sympy.Expr:
        """In the symbol `U`, numbers rounded to so many digits; gelu, silu and relu by name (see `exact`)."""
        def number(value: float) -> sympy.Expr:
            text = f"{value:.{digits}g}"
            return sympy.Integer(int(float(text))) if float(text).is_integer() else sympy.Float(text)

        y = sum((number(value) * U ** n for n, value in enumerate(self.polynomial) if value), sympy.Integer(0))
        if self.form != "polynomial":
            y += number(self.a) * FORMS[self.form].symbol(number(self.b) * U + number(self.c))
        return y.xreplace({value: number(value) for value in y.atoms(sympy.Float)})     # sympy has squared some

    def exact(self) -> sympy.Expr:
        """`expression` in functions that sympy knows, as it differentiates, integrates and evaluates them."""
        y = self.expression()
        for name, definition in DEFINITIONS.items():
            y = y.replace(sympy.Function(name), lambda x, definition=definition: definition.subs(_X, x))
        return y

    @property
    def text(self) -> str:
        return sympy.sstr(self.expression(4), full_prec=False)

    @property
    def latex(self) -> str:
        return sympy.latex(self.expression(4), full_prec=False)


@dataclass(frozen=True)
class _Curve:
    """A function to be fitted: u, y, and the roots of the weights, whose squares sum to 1; float64 [N]. parsimony: of
    `fit_symbolic`."""
    u: np.ndarray
    y: np.ndarray
    root: np.ndarray
    parsimony: float

    @cached_property
    def mean(self) -> float:
        return float(self.root ** 2 @ self.u)

    @cached_property
    def deviation(self) -> float:
        return float(self.root ** 2 @ (self.u - self.mean) ** 2) ** 0.5

    @cached_property
    def variance(self) -> float:
        return float(self.root ** 2 @ (self.y - self.root ** 2 @ self.y) ** 2)

    def solve(self, columns: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Coefficients of the columns, and the weighted residuals: linear least squares."""
        target = self.root * self.y
        if not columns:
            return np.zeros(0), target
        matrix = self.root[:, None] * np.stack(columns, 1)
        norms = np.linalg.norm(matrix, axis=0)
        norms[norms == 0] = 1
        coefficients = np.linalg.lstsq(matrix / norms, target, rcond=1e-12)[0]
        return coefficients / norms, matrix @ (coefficients / norms) - target

    def score(self, formula: Formula) -> float:
        """The lower the better (the rule of pykan's `suggest_symbolic`, arXiv:2408.10205, with 1 - R^2 down to `UNEXPLAINED`)."""
        return math.log(max(0.0, 1 - formula.r2) + UNEXPLAINED, self.parsimony) + formula.complexity

    def rated(self, formula: Formula, residuals: np.ndarray) -> Formula:
        error = float(residuals @ residuals)
        return replace(formula, r2=1 - error / self.variance if self.variance else 1.0, residual=error ** 0.5)

    def polynomial(self, powers: Sequence[int]) -> Formula:
        coefficients, residuals = self.solve([self.u ** n for n in powers])
        every = np.zeros(max(powers) + 1)
        every[list(powers)] = coefficients
        return self.rated(Formula("polynomial", tuple(every.tolist())), residuals)

    def fit(self, name: str, b: float, middle: float, free: str, powers: Sequence[int]) -> Formula:
        """b and c = -b * middle, those named in `free`, are searched from the given values on; a and the powers of u are at
        each step the best ones for them (variable projection, Golub and Pereyra 1973)."""
        form, sign = FORMS[name], math.copysign(1, b)

        def numbers(x: np.ndarray) -> tuple[float, float]:
            given = {key: float(np.clip(value, *limits[key])) for key, value in zip(free, x)}
            return (sign * math.exp(given["b"]) / self.deviation if "b" in given else b,
                    self.mean + self.deviation * given["c"] if "c" in given else middle)

        def solved(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            b, middle = numbers(x)
            f = form.function(torch.from_numpy(b * (self.u - middle))).numpy()
            return self.solve([f, *(self.u ** n for n in powers)])

        start = {"b": math.log(abs(b) * self.deviation), "c": (middle - self.mean) / self.deviation}
        limits = {"b": (math.log(0.05), math.log(30)), "c": (-6.0, 6.0)}
        x = np.array([start[key] for key in free])
        if free:        # MINPACK is the fastest and knows no limits: beyond them nothing changes
            x = least_squares(lambda x: solved(x)[1] / self.variance ** 0.5, x, method="lm", max_nfev=120).x
        (a, *coefficients), residuals = solved(x)
        every = [0.0] * (max(powers, default=-1) + 1)
        for n, value in zip(powers, coefficients):
            every[n] = float(value)
        b, middle = numbers(x)
        c = -b * middle + 0.0       # no -0.0
        if name == "sin":       # c within half a period: sin(x + pi) = -sin(x)
            a, c = -a if round(c / math.pi) % 2 else a, math.remainder(c, math.pi)
        return self.rated(Formula(name, tuple(every), float(a), b, c), residuals)

    def starts(self, name: str, sign: float, count: int = 3) -> list[tuple[float, float]]:
        """Pairs (b, middle) of a grid from which a*f(b*(u - middle)) + d*u + e comes nearest, where that is a local best."""
        form = FORMS[name]
        slopes = np.geomspace(0.2, 8, 24) / self.deviation if form.scaled else np.ones(1)
        middles = self.mean + self.deviation * np.linspace(-3, 3, 13) if form.shifted else np.zeros(1)
        b, middle = np.meshgrid(sign * slopes, middles, indexing="ij")
        f = form.function(torch.from_numpy(b[..., None] * (self.u - middle[..., None]))).numpy()     # [slopes, middles, N]
        linear, _ = np.linalg.qr(np.stack([self.root, self.root * self.u], 1))
        f, y = (value - value @ linear @ linear.T for value in (self.root * f, self.root * self.y))
        norms = np.square(f).sum(-1)
        gain = np.where(norms > 1e-20, (f @ y) ** 2 / np.maximum(norms, 1e-20), 0)
        padded = np.pad(gain, 1, constant_values=-1)
        around = np.max([np.roll(padded, shift, axis)[1:-1, 1:-1] for axis in (0, 1) for shift in (-1, 1)], axis=0)
        best = np.argsort(-np.where(gain >= around, gain, -1), axis=None)[:count]
        return list(zip(b.flat[best].tolist(), middle.flat[best].tolist()))


def _simplified(curve: _Curve, formula: Formula, simpler: Callable[[Formula], Iterable[Formula]]) -> Formula:
    """Without the numbers that it does as well without, taken away one at a time."""
    while (best := min(simpler(formula), key=curve.score, default=formula)) and curve.score(best) < curve.score(formula):
        formula = best
    return formula


def _polynomials(curve: _Curve) -> Iterator[Formula]:
    def simpler(formula: Formula) -> Iterator[Formula]:
        powers = [n for n, value in enumerate(formula.polynomial) if value]
        if len(powers) > 1:
            yield from (curve.polynomial([p for p in powers if p != n]) for n in powers)

    for degree in range(DEGREE + 1):
        yield _simplified(curve, curve.polynomial(range(degree + 1)), simpler)


def _of_form(curve: _Curve, name: str, best: float) -> Iterator[Formula]:
    """Without those that cannot be better than the score `best`."""
    form = FORMS[name]

    def simpler(formula: Formula) -> Iterator[Formula]:
        powers = [n for n, value in enumerate(formula.polynomial) if value]
        scaled, shifted, sign = abs(formula.b) != 1, formula.c != 0, math.copysign(1, formula.b)
        middle, free = -formula.c / formula.b, "b" * scaled + "c" * shifted
        yield from (curve.fit(name, formula.b, middle, free, [p for p in powers if p != n]) for n in powers)
        if scaled:
            yield curve.fit(name, sign, middle, "c" * shifted, powers)
        if shifted:
            yield curve.fit(name, formula.b, 0.0, "b" * scaled, powers)

    free = "b" * form.scaled + "c" * form.shifted
    for sign in form.signs:
        whole = min((curve.fit(name, b, middle, free, (0, 1)) for b, middle in curve.starts(name, sign)),
                    key=lambda formula: formula.residual)
        if curve.score(replace(whole, polynomial=(), b=1.0, c=0.0)) < best:      # as if it could do with a alone
            yield _simplified(curve, whole, simpler)


def fit_symbolic(u, y, weight=None, forms: Sequence[str] = tuple(FORMS), parsimony: float = 2.0) -> Formula:
    """The formula that says best, for its length, what y is of u.

    Args:
        u, y: [N] numbers, arrays or tensors. weight: [N], at least 0, how much each point counts; None: all the same.
        forms: keys of `FORMS` besides the polynomials. parsimony: a further number in the formula must make what is left
            unexplained so many times smaller, more than 1.
    Raises: ValueError for values that are not finite, of different lengths, or all in one point.
    """
    weight = np.ones(len(u)) if weight is None else weight
    u, y, weight = (np.asarray(value, dtype=np.float64).ravel() for value in (u, y, weight))
    if not len(u) == len(y) == len(weight):
        raise ValueError(f"u, y and weight have {len(u)}, {len(y)} and {len(weight)} values")
    if not (np.isfinite(u).all() and np.isfinite(y).all() and np.isfinite(weight).all() and (weight >= 0).all()):
        raise ValueError("u, y or weight has a value that is not finite, or a weight below 0")
    u, y, weight = u[weight > 0], y[weight > 0], weight[weight > 0]
    if len(u) == 0 or np.ptp(u) == 0:
        raise ValueError("a function of a single point has no formula")
    curve = _Curve(u, y, np.sqrt(weight / weight.sum()), parsimony)
    if curve.variance <= 1e-20 * float(curve.root ** 2 @ y ** 2):       # a constant, but for rounding
        return replace(curve.polynomial([0]), r2=1.0)
    best = min(_polynomials(curve), key=curve.score)
    for name in forms:
        best = min([best, *_of_form(curve, name, curve.score(best))], key=curve.score)
    return best


# ---------------------------------------------------------------- what a model has learned, and where
@dataclass(frozen=True)
class Learned:
    """A function of a model. part: name of its module. function: "3", a group, or "12 -> 40", an edge. u: [N], quantiles of
    what arrives and even steps from the least to the most; weight [N]; y [N]. formula: of y."""
    part: str
    function: str
    u: Tensor
    weight: Tensor
    y: Tensor
    formula: Formula

    @property
    def block(self) -> str:
        found = re.search(r"blocks\.(\d+)\.", self.part)
        return found[1] if found else ""

    @property
    def layer(self) -> str:
        return self.part.rpartition("mlp.")[2]


class Inputs:
    """What arrives at a module's functions: `SAMPLES` values of each, drawn from all, and the least and the most."""

    def __init__(self, functions: int, rounds: int, generator: torch.Generator):
        self.functions, self.each, self.generator = functions, -(-SAMPLES // rounds), generator
        self.samples: list[Tensor] = []
        self.least, self.most = torch.full((functions,), math.inf), torch.full((functions,), -math.inf)

    def add(self, u: Tensor) -> None:
        """u [..., channels]: neighbouring channels are of one function."""
        u = u.detach().float().cpu().unflatten(-1, (self.functions, -1)).movedim(-2, 0).flatten(1)      # [functions, n]
        self.least, self.most = torch.minimum(self.least, u.amin(1)), torch.maximum(self.most, u.amax(1))
        self.samples.append(u[:, torch.randint(u.shape[1], (min(self.each, u.shape[1]),), generator=self.generator)])

    def points(self, which: Sequence[int]) -> tuple[Tensor, Tensor]:
        """u [len(which), N] and weight [N] of `Learned`."""
        even = POINTS // 4
        shares = (torch.arange(POINTS - even) + 0.5) / (POINTS - even)
        quantiles = torch.cat([values[which] for values in self.samples], 1).quantile(shares, dim=1).T
        least, most = self.least[which, None], self.most[which, None]
        weight = torch.cat([torch.full((POINTS - even,), (1 - EVEN_SHARE) / (POINTS - even)),
                            torch.full((even,), EVEN_SHARE / even)])
        return torch.cat([quantiles, least + torch.linspace(0, 1, even) * (most - least)], 1).double(), weight.double()


def _evenly(layer: FunctionLayer, functions: int) -> tuple[Tensor, Tensor]:
    """The same without inputs: all of the grid counts alike."""
    grid = grid_of(layer)
    u = torch.linspace(float(grid[0]), float(grid[-1]), POINTS, dtype=torch.float64)
    return u.expand(functions, -1), torch.full((POINTS,), 1 / POINTS, dtype=torch.float64)


def _strongest(layer: EdgeLayer, inputs: Inputs | None, count: int) -> list[tuple[int, int]]:
    """(input, output) of the edges that deviate most under what arrives, the strongest first."""
    weights = edge_weights(layer)
    if inputs is None:
        parts: Iterable[Tensor] = [edge_basis(layer, _evenly(layer, 1)[0]).expand(weights.shape[1], -1, -1)]
    else:
        parts = (edge_basis(layer, part.double()) for part in torch.cat(inputs.samples, 1).split(64))
    gram = torch.cat([torch.einsum("ink,inl->ikl", part - part.mean(1, True), part - part.mean(1, True)) / part.shape[1]
                      for part in parts])
    variance = torch.einsum("oik,ikl,oil->oi", weights, gram, weights)
    chosen = variance.flatten().topk(min(count, variance.numel())).indices.tolist()
    return [(index % variance.shape[1], index // variance.shape[1]) for index in chosen]


def _inputs(trained: Trained, images: Iterable[Tensor], rounds: int, layers: Mapping[str, FunctionLayer]) -> dict[str, Inputs]:
    """What arrives at the layers' functions while the model looks at the images."""
    generator = torch.Generator().manual_seed(0)
    found = {name: Inputs(len(layer.coefficients) if isinstance(layer, GroupActivation) else layer.in_features, rounds, generator)
             for name, layer in layers.items()}
    with watching(layers, lambda name, _, u: found[name].add(u)), torch.inference_mode():
        for batch in images:
            trained.model(batch.to(trained.device))
    return found


def find_formulas(trained: Trained, images: Iterable[Tensor] | None = None, rounds: int = 1, edges: int = 6,
                  parsimony: float = 2.0) -> list[Learned]:
    """Formulas of the functions of a group KAN, or of the strongest edges of each layer of a full-edge KAN.

    Args:
        images: batches [B, 3, S, S] whose inputs to the functions weight the fits; None: the grid, evenly. rounds: how many
            batches. edges: of each layer. parsimony: of `fit_symbolic`.
    Raises: UserError for a model without learned functions, and without any image.
    """
    modules = function_layers(trained.model)
    if not modules:
        raise UserError(f"{trained.path} holds no KAN ({trained.spec.name}): there are no learned functions to find formulas of")
    inputs = _inputs(trained, images, rounds, modules) if images is not None else {}
    if any(not found.samples for found in inputs.values()):
        raise UserError("no image could be read, so nothing arrives at the functions: check the folder")
    found = []
    for name, module in modules.items():
        if isinstance(module, GroupActivation):
            which: list[int] = list(range(len(module.coefficients)))
            labels = [str(group) for group in which]
        else:
            chosen = _strongest(module, inputs.get(name), edges)
            which, labels = [i for i, _ in chosen], [f"{i} -> {o}" for i, o in chosen]
        u, weight = inputs[name].points(which) if name in inputs else _evenly(module, len(which))
        if isinstance(module, GroupActivation):
            scale = None if module.scale is None else module.scale.cpu().double()
            y = rswaf_activation_reference(u.T, module.coefficients.cpu().double(), module.points, module.h, module.base, scale).T
        else:
            weights = edge_weights(module)
            y = torch.stack([edge_basis(module, u[n]) @ weights[o, i] for n, (i, o) in enumerate(chosen)])
        found += [Learned(name, label, u[n], weight, y[n], fit_symbolic(u[n], y[n], weight, parsimony=parsimony))
                  for n, label in enumerate(labels)]
    return found


# ---------------------------------------------------------------- formulas in the functions' place
class SymbolicActivation(nn.Module):
    """A formula for each group of neighbouring channels, elementwise: [..., channels] -> the same shape."""

    def __init__(self, formulas: Sequence[Formula]):
        super().__init__()
        self.formulas = list(formulas)

    def forward(self, u: Tensor) -> Tensor:
        groups = u.unflatten(-1, (len(self.formulas), -1)).unbind(-2)
        return torch.stack([formula(group) for formula, group in zip(self.formulas, groups)], -2).flatten(-2)


def with_formulas(model: nn.Module, found: Sequence[Learned]) -> nn.Module:
    """A copy of a group KAN whose functions are their formulas."""
    model = deepcopy(model)
    for name in dict.fromkeys(each.part for each in found):
        model.set_submodule(name, SymbolicActivation([each.formula for each in found if each.part == name]))
    return model


@torch.no_grad()
def with_fitted_basis(model: nn.Module, found: Sequence[Learned]) -> tuple[nn.Module, list[float]]:
    """A copy of a group KAN of the same kind, its coefficients such that each function is the nearest one to its formula by
    weighted least squares; and how near each is: R^2."""
    model, fits = deepcopy(model), []
    for each in found:
        phi, group = model.get_submodule(each.part), int(each.function)
        assert isinstance(phi, GroupActivation)
        basis = rswaf_basis(each.u, torch.tensor(phi.points, dtype=torch.float64), phi.h)               # [N, G]
        scale = None if phi.scale is None else phi.scale[group:group + 1].cpu().double()
        base = rswaf_activation_reference(each.u[:, None], torch.zeros(1, basis.shape[1], dtype=torch.float64), phi.points,
                                          phi.h, phi.base, scale).squeeze(1)
        y = each.formula(each.u)
        gram = basis.T @ (each.weight[:, None] * basis)
        gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
        coefficients = torch.linalg.solve(gram, basis.T @ (each.weight * (y - base)))
        phi.coefficients[group] = coefficients.to(phi.coefficients)
        error = each.weight @ (base + basis @ coefficients - y).square()
        variance = each.weight @ (y - each.weight @ y).square()
        fits.append(float(1 - error / variance) if variance > 0 else 1.0)
    return model, fits


def replace_functions(trained: Trained, found: Sequence[Learned], target: Path) -> str:
    """Evaluate a group KAN as it is, with formulas for its functions, and as it is then saved to `target`, which
    `main.py --eval` reads; returns the table of the three."""
    loaders, process = loaders_of(trained), Process(device=trained.device)
    fitted, fits = with_fitted_basis(trained.model, found)
    about = {"model_args": plain({"name": trained.spec.name, "kwargs": trained.spec.kwargs}),
             "args": plain({dest: value for dest, value in vars(trained.args).items() if SCOPE[dest] in ("model", "data")})}
    if trained.about.get("class_names"):
        about["class_names"] = trained.about["class_names"]
    lines = [summary(f"{title:17}", evaluate(model, loaders.val, process)) for title, model in (
        ("learned functions", trained.model), ("their formulas", with_formulas(trained.model, found)), ("saved", fitted))]
    loaders.check_unreadable(together=True)
    save_safetensors(fitted.state_dict(), about, target)
    return "\n".join([*lines, f"{target}: {trained.spec.name}, its functions are those of the grid's basis nearest to the "
                      f"formulas (R^2 {min(fits):.4f} or more, half of them {float(np.median(fits)):.6f} or more)"])


# ---------------------------------------------------------------- reports
def _is_edge(found: Sequence[Learned]) -> bool:
    return "->" in found[0].function


def rows(found: Sequence[Learned]) -> list[dict]:
    """What the CSV and JSON files have of each function."""
    name = "edge" if _is_edge(found) else "group"
    return [{"block": each.block, "activation": each.layer, name: each.function, "formula": each.formula.text,
             "r2": each.formula.r2, "residual": each.formula.residual, "complexity": each.formula.complexity,
             "form": each.formula.form, "a": each.formula.a, "b": each.formula.b, "c": each.formula.c,
             "polynomial": list(each.formula.polynomial), "latex": each.formula.latex} for each in found]


def table(found: Sequence[Learned]) -> str:
    lines = [["block", "activation", "edge" if _is_edge(found) else "group", "R^2", "residual", "formula"]]
    lines += [[each.block, each.layer, each.function, f"{each.formula.r2:.5f}", f"{each.formula.residual:.2g}",
               each.formula.text] for each in found]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  ".join(word.ljust(width) for word, width in zip(line, widths)).rstrip() for line in lines)


def latex_table(found: Sequence[Learned]) -> str:
    """A longtable to be included in a document."""
    edge = _is_edge(found)
    lines = [r"% \usepackage{amsmath, longtable}", r"\begin{longtable}{lllrl}",
             rf"block & activation & {'edge' if edge else 'group'} & $R^2$ & $\varphi(u)$ \\ \hline"]
    for each in found:
        function = each.function.replace("->", r"\to")
        lines.append(rf"{each.block} & \verb|{each.layer}| & ${function}$ & {each.formula.r2:.4f} & ${each.formula.latex}$ \\")
    lines += [r"\end{longtable}", r"\noindent Here "
              + ", ".join(rf"$\operatorname{{{name}}}(x) = {sympy.latex(value)}$" for name, value in DEFINITIONS.items()) + "."]
    return "\n".join(lines) + "\n"


def draw(found: Sequence[Learned], picture: Path) -> None:
    """The functions of each module, their formulas dashed above them, and the range in which nine of ten inputs lie."""
    parts = list(dict.fromkeys(each.part for each in found))
    columns = min(4, len(parts))
    lines = -(-len(parts) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(5 * columns, 3.4 * lines), squeeze=False, layout="constrained")
    for axis, part in zip(axes.flat, parts):
        for each in (each for each in found if each.part == part):
            u, order = each.u.sort()
            line, = axis.plot(u, each.y[order], linewidth=2.4, alpha=0.45, label=each.function)
            axis.plot(u, each.formula(u), "--", color=line.get_color(), linewidth=1.1)
        inputs = torch.cat([each.u[each.weight == each.weight.max()] for each in found if each.part == part])
        axis.axvspan(*inputs.quantile(torch.tensor([0.05, 0.95]).double()).tolist(), color="grey", alpha=0.12, linewidth=0)
        worst = min(each.formula.r2 for each in found if each.part == part)
        axis.set_title(f"{part}: R² {worst:.4f} or more", fontsize=9)
        axis.set_xlabel("input u (grey: nine of ten)", fontsize=8)
        axis.set_ylabel("φ(u), dashed: its formula", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.25)
        if (count := len(axis.get_legend_handles_labels()[1])) <= 48:     # of more the colours say nothing
            axis.legend(fontsize=6, title="edge" if _is_edge(found) else "group", title_fontsize=6, ncols=-(-count // 16),
                        loc="center left", bbox_to_anchor=(1, 0.5), borderaxespad=0.3)      # the curves may be anywhere
    for axis in list(axes.flat)[len(parts):]:
        axis.remove()
    figure.savefig(picture, dpi=110)
    plt.close(figure)


def report(found: Sequence[Learned], folder: Path) -> None:
    """formulas.txt, .csv, .json, .tex and .png in a folder."""
    sheet = io.StringIO()
    records = rows(found)
    writer = csv.DictWriter(sheet, records[0])
    writer.writeheader()
    writer.writerows(records)
    texts = {".txt": table(found) + "\n", ".csv": sheet.getvalue(), ".json": to_json(records, indent=1) + "\n",
             ".tex": latex_table(found)}
    for suffix, text in texts.items():
        with whole(folder / f"formulas{suffix}") as file:
            file.write_text(text, encoding="utf-8")
    with whole(folder / "formulas.png") as file:
        draw(found, file)


# ---------------------------------------------------------------- the command
def _images(trained: Trained, folder: Path | None, limit: int) -> tuple[Iterable[Tensor] | None, int]:
    """Up to `limit` images, spread evenly over what there is, in batches, and how many batches; (None, 0) without any."""
    if folder:
        files = image_files([folder])
        pictures = Pictures(files[::-(-len(files) // limit)], trained.args)
        return (images for images, _ in pictures), -(-len(pictures) // 64)
    if not trained.has_data:
        return None, 0
    data: Any = loaders_of(trained).val.dataset
    some = Subset(data, range(0, len(data), -(-len(data) // limit)))
    loader = DataLoader(some, 64, generator=torch.Generator())
    return (images[targets >= 0] for images, targets in batches(loader) if (targets >= 0).any()), len(loader)


def run(argv: list[str]) -> int:
    parser = Parser("symbolic.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="images whose inputs to the functions weight the fits "
                        "(default: the validation images of --data-path; without any, all of the grid counts alike)")
    parser.add_argument("--limit", type=int, default=512, metavar="N", help="of these images, spread evenly (default: 512)")
    parser.add_argument("--edges", type=int, default=6, metavar="N", help="of each layer of a full-edge KAN, the strongest "
                        "(default: 6)")
    parser.add_argument("--parsimony", type=float, default=2.0, metavar="FACTOR", help="a further number in a formula must make "
                        "what is left unexplained so many times smaller: near 1 for the closest fits (default: 2)")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="the table as text, CSV, JSON and LaTeX, and a picture")
    parser.add_argument("--replace", type=Path, metavar="TARGET", help="put the formulas in the functions' place, evaluate, "
                        "and save the nearest model that main.py reads (.safetensors; group KAN)")
    own, flags = parse_beside_main(parser, argv)
    for name in ("limit", "edges"):
        if getattr(own, name) < 1:
            raise UserError(f"--{name} {getattr(own, name)} must be at least 1")
    if not 1 < own.parsimony < math.inf:
        raise UserError(f"--parsimony {own.parsimony:g} must be more than 1")
    if own.replace and own.replace.suffix != ".safetensors":
        raise UserError(f"--replace {own.replace} must end in .safetensors")
    trained = load_trained(own.checkpoint, weights=own.weights, device=own.device, flags=flags)
    if own.replace and not any(isinstance(module, GroupActivation) for module in trained.model.modules()):
        raise UserError(f"--replace puts formulas in the place of a group KAN's functions, and {trained.path} holds "
                        f"{trained.spec.name}: leave it out")
    if own.replace and not trained.has_data:
        raise UserError("--replace evaluates the model before and after: name its data with --data-path DIR")
    images, rounds = _images(trained, own.images, own.limit)
    say("weighted by the inputs that arrive" if images else "no images: all of the grid counts alike (see --images)")
    found = find_formulas(trained, images, rounds, own.edges, own.parsimony)
    say(table(found))
    if own.output:
        report(found, own.output)
        say(f"{own.output}: formulas.txt, .csv, .json, .tex and .png")
    if own.replace:
        say(replace_functions(trained, found, own.replace))
    return 0


def main(argv: list[str] | None = None) -> int:
    return peers.exit_code(lambda: run(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
