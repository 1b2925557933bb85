"""Every criterion against a formula written out here in numpy or plain PyTorch."""
from argparse import Namespace

import numpy as np
import pytest
import timm
import torch
from timm.data import Mixup
from timm.task import TokenDistillationTask
from torch import nn
from torch.nn import functional as F

from losses import CosubLoss, DistillationLoss, build_criterion, positive_threshold
from vision_kan.training import criterion as criterion_module
from vision_kan.training.criterion import ClassWeights, balanced

B, K = 6, 7


def flags(**values) -> Namespace:
    return Namespace(**{"bce_loss": False, "smoothing": 0.1, "cosub": False, "distillation_type": "none",
                        "distillation_alpha": 0.5, "distillation_tau": 1.0, **values})


@pytest.fixture
def batch():
    """Images, logits [B, K] and class indices [B]."""
    random = torch.Generator().manual_seed(0)
    return (torch.randn(B, 3, 4, 4, generator=random), 2 * torch.randn(B, K, generator=random),
            torch.randint(K, (B,), generator=random))


def soft(seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).dirichlet(np.ones(K), B)).float()


def log_softmax(x: torch.Tensor) -> np.ndarray:
    x = x.detach().double().numpy()
    return x - np.log(np.exp(x).sum(1, keepdims=True))


def bce(logits: torch.Tensor, targets) -> float:
    """-t log s - (1 - t) log(1 - s), averaged over images and classes."""
    s, t = 1 / (1 + np.exp(-logits.detach().double().numpy())), np.asarray(targets, dtype=np.float64)
    return float(-(t * np.log(s) + (1 - t) * np.log(1 - s)).mean())


def one_hot(targets: torch.Tensor) -> np.ndarray:
    return np.eye(K)[targets.numpy()]


# ---------------------------------------------------------------- without a teacher
def test_plain_cross_entropy(batch):
    images, logits, targets = batch
    loss = build_criterion(flags(smoothing=0.0), K, False)(images, logits, targets)
    expected = -log_softmax(logits)[np.arange(B), targets.numpy()].mean()
    assert loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("smoothing", [0.1, 0.4])
def test_label_smoothing(batch, smoothing):
    images, logits, targets = batch
    loss = build_criterion(flags(smoothing=smoothing), K, False)(images, logits, targets)
    smooth = one_hot(targets) * (1 - smoothing) + smoothing / K
    assert loss.item() == pytest.approx(-(smooth * log_softmax(logits)).sum(1).mean(), rel=1e-6)


def test_soft_targets_are_not_smoothed_a_second_time(batch):
    images, logits, _ = batch
    loss = build_criterion(flags(smoothing=0.1), K, True)(images, logits, soft())
    assert loss.item() == pytest.approx(-(soft().numpy() * log_softmax(logits)).sum(1).mean(), rel=1e-6)


def test_bce_without_mixup_is_of_smoothed_one_hot_targets(batch):
    images, logits, targets = batch
    loss = build_criterion(flags(bce_loss=True), K, False)(images, logits, targets)
    assert loss.item() == pytest.approx(bce(logits, one_hot(targets) * 0.9 + 0.1 / K), rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.1, 0.0])
@pytest.mark.parametrize("kind", [{"mixup_alpha": 0.8}, {"mixup_alpha": 0.0, "cutmix_alpha": 1.0}])
def test_bce_after_mixup_has_the_classes_in_the_image_as_positives(batch, smoothing, kind):
    images, logits, targets = batch
    logits = logits - 2                 # most classes are unlikely, as in practice
    np.random.seed(3)
    mixed_images, mixed = Mixup(**kind, label_smoothing=smoothing, num_classes=K)(images, targets)
    in_image = np.maximum(one_hot(targets), one_hot(targets.flip(0)))    # timm mixes image i with image B-1-i
    assert in_image.sum(1).max() == 2
    loss = build_criterion(flags(bce_loss=True, smoothing=smoothing), K, True)(mixed_images, logits, mixed)
    assert loss.item() == pytest.approx(bce(logits, in_image), rel=1e-5)
    if smoothing:       # DeiT's `targets > 0` makes every class of every image positive, and that is another loss
        assert bool((mixed > 0).all())
        assert abs(loss.item() - bce(logits, np.ones((B, K)))) > 0.1


def test_threshold_lies_between_the_smoothing_and_the_least_share_of_an_image():
    for smoothing in (0.0, 0.1, 0.3):
        threshold = positive_threshold(flags(smoothing=smoothing), K)
        absent, present = smoothing / K, smoothing / K + 0.001 * (1 - smoothing)
        assert absent < threshold < present


# ---------------------------------------------------------------- distillation
class Teacher(nn.Module):
    """Fixed logits that depend on a parameter, so that a gradient could reach it."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(3 * torch.randn(B, K, generator=torch.Generator().manual_seed(5)))

    def forward(self, images):
        return self.logits + 0 * images.mean()


def distil(batch, kind, alpha, tau, teacher=None):
    images, by_class, targets = batch
    by_class = by_class.clone().requires_grad_()
    by_token = torch.randn(B, K, generator=torch.Generator().manual_seed(9)).requires_grad_()
    teacher = teacher or Teacher()
    criterion = build_criterion(flags(smoothing=0.0, distillation_type=kind, distillation_alpha=alpha,
                                      distillation_tau=tau), K, False, teacher)
    assert isinstance(criterion, DistillationLoss)
    return criterion(images, (by_class, by_token), targets), by_class, by_token, teacher


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_soft_distillation_is_deits_kl_times_tau_squared_over_numel(batch, alpha, tau):
    loss, by_class, by_token, teacher = distil(batch, "soft", alpha, tau)
    p, q = log_softmax(teacher.logits / tau), log_softmax(by_token / tau)
    kl = (np.exp(p) * (p - q)).sum() * tau ** 2 / (B * K)
    ce = -log_softmax(by_class)[np.arange(B), batch[2].numpy()].mean()
    assert loss.item() == pytest.approx((1 - alpha) * ce + alpha * kl, rel=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_hard_distillation_is_the_cross_entropy_with_the_teachers_choice(batch, alpha):
    loss, by_class, by_token, teacher = distil(batch, "hard", alpha, 1.0)
    choice = teacher.logits.detach().numpy().argmax(1)
    hard = -log_softmax(by_token)[np.arange(B), choice].mean()
    ce = -log_softmax(by_class)[np.arange(B), batch[2].numpy()].mean()
    assert loss.item() == pytest.approx((1 - alpha) * ce + alpha * hard, rel=1e-5)


def test_alpha_0_and_1_train_one_token_alone(batch):
    for kind in ("soft", "hard"):
        for alpha, trained in ((0.0, "class"), (1.0, "token")):
            loss, by_class, by_token, _ = distil(batch, kind, alpha, 2.0)
            loss.backward()
            assert bool(by_class.grad.abs().sum() > 0) == (trained == "class")
            assert bool(by_token.grad.abs().sum() > 0) == (trained == "token")


def test_tau_changes_the_soft_loss_and_not_the_hard_one(batch):
    losses = {(kind, tau): distil(batch, kind, 0.5, tau)[0].item() for kind in ("soft", "hard") for tau in (1.0, 4.0)}
    assert abs(losses["soft", 1.0] - losses["soft", 4.0]) > 1e-3
    assert losses["hard", 1.0] == losses["hard", 4.0]


def test_no_gradient_reaches_the_teacher(batch):
    for kind in ("soft", "hard"):
        loss, by_class, by_token, teacher = distil(batch, kind, 0.5, 1.0)
        loss.backward()
        assert teacher.logits.grad is None and by_class.grad is not None and by_token.grad is not None


def test_a_student_that_agrees_with_its_teacher_has_no_soft_loss(batch):
    images, _, targets = batch
    teacher = Teacher()
    criterion = DistillationLoss(nn.CrossEntropyLoss(), teacher, "soft", 1.0, 2.0)
    assert criterion(images, (batch[1], teacher.logits.detach()), targets).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_agrees_with_timms_distillation_task(kind):
    """timm divides the soft loss by B where DeiT divides by B*K; the hard one is the same."""
    torch.manual_seed(0)
    student = timm.create_model("deit_tiny_distilled_patch16_224_KAN", img_size=32, depth=1, num_classes=K).train()
    teacher = timm.create_model("vit_nano_patch8_32_ViT", depth=1, num_classes=K).eval()
    for head in (student.head, student.head_dist, teacher.head):
        nn.init.normal_(head.weight)        # as initialised they give nearly equal logits
    images, targets, alpha, tau = torch.randn(B, 3, 32, 32), torch.randint(K, (B,)), 0.3, 2.0
    task = TokenDistillationTask(student, teacher, nn.CrossEntropyLoss(), distill_type=kind, task_loss_weight=1 - alpha,
                                 distill_loss_weight=alpha if kind == "hard" else alpha / K, temperature=tau,
                                 verbose=False)
    theirs = task(images, targets)["loss"].item()
    ours = DistillationLoss(nn.CrossEntropyLoss(), teacher, kind, alpha, tau)(images, student(images), targets)
    assert ours.item() == pytest.approx(theirs, rel=1e-6)


def test_distillation_of_a_half_precision_student_is_computed_in_float32(batch):
    images, logits, targets = batch
    half = tuple(x.to(torch.bfloat16) for x in (logits, -logits))
    criterion = DistillationLoss(nn.CrossEntropyLoss(), Teacher(), "soft", 0.5, 3.0)
    loss = criterion(images, half, targets)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(criterion(images, tuple(x.float() for x in half), targets).item(), rel=1e-6)


# ---------------------------------------------------------------- two submodels
def two_halves():
    a = torch.randn(B, K, generator=torch.Generator().manual_seed(1)).requires_grad_()
    b = torch.randn(B, K, generator=torch.Generator().manual_seed(2)).requires_grad_()
    return a, b


def sigmoid(x: torch.Tensor) -> np.ndarray:
    return 1 / (1 + np.exp(-x.detach().double().numpy()))


@pytest.mark.parametrize("targets", ["indices", "soft"])
@pytest.mark.parametrize("bce_loss", [False, True])
def test_cosub_is_the_mean_of_four_terms(batch, targets, bce_loss):
    images, _, indices = batch
    a, b = two_halves()
    criterion = build_criterion(flags(cosub=True, bce_loss=bce_loss), K, targets == "soft")
    assert isinstance(criterion, CosubLoss) and criterion.copies == 2
    if targets == "soft":
        given = soft()
        expected = given.numpy() > 0.1 / K + 1e-4 if bce_loss else given.numpy()
        assert not bce_loss or 0 < expected.mean() < 1
    else:
        given = indices
        expected = one_hot(indices) if bce_loss else one_hot(indices) * 0.9 + 0.1 / K
    loss = criterion(images, torch.cat([a, b]), given)
    terms = [bce(a, expected), bce(b, expected), bce(a, sigmoid(b)), bce(b, sigmoid(a))]
    assert loss.item() == pytest.approx(np.mean(terms), rel=1e-5)


def test_cosub_gradient_does_not_flow_through_the_other_halfs_probabilities(batch):
    images, _, indices = batch
    a, b = two_halves()
    build_criterion(flags(cosub=True), K, False)(images, torch.cat([a, b]), indices).backward()
    target = one_hot(indices) * 0.9 + 0.1 / K
    # d BCE(x, t)/dx = (sigmoid(x) - t)/(B*K) from the two terms where x is the logit, and nothing where it is the target
    for x, other in ((a, b), (b, a)):
        expected = (2 * sigmoid(x) - target - sigmoid(other)) / (4 * B * K)
        np.testing.assert_allclose(x.grad.numpy(), expected, atol=1e-7)
    through = F.binary_cross_entropy_with_logits(b, a.sigmoid()) / 4      # what would come on top
    assert torch.autograd.grad(through, a)[0].abs().max() > 1e-4


def test_other_criteria_show_each_image_once(batch):
    assert build_criterion(flags(), K, True).copies == 1
    assert build_criterion(flags(distillation_type="soft"), K, True, Teacher()).copies == 1


# ---------------------------------------------------------------- class weights
def test_balanced_weights():
    from sklearn.utils.class_weight import compute_class_weight
    targets = np.repeat(np.arange(4), [50, 5, 30, 1])
    weights = balanced(np.bincount(targets))
    assert weights.dtype == np.float32
    assert weights == pytest.approx(compute_class_weight("balanced", classes=np.arange(4), y=targets), rel=1e-6)
    assert weights[targets].mean() == pytest.approx(1)
    assert balanced(np.array([3, 0, 1])).tolist() == pytest.approx([4 / 6, 0, 2])


WEIGHTS = torch.tensor([0.2, 3.0, 1.0, 0.5, 8.0, 0.1, 1.5])
CRITERIA = [{}, {"smoothing": 0.0}, {"bce_loss": True}, {"cosub": True}, {"cosub": True, "bce_loss": True},
            {"distillation_type": "soft", "distillation_tau": 3.0}, {"distillation_type": "hard"}]


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("changes", CRITERIA, ids=str)
def test_class_weights_weight_each_image_as_a_whole(batch, changes, mixed):
    """The weighted loss of a batch is the weighted mean of what the images lose alone, whatever the criterion."""
    images, logits, labels = batch
    args = flags(**changes)
    other = torch.randn(B, K, generator=torch.Generator().manual_seed(1))
    shares = torch.nn.functional.one_hot(labels, K).float() if not mixed else soft()
    targets = labels if not mixed else shares * (1 - args.smoothing) + args.smoothing / K

    def teacher(images):
        return images.flatten(1)[:, :K]

    def outputs(rows):
        if args.cosub:
            return torch.cat([logits[rows], other[rows]])
        return (logits[rows], other[rows]) if args.distillation_type != "none" else logits[rows]

    plain = build_criterion(args, K, mixed, teacher)
    alone = torch.stack([plain(images[i:i + 1], outputs(slice(i, i + 1)), targets[i:i + 1]) for i in range(B)])
    weighted = build_criterion(args, K, mixed, teacher, WEIGHTS)(images, outputs(slice(None)), targets)
    assert weighted.item() == pytest.approx((alone * (shares @ WEIGHTS)).mean().item(), rel=1e-5)
    even = build_criterion(args, K, mixed, teacher, torch.ones(K))(images, outputs(slice(None)), targets)
    assert even.item() == pytest.approx(plain(images, outputs(slice(None)), targets).item(), rel=1e-6)


def test_the_smoothing_of_a_rare_class_does_not_win():
    """On an image of the common class the smallest loss is where that is the most probable."""
    criterion = build_criterion(flags(smoothing=0.1), 10, False, None, torch.tensor([0.5] + [100.0] * 9))
    logits = torch.zeros(1, 10, requires_grad=True)
    criterion(torch.zeros(1, 3, 2, 2), logits, torch.tensor([0])).backward()
    assert logits.grad[0, 0] < 0 < logits.grad[0, 1:].min()


def test_the_weight_of_what_timm_mixes(batch):
    images, _, labels = batch
    mixed, targets = Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=K)(images, labels)
    lam = ((targets - 0.1 / K) / 0.9).gather(1, labels[:, None])[:, 0]
    expected = torch.where(labels == labels.flip(0), WEIGHTS[labels], lam * WEIGHTS[labels] + (1 - lam) * WEIGHTS[labels.flip(0)])
    assert torch.allclose(ClassWeights(WEIGHTS, 0.1)(targets), expected, atol=1e-5)


# ---------------------------------------------------------------- a teacher of another size and normalisation
@pytest.mark.parametrize("size", [(8, 8), (12, 12), (4, 4)])
def test_a_teacher_sees_the_images_as_it_knows_them(size):
    own, students = ((0.5, 0.4, 0.3), (0.5, 0.25, 0.2)), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    pixels = torch.rand(B, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    normalised = {of: (pixels - torch.tensor(of[0]).view(3, 1, 1)) / torch.tensor(of[1]).view(3, 1, 1) for of in (own, students)}
    expected = F.interpolate(normalised[own], size, mode="bicubic", antialias=True) if size != (8, 8) else normalised[own]
    seen = criterion_module.Teacher(nn.Identity(), size, *own, *students)(normalised[students])
    torch.testing.assert_close(seen, expected, rtol=0, atol=1e-5)
    assert torch.equal(criterion_module.Teacher(nn.Identity(), (8, 8), *own, *own)(pixels), pixels)
    teacher = criterion_module.Teacher(nn.Linear(1, 1), size, *own, *students)
    assert not teacher.state_dict().keys() - {"model.weight", "model.bias"}
