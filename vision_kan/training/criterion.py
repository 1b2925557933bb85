"""The base of every criterion, weights of classes, and the teacher of a distillation."""
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ClassWeights(nn.Module):
    """The weight of each image's loss in a batch's mean, float32 [B]: that of its class, for a mixed image the mean by shares.

    It applies to the whole image, with its smoothing and what it learns from a teacher, as if the image were drawn more often.
    Weighting each class's term instead would also raise the smoothing's share of rare classes, until they win on any image.

    Args:
        of_class: float32 [K].
        smoothing: the label smoothing contained in targets [B, K].
    """

    def __init__(self, of_class: Tensor, smoothing: float):
        super().__init__()
        self.of_class, self.smoothing = of_class, smoothing

    def forward(self, targets: Tensor) -> Tensor:
        if targets.ndim == 1:
            return self.of_class[targets]
        return (targets - self.smoothing / len(self.of_class)) / (1 - self.smoothing) @ self.of_class


def balanced(counts: np.ndarray) -> np.ndarray:
    """Class weights n / (classes * count), float32 [K], as scikit-learn's "balanced": all classes count the same, and an image
    counts 1 on average. 0 for a class without images. counts: images of each class, [K]."""
    present = counts > 0
    return np.where(present, counts.sum() / (present.sum() * np.maximum(counts, 1)), 0).astype(np.float32)


class Criterion(nn.Module):
    """Called as criterion(images, outputs, targets)."""
    copies = 1      # of each image in the batch that the model gets

    def __init__(self, weights: ClassWeights | None = None):
        super().__init__()
        self.weights = weights
        self.reduction = "mean" if weights is None else "none"      # that a subclass's loss must use

    def mean(self, losses: Tensor, targets: Tensor) -> Tensor:
        """The mean over the batch. losses: reduced by `reduction`: the mean already, or, with weights, [B] or [B, K]."""
        if self.weights is None:
            return losses
        return (losses.reshape(len(losses), -1).mean(1) * self.weights(targets)).mean()


class Teacher(nn.Module):
    """A teacher that gets the student's images at its own size and with its own mean and deviation.

    The batch is resized and scaled on its device, after mixup and erasing. So teacher and student see the same images, and no
    random numbers are drawn that a resume or another number of processes could change.

    Args:
        model: maps images float32 [B, 3, h, w] of `size` (height, width), normalised by mean and std, to logits.
        mean, std: the teacher's normalisation.
        student_mean, student_std: the normalisation of the images that it is called with, [B, 3, H, W]."""
    scale: Tensor
    shift: Tensor

    def __init__(self, model: nn.Module, size: tuple[int, int], mean: Sequence[float], std: Sequence[float],
                 student_mean: Sequence[float], student_std: Sequence[float]):
        super().__init__()
        self.model, self.size = model, size
        own, student = torch.tensor([list(mean), list(std)]), torch.tensor([list(student_mean), list(student_std)])
        self.same = bool((own == student).all())
        self.register_buffer("scale", (student[1] / own[1]).view(3, 1, 1), persistent=False)
        self.register_buffer("shift", ((student[0] - own[0]) / own[1]).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[-2:] != self.size:
            images = F.interpolate(images, self.size, mode="bicubic", antialias=True)
        return self.model(images if self.same else images * self.scale + self.shift)


def loss_of(net: Callable[[Tensor], Any], criterion: Criterion, images: Tensor, targets: Tensor) -> Tensor:
    """The criterion's loss of a batch, a scalar. The criterion gets logits in float32: one tensor, or a pair from the class and
    distillation tokens."""
    outputs = net(images if criterion.copies == 1 else torch.cat([images] * criterion.copies))
    outputs = outputs.float() if isinstance(outputs, Tensor) else tuple(output.float() for output in outputs)
    return criterion(images, outputs, targets)
