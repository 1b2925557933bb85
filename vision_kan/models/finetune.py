"""Another model's weights as the start of a training: tensors are loaded, resampled, converted or dropped."""
import math
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from vision_kan.checkpoints.layouts import rename_keys
from vision_kan.common.errors import UserError
from vision_kan.layers.feed_forward import beginnings
from vision_kan.models.infer import load_into, sample_keys


@dataclass
class LoadReport:
    """What became of each tensor when a model took over another's weights, each a dict of key -> note."""
    loaded: dict[str, str] = field(default_factory=dict)
    converted: dict[str, str] = field(default_factory=dict)
    resampled: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    initial: dict[str, str] = field(default_factory=dict)

    def table(self) -> str:
        """One line per kind of tensor, with `*` for the number of the block."""
        lines = []
        for title, entries in (("loaded", self.loaded), ("converted", self.converted), ("resampled", self.resampled),
                               ("dropped", self.dropped), ("left as initialised", self.initial)):
            groups = Counter((re.sub(r"\.\d+\.", ".*.", key, count=1), note) for key, note in entries.items())
            lines.append(f"  {title}: {len(entries)} tensors")
            lines += [f"    {key}{f'  x{n}' if n > 1 else ''}{f'  ({note})' if note else ''}"
                      for (key, note), n in groups.items()]
        return "\n".join(lines)


def _adapt_pos_embed(state: dict[str, Tensor], model: Any, old: tuple[int, int] | None) -> None:
    """Adapt `pos_embed` to the model's grid and prefix tokens, in place. old: the grid of the embedding; None: a square.

    The positions of the class and distillation tokens are kept. A DeiT-III model has none, so there they are added to the tokens
    themselves, which gives the same function; coming from DeiT-III they become zero, which also does."""
    pos = state["pos_embed"]
    if not hasattr(model, "patch_embed") or getattr(model, "pos_embed", None) is None or pos.dim() != 3:
        return
    tokens = [token for token in ("cls_token", "dist_token") if token in state]

    def fits(patches: int) -> bool:
        return patches > 0 and (patches == old[0] * old[1] if old else math.isqrt(patches) ** 2 == patches)

    n_prefix = next((n for n in (len(tokens), 0) if fits(pos.shape[1] - n)), None)
    if n_prefix is None:        # oblong images or further tokens: the meaning of the positions is unknown
        if pos.shape != model.pos_embed.shape:
            del state["pos_embed"]
        return
    prefix, grid = pos[:, :n_prefix], pos[:, n_prefix:]
    grid = resample_abs_pos_embed(grid, new_size=list(model.patch_embed.grid_size), old_size=list(old) if old else None,
                                  num_prefix_tokens=0)
    if getattr(model, "no_embed_class", False):
        for i, token in enumerate(tokens[:n_prefix]):
            state[token] = state[token] + prefix[:, i:i + 1]
        prefix = prefix[:, :0]
    else:
        wanted = model.num_prefix_tokens
        if n_prefix == 0:
            prefix = pos.new_zeros(1, wanted, pos.shape[-1])
        prefix = torch.cat([prefix[:, :wanted]] + [prefix[:, :1]] * (wanted - prefix.shape[1]), dim=1)
    state["pos_embed"] = torch.cat([prefix, grid], dim=1)


def load_finetune(model: nn.Module, source: dict[str, Tensor], grid: tuple[int, int] | None = None) -> LoadReport:
    """Load all of another model's weights that fit, and report what became of each tensor.

    Position and patch embeddings are resampled to the model's image and patch size. The head is dropped if the number of classes
    differs. A group KAN and KAT take over an MLP's weights; for other KANs they are dropped (`conversion.load_converted` fits
    them).

    Args:
        source: the other model's parameters.
        grid: (rows, columns) of its patches (`infer.patch_grid`); None: a square.
    Raises: UserError if no tensor fits, or none of the attention."""
    own, report = model.state_dict(), LoadReport()
    if any(".kan.layers." in key for key in source):
        report.dropped = {key: "never used by the original" for key in source if ".mlp." in key}
    source = rename_keys(source, own)
    state = dict(source)
    if "pos_embed" in own and "pos_embed" in state:
        _adapt_pos_embed(state, model, grid)
    if isinstance(model, VisionTransformer):
        pos = state.pop("pos_embed", None)
        state = checkpoint_filter_fn(state, model)
        if pos is not None:
            state["pos_embed"] = pos
    taken, begun = {}, beginnings(model, state)
    for key, value in own.items():
        if key in state and state[key].shape == value.shape:
            taken[key] = state[key]
            before = source[key].shape if key in source else None
            if before is not None and before != value.shape:
                report.resampled[key] = f"{tuple(before)} -> {tuple(value.shape)}"
            else:
                report.loaded[key] = ""
        elif key in begun:
            report.converted[key] = begun[key]
        else:
            report.initial[key] = ""
    for key, value in source.items():
        if key not in taken:
            report.dropped[key] = (f"{tuple(value.shape)} against {tuple(own[key].shape)}" if key in own
                                   else "no such part in this model")
    attention = [key for key in own if ".attn." in key]
    if source and not own.keys() & source.keys():
        raise UserError(f"the checkpoint's weights ({sample_keys(source)}) have no name in common with those of the model "
                        f"({sample_keys(own)}): it is of another program or architecture: choose weights of a "
                        "vision transformer of the model's width and depth")
    if not taken or (attention and not any(key in taken for key in attention)):
        theirs = next((f" ({key}: {tuple(source[key].shape)} against {tuple(own[key].shape)})"
                       for key in attention if key in source), "")
        raise UserError(f"nothing of the checkpoint's attention fits this model{theirs}, so it would train from "
                        "random weights: choose a --model of the same width and depth")
    # with what has no place, by which a layer knows functions of another basis
    load_into(model, {**{key: value for key, value in state.items() if key not in own}, **taken}, "the checkpoint")
    return report
