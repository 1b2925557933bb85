"""Entry points of `torch.hub`: every registered model, those that come with trained weights, and one for checkpoints.

    torch.hub.load(PATH_OF_THIS_CODE, "deit_tiny_patch16_224_GKAN", source="local", num_classes=10)
    torch.hub.load(PATH_OF_THIS_CODE, "vit_nano_patch8_32_GKAN.digits", source="local", pretrained=True)
    torch.hub.load(PATH_OF_THIS_CODE, "checkpoint", FILE_OR_URL, source="local")
"""
from functools import partial as _partial
from typing import Any as _Any

import timm as _timm
from torch import nn as _nn

import models_kan as _models_kan
from vision_kan.checkpoints.shipped import shipped as _shipped

# torch.hub checks that these are installed before it calls an entry point
dependencies = ["torch", "torchvision", "timm", "numpy", "PIL", "yaml", "safetensors"]


def _entry(name: str) -> _partial:
    entry = _partial(_timm.create_model, name)
    entry.__doc__ = getattr(_models_kan, name.split(".")[0]).__doc__
    return entry


globals().update({name: _entry(name) for name in [*_models_kan.registered_models(), *_shipped()]})


def checkpoint(location: str, weights: str = "model", device: str = "cpu") -> _nn.Module:
    """The trained model of a checkpoint of this project, of the original Vision-KAN or of DeiT. No code in it is run.

    Args:
        location: a file, a folder, a URL, hf-hub:OWNER/NAME or the name of weights that come with this code.
        weights: "model", the trained ones, or "model_ema", their moving average.
        device: as --device of main.py.
    Returns: the model in evaluation mode. Its `pretrained_cfg` says how to prepare images
        (`timm.data.resolve_model_data_config(model)`) and names the classes, "label_names".
    Raises: vision_kan.common.errors.UserError, with one sentence, if it is not such a checkpoint.
    """
    from vision_kan.run.trained import load_trained
    trained = load_trained(location, weights=weights, device=device)
    model: _Any = trained.model
    model.pretrained_cfg = {**model.pretrained_cfg, **trained.data_config, "label_names": trained.class_names}
    return model.requires_grad_(True)
