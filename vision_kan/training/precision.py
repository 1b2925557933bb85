"""The dtype in which a model computes."""
from contextlib import nullcontext

import torch

AMP_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_amp_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of `--amp-dtype`. auto: bfloat16 if the GPU supports it, else float16; float32 on a CPU."""
    if name != "auto":
        return AMP_DTYPES[name]
    if device.type == "cpu":
        return torch.float32
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float16


def autocast(device: torch.device, dtype: torch.dtype):
    """The context in which the forward pass computes in `dtype`; none is needed for float32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)
