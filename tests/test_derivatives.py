"""Derivatives beyond one backward pass, of every KAN: forward mode, second ones, many at once, and graphs of torch.fx."""
import functools

import pytest
import timm
import torch
from helpers import every
from paths import error
from timm.models._features_fx import create_feature_extractor as timms_extractor
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torchvision.models.feature_extraction import create_feature_extractor

import models_kan  # noqa: F401  (registers the models)
from faster_kan import FasterKAN
from vision_kan.kernels import rswaf_activation
from vision_kan.layers.efficient_kan import EfficientKAN
from vision_kan.layers.group_kan import GroupKAN
from vision_kan.layers.kat import KAT

KANS = {
    "group": functools.partial(GroupKAN, groups=2, trainable_base=True),
    "full-edge": FasterKAN,
    "full-edge, trained grid": functools.partial(FasterKAN, train_grid=True, train_h=True, kan_bias=True),
    "full-edge, covering": functools.partial(FasterKAN, grid_min=-3, grid_max=3, h=None, kan_bias=True, base_branch=True,
                                             second_norm="static"),
    "efficient": EfficientKAN,
    "KAT": functools.partial(KAT, groups=2),
}


def kan_of(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    kan = KANS[name](4, 6)
    for key, parameter in kan.named_parameters():
        if key.endswith(("coefficients", "weight", "scaler")) and "layernorm" not in key:
            nn.init.normal_(parameter, std=0.4)
    return kan.to(dtype)


def functional(kan: nn.Module):
    """kan(x) as a function of x and all parameters."""
    names = [key for key, _ in kan.named_parameters()]
    return lambda x, *parameters: functional_call(kan, dict(zip(names, parameters, strict=True)), x)


def slope(kan: nn.Module, x: torch.Tensor, create_graph: bool = False) -> torch.Tensor:
    x = x if x.requires_grad else x.clone().requires_grad_()
    return torch.autograd.grad(kan(x).square().sum(), x, create_graph=create_graph)[0]


def differences(function, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The derivative of function at x along t, central differences in fp64."""
    return (function(x.double() + 1e-6 * t.double()) - function(x.double() - 1e-6 * t.double())) / 2e-6


@pytest.mark.parametrize("name", every(2, KANS))
def test_first_and_second_derivatives_in_both_modes(name):
    """In float64 by every input and parameter: gradients, tangents, gradients of gradients."""
    kan = kan_of(name, torch.float64)
    torch.manual_seed(3)
    inputs = (torch.randn(2, 4, dtype=torch.float64, requires_grad=True), *kan.parameters())
    assert torch.autograd.gradcheck(functional(kan), inputs, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(functional(kan), inputs, fast_mode=True)


@pytest.mark.parametrize("name", KANS)
def test_transforms_of_the_layers_as_they_train(name):
    """In float32, where kernels compute the ordinary passes, against differences in float64."""
    kan, exact = kan_of(name), kan_of(name, torch.float64)
    x, t = torch.randn(3, 4), torch.randn(3, 4)
    along = differences(exact, x, t)
    value, tangent = jvp(kan, (x,), (t,))
    assert error(value, exact(x.double())) < 1e-5 and error(tangent, along) < 1e-4
    with forward_ad.dual_level():
        assert error(forward_ad.unpack_dual(kan(forward_ad.make_dual(x, t))).tangent, along) < 1e-4
        # along a parameter alone
        key, weight = next((key, parameter) for key, parameter in kan.named_parameters() if parameter.dim() == 2)
        direction = torch.randn_like(weight)
        dual = functional_call(kan, {key: forward_ad.make_dual(weight.detach(), direction)}, x)
        tangent = forward_ad.unpack_dual(dual).tangent
    of_weight = exact.get_parameter(key).detach()
    assert error(tangent, differences(lambda w: functional_call(exact, {key: w}, x.double()), of_weight,
                                      direction)) < 1e-4
    jacobian = jacrev(kan)(x)
    assert error(jacfwd(kan)(x), jacobian) < 1e-4
    for strategy in ("reverse-mode", "forward-mode"):                   # the first does many backward passes at once
        assert error(torch.autograd.functional.jacobian(kan, x, vectorize=True, strategy=strategy), jacobian) < 1e-4
    second = differences(lambda x: slope(exact, x), x, t)
    assert error((hessian(lambda x: kan(x).square().sum())(x) * t).sum((2, 3)), second) < 1e-3
    again = x.clone().requires_grad_()
    assert error(torch.autograd.grad((slope(kan, again, create_graph=True) * t).sum(), again)[0], second) < 1e-3


@pytest.mark.parametrize("name", KANS)
def test_a_gradient_penalty_beside_other_terms(name):
    """The gradient that reaches the layer does not depend on x, what comes before it does."""
    kan, exact = kan_of(name), kan_of(name, torch.float64)
    before = nn.Linear(4, 4)

    def penalty(kan, x, create_graph=False):
        x = x.clone().requires_grad_() if not x.requires_grad else x
        y = kan(nn.functional.linear(x, before.weight.to(x), before.bias.to(x))) + x ** 3
        return torch.autograd.grad(y.sum(), x, create_graph=create_graph)[0].square().sum()

    x, t = torch.randn(5, 4, requires_grad=True), torch.randn(5, 4)
    penalty(kan, x, True).backward()
    assert error((x.grad * t).sum(), differences(lambda x: penalty(exact, x), x.detach(), t)) < 1e-3
    assert not torch.autograd.grad(kan(x).sum(), x)[0].requires_grad    # and the ordinary pass keeps no graph


@pytest.mark.parametrize("name", KANS)
def test_gradients_of_every_sample(name):
    kan, x = kan_of(name), torch.randn(5, 3, 4)
    parameters = {key: parameter.detach() for key, parameter in kan.named_parameters()}

    def loss(parameters, x):
        return functional_call(kan, parameters, (x,)).square().sum()

    each = vmap(grad(loss), (None, 0))(parameters, x)
    for i, sample in enumerate(x):
        want = torch.autograd.grad(kan(sample).square().sum(), list(kan.parameters()))
        for key, gradient in zip(parameters, want, strict=True):
            assert error(each[key][i], gradient) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["group", "efficient"])                # in others LayerNorm has no tangents there
def test_a_compiled_tangent(name):
    kan, x, t = kan_of(name), torch.randn(3, 4), torch.randn(3, 4)
    compiled = torch.compile(lambda x, t: jvp(kan, (x,), (t,))[1], backend="eager", fullgraph=True)
    assert error(compiled(x, t), jvp(kan, (x,), (t,))[1]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["group", "full-edge", "efficient"])
def test_second_derivatives_under_autocast(name, dtype):
    kan, exact, x, t = kan_of(name), kan_of(name, torch.float64), torch.randn(30, 4), torch.randn(30, 4)
    again = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype):
        first = slope(kan, again, create_graph=True)
    got, = torch.autograd.grad((first * t).sum(), again)
    assert got.dtype == torch.float32 and error(got, differences(lambda x: slope(exact, x), x, t)) < 0.1


def test_a_scale_without_a_base():
    """It does not enter the value: a gradient of zero, and no error."""
    u, c, s = (torch.randn(shape, requires_grad=True) for shape in ((3, 4), (2, 2), (2,)))
    y = rswaf_activation(u, c, (-1.0, 1.0), 1.0, "none", s)
    first, = torch.autograd.grad(y.square().sum(), u, create_graph=True)
    gradient, = torch.autograd.grad(first.sum(), s, allow_unused=True)
    assert gradient is None or not gradient.any()


@pytest.mark.parametrize("suffix", ["ViT", "GKAN", "KAN", "EKAN", "KAT"])
def test_feature_extractors_through_torch_fx(suffix):
    model = timm.create_model(f"vit_nano_patch8_32_{suffix}", num_classes=5, depth=2).eval()
    images, want = torch.randn(2, 3, 32, 32), []
    model.blocks[1].mlp.register_forward_hook(lambda module, args, out: want.append(out))
    logits = model(images)
    model.blocks[1].mlp._forward_hooks.clear()
    for extractor in (create_feature_extractor, timms_extractor):
        maps = extractor(model, ["blocks.1.mlp", "head"])(images)
        assert torch.equal(maps["blocks.1.mlp"], want[0]) and torch.equal(maps["head"], logits)
