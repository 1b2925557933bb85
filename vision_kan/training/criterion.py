"""What every criterion is made of."""
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ClassWeights(nn.Module):
    """What an image's loss counts in a batch's mean: float32 [B] by its class, for a mixed image by the shares of its classes.

    The image is weighted as a whole, with its smoothing and whatever it learns from a teacher: as if it were drawn so much more
    often, but with the order of the images as it is. To weight each class's term instead would raise the smoothing's share of
    rare classes, too, until they win on any image.

    Args:
        of_class: float32 [K]. smoothing: that targets [B, K] have in them.
    """

    def __init__(self, of_class: Tensor, smoothing: float):
        super().__init__()
        self.of_class, self.smoothing = of_class, smoothing

    def forward(self, targets: Tensor) -> Tensor:
        if targets.ndim == 1:
            return self.of_class[targets]
        return (targets - self.smoothing / len(self.of_class)) / (1 - self.smoothing) @ self.of_class


def balanced(counts: np.ndarray) -> np.ndarray:
    """A weight for each class, inverse to its number of images (scikit-learn's "balanced"): n / (classes * count), float32 [K],
    so that all classes count alike and an image counts 1 on average. 0 for a class without images."""
    present = counts > 0
    return np.where(present, counts.sum() / (present.sum() * np.maximum(counts, 1)), 0).astype(np.float32)


class Criterion(nn.Module):
    """Called as criterion(images, outputs, targets)."""
    copies = 1      # how often the model sees each image of a batch

    def __init__(self, weights: ClassWeights | None = None):
        super().__init__()
        self.weights = weights
        self.reduction = "mean" if weights is None else "none"      # of the losses that `mean` is given

    def mean(self, losses: Tensor, targets: Tensor) -> Tensor:
        """Over the batch. losses: their mean already, or, where images have weights, [B] or [B, K]."""
        if self.weights is None:
            return losses
        return (losses.reshape(len(losses), -1).mean(1) * self.weights(targets)).mean()


class Teacher(nn.Module):
    """A teacher that gets its images at its own size and with its own mean and deviation.

    The batch itself is resized and scaled on its device, after mixup and erasing: so teacher and student see the same, nothing is
    drawn at random, and a resume or another number of processes changes nothing.

    Args:
        model: images float32 [B, 3, h, w] of `size` (height, width), normalised by mean and std, to logits.
        mean, std: of the teacher; students_mean, students_std: of what it is called with, [B, 3, H, W]."""
    scale: Tensor
    shift: Tensor

    def __init__(self, model: nn.Module, size: tuple[int, int], mean: Sequence[float], std: Sequence[float],
                 students_mean: Sequence[float], students_std: Sequence[float]):
        super().__init__()
        self.model, self.size = model, size
        own, students = torch.tensor([list(mean), list(std)]), torch.tensor([list(students_mean), list(students_std)])
        self.same = bool((own == students).all())
        self.register_buffer("scale", (students[1] / own[1]).view(3, 1, 1), persistent=False)
        self.register_buffer("shift", ((students[0] - own[0]) / own[1]).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[-2:] != self.size:
            images = F.interpolate(images, self.size, mode="bicubic", antialias=True)
        return self.model(images if self.same else images * self.scale + self.shift)


def loss_of(net: nn.Module, criterion: Criterion, images: Tensor, targets: Tensor) -> Tensor:
    """The criterion's loss of a batch, scalar. It sees logits in float32: one tensor, or the class and distillation tokens'
    pair."""
    outputs = net(images if criterion.copies == 1 else torch.cat([images] * criterion.copies))
    outputs = outputs.float() if isinstance(outputs, Tensor) else tuple(output.float() for output in outputs)
    return criterion(images, outputs, targets)
