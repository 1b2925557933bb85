"""--weight-init mimetic: attention that begins like trained attention (Trockman and Kolter, arXiv:2305.09828)."""
import torch
from torch import Tensor, nn

# Their constants for vision transformers: products begin as SHARE_QK * (Z + I) and SHARE_VO * (Z - I), Z random.
SHARE_QK, SHARE_VO = 0.7, 0.4


@torch.no_grad()
def init_mimetic(model: nn.Module) -> int:
    """Initialise every attention of timm's kind, by torch's generator. Wq^T Wk of each head approximates 0.7 Z + 0.7 I by its
    largest singular values, and Wo Wv of all heads together is 0.4 Z - 0.4 I; Z has normal entries of variance 1/D. Their biases
    and all else keep their values.

    Returns: the number of attentions, modules with `num_heads`, one linear map `qkv` [3 D, D] and one `proj` [D, D]."""
    found = [module for module in model.modules() if _is_attention(module)]
    for attention in found:
        qkv: Tensor = attention.qkv.weight      # type: ignore[assignment, union-attr]
        proj: Tensor = attention.proj.weight    # type: ignore[assignment, union-attr]
        heads: int = attention.num_heads        # type: ignore[assignment]
        width = qkv.shape[1]
        q, k, v = qkv.view(3, heads, -1, width)
        for head in range(heads):
            left, right = _factors(width, SHARE_QK, 1.0)
            q[head], k[head] = left.T[:len(q[head])], right[:len(k[head])]
        left, right = _factors(width, SHARE_VO, -1.0)
        proj.copy_(left)
        v.copy_(right.view_as(v))
    return len(found)


def _factors(width: int, share: float, sign: float) -> tuple[Tensor, Tensor]:
    """L and R [D, D] with L R = share * (Z + sign * I), the columns of L and rows of R by falling singular values."""
    product = share * (torch.randn(width, width) / width ** 0.5 + sign * torch.eye(width))
    u, s, vh = torch.linalg.svd(product)
    return u * s.sqrt(), s.sqrt()[:, None] * vh


def _is_attention(module: nn.Module) -> bool:
    qkv, proj = getattr(module, "qkv", None), getattr(module, "proj", None)
    return isinstance(qkv, nn.Linear) and isinstance(proj, nn.Linear) and isinstance(getattr(module, "num_heads", None), int) \
        and qkv.weight.shape == (3 * qkv.in_features, qkv.in_features) and proj.weight.shape == (qkv.in_features,) * 2
