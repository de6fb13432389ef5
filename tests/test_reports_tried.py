"""Situations that were reported about other libraries and failed here once (docs/reports-tried.md)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from tempering import distill
from tempering.methods import CRD, KD, FitNet, Supervised
from tempering.methods.base import Method
from tempering.rows import Rows
from tempering.tasks import Classification
from tempering.teachers import Live
from tempering.training.checks import check_unsharded
from tempering.training.config import SelfCheckError
from tempering.training.loss_checks import check_label_names
from tempering.utils.state import restored
from tests.cases import each
from tests.lazy_modules import LazyModule
from tests.runs import CLASSES, cut, go, identical, points, student_net, teacher_net

hf = LazyModule("transformers")
mixin = LazyModule("tempering.integrations.huggingface")

torch.manual_seed(0)
Y = torch.arange(32) % 4
X = torch.randn(32, 8) + 2.0 * nn.functional.one_hot(Y, 8)
IMAGES = torch.randn(32, 1, 8, 8) + Y[:, None, None, None]


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def cnn(width: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = (nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4))
    return nn.Sequential(*layers)


def run(student: nn.Module, teacher: nn.Module, batch: Any, method: Method | None = None, **options: Any) -> nn.Module:
    skipped = {"skip_checks": ["above chance"]} | options
    distill(student, teacher, [batch], method=method or KD(), steps=2, quiet=True, **skipped)
    return student


class Probabilities(nn.Module):
    """A model that ends in softmax."""

    def __init__(self, *, log: bool = False) -> None:
        super().__init__()
        self.model, self.log = net(1), log

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).log_softmax(-1) if self.log else self.model(x).softmax(-1)


def test_probabilities_in_place_of_logits_are_refused_on_both_sides() -> None:
    for models in ((net(), Probabilities()), (Probabilities(), net())):
        with pytest.raises(SelfCheckError, match="are probabilities"):
            run(*models, (X, Y))
    run(net(), Probabilities(log=True), (X, Y))  # their softmax is right
    run(net(), Probabilities(), (X, Y), skip_checks=["logits", "above chance"])


class Named(nn.Module):
    """Has the label names of a model of transformers."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.config = type("Config", (), {"id2label": dict(enumerate(names))})()


def test_the_same_labels_in_another_order_are_refused() -> None:
    check_label_names(Named("cat", "dog"), Named("cat", "dog"))
    check_label_names(Named("cat", "dog"), Named("LABEL_0", "LABEL_1"))  # other names say nothing
    check_label_names(Named("cat", "dog"), nn.Linear(1, 1))
    with pytest.raises(SelfCheckError, match="class 1 is 'dog' for the student and 'cow'"):
        check_label_names(nn.Sequential(Named("cat", "dog", "cow")), Named("cat", "cow", "dog"))


class Checkpointed(nn.Module):
    """Computes its feature again in the backward pass, by one of torch's two ways."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.body, self.head, self.reentrant = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4, 4), reentrant

    def forward(self, x: Tensor) -> Tensor:
        z = self.body(x) if self.reentrant is None else checkpoint(self.body, x, use_reentrant=self.reentrant)
        return self.head(z.mean((2, 3)))  # pyright: ignore[reportOptionalMemberAccess]


@pytest.mark.filterwarnings("ignore:None of the inputs")
def test_features_without_a_gradient_path_are_refused_and_recomputed_ones_learn_the_same() -> None:
    task, small = Classification(features={"map": ("body", "0")}), partial(torch.optim.SGD, lr=1e-4)
    trained = []
    for reentrant in (None, False):
        torch.manual_seed(3)
        student = run(Checkpointed(reentrant), cnn(8, 1), (IMAGES, Y), FitNet(), task=task, optimizer=small)
        trained.append(torch.cat([p.detach().flatten() for p in student.parameters()]))
    torch.testing.assert_close(*trained)
    with pytest.raises(SelfCheckError, match=r"'map' has no gradient path.*use_reentrant=False"):
        run(Checkpointed(True), cnn(8, 1), (IMAGES, Y), FitNet(), task=task)


def test_a_teacher_runs_in_the_type_of_its_weights() -> None:
    """Without autocast; with it, torch converts."""
    teacher, x = net(1), X.double()
    want = copy.deepcopy(teacher)(X)
    assert torch.equal(Live(copy.deepcopy(teacher))(x), want)
    got = Live(copy.deepcopy(teacher).bfloat16())(X)
    assert got.dtype == torch.float32 and torch.equal(got, copy.deepcopy(teacher).bfloat16()(X.bfloat16()).float())
    run(net().double(), teacher, (x, Y))
    named = Live(mixin.Unpacked(Keyword(copy.deepcopy(teacher))))
    assert torch.equal(named({"x": x, "unused": Y}), want)


class Keyword(nn.Module):
    """Called with keywords, as models of transformers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, unused: Tensor | None = None) -> Tensor:
        return self.model(x)


class Fixed(nn.Sequential):
    """Cannot be moved, as a model that bitsandbytes loaded in few bits."""

    is_loaded_in_4bit = True

    def to(self, *_: Any, **__: Any) -> Any:
        raise ValueError("`.to` is not supported for `4-bit` or `8-bit` bitsandbytes models.")


def test_a_teacher_of_few_bits_stays_where_it_is() -> None:
    run(net(), Fixed(net(1)), (X, Y))
    Live(Fixed(net(1)), device="cpu")
    Live(nn.Sequential(Fixed(net(1)))).to("cpu")


def refused() -> dict[str, tuple[Callable[[], Any], str]]:
    """What -> (the call, what its error says)."""
    logits = torch.randn(4, 3)
    features = Classification(features={"hidden": ("1", "1")})
    ids = (X, Y, torch.arange(32))
    return {
        "labels as a column": (lambda: Rows(logits, logits, torch.zeros(4, 1).long()), r"target.squeeze\(1\)"),
        "weights as a column": (lambda: Rows(logits, logits, weight=torch.ones(4, 1)), r"weight.squeeze\(1\)"),
        "one-hot labels": (
            lambda: Rows(logits, logits, torch.eye(3).long()[[0, 1, 2, 0]]),
            r"Pass labels.float\(\), or labels.argmax\(1\)",
        ),
        "ids beyond samples": (
            lambda: run(net(), net(1), ids, CRD(samples=16), task=features),
            "ids 0 to 15; got 0 to 31",
        ),
    }


@each("what", refused())
def test_errors_say_what_to_write(what: str) -> None:
    call, told = refused()[what]
    with pytest.raises(ValueError, match=told):
        call()


@each("inputs", [X.double(), (X * 20).abs().byte()])
def test_inputs_of_another_type_are_explained(inputs: Tensor) -> None:
    with pytest.raises(RuntimeError) as error:
        run(net(), net(1).to(torch.float32), (inputs, Y), selfcheck=True)
    notes: list[str] = getattr(error.value, "__notes__", [])
    assert any(f"{inputs.dtype} and the student's weights are torch.float32" in note for note in notes)


class Text(nn.Module):
    """A classifier of texts that adds up embeddings of tokens and, if it has them, of token types."""

    def __init__(self, *, types: bool, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.tokens, self.types = nn.Embedding(16, 3), nn.Embedding(2, 3) if types else None


class Typed(Text):
    """Takes token types."""

    def forward(
        self, input_ids: Tensor, token_type_ids: Tensor | None = None, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        assert self.types is not None and token_type_ids is not None, "the column was removed"
        return {"logits": (self.tokens(input_ids) + 5.0 * self.types(token_type_ids)).mean(1)}


class Untyped(Text):
    """Has no token types."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        return {"logits": self.tokens(input_ids).mean(1)}


def trainer(student: Any, teacher: Any, data: Any, folder: Any, *, options: Any = None, **more: Any) -> Any:
    """The Trainer of transformers with distillation."""

    class KDTrainer(mixin.DistillMixin, hf.Trainer):
        pass

    options = {"max_steps": 3, "per_device_train_batch_size": 8, "report_to": [], "disable_tqdm": True} | (
        options or {}
    )
    args = hf.TrainingArguments(str(folder), logging_steps=1, use_cpu=True, **options)
    more = {"method": KD(), "selfcheck": False} | more
    return KDTrainer(student, args, train_dataset=data, teacher=teacher, **more)


def test_columns_that_only_one_model_takes_reach_it(tmp_path: Any) -> None:
    pytest.importorskip("transformers")
    datasets = pytest.importorskip("datasets")
    tokens, types = torch.randint(0, 16, (16, 6)), torch.tensor([0, 0, 0, 1, 1, 1]).repeat(16, 1)
    columns = {"input_ids": tokens, "token_type_ids": types, "labels": torch.arange(16) % 3, "text": ["unused"] * 16}
    data = datasets.Dataset.from_dict({n: x.tolist() if isinstance(x, Tensor) else x for n, x in columns.items()})
    for student, teacher in (
        (Untyped(types=False, seed=0), Typed(types=True, seed=1)),
        (Typed(types=True, seed=0), Untyped(types=False, seed=1)),
    ):
        kd = trainer(student, teacher, data, tmp_path, options={"max_steps": 1, "per_device_train_batch_size": 16})
        kd.train()
        inputs = {"input_ids": tokens, "token_type_ids": types}
        own = {n: x for n, x in inputs.items() if isinstance(teacher, Typed) or n == "input_ids"}
        other = {n: x for n, x in inputs.items() if isinstance(student, Typed) or n == "input_ids"}
        start = type(student)(types=isinstance(student, Typed), seed=0)
        rows = Rows(start(**other)["logits"], teacher(**own)["logits"].detach(), columns["labels"])
        terms = KD()(rows, 1.0)
        want = sum(float(term.detach().mean()) for term in terms.values())
        assert kd.state.log_history[0]["loss"] == pytest.approx(want, abs=1e-5)


class Image(nn.Module):
    """A network over images with the arguments of transformers."""

    def __init__(self, width: int, seed: int = 0) -> None:
        super().__init__()
        self.net = cnn(width, seed)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        return {"logits": self.net(pixel_values)}


PIXELS = [{"pixel_values": x, "labels": y} for x, y in zip(IMAGES, Y, strict=True)]


def features() -> Any:
    return mixin.Labeled(features={"map": ("net.1", "net.1")})


def test_every_run_of_model_init_has_a_new_student_and_a_new_method(tmp_path: Any) -> None:
    """Features are those of the new student, and projectors do not come from the run before."""
    pytest.importorskip("transformers")
    kd = trainer(None, Image(8, 1), PIXELS, tmp_path, method=FitNet(), task=features(), model_init=lambda: Image(4))
    losses = []
    for _ in range(2):
        first = kd.model
        torch.manual_seed(0)
        kd.train()
        assert kd.model is not first
        losses.append([log["loss"] for log in kd.state.log_history if "loss" in log])
    assert losses[0] == losses[1]


def test_the_best_student_comes_with_its_method(tmp_path: Any) -> None:
    """``load_best_model_at_end``: the loss after training is the best one, with the projector of that step."""
    pytest.importorskip("transformers")
    each_step = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    options = {**each_step, "load_best_model_at_end": True, "learning_rate": 0.3, "max_steps": 4, "eval_on_start": True}
    kd = trainer(
        Image(4), Image(8, 1), PIXELS, tmp_path, method=FitNet(), task=features(), eval_dataset=PIXELS, options=options
    )
    kd.train()
    losses = [log["eval_loss"] for log in kd.state.log_history if "eval_loss" in log]
    assert losses[-1] > min(losses[1:])  # otherwise this shows nothing
    assert kd.evaluate()["eval_loss"] == pytest.approx(kd.state.best_metric, rel=1e-6)


def test_an_evaluation_before_training_prepares_the_method(tmp_path: Any) -> None:
    pytest.importorskip("transformers")
    kd = trainer(Image(4), Image(8, 1), PIXELS, tmp_path, method=FitNet(), task=features(), eval_dataset=PIXELS)
    before = kd.evaluate()["eval_loss"]
    again = trainer(Image(4), Image(8, 1), PIXELS, tmp_path, method=kd.method, task=features(), eval_dataset=PIXELS)
    assert again.evaluate()["eval_loss"] == pytest.approx(before)


def test_steps_that_were_broken_off_are_not_in_the_log(tmp_path: Any) -> None:
    """The terms of the first step add up to its loss, also after an attempt that ran out of memory."""
    pytest.importorskip("transformers")
    kd = trainer(Image(4), Image(8, 1), PIXELS, tmp_path, options={"max_steps": 1})
    compute = kd.compute_loss

    def short_of_memory(*args: Any, **more: Any) -> Any:
        compute(*args, **more)
        raise RuntimeError("CUDA out of memory.")

    kd.compute_loss = short_of_memory
    with pytest.raises(RuntimeError, match="out of memory"):
        kd.train()
    kd.compute_loss = compute
    kd.train()
    first = kd.state.log_history[0]
    assert first["loss"] == pytest.approx(first["hard"] + first["soft"], rel=1e-5)


@pytest.mark.filterwarnings("ignore")
@each("precision", ["64-true", "bf16-true"])
def test_lightning_tests_predicts_and_trains_in_other_types(precision: str, tmp_path: Any) -> None:
    pl = pytest.importorskip("lightning.pytorch")
    from tempering.integrations.lightning import DistillModule

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    fit = pl.Trainer(max_epochs=1, precision=precision, enable_model_summary=False, default_root_dir=tmp_path, **quiet)
    loader = DataLoader(TensorDataset(X, Y), batch_size=10)
    module = DistillModule(net(), net(1), method=KD(), selfcheck=False)
    fit.fit(module, loader, loader)
    validated = {
        name.removeprefix("val_"): value for name, value in fit.validate(module, loader, verbose=False)[0].items()
    }
    tested = {name.removeprefix("test_"): value for name, value in fit.test(module, loader, verbose=False)[0].items()}
    assert tested == validated and tested.keys() >= {"loss", "accuracy", "agreement"}
    predicted = torch.cat(fit.predict(module, loader))
    assert float((predicted.argmax(1) == Y).float().mean()) == pytest.approx(tested["accuracy"])


# other situations


class Answering(nn.Module):
    """A module that has every attribute that it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.net = student_net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return lambda *_, **__: None


def test_a_module_that_has_every_attribute_is_not_sharded_and_trains(tmp_path: Path) -> None:
    check_unsharded(Answering())
    net = Answering()
    with restored(net):
        net.register_forward_hook(lambda *_: None)
    assert not net._forward_hooks
    trained = go(cut(points(24), 8), student=net, epochs=1, out=tmp_path).student
    plain = go(cut(points(24), 8), epochs=1).student
    assert identical([*trained.parameters()], [*plain.parameters()]) and "_forward_methods" not in vars(trained)


def test_an_exported_teacher_is_the_teacher() -> None:
    x, y = points(24)
    teacher = teacher_net().eval()
    sizes = ({0: torch.export.Dim("batch", min=2, max=512)},)
    exported = torch.export.export(teacher, (x[:8],), dynamic_shapes=sizes).module()
    runs = [go(cut((x, y), 8), teacher=given, steps=3) for given in (teacher, exported)]
    for a, b in zip(*(run.student.parameters() for run in runs), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert runs[1].facts["selfcheck"]["checks"]["in eval"] == "ok"


def test_a_function_and_stored_logits_are_no_teacher_and_told_how_to_be() -> None:
    x, y = points(8)
    logits: Any = torch.zeros(8, CLASSES)
    function: Any = torch.tanh
    for given, message in ((function, r"forward = staticmethod\(function\)"), (logits, r"return logits\[ids\]")):
        for use in (Live, lambda given: go([(x, y)], teacher=given, steps=1)):
            with pytest.raises(TypeError, match=message):
                use(given)


@pytest.mark.parametrize("max_norm", [0.01, 100.0])
def test_sparse_gradients_are_clipped_as_dense_ones(max_norm: float) -> None:
    def weights(*, sparse: bool) -> Tensor:
        torch.manual_seed(0)
        student = nn.Sequential(nn.EmbeddingBag(10, 8, sparse=sparse), nn.Linear(8, CLASSES))
        batches = [(torch.randint(10, (8, 3)), torch.randint(CLASSES, (8,))) for _ in range(3)]
        more: dict[str, Any] = {"teacher": None, "method": Supervised(), "selfcheck": False, "max_grad_norm": max_norm}
        go(batches, student=student, steps=3, optimizer=partial(torch.optim.SGD, lr=0.5), **more)
        return torch.cat([p.detach().flatten() for p in student.parameters()])

    torch.testing.assert_close(weights(sparse=True), weights(sparse=False), rtol=0, atol=1e-6)


class Ending:
    """Three batches, in the first passes only."""

    passes = 0

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Any:
        self.passes += 1
        return iter(cut(points(24), 8) if self.passes < 6 else [])


def test_an_epoch_without_batches_is_named_by_its_number() -> None:
    with pytest.raises(ValueError, match=r"yields no batches\..* Epoch \d has none: is it a generator"):
        go(Ending(), epochs=9)


def test_ids_that_are_numbers_of_groups_are_warned_of() -> None:
    x, y = points(24)
    method, net = CRD(samples=24, negatives=8, size=4), student_net()
    task = Classification(features={"last": ("0", "0")})
    with pytest.warns(UserWarning, match=r"a batch of 24 has \d different ids\. Are they numbers of groups"):
        go([(x, y, y)], student=net, method=method, steps=1, task=task, selfcheck=False)


class Answers(nn.Module):
    """What models for question answering return."""

    def __init__(self) -> None:
        super().__init__()
        self.net = student_net()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"start_logits": self.net(x), "end_logits": self.net(x)}


def test_outputs_of_question_answering_are_refused_with_what_they_have() -> None:
    with pytest.raises(ValueError, match=r"start_logits.*end_logits"):
        go(cut(points(24), 8), student=Answers(), steps=1)
