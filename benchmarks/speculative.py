"""Writing a batch: on-policy by the student alone, and speculative with a teacher, whose checking is reused or not.

The time is that of a token that is written, with the teacher's logits for the loss: on-policy asks it about the whole
text, speculative a block at a time, and about the whole again unless its logits are reused. Weights are random, so how
much is accepted is set by ``top_k``: all of the vocabulary accepts everything.

Usage:
    python benchmarks/speculative.py [--rounds 9] [--tiny]
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from timing import Sheet, Variant, arguments, device, in_turn
from torch import nn

from tempering.rollouts.sampling import GenerationStats, generate
from tempering.tasks import LanguageModeling, Sampling
from tempering.teachers import Live

VOCABULARY = 512


def gpt(width: int, layers: int, *, seed: int) -> nn.Module:
    """A GPT-2 with random weights; what it says costs as much as what a trained one says."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"n_embd": width, "n_layer": layers, "n_head": max(1, width // 32), "n_positions": 256}
    return (
        GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0, **sizes)).eval().to(device())
    )


class Written:
    """One variant: texts of exactly ``length`` tokens, and the teacher's logits of every one of them."""

    def __init__(
        self, student: nn.Module, teacher: nn.Module, prompts: list[list[int]], length: int, **how: Any
    ) -> None:
        self.student, self.teacher, self.task = student, Live(teacher), LanguageModeling()
        self.prompts, self.length, self.how, self.pace = prompts, length, how, GenerationStats()
        self.task.prepare_model(teacher)

    def __call__(self) -> None:
        both = self.teacher.model if "top_k" in self.how else None
        batch, pace = generate(self.student, both, self.prompts, max_new_tokens=self.length, **self.how)
        self.teacher(self.task.inputs(batch)[1], None)
        self.pace.add(pace)

    def note(self, seconds: float) -> str:
        """Tokens a second, what was accepted, and how far a forward of the teacher went."""
        said, out = self.pace.report(), f"{len(self.prompts) * self.length / seconds:.0f} tokens/s"
        if "top_k" not in self.how:
            return out
        return f"{out}, {said['acceptance']:.0%} accepted, {said['tokens_per_teacher_forward']:.3g} a teacher forward"


def main() -> None:
    """Time all three where little, half and everything is accepted."""
    args = arguments(__doc__, rounds=9).parse_args()
    sheet = Sheet("speculative", args)
    rows, length, sizes = (2, 6, ((32, 1), (32, 1))) if args.tiny else (8, 48, ((128, 2), (256, 6)))
    student, teacher = gpt(*sizes[0], seed=1), gpt(*sizes[1], seed=2)
    prompts = torch.randint(VOCABULARY, (rows, 16), generator=torch.Generator().manual_seed(0)).tolist()
    alone = {"sampling": Sampling(temperature=0.5, top_p=0.5)}
    for top_k in (25, VOCABULARY // 2, VOCABULARY):
        both = {**alone, "top_k": top_k, "resampling": Sampling(temperature=0.2, top_p=0.5)}
        variants: dict[str, Variant] = {
            "on-policy": Written(student, teacher, prompts, length, **alone),
            "speculative, teacher asked again": Written(student, teacher, prompts, length, **both),
            "speculative, logits reused": Written(student, teacher, prompts, length, **both, reuse=True),
        }
        taken = in_turn(variants, rounds=args.rounds)
        notes = {n: made.note(statistics.median(taken[n])) for n, made in variants.items() if isinstance(made, Written)}
        sheet.add(f"{rows} x {length} tokens, top {top_k} of {VOCABULARY}", taken, notes=notes, per=rows * length)
    print(sheet.write())


if __name__ == "__main__":
    main()
