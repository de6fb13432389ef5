"""What the engine adds to a step: a null model under distill() against the bare loop with the same method.

A leg is so many steps of each; the engine's set-up and its epoch's end are outside of what is timed.

Usage:
    python benchmarks/overhead.py [--rounds 9] [--steps 300] [--tiny]
"""

from __future__ import annotations

from functools import partial

import torch
from timing import Marks, Sheet, arguments, legs_in_turn
from torch import Tensor, nn

from tempering import distill
from tempering.methods import KD
from tempering.rows import Rows, total
from tempering.teachers import Live

SGD = partial(torch.optim.SGD, lr=0.01, momentum=0.9)


def bare(batch: tuple[Tensor, Tensor], steps: int) -> float:
    """CPU seconds of the loop that one writes by hand, the check that the loss is a number included."""
    student, teacher, method = nn.Linear(8, 10), Live(nn.Linear(8, 10)), KD()
    optimizer = SGD(student.parameters())
    marks = Marks(steps)
    for step in range(steps + 1):
        rows = Rows(student(batch[0]), teacher(batch[0]), batch[1])
        loss = total(method(rows, step / steps), rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {float(loss)}")
        marks(step)
    return marks.seconds


def engine(batch: tuple[Tensor, Tensor], steps: int) -> float:
    """CPU seconds of the same steps by ``distill``."""
    marks = Marks(steps)
    distill(
        nn.Linear(8, 10),
        nn.Linear(8, 10),
        [batch] * (steps + 1),
        method=KD(),
        optimizer=SGD,
        steps=steps + 1,
        accelerator="cpu",
        selfcheck=False,
        quiet=True,
        on_step=marks,
    )
    return marks.seconds


def main() -> None:
    """Time legs in turn; the milliseconds are those of a step."""
    args = arguments(__doc__, rounds=9, steps=300).parse_args()
    sheet = Sheet("overhead", args)
    steps = 5 if args.tiny else args.steps
    torch.manual_seed(0)
    batch = torch.randn(8, 8), torch.randint(10, (8,))
    legs = {"bare loop": partial(bare, batch), "tempering.distill": partial(engine, batch)}
    taken = legs_in_turn(legs, steps=steps, rounds=args.rounds)
    added = sorted(1e3 * (b - a) / steps for a, b in zip(*taken.values(), strict=True))[args.rounds // 2]
    notes = {"tempering.distill": f"{added:.3f} ms a step on top, the median of the rounds"}
    sheet.add("null model, a step", taken, notes=notes, per=steps)
    print(sheet.write())


if __name__ == "__main__":
    main()
