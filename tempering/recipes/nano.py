"""Distill with DTKD in one file that imports nothing of tempering.

Command:  python recipes/nano.py            (--solve exact|published, --steps N, --seed N)
Hardware: one CPU core; about ten seconds; scikit-learn's bundled digits.

Read this file first. The teacher is a wide network, the student a narrow one. For every sample, DTKD selects
temperatures with T_teacher + T_student = 2 tau such that the softened logits of both have the same logsumexp: the
sharper network gets the higher temperature. The student is trained on the teacher's softened distribution. (Wei & Bai,
arXiv:2404.12711, with the root that its erratum does not give.)
"""

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


def load_data(seed: int = 0):
    """Load the digits: train images, labels, test images, labels; images are float32 in [0, 1]."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    x, y = torch.tensor(images[order] / 16.0, dtype=torch.float32), torch.tensor(labels[order])
    return x[:400], y[:400], x[400:], y[400:]


def build_net(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


def sharpness(z, T):
    """Return logsumexp(z / T) and its negative derivative in T, E[z] / T^2 under softmax(z / T)."""
    p = torch.softmax(z / T, -1)
    return torch.logsumexp(z / T, -1, keepdim=True), (p * z).sum(-1, keepdim=True) / T**2


@torch.no_grad()
def temperatures(student, teacher, tau: float = 4.0, solve: str = "exact", reach: float = 0.9):
    """Return T_student and T_teacher, (N, 1) each; their sum is 2 tau."""
    u, v = teacher.double(), student.double()
    if solve == "published":
        # the released closed form: equal leading terms of both logsumexps. It depends on shifts of the logits.
        x, y = u.amax(-1, keepdim=True), v.amax(-1, keepdim=True)
        bad = (x <= 1e-4 * y.abs().clamp_min(1)) | (y <= 1e-4 * x.abs().clamp_min(1))
        delta = torch.where(bad, 0.0, tau * (x - y) / (x + y)).clamp(-reach * tau, reach * tau)
    else:
        # centered, the gap decreases strictly from +inf to -inf in delta: one root, found by 60 steps of bisection
        u, v = u - u.mean(-1, keepdim=True), v - v.mean(-1, keepdim=True)
        low = torch.full_like(u[:, :1], -reach * tau)
        high = -low
        for _ in range(60):
            delta = (low + high) / 2
            gap = sharpness(u, tau + delta)[0] - sharpness(v, tau - delta)[0]
            low, high = torch.where(gap > 0, delta, low), torch.where(gap > 0, high, delta)
        flat = (u.amax(-1, keepdim=True) == 0) | (v.amax(-1, keepdim=True) == 0)
        delta = torch.where(flat, 0.0, (low + high) / 2)
    return (tau - delta).to(student.dtype), (tau + delta).to(student.dtype)


def kl(student, teacher, T_s, T_t):
    """Return T_s T_t KL(teacher || student) per row, (N,)."""
    logq, logp = F.log_softmax(student / T_s, -1), F.log_softmax(teacher / T_t, -1)
    return (T_s * T_t).squeeze(-1) * (logp.exp() * (logp - logq)).sum(-1)


def dtkd(student, teacher, labels, progress: float, *, tau: float = 4.0, solve: str = "exact"):
    """Return 3 * KL at dynamic temperatures + 1 * KL at tau, both warmed up over 20/240 of the run, + cross entropy."""
    T_s, T_t = temperatures(student.detach(), teacher, tau, solve)
    static = torch.full_like(T_s, tau)
    soft = 3.0 * kl(student, teacher, T_s, T_t) + 1.0 * kl(student, teacher, static, static)
    warmup = min(progress / (20 / 240), 1.0)
    return (warmup * soft + F.cross_entropy(student, labels, reduction="none")).mean()


def train(model, x, y, loss_fn, *, steps: int, seed: int, lr: float = 0.1, batch: int = 64):
    """Train by SGD with momentum; return the loss of every step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    generator, losses = torch.Generator().manual_seed(seed), []
    for step in range(steps):
        index = torch.randint(len(x), (batch,), generator=generator)
        loss = loss_fn(model(x[index]), x[index], y[index], (step + 1) / steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def accuracy(model, x, y) -> float:
    with torch.no_grad():
        return float((model(x).argmax(-1) == y).float().mean())


def distill(teacher, x, y, *, steps: int, seed: int, solve: str = "exact", width: int = 8):
    """Distill a student from ``teacher``; return it and its losses."""
    torch.manual_seed(seed)
    student = build_net(width)

    def loss_fn(logits, inputs, labels, progress):
        with torch.no_grad():
            teacher_logits = teacher(inputs)
        return dtkd(logits, teacher_logits, labels, progress, solve=solve)

    return student, train(student, x, y, loss_fn, steps=steps, seed=seed)


def train_supervised(x, y, *, steps: int, seed: int, width: int = 8):
    """Train the same network on the labels only."""
    torch.manual_seed(seed)
    model = build_net(width)
    train(model, x, y, lambda z, _, labels, __: F.cross_entropy(z, labels), steps=steps, seed=seed)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--solve", choices=("exact", "published"), default="exact", help="solver of the temperatures")
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps of each network")
    parser.add_argument("--seed", type=int, default=0, help="random seed of initialization and order")
    args = parser.parse_args()
    x, y, x_test, y_test = load_data()
    teacher = train_supervised(x, y, steps=args.steps, seed=args.seed, width=128)
    print(f"teacher        {accuracy(teacher, x_test, y_test):.4f}")
    plain = train_supervised(x, y, steps=args.steps, seed=args.seed)
    print(f"student alone  {accuracy(plain, x_test, y_test):.4f}")
    student, losses = distill(teacher, x, y, steps=args.steps, seed=args.seed, solve=args.solve)
    print(f"student, DTKD  {accuracy(student, x_test, y_test):.4f}   (loss {losses[0]:.3f} -> {losses[-1]:.3f})")


if __name__ == "__main__":
    main()
