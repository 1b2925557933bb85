"""Symbolic regression of functions of one variable, by least squares."""
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import sympy
import torch
from scipy.optimize import least_squares
from torch import Tensor
from torch.nn import functional as F

UNEXPLAINED = 1e-6      # share of the variance below which a better fit does not improve the score
MAX_DEGREE = 5          # of a polynomial


@dataclass(frozen=True)
class Form:
    """f in a*f(b*u + c) + d*u + e."""
    function: Callable[[Tensor], Tensor]
    symbol: Callable[[sympy.Expr], sympy.Expr]
    signs: tuple[float, ...] = (1.0,)       # of b to try: both unless f is even or odd
    scaled: bool = True                     # b is free; it is not if f(b*x) is a multiple of f(x)
    shifted: bool = True                    # c is free; it is not for exp, since exp(x + c) is a multiple of exp(x)


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
# Functions in formulas that sympy lacks.
DEFINITIONS = {
    "gelu": _X * (1 + sympy.erf(_X / sympy.sqrt(2))) / 2,
    "silu": _X / (1 + sympy.exp(-_X)),
    "relu": sympy.Max(0, _X),
}
U = sympy.Symbol("u", real=True)


@dataclass(frozen=True)
class Formula:
    """a*f(b*u + c) + sum_n polynomial[n] * u^n, f = FORMS[form]; form "polynomial": the sum only.

    r2: 1 - weighted mean square error / weighted variance of the fitted function; 1 for an exactly fitted constant.
    residual: root of the weighted mean square error, in units of the function."""
    form: str
    polynomial: tuple[float, ...] = ()
    a: float = 0.0
    b: float = 1.0
    c: float = 0.0
    r2: float = math.nan
    residual: float = math.nan

    def __call__(self, u: Tensor) -> Tensor:
        """The values at u, in u's shape and dtype on its device."""
        y = torch.zeros_like(u)
        for coefficient in reversed(self.polynomial):
            y = y * u + coefficient
        return y if self.form == "polynomial" else y + self.a * FORMS[self.form].function(self.b * u + self.c)

    @property
    def complexity(self) -> int:
        """The number of coefficients that are not 0 (for b: not 1), plus one for f."""
        terms = sum(coefficient != 0 for coefficient in self.polynomial)
        return terms if self.form == "polynomial" else terms + 2 + (abs(self.b) != 1) + (self.c != 0)

    def expression(self, digits: int = 17) -> sympy.Expr:
        """The formula in the symbol `U`, with numbers rounded to `digits` digits; gelu, silu and relu by name (see `exact`)."""
        def number(value: float) -> sympy.Expr:
            text = f"{value:.{digits}g}"
            return sympy.Integer(int(float(text))) if float(text).is_integer() else sympy.Float(text)

        y = sum((number(value) * U ** n for n, value in enumerate(self.polynomial) if value), sympy.Integer(0))
        if self.form != "polynomial":
            y += number(self.a) * FORMS[self.form].symbol(number(self.b) * U + number(self.c))
        return y.xreplace({value: number(value) for value in y.atoms(sympy.Float)})     # sympy may have squared numbers

    def exact(self) -> sympy.Expr:
        """`expression` in sympy's own functions, which it can differentiate, integrate and evaluate."""
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
    """A function to be fitted, float64 [N] each."""
    u: np.ndarray
    y: np.ndarray
    root: np.ndarray        # square roots of the weights, which sum to 1
    parsimony: float        # of `fit_symbolic`

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
        """Linear least squares: the columns' coefficients, and the weighted residuals."""
        target = self.root * self.y
        if not columns:
            return np.zeros(0), target
        matrix = self.root[:, None] * np.stack(columns, 1)
        norms = np.linalg.norm(matrix, axis=0)
        norms[norms == 0] = 1
        coefficients = np.linalg.lstsq(matrix / norms, target, rcond=1e-12)[0]
        return coefficients / norms, matrix @ (coefficients / norms) - target

    def score(self, formula: Formula) -> float:
        """Lower is better: the rule of pykan's `suggest_symbolic` (arXiv:2408.10205), with 1 - R^2 bounded by `UNEXPLAINED`."""
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
        """Fit a form. b and c = -b * middle, if named in `free`, are searched from the given values on; in each step a and the
        coefficients of the powers are the best for them (variable projection, Golub and Pereyra 1973)."""
        form, sign = FORMS[name], math.copysign(1, b)

        def numbers(x: np.ndarray) -> tuple[float, float]:
            given = {key: float(np.clip(value, *limits[key])) for key, value in zip(free, x)}
            return (sign * math.exp(given["b"]) / self.deviation if "b" in given else b,
                    self.mean + self.deviation * given["c"] if "c" in given else middle)

        def solved(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            b, middle = numbers(x)
            f = _finite(form.function(torch.from_numpy(b * (self.u - middle))).numpy())
            return self.solve([f, *(self.u ** n for n in powers)])

        start = {"b": math.log(abs(b) * self.deviation), "c": (middle - self.mean) / self.deviation}
        limits = {"b": (math.log(0.05), math.log(30)), "c": (-6.0, 6.0)}
        x = np.array([start[key] for key in free])
        if free:        # MINPACK is the fastest method and has no bounds, so `numbers` clips
            x = least_squares(lambda x: solved(x)[1] / self.variance ** 0.5, x, method="lm", max_nfev=120).x
        (a, *coefficients), residuals = solved(x)
        every = [0.0] * (max(powers, default=-1) + 1)
        for n, value in zip(powers, coefficients):
            every[n] = float(value)
        b, middle = numbers(x)
        c = -b * middle + 0.0       # no -0.0
        if name == "sin":       # reduce c to half a period: sin(x + pi) = -sin(x)
            a, c = -a if round(c / math.pi) % 2 else a, math.remainder(c, math.pi)
        return self.rated(Formula(name, tuple(every), float(a), b, c), residuals)

    def starts(self, name: str, sign: float, count: int = 3) -> list[tuple[float, float]]:
        """Starting points (b, middle): the best local optima on a grid, for the best a, d, e of a*f(b*(u - middle)) + d*u + e."""
        form = FORMS[name]
        slopes = np.geomspace(0.2, 8, 24) / self.deviation if form.scaled else np.ones(1)
        middles = self.mean + self.deviation * np.linspace(-3, 3, 13) if form.shifted else np.zeros(1)
        b, middle = np.meshgrid(sign * slopes, middles, indexing="ij")
        f = _finite(form.function(torch.from_numpy(b[..., None] * (self.u - middle[..., None]))).numpy())  # [slopes, middles, N]
        linear, _ = np.linalg.qr(np.stack([self.root, self.root * self.u], 1))
        f, y = (value - value @ linear @ linear.T for value in (self.root * f, self.root * self.y))
        norms = np.square(f).sum(-1)
        gain = np.where(norms > 1e-20, (f @ y) ** 2 / np.maximum(norms, 1e-20), 0)
        padded = np.pad(gain, 1, constant_values=-1)
        around = np.max([np.roll(padded, shift, axis)[1:-1, 1:-1] for axis in (0, 1) for shift in (-1, 1)], axis=0)
        best = np.argsort(-np.where(gain >= around, gain, -1), axis=None)[:count]
        return list(zip(b.flat[best].tolist(), middle.flat[best].tolist()))


def _finite(values: np.ndarray) -> np.ndarray:
    """Functions [..., N]; zeros, which explain nothing, in place of one whose square overflows, as exp's does far from 0."""
    return np.where((np.abs(values) < 1e100).all(-1, keepdims=True), values, 0)


def _simplified(curve: _Curve, formula: Formula, simpler: Callable[[Formula], Iterable[Formula]]) -> Formula:
    """The formula without the numbers that it does not need, removed one at a time."""
    while (best := min(simpler(formula), key=curve.score, default=formula)) and curve.score(best) < curve.score(formula):
        formula = best
    return formula


def _polynomials(curve: _Curve) -> Iterator[Formula]:
    def simpler(formula: Formula) -> Iterator[Formula]:
        powers = [n for n, value in enumerate(formula.polynomial) if value]
        if len(powers) > 1:
            yield from (curve.polynomial([p for p in powers if p != n]) for n in powers)

    for degree in range(MAX_DEGREE + 1):
        yield _simplified(curve, curve.polynomial(range(degree + 1)), simpler)


def _of_form(curve: _Curve, name: str, best: float) -> Iterator[Formula]:
    """Formulas of a form, except those that cannot beat the score `best`."""
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
        full = min((curve.fit(name, b, middle, free, (0, 1)) for b, middle in curve.starts(name, sign)),
                   key=lambda formula: formula.residual)
        if curve.score(replace(full, polynomial=(), b=1.0, c=0.0)) < best:      # a bound: as if it needed a only
            yield _simplified(curve, full, simpler)


def fit_symbolic(u, y, weight=None, forms: Sequence[str] = tuple(FORMS), parsimony: float = 2.0) -> Formula:
    """The formula of y in terms of u with the best balance of accuracy and length.

    Args:
        u, y: [N] numbers, arrays or tensors.
        weight: [N], at least 0; None: all points count the same.
        forms: keys of `FORMS` to try besides polynomials.
        parsimony: above 1; each further number in the formula must divide the unexplained part by this factor.
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
