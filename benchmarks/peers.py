"""What peers compute, stated again in plain torch where the peer itself is a repository or is not installed.

Each says what it restates. The numbers are theirs to the last term; the code is not.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tempering.models.external_detectors import torchvision

RESTATED = "re-stated"
CHECKOUT = "its own distiller, in its step re-stated"
# what the repositories' configurations of CIFAR-100 say, as their distillers ask for it
CONFIG = SimpleNamespace(
    KD=SimpleNamespace(TEMPERATURE=4.0, LOSS=SimpleNamespace(CE_WEIGHT=0.1, KD_WEIGHT=0.9)),
    DTKD=SimpleNamespace(T=4.0, ALPHA=3.0, BETA=1.0, CE_WEIGHT=1.0, WARMUP=20),
)


def dtkd_term(student: Tensor, teacher: Tensor, tau: float = 4.0) -> Tensor:
    """The DTKD repository's dynamic term: temperatures from the maxima, attached; mean over rows of T_s T_t KL."""
    top_s, top_t = student.max(1, keepdim=True).values, teacher.max(1, keepdim=True).values
    T_s, T_t = 2 * top_s / (top_t + top_s) * tau, 2 * top_t / (top_t + top_s) * tau
    pointwise = F.kl_div(F.log_softmax(student / T_s, 1), F.softmax(teacher / T_t, 1), reduction="none")
    return (pointwise.sum(1, keepdim=True) * T_t * T_s).mean()


def kd_term(student: Tensor, teacher: Tensor, tau: float = 4.0) -> Tensor:
    """mdistiller's KD term: tau^2 times the mean over rows of KL."""
    pointwise = F.kl_div(F.log_softmax(student / tau, 1), F.softmax(teacher / tau, 1), reduction="none")
    return pointwise.sum(1).mean() * tau**2


def jsd(student: Tensor, teacher: Tensor, beta: float = 0.5) -> Tensor:
    """TRL's generalised JSD at temperature 1: the two divergences from the mixture, summed and divided by the rows."""
    logq, logp = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
    share = torch.tensor(beta, dtype=logq.dtype, device=logq.device)
    middle = torch.logsumexp(torch.stack([logq + torch.log1p(-share), logp + share.log()]), 0)
    from_teacher = F.kl_div(middle, logp, reduction="none", log_target=True)
    from_student = F.kl_div(middle, logq, reduction="none", log_target=True)
    return (beta * from_teacher + (1 - beta) * from_student).sum() / len(student)


def trl_jsd() -> tuple[Callable[[Tensor, Tensor], Tensor], str]:
    """TRL's own function where trl is installed, else the one above; and which it is."""
    try:
        from trl.experimental.gkd import GKDTrainer  # pyright: ignore[reportMissingImports]
    except ImportError:
        try:
            from trl import GKDTrainer  # pyright: ignore
        except ImportError:
            return jsd, RESTATED

    def own(student: Tensor, teacher: Tensor) -> Tensor:
        return GKDTrainer.generalized_jsd_loss(student.unsqueeze(0), teacher.unsqueeze(0), beta=0.5)

    return own, "trl"


class Meters:
    """mdistiller's way of counting: the loss and the two accuracies of every step are fetched from the device."""

    def __init__(self) -> None:
        self.sums, self.count = [0.0, 0.0, 0.0], 0

    def update(self, loss: Tensor, logits: Tensor, target: Tensor) -> None:
        with torch.no_grad():
            _, guessed = logits.topk(5, 1, True, True)
            right = guessed.t().eq(target.view(1, -1).expand(5, -1))
            found = [loss.cpu().detach().numpy().mean()]
            found += [
                right[:k].reshape(-1).float().sum(0, keepdim=True).mul(100.0 / len(target)).cpu().numpy()[0]
                for k in (1, 5)
            ]
        self.sums = [a + float(b) * len(target) for a, b in zip(self.sums, found, strict=True)]
        self.count += len(target)


class Restated(nn.Module):
    """mdistiller's KD: 0.1 CE + 0.9 KD."""

    def __init__(self, student: nn.Module, teacher: nn.Module, config: Any) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher

    def forward(self, image: Tensor, target: Tensor, **_: Any) -> tuple[Tensor, dict[str, Tensor]]:
        logits, _ = self.student(image)
        with torch.no_grad():
            taught, _ = self.teacher(image)
        return logits, {"ce": 0.1 * F.cross_entropy(logits, target), "kd": 0.9 * kd_term(logits, taught)}


class Answering(nn.Module):
    """A net as mdistiller's answer: logits and features."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, image: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.net(image), {}


def distiller(name: str, checkout: Path | None) -> Callable[[nn.Module, nn.Module, Any], nn.Module]:
    """The class of that name, "KD" or "DTKD", of a checkout of mdistiller or of DTKD; without one, KD re-stated.

    The file and its base are loaded, not the package, which asks for more than is needed here.

    Raises:
        FileNotFoundError: for a folder that is no such checkout.
    """
    if checkout is None:
        return Restated
    folder = checkout / "mdistiller" / "distillers"
    if not (folder / f"{name}.py").is_file():
        raise FileNotFoundError(f"{checkout} has no mdistiller/distillers/{name}.py. Give the root of a checkout.")
    package = f"checkout_{name}"
    sys.modules[package] = ModuleType(package)
    sys.modules[package].__path__ = [str(folder)]
    for part in ("_base", name):
        spec = importlib.util.spec_from_file_location(f"{package}.{part}", folder / f"{part}.py")
        assert spec is not None and spec.loader is not None
        module = sys.modules[f"{package}.{part}"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return getattr(sys.modules[f"{package}.{name}"], name)


def mdistiller_step(whole: nn.Module, optimizer: Any, meters: Meters, batch: tuple[Tensor, Tensor]) -> None:
    """mdistiller's training step round a distiller: both nets in float32 as they come, meters every step."""
    image, target = batch[0].float(), batch[1]
    optimizer.zero_grad()
    logits, losses = whole(image=image, target=target, epoch=1)
    loss = torch.stack([x.mean() for x in losses.values()]).sum()
    loss.backward()
    optimizer.step()
    meters.update(loss, logits, target)


def torchdistill_step(
    student: nn.Module, teacher: nn.Module, optimizer: Any, batch: tuple[Tensor, Tensor], tau: float = 4.0
) -> None:
    """torchdistill's training step with its KDLoss: the teacher first, 0.1 CE + 0.9 tau^2 KL, no meters."""
    image, target = batch
    with torch.no_grad():
        taught = teacher(image)
    logits = student(image)
    soft = F.kl_div(torch.log_softmax(logits / tau, 1), torch.softmax(taught / tau, 1), reduction="batchmean")
    loss = 0.1 * F.cross_entropy(logits, target) + 0.9 * tau**2 * soft
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def timm_step(student: nn.Module, teacher: nn.Module, optimizer: Any) -> Callable[[Tensor, Tensor], None]:
    """The step of timm's train.py, which its package does not have, round its own task of logit distillation."""
    torchvision()
    from timm.task.distillation import DistillationTeacher, LogitDistillationTask  # pyright: ignore

    for net in (student, teacher):  # what timm's own nets have
        net.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.25,) * 3}  # pyright: ignore
    weights = {"task_loss_weight": 0.1, "distill_loss_weight": 0.9, "temperature": 4.0, "verbose": False}
    task = LogitDistillationTask(student, DistillationTeacher(teacher), criterion=nn.CrossEntropyLoss(), **weights)

    def step(image: Tensor, target: Tensor) -> None:
        task(image, target)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


class Pictures(torch.utils.data.Dataset):
    """Images as PIL's, as timm's data sets give them."""

    def __init__(self, pixels: Tensor, labels: Tensor) -> None:
        self.pixels, self.labels, self.transform = pixels.permute(0, 2, 3, 1).numpy(), labels.tolist(), None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from PIL import Image

        image: Any = Image.fromarray(self.pixels[index])
        return image if self.transform is None else self.transform(image), self.labels[index]


def timm_loader(pixels: Tensor, labels: Tensor, *, mean: Any, std: Any, batch_size: int, training: bool) -> Any:
    """timm's loader in this process: crop of 4, flip and normalization, and nothing else that it can do."""
    torchvision()
    from timm.data import create_loader  # pyright: ignore[reportMissingImports]

    own: dict[str, Any] = {"num_workers": 0, "persistent_workers": False, "use_prefetcher": False, "color_jitter": 0.0}
    if training:
        own["train_crop_mode"] = "rkrc"
    sizes = {"input_size": (3, *pixels.shape[2:]), "batch_size": batch_size, "crop_pct": 1.0}
    device = torch.device("cpu")
    return create_loader(
        Pictures(pixels, labels), **sizes, is_training=training, mean=mean, std=std, device=device, **own
    )


def timm_validate(net: nn.Module, loader: Any) -> float:
    """The loop of timm's train.py over a split: loss and two accuracies, each fetched every batch."""
    from timm.utils import AverageMeter, accuracy  # pyright: ignore[reportMissingImports]

    meters = [AverageMeter() for _ in range(3)]
    net.eval()
    with torch.no_grad():
        for image, target in loader:
            output = net(image)
            found = F.cross_entropy(output, target), *accuracy(output, target, topk=(1, 5))
            for meter, value in zip(meters, found, strict=True):
                meter.update(value.item(), len(target))
    return meters[1].avg
