"""Numbers of TRL, DistiLLM and of independent formulas for distilling language models, reproduced.

Tolerances are those of ../shared/golden/README.md.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tempering.methods import Divergence  # pyright: ignore[reportAttributeAccessIssue]
from tempering.objectives import adaptive_kl, entropy, head_share, jsd, kl, log_softmax, reverse_kl, tvd
from tempering.rows import IGNORE_INDEX, Rows, total
from tempering.temperature import Static, Temperatures
from tests.paths import needs_shared
from tests.test_golden import Case, archive, case, cases  # noqa: F401

pytestmark = needs_shared


def tokens(of: Case) -> Rows:
    """Every position a row; those labeled -100 weigh nothing. The student is the leaf."""
    student, teacher = (torch.tensor(of.values[f"{who}_logits"]) for who in ("student", "teacher"))
    labels = torch.tensor(of.values["labels"]).flatten()
    of.seen |= {"student_logits", "teacher_logits", "labels"}
    weight = (labels != IGNORE_INDEX).double()
    return Rows(student.flatten(0, 1).requires_grad_(), teacher.flatten(0, 1), labels, weight)


def slope(value: Tensor, rows: Rows, of: Case, key: str) -> None:
    if key in of.values:
        grad = torch.autograd.grad(value, rows.student, retain_graph=True)[0]
        of.agree(key, grad.view(of.values[key].shape))


def test_every_case_is_read() -> None:
    seen = {file: {k.split("__")[0] for k in archive(file)} - {"meta"} for file in ("llm_kl", "llm_jsd")}
    assert seen == {"llm_kl": {"v211", "v1031", "distillm2"}, "llm_jsd": {"v211", "v211_T", "v1031", "all_masked"}}


@cases("llm_kl", "v211", "v1031")
def test_the_divergences_of_distillm(case: Case) -> None:  # noqa: F811
    c, rows = case.config, tokens(case)
    skew = c["lam_skew"]
    own = {
        "reverse_kl": Divergence(objective="reverse_kl"),
        "tv_distance": Divergence(objective="tvd"),
        "skewed_reverse_kl": Divergence(objective="skew_reverse_kl", skew=skew),
        "js_distance": Divergence(objective="jsd", beta=1.0 - c["lam_js_sym"]),
        "forward_kl_with_entropy": Divergence(objective="kl"),
        "skewed_forward_kl_with_entropy": Divergence(objective="skew_kl", skew=skew),
    }
    values = {name: total(method(rows), rows) for name, method in own.items()}
    uncertain = total({"entropy": entropy(rows.teacher)}, rows)
    case.agree("teacher_entropy_masked", uncertain)
    for name, value in values.items():
        case.agree(name, value)
        slope(value, rows, case, f"grad_{name.removesuffix('_with_entropy')}")
        if name.endswith("_with_entropy"):  # the released value is without the teacher's entropy
            case.agree(name.removesuffix("_with_entropy"), value + uncertain)
    # their symmetric one adds a cross-entropy to a divergence
    both = c["lam_js_sym"]
    symmetric = (1 - both) * (values["forward_kl_with_entropy"] + uncertain) + both * values["reverse_kl"]
    case.agree("symmetric_kl", symmetric)
    unseen = set(case.values) - case.seen
    assert all(key.endswith("_f32") or key.startswith("grad_") for key in unseen), unseen
    assert sum(key.startswith("grad_") for key in case.seen) >= 2


@cases("llm_jsd", "v211", "v211_T", "v1031")
def test_the_generalized_jsd_of_gkd(case: Case) -> None:  # noqa: F811
    c, rows = case.config, tokens(case)
    tau = c["temperature"]
    T = Static(tau)(rows)
    T = Temperatures(T.student, T.teacher, torch.ones_like(T.student))  # theirs is without T^2
    for i, beta in enumerate(c["betas"]):
        per_token = jsd(rows, T, beta=beta)
        case.agree(f"per_token_b{i}", per_token.view(case.values[f"per_token_b{i}"].shape))
        loss = total({"jsd": per_token}, rows)
        case.agree(f"loss_masked_b{i}", loss)
        slope(loss, rows, case, f"grad_masked_b{i}")
        assert rows.weight is not None
        case.agree(f"sum_b{i}", (per_token * rows.weight).sum())
        case.agree(f"num_items_b{i}", total({"jsd": per_token}, rows, normalizer=c["num_items_in_batch"]))
        if beta not in (0, 1):  # the same by the method, T^2 and all
            method = Divergence(objective="jsd", beta=beta, temperature=Static(tau))
            torch.testing.assert_close(total(method(rows), rows), tau**2 * loss, rtol=1e-12, atol=0.0)
    unseen = set(case.values) - case.seen
    assert all("_f32_" in key or key.startswith("loss_nomask") for key in unseen), unseen


@cases("llm_jsd", "all_masked")
def test_a_batch_of_masked_tokens_is_zero(case: Case) -> None:  # noqa: F811
    rows = tokens(case)
    loss = total(Divergence()(rows), rows)
    case.agree_with_gradient("loss", "", loss, rows)
    slope(loss, rows, case, "grad")
    case.all_seen()


@cases("llm_skd", "akl")
def test_adaptive_kl_and_total_variation(case: Case) -> None:  # noqa: F811
    rows = tokens(case)
    T = Static(1.0)(rows)
    shape = case.values["fkl_per_token"].shape
    p, q = log_softmax(rows.teacher).exp(), log_softmax(rows.student.detach()).exp()
    case.agree("akl_head_weight", head_share(p, q, case.config["mu"]).view(shape))
    case.agree("fkl_per_token", kl(rows, T).view(shape))
    case.agree("rkl_per_token", reverse_kl(rows, T).view(shape))
    case.agree("tvd_per_token", tvd(rows, T).view(shape))
    slope(total({"tvd": tvd(rows, T)}, rows), rows, case, "tvd_grad")
    loss = total({"akl": adaptive_kl(rows, T, head=case.config["mu"])}, rows)
    case.agree("akl_loss", loss)
    slope(loss, rows, case, "akl_grad")
    case.all_seen("uld_per_token", "uld_grad")


def test_what_a_divergence_refuses() -> None:
    with pytest.raises(ValueError, match=r"Divergence needs objective 'kl', 'reverse_kl'.* got 'mse'"):
        Divergence(objective="mse")
    with pytest.raises(ValueError, match=r"needs head in \[0, 1\]"):
        Divergence(head=1.5)
    with pytest.raises(ValueError, match=r"needs skew in \[0, 1\)"):
        Divergence(objective="skew_kl", skew=1.0)
