"""Small models."""
import timm
import torch
from helpers import NANO, TWIN
from torch import nn

import models_kan  # noqa: F401  (registers the models)


def nano(name: str = NANO, seed: int = 0, **kwargs) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model(name, **{"depth": 1, "num_classes": 4, **kwargs})


def learned(suffix: str, **kwargs) -> nn.Module:
    """A model whose learned functions have left their initial values."""
    model = nano(f"vit_nano_patch8_32_{suffix}", **{"depth": 4, "num_classes": 3, **kwargs}).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".coefficients" in name or ".scale" in name:
                parameter.normal_()
    return model


def trained(name: str = TWIN, **kwargs) -> nn.Module:
    """A model far from its initialisation: every parameter has moved, norms and biases too."""
    torch.manual_seed(0)
    model = timm.create_model(name, **{"num_classes": 10, **kwargs})
    with torch.no_grad():
        for key, p in model.named_parameters():
            p.add_(torch.randn_like(p) * (0.2 if "norm" in key or "bias" in key else 0.05))
    return model.eval()


def spread(model: nn.Module, seed: int = 1) -> nn.Module:
    """Adds noise to every value, as initial biases, norms and class tokens are all alike."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if not key.endswith(("grid", "rbf.h")):
                value.add_(torch.randn(value.shape, generator=generator), alpha=0.1)
    return model
