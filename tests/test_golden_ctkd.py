"""CTKD's numbers from the authors' own code: the schedule, the global temperature, and the instance form's snippet."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tempering.methods import DKD, KD
from tempering.objectives import softened
from tempering.rows import Rows, total
from tempering.temperature import Curriculum
from tests.paths import needs_shared
from tests.test_golden import Case, archive, case, cases, term

pytestmark = needs_shared
__all__ = ["case"]  # the fixture

LAYERS = {"w1": "net.0.weight", "b1": "net.0.bias", "w2": "net.2.weight", "b2": "net.2.bias"}


def curriculum(c: dict, **options) -> Curriculum:
    low, span = c["t_start"], c["t_end"]
    first, last = c["lambda_max"], c["lambda_min"]
    run_fraction = c["lambda_loops"] / 240
    return Curriculum(
        low=low, high=low + span, lambda_first=first, lambda_last=last, run_fraction=run_fraction, **options
    ).double()


def test_every_case_is_read() -> None:
    names = {key.split("__")[0] for key in archive("ctkd")} - {"meta"}
    globals_, instances = {"global_init", "global_mid", "global_full"}, {"instance_a", "instance_b"}
    assert names == {"schedule0", "schedule1", "schedule2", *globals_, *instances}


@cases("ctkd", "schedule0", "schedule1", "schedule2")
def test_the_curriculum_of_lambda(case: Case) -> None:
    c = case.config
    policy = Curriculum(lambda_first=c["max"], lambda_last=c["min"], run_fraction=c["loops"] / 240)
    found = [policy.lambda_at(max(epoch, 0) / 240) for epoch in case.values["epochs"].tolist()]
    case.agree("cosine", torch.tensor(found, dtype=torch.float64))


@cases("ctkd", "global_init", "global_mid", "global_full")
def test_the_global_temperature(case: Case) -> None:
    c, rows, progress = case.config, case.rows(), case.config["epoch"] / 240
    policy = curriculum(c)
    assert policy.raw is not None
    policy.raw.data.fill_(float(case.values["raw_parameter"][0]))
    case.agree("lam", torch.tensor(policy.lambda_at(progress), dtype=torch.float64))
    case.agree("temperature", policy(rows, progress).student)
    parts = KD(soft=1.0, hard=1.0, temperature=policy)
    case.agree("loss_kd", term(parts, rows, "soft", progress))
    case.agree("loss_ce", term(parts, rows, "hard", progress))
    loss = total(KD(soft=c["kd_weight"], hard=c["ce_weight"], temperature=policy)(rows, progress), rows)
    case.agree_with_gradient("loss", "grad", loss, rows)
    (slope,) = torch.autograd.grad(loss, policy.raw)
    case.agree("grad_raw_parameter", slope.flatten())
    share = (policy(rows).student.detach() - policy.low) / (policy.high - policy.low)
    by_T = slope / (policy.lambda_at(progress) * (policy.high - policy.low) * share * (1.0 - share))
    case.agree("dloss_kd_dT_unreversed", (by_T / c["kd_weight"]).flatten())
    dkd = DKD(target=c["dkd_alpha"], non_target=c["dkd_beta"], hard=0.0, warmup=0.0, temperature=policy)
    loss = total(dkd(rows, progress), rows)
    case.agree_with_gradient("dkd_unweighted", "grad_dkd", loss, rows)
    # the released code's own gradient here is not a number
    case.agree("grad_raw_parameter_dkd_stable", torch.autograd.grad(loss, policy.raw)[0].flatten())
    case.all_seen("raw_parameter", "grad_raw_parameter_dkd")


@cases("ctkd", "instance_a", "instance_b")
@pytest.mark.parametrize("attached", [True, False], ids=["attached", "detached"])
def test_the_instance_temperature(case: Case, attached: bool) -> None:
    c, rows, progress = case.config, case.rows(), case.config["epoch"] / 240
    policy = curriculum(c, form="instance", hidden=c["hidden"], centered=False, differentiable=attached)
    method = KD(soft=1.0, hard=1.0, temperature=policy)
    method.setup(rows)
    weights = {name: torch.tensor(case.values[key]) for key, name in LAYERS.items()}
    policy.load_state_dict(weights)
    case.agree("lam", torch.tensor(policy.lambda_at(progress), dtype=torch.float64))
    T = policy(rows, progress)
    case.agree("temperature", T.student)
    case.agree("raw", torch.logit((T.student - policy.low) / (policy.high - policy.low)))
    case.agree("loss_ce", term(method, rows, "hard", progress))
    suffix = "attached" if attached else "input_detached"
    for kind, loss in (("plain", term(method, rows, "soft", progress)), ("snippet", snippet(policy, rows, progress))):
        case.agree_with_gradient(f"loss_kd_{kind}", f"grad_{kind}_{suffix}", loss, rows)
        slopes = torch.autograd.grad(loss, list(policy.parameters()))
        for slope, (name, parameter) in zip(slopes, policy.named_parameters(), strict=True):
            assert isinstance(parameter, nn.Parameter)
            key = next(k for k, full in LAYERS.items() if full == name)
            if f"grad_{key}_{kind}_{suffix}" in case.values:  # those of the weights do not depend on the input's
                case.agree(f"grad_{key}_{kind}_{suffix}", slope)
    others = [key for key in case.values if key.endswith("_attached" if not attached else "_input_detached")]
    case.all_seen(*LAYERS, *others)


def snippet(policy: Curriculum, rows: Rows, progress: float) -> torch.Tensor:
    """The snippet's loss: each teacher probability is 1e-7 larger."""
    T = policy(rows, progress)
    student, teacher = softened(rows, T)
    p = teacher.exp() + 1e-7
    return (T.scale * (p * (p.log() - student)).sum(-1)).mean()
