"""The dtype that a model computes in."""
from contextlib import nullcontext

import torch

AMP_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_amp_dtype(name: str, device: torch.device) -> torch.dtype:
    """`--amp-dtype`; auto: bfloat16 where the GPU computes in it, else float16; float32 on a CPU."""
    if name != "auto":
        return AMP_DTYPES[name]
    if device.type == "cpu":
        return torch.float32
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float16


def autocast(device: torch.device, dtype: torch.dtype):
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)
