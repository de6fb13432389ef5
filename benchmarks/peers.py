"""What peers compute, stated again in plain torch where the peer itself is a repository or is not installed.

Each says what it restates. The numbers are theirs to the last term; the code is not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RESTATED = "re-stated"


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


def mdistiller_step(
    student: nn.Module,
    teacher: nn.Module,
    optimizer: Any,
    meters: Meters,
    batch: tuple[Tensor, Tensor],
    tau: float = 4.0,
) -> None:
    """mdistiller's training step with KD: both nets in float32 as they come, 0.1 CE + 0.9 KD, meters every step."""
    image, target = batch[0].float(), batch[1]
    optimizer.zero_grad()
    logits = student(image)
    with torch.no_grad():
        taught = teacher(image)
    loss = 0.1 * F.cross_entropy(logits, target) + 0.9 * kd_term(logits, taught, tau)
    loss.backward()
    optimizer.step()
    meters.update(loss, logits, target)
