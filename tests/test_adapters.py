"""The adapters: the Trainer of transformers and Lightning's, held to a loop written by hand and to any split of it."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import tempering as kd
from tempering import tasks
from tempering.integrations.huggingface import METHOD, TEACHER, DistillMixin, Labeled, Unpacked
from tempering.methods import DIST, DTKD, KD, PKT, FitNet, StepMethod, Sum, Supervised
from tempering.rows import Rows, total
from tempering.tasks import Classification
from tempering.teachers import Ensemble, InBatch, MeanTeacher, Routed, Teacher
from tempering.temperature import AdaptivePolicy, Static, Temperatures
from tempering.training import checks
from tempering.training.selfcheck import SelfCheckError

CLASSES, IMAGES = 4, 72


class LearnedT(Static):
    """A temperature that the loss trains: what a method may own."""

    def __init__(self, tau: float = 4.0) -> None:
        super().__init__(tau)
        self.log = nn.Parameter(torch.zeros(()))

    def forward(self, rows: Rows, progress: float) -> Temperatures:
        T = (self.tau * self.log.exp()).reshape(1, 1)
        return Temperatures(T, T, T.detach() ** 0)


class Told(AdaptivePolicy):
    paper, tau = "none", 4.0

    def forward(self, rows: Rows, progress: float) -> Temperatures:
        return Static(4.0)(rows)

    def update(self, reward: Tensor) -> None:
        raise AssertionError


class Owner(StepMethod):
    paper = "none"

    def step(self, step: Any) -> dict[str, Tensor]:
        raise AssertionError


def images(n: int = IMAGES) -> list[dict[str, Tensor]]:
    x = torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return [{"pixel_values": a, "labels": a.flatten()[:CLASSES].argmax()} for a in x]


def hand_written(
    student: nn.Module, teacher: nn.Module, method: Any, steps: list[list[dict]], lr: float
) -> list[float]:
    """The losses of plain SGD on these steps of micro-batches, each step as one batch."""
    optimizer = torch.optim.SGD([*student.parameters(), *method.parameters()], lr=lr)
    losses = []
    for number, parts in enumerate(steps):
        batch = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        labels = batch.pop("labels")
        with torch.no_grad():
            taught = teacher(**batch).logits
        said = student(**batch).logits
        if said.ndim == 3:
            said, taught, labels = (z[:, s].flatten(0, 1) for z, s in zip((said, taught, labels), SHIFTED, strict=True))
            rows = Rows(said[labels >= 0], taught[labels >= 0], labels[labels >= 0])
        else:
            rows = Rows(said, taught, labels)
        loss = total(method(rows, (number + 1) / len(steps)), rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


SHIFTED = (slice(None, -1), slice(None, -1), slice(1, None))


def alike(a: nn.Module, b: nn.Module, atol: float = 1e-6) -> None:
    for (name, x), y in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


# transformers


@pytest.fixture
def hf(tmp_path: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class KDTrainer(DistillMixin, transformers.Trainer):
        """Keeps what it saw: the losses and batches of every step."""

        def training_step(self, model: Any, inputs: Any, *rest: Any) -> Tensor:
            self.seen = [*getattr(self, "seen", []), (self.state.global_step, copy.deepcopy(dict(inputs)))]
            loss = super().training_step(model, inputs, *rest)
            self.losses = getattr(self, "losses", {})
            self.losses[self.state.global_step] = self.losses.get(self.state.global_step, 0.0) + float(loss)
            return loss

        def steps(self) -> list[list[dict]]:
            return [[b for step, b in self.seen if step == i] for i in range(self.state.max_steps)]

    def make(student: nn.Module, data: Any, *, batch: int = 32, accumulate: int = 1, options: Any = None, **own: Any):
        defaults = {"max_steps": 3, "learning_rate": 0.05, "optim": "sgd", "lr_scheduler_type": "constant"}
        defaults |= {"max_grad_norm": 0.0, "report_to": [], "use_cpu": True, "save_strategy": "no"}
        defaults |= {"disable_tqdm": True, "logging_strategy": "no", "dataloader_pin_memory": False}
        args = transformers.TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulate,
            **defaults | (options or {}),
        )
        return KDTrainer(student, args, train_dataset=data, **own)

    return make


def vit(width: int, seed: int) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(seed)
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 1, "num_attention_heads": 2}
    drops = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = ViTConfig(image_size=8, patch_size=4, num_channels=1, num_labels=CLASSES, **sizes, **drops)
    return ViTForImageClassification(config)


def gpt(width: int, seed: int) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    drops = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=11, n_positions=8, n_embd=width, n_layer=1, n_head=2, **drops))


def sentences(n: int = 48) -> list[dict[str, Tensor]]:
    """Of eight tokens, with an uneven number of labels left out at the front."""
    generator = torch.Generator().manual_seed(0)
    out = []
    for i in range(n):
        ids = torch.randint(11, (8,), generator=generator)
        out.append({"input_ids": ids, "labels": ids.masked_fill(torch.arange(8) < (i * 5) % 8, -100)})
    return out


@pytest.mark.parametrize(("batch", "accumulate"), [(32, 1), (8, 4)])
def test_the_trainer_of_transformers_is_the_hand_written_loop(hf: Any, batch: int, accumulate: int) -> None:
    """72 images: the last step of the epoch is a short one, of 8 images."""
    teacher, student = vit(16, 0), vit(8, 1)
    plain, method = copy.deepcopy(student), DTKD(temperature=LearnedT())
    own = copy.deepcopy(method)
    trainer = hf(student, images(), batch=batch, accumulate=accumulate, teacher=teacher, method=method, selfcheck=False)
    trainer.train()
    steps = trainer.steps()
    assert [sum(len(b["labels"]) for b in s) for s in steps] == [32, 32, 8]
    want = hand_written(plain, teacher, own, steps, 0.05)
    torch.testing.assert_close([trainer.losses[i] for i in range(3)], want, rtol=1e-6, atol=1e-6)
    alike(student, plain)
    alike(method, own)
    assert method.temperature.log.item() != 0.0, "what the method owns is trained"


@pytest.mark.parametrize("many", [checks.MIN_LOGITS, 1], ids=["plain", "chunks"])
def test_a_split_step_of_tokens_is_the_whole_one(hf: Any, many: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every micro-batch has another number of tokens, and the labels are shifted."""
    monkeypatch.setattr(checks, "MIN_LOGITS", many)
    teacher, student, plain = gpt(16, 0), gpt(8, 1), gpt(8, 1)
    own: dict[str, Any] = {"teacher": teacher, "method": DTKD(), "task": Labeled(shift=True), "selfcheck": False}
    trainer = hf(student, sentences(), batch=4, accumulate=8, options={"max_steps": 2}, **own)
    trainer.train()
    want = hand_written(plain, teacher, DTKD(), trainer.steps(), 0.05)
    torch.testing.assert_close([trainer.losses[i] for i in range(2)], want, rtol=1e-6, atol=1e-6)
    alike(student, plain)


def test_teacher_is_frozen_and_in_no_checkpoint_and_resume_goes_on(hf: Any, tmp_path: Path) -> None:
    teacher, method = Conv(3, 0), Sum(FitNet(hard=0.0), KD(temperature=LearnedT()))
    task = Labeled(features={"map": ("map", "map")})
    own: dict[str, Any] = {"teacher": teacher, "task": task, "selfcheck": False}
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
    weights = copy.deepcopy(teacher.state_dict())
    straight = hf(Conv(2, 1), images(), method=method, options=options, **own)
    straight.train()
    assert teacher.training and all(p.requires_grad for p in teacher.parameters()), "given back"
    assert all(torch.equal(v, weights[k]) for k, v in teacher.state_dict().items())
    saved = tmp_path / "checkpoint-2"
    assert len(load_file(saved / "model.safetensors")) == len(straight.model.state_dict())
    assert load_file(saved / METHOD).keys() == method.state_dict().keys()
    groups = straight.optimizer.param_groups
    assert [g["weight_decay"] for g in groups[-2:]] == [0.0, 0.0]
    assert {id(p) for g in groups for p in g["params"]} >= {id(p) for p in method.parameters()}

    again = Sum(FitNet(hard=0.0), KD(temperature=LearnedT()))
    resumed = hf(Conv(2, 2), images(), method=again, options=options, **own)
    resumed.train(resume_from_checkpoint=str(saved))
    alike(resumed.model, straight.model)
    alike(again, method)
    (saved / METHOD).unlink()
    with pytest.raises(ValueError, match=rf"{METHOD} does not exist, so Sum cannot resume its own parameters"):
        hf(Conv(2, 2), images(), method=Sum(FitNet(hard=0.0), KD()), options=options, **own).train(str(saved))


def test_evaluation_is_the_method_on_the_rows(hf: Any) -> None:
    teacher, student, method = vit(16, 0), vit(8, 1), KD()
    trainer = hf(student, images(), teacher=teacher, method=method, options={"per_device_eval_batch_size": 40})
    batch = {k: torch.stack([x[k] for x in images(40)]) for k in ("pixel_values", "labels")}
    with torch.no_grad():
        rows = Rows(student(batch["pixel_values"]).logits, teacher(batch["pixel_values"]).logits, batch["labels"])
    assert trainer.evaluate(images(40))["eval_loss"] == pytest.approx(float(total(method(rows), rows)), rel=1e-6)
    predicted = trainer.predict(images(40))
    torch.testing.assert_close(torch.from_numpy(predicted.predictions), rows.student, rtol=1e-5, atol=1e-6)


def test_a_model_that_answers_a_bare_tensor_is_evaluated_whole(hf: Any) -> None:
    options = {"max_steps": 1}
    trainer = hf(BareHead(), images(), teacher=BareHead(), method=KD(), selfcheck=False, options=options)
    trainer.train()
    assert trainer.predict(images(10)).predictions.shape == (10, CLASSES)


def test_first_batch_is_checked_in_the_trainer(hf: Any, caplog: pytest.LogCaptureFixture) -> None:
    teacher = Unpacked(Knowing())
    with caplog.at_level("INFO", "tempering"):
        hf(vit(8, 1), images(), teacher=teacher, method=DTKD(), options={"max_steps": 1}).train()
    assert "self-check ok: teacher frozen, in eval, deterministic, above chance" in caplog.text
    other = [{**x, "labels": (x["labels"] + 1) % CLASSES} for x in images()]
    with pytest.raises(SelfCheckError, match="as a guess among 4 classes"):
        hf(vit(8, 1), other, teacher=teacher, method=DTKD()).train()


class BareHead(nn.Module):
    """A model that answers a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, CLASSES)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.head(pixel_values.flatten(1))


class Conv(nn.Module):
    def __init__(self, channels: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.map, self.head = nn.Conv2d(1, channels, 3), nn.Linear(36 * channels, CLASSES)

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.map(pixel_values).flatten(1))}


class Knowing(nn.Module):
    """Always right about ``images``."""

    def forward(self, pixel_values: Tensor) -> Tensor:
        return 4.0 * pixel_values.flatten(1)[:, :CLASSES]


def test_what_the_trainer_of_transformers_refuses(hf: Any) -> None:
    student = vit(8, 1)
    own: dict[str, Any] = {"teacher": vit(16, 0), "method": KD()}
    for changed, error, text in [
        ({"method": DIST(), "accumulate": 2}, ValueError, "DIST compares rows .* gradient_accumulation_steps=2 would"),
        (
            {"method": Owner()},
            TypeError,
            "Owner owns its step, and so does this trainer. Run it with tempering.distill",
        ),
        ({"method": KD(temperature=Told())}, ValueError, "Told learns from a second forward after every step"),
        ({"method": 4.0}, TypeError, r"method must be a Method, such as methods.DTKD\(\); got float"),
        ({"teacher": None}, ValueError, "KD needs a teacher, and teacher is None"),
        ({"teacher": "bert"}, TypeError, "teacher must be a module, a Teacher or None; got str"),
        ({"teacher": student}, ValueError, r"shares weights with the student: frozen, .* copy.deepcopy\(model\)"),
        (
            {"options": {"label_smoothing_factor": 0.1}},
            ValueError,
            "the method computes the loss, so label_smoothing_fac",
        ),
    ]:
        with pytest.raises(error, match=text):
            hf(student, images(), **own | changed)
    assert student.training and all(p.requires_grad for p in student.parameters())
    hf(student, images(), teacher=None, method=Supervised(), options={"max_steps": 1}).train()


# the task for batches of transformers


def test_labeled_makes_rows_of_classes_and_of_tokens() -> None:
    task, z = Labeled(), torch.randn(2, 3)
    batch = {"x": z, "labels": torch.tensor([1, -100]), "ids": torch.tensor([5, 6])}
    said, taught, ids = task.inputs(batch)
    assert said.keys() == taught.keys() == {"x"} and ids is batch["ids"]
    assert Labeled(keep_labels=True).inputs(batch)[0].keys() == {"x", "labels"}
    (rows,) = task.rows(z, z.detach(), batch)
    assert rows.weight is None and rows.ids is batch["ids"] and task.row_weights(batch) == {"logits": 2.0}
    assert task.rows(z, None, {"x": z})[0].target is None and task.row_weights({"x": z}) == {"logits": 2.0}

    tokens, labels = torch.randn(2, 4, 3), torch.tensor([[0, 1, -100, 2], [-100, -100, 1, -100]])
    (rows,) = task.rows({"logits": tokens}, tokens.clone(), {"labels": labels})
    assert rows.student.shape == (4, 3) and float(rows.total_weight) == 4.0 == float(
        task.row_weights({"labels": labels})["logits"]
    )
    shifted = Labeled(shift=True)
    (rows,) = shifted.rows(tokens, tokens.clone(), {"labels": labels})
    assert float(rows.total_weight) == 3.0 == float(shifted.row_weights({"labels": labels})["logits"])
    torch.testing.assert_close(rows.student, tokens[:, :-1].reshape(6, 3)[[0, 2, 4]])
    assert rows.target is not None and rows.target.tolist() == [1, 2, 1]


def test_labeled_loss_is_that_of_the_model_of_transformers() -> None:
    pytest.importorskip("transformers")
    model = gpt(8, 0)
    batch = {k: torch.stack([x[k] for x in sentences(6)]) for k in ("input_ids", "labels")}
    (rows,) = Labeled(shift=True).rows(model(batch["input_ids"]), None, batch)
    torch.testing.assert_close(total(Supervised()(rows), rows), model(**batch).loss)


def test_labeled_refuses_what_does_not_fit() -> None:
    task, tokens = Labeled(), torch.zeros(2, 4, 3)
    with pytest.raises(
        ValueError, match=r"mappings, as collators of transformers return; got tuple.*Classification\(\)"
    ):
        task.inputs((tokens, tokens))
    with pytest.raises(ValueError, match=r"need labels of shape \(N, L\) = \(2, 4\), .*got none. Collate with labels"):
        task.rows(tokens, None, {"x": tokens})
    with pytest.raises(ValueError, match=r"got \(2, 3\)"):
        task.rows(tokens, None, {"labels": torch.zeros(2, 3)})
    with pytest.raises(
        ValueError, match=r"student's logits are \(2, 4, 3\) and the teacher's \(2, 4, 5\): both need the same"
    ):
        task.rows(tokens, torch.zeros(2, 4, 5), {"labels": tokens[..., 0].long()})
    with pytest.raises(ValueError, match=r"teacher must return \(N, C\) or \(N, L, C\) logits.*got str"):
        task.rows(tokens, "no", {})


def test_a_whole_run_on_batches_of_transformers() -> None:
    data = images(64)
    batches = [{k: torch.stack([x[k] for x in data[i : i + 32]]) for k in data[0]} for i in (0, 32)]
    run = kd.distill(
        Unpacked(BareHead()),
        Unpacked(Knowing()),
        batches,
        method=KD(),
        task=Labeled(),
        epochs=2,
        test=batches,
        quiet=True,
        log_every=1,
    )
    assert run.last["test"].keys() == {"accuracy", "loss", "agreement"}
    assert run.last["test"]["agreement"] == run.last["test"]["accuracy"], "the teacher is always right"
    with pytest.raises(ValueError, match="no row has a label"):
        Labeled().score(run.student, [{**batches[0], "labels": torch.full((32,), -100)}])


# Lightning


@pytest.fixture
def pl() -> Any:
    return pytest.importorskip("lightning.pytorch")


def flat() -> tuple[Tensor, Tensor]:
    data = images()
    return torch.stack([x["pixel_values"].flatten() for x in data]), torch.stack([x["labels"] for x in data])


def mlp(width: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, CLASSES))


class Padded(Classification):
    """Batches of (inputs, labels, ...) of which samples with an odd index weigh nothing."""

    def rows(self, student: Any, teacher: Any, batch: Any) -> list[Rows]:
        (rows,) = super().rows(student, teacher, batch)
        return [rows.replace(weight=(batch[2] % 3 > 0).float())]

    def row_weights(self, batch: Any) -> dict[str, float]:
        return {"logits": float((batch[2] % 3 > 0).sum())}


def fit(pl: Any, module: Any, data: Any, *, batch: int, accumulate: int = 1, epochs: int = 2, **options: Any) -> Any:
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data), batch_size=batch)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False} | options
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        accumulate_grad_batches=accumulate,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, loader, loader)
    return trainer


# counsel on loaders, and what it calls of torch
LIGHTNING = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*LeafSpec:FutureWarning")


@LIGHTNING
@pytest.mark.parametrize(("batch", "accumulate"), [(32, 1), (8, 4)])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("many", [checks.MIN_LOGITS, 1], ids=["plain", "chunks"])
def test_lightning_is_the_hand_written_loop(
    pl: Any, batch: int, accumulate: int, padded: bool, many: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """72 samples: the last step of an epoch is a short group, 8 samples; clipping sees the whole step's gradient."""
    from tempering.integrations.lightning import DistillModule

    monkeypatch.setattr(checks, "MIN_LOGITS", many)
    x, y = flat()
    ids, teacher, student = torch.arange(len(x)), mlp(32, 0), mlp(8, 1)
    plain, method, own = copy.deepcopy(student), DTKD(temperature=LearnedT()), DTKD(temperature=LearnedT())
    task = Padded() if padded else Classification()
    module = DistillModule(
        student,
        teacher,
        method=method,
        task=task,
        optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1),
        schedule=lambda progress: 1.0 - progress / 2,
        selfcheck=False,
    )
    fit(pl, module, (x, y, ids), batch=batch, accumulate=accumulate, gradient_clip_val=0.5)

    trained = [*plain.parameters(), *own.parameters()]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for step in range(6):
        part = slice(32 * (step % 3), 32 * (step % 3) + 32)
        with torch.no_grad():
            taught = teacher(x[part])
        weight = (ids[part] % 3 > 0).float() if padded else None
        rows = Rows(plain(x[part]), taught, y[part], weight)
        optimizer.zero_grad()
        total(own(rows, (step + 1) / 6), rows).backward()
        nn.utils.clip_grad_norm_(trained, 0.5)
        optimizer.param_groups[0]["lr"] = 0.1 * (1.0 - step / 12)
        optimizer.step()
    alike(student, plain)
    alike(method, own)


@LIGHTNING
def test_lightning_module_holds_student_and_method_and_no_teacher(pl: Any, tmp_path: Path) -> None:
    from tempering.integrations.lightning import DistillModule

    x, y = flat()
    teacher, data = nn.Sequential(nn.Flatten(), Knowing()), (x.view(-1, 1, 8, 8), y)

    def made(seed: int) -> Any:
        torch.manual_seed(seed)
        student = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, CLASSES))
        large = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten(), nn.Linear(108, CLASSES))
        task = Classification(features={"map": ("0", "0")})
        module = DistillModule(student, large, method=Sum(FitNet(hard=0.0), KD()), task=task, selfcheck=False)
        module.prepare((data[0][:8], data[1][:8]))
        return module

    module = made(0)
    large = module.teacher.model
    assert not any(m is large or m is teacher for m in module.modules())
    assert {name.split(".")[0] for name in module.state_dict()} == {"student", "method"}
    before = copy.deepcopy(module.method.state_dict())
    trainer = fit(pl, module, data, batch=24, epochs=1, enable_checkpointing=True, default_root_dir=tmp_path)
    assert any(not torch.equal(v, before[k]) for k, v in module.method.named_parameters()), "projectors are trained"
    assert large.training and all(p.requires_grad for p in large.parameters()), "given back"
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = made(1)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.validate(again, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data), batch_size=24))
    again.load_state_dict(module.state_dict())
    alike(again, module, atol=0.0)


@LIGHTNING
def test_lightning_logs_checks_and_scores(pl: Any, caplog: pytest.LogCaptureFixture) -> None:
    from tempering.integrations.lightning import DistillModule

    x, y = flat()

    class Knows(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 4.0 * x[:, :CLASSES]

    student, method = mlp(8, 1), DTKD()
    module = DistillModule(student, Knows(), method=method)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=24)
    with caplog.at_level("INFO"):
        trainer = fit(pl, module, (x, y), batch=24, epochs=1)
    assert "self-check ok: teacher frozen" in caplog.text and "train_loss" in trainer.logged_metrics
    scores = trainer.validate(module, loader, verbose=False)[0]
    with torch.no_grad():
        rows = Rows(student(x), Knows()(x), y)
        assert scores["val_loss"] == pytest.approx(float(total(method(rows), rows)), rel=1e-5)
        assert scores["val_accuracy"] == pytest.approx(float((student(x).argmax(-1) == y).float().mean()))
        torch.testing.assert_close(module(x), rows.student)
    with pytest.raises(SelfCheckError, match="as a guess among 4 classes"):
        fit(pl, DistillModule(student, Knows(), method=method), (x, (y + 1) % CLASSES), batch=24)


@LIGHTNING
def test_what_lightning_refuses(pl: Any) -> None:
    from tempering.integrations.lightning import DistillModule

    data, teacher = flat(), mlp(32, 0)
    with pytest.raises(ValueError, match=r"DIST compares rows .* accumulate_grad_batches=2 would change it"):
        fit(pl, DistillModule(mlp(8, 1), teacher, method=DIST(), selfcheck=False), data, batch=24, accumulate=2)
    fit(pl, DistillModule(mlp(8, 1), teacher, method=DIST(), selfcheck=False), data, batch=24, epochs=1)
    with pytest.raises(ValueError, match=r"needs its end: set max_epochs= or max_steps= of the Trainer"):
        fit(pl, DistillModule(mlp(8, 1), teacher, method=KD(), selfcheck=False), data, batch=24, epochs=-1)
    with pytest.raises(TypeError, match="Owner owns its step"):
        DistillModule(mlp(8, 1), teacher, method=Owner())

    class Twice(Classification):
        def rows(self, student: Any, teacher: Any, batch: Any) -> list[Rows]:
            (rows,) = super().rows(student, teacher, batch)
            return [rows, rows.replace(name="again")]

    def two() -> Any:
        return DistillModule(mlp(8, 1), teacher, method=KD(), task=Twice(), selfcheck=False)

    with pytest.raises(ValueError, match=r"Twice makes 2 blocks of rows per batch.*=1 on one device"):
        fit(pl, two(), data, batch=24, accumulate=3)
    fit(pl, two(), data, batch=24, epochs=1)


# the self-check in both


def labeled_wrongly(data: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [{**x, "labels": (x["labels"] + 1) % CLASSES} for x in data]


def pairs(data: list[dict[str, Tensor]]) -> Any:
    x, y = torch.stack([d["pixel_values"].flatten() for d in data]), torch.stack([d["labels"] for d in data])
    return torch.utils.data.TensorDataset(x, y)


class Flat(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 4.0 * x[:, :CLASSES]


def noisy(dropout: float = 0.5) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, CLASSES))


class Bare(nn.Module):
    """The same with the inputs of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = noisy()

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        return {"logits": self.net(pixel_values.flatten(1))}


def fit_noisy(pl: Any, train: Any, evaluated: Any, *, batch: int = 8, epochs: int = 2, **own: Any) -> nn.Module:
    """Shuffled by torch's generator, with workers that stay, and scored after every epoch."""
    from tempering.integrations.lightning import DistillModule

    torch.manual_seed(own.pop("seed", 5))
    options = {"num_workers": 1, "persistent_workers": True} if own.pop("workers", False) else {}
    loader = torch.utils.data.DataLoader(train, batch_size=batch, shuffle=True, **options)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"enable_checkpointing": False, "accelerator": "cpu", "num_sanity_val_steps": 0} | own.pop("options", {})
    path = own.pop("ckpt_path", None)
    module = DistillModule(noisy(), Flat(), method=KD(), **own)
    trainer = pl.Trainer(max_epochs=epochs, **quiet)
    trainer.fit(module, loader, torch.utils.data.DataLoader(evaluated, batch_size=batch), ckpt_path=path)
    return module.student


@LIGHTNING
def test_both_check_as_many_batches_as_it_takes(hf: Any, pl: Any) -> None:
    """A teacher that guesses is not found by one batch of two rows."""
    wrong = labeled_wrongly(images(160))
    with pytest.raises(SelfCheckError, match="as a guess among 4 classes"):
        hf(vit(8, 1), wrong, batch=2, teacher=Unpacked(Knowing()), method=DTKD()).train()
    with pytest.raises(SelfCheckError, match="as a guess among 4 classes"):
        fit_noisy(pl, pairs(wrong), pairs(wrong), batch=2)


@LIGHTNING
@pytest.mark.parametrize("what", ["label", "nothing"])
def test_both_check_what_is_evaluated(hf: Any, pl: Any, what: str) -> None:
    data = images()
    other = [] if what == "nothing" else [{**x, "labels": x["labels"] + 3} for x in data]
    said = "there is nothing to evaluate" if what == "nothing" else "label 6 is out of range for 4 classes"
    options = {"eval_strategy": "steps", "eval_steps": 2}
    for name, given in (("eval_dataset", other), (r"eval_dataset\['b'\]", {"a": data, "b": other})):
        own: dict[str, Any] = {"teacher": Unpacked(Knowing()), "method": KD(), "eval_dataset": given}
        with pytest.raises(SelfCheckError, match=f"{name}: {said}"):
            hf(vit(8, 1), data, options=options, **own).train()
    if other:  # Lightning leaves out a loader without batches, and says so
        with pytest.raises(SelfCheckError, match=f"the validation loader: {said}"):
            fit_noisy(pl, pairs(data), pairs(other))


@LIGHTNING
@pytest.mark.parametrize("workers", [False, True])
def test_the_self_check_of_lightning_changes_no_bit(pl: Any, workers: bool) -> None:
    data = pairs(images())
    checked, plain = (fit_noisy(pl, data, data, workers=workers, selfcheck=on) for on in (True, False))
    alike(checked, plain, atol=0.0)
    assert torch.equal(checked[1].running_mean, plain[1].running_mean)


def test_the_self_check_of_the_trainer_changes_no_bit(hf: Any) -> None:
    """In steps of two micro-batches, of which accelerate counts where an epoch ends."""
    trained = []
    for on in (True, False):
        own: dict[str, Any] = {"teacher": Unpacked(Knowing()), "method": KD(), "selfcheck": on}
        options = {"max_steps": -1, "num_train_epochs": 2, "eval_strategy": "epoch"}
        student = Bare()
        hf(student, images(), batch=8, accumulate=2, options=options, eval_dataset=images(20), **own).train()
        trained.append(student)
    alike(*trained, atol=0.0)
    assert torch.equal(trained[0].net[1].running_mean, trained[1].net[1].running_mean)


@LIGHTNING
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint", "ignore:Checkpoint directory")
def test_lightning_resumes_to_the_same_bits(pl: Any, tmp_path: Path) -> None:
    """The order of the samples and the dropout are those that the run would have drawn."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    def fitted(**more: Any) -> nn.Module:
        saves = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        options = {"enable_checkpointing": True, "callbacks": [saves]}
        return fit_noisy(pl, data, data, epochs=3, options=options, **more)

    data = pairs(images())
    straight = fitted()
    (tmp_path / "epoch=0.ckpt").rename(tmp_path / "before.ckpt")
    resumed = fitted(seed=99, ckpt_path=tmp_path / "before.ckpt")
    alike(resumed, straight, atol=0.0)
    assert torch.equal(resumed[1].running_mean, straight[1].running_mean)


# several teachers, and an average of the student


def domains_of(data: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [{**sample, "domain": torch.tensor(i % 2)} for i, sample in enumerate(data)]


def several(kind: str, teachers: list[nn.Module]) -> Teacher:
    if kind == "routed":
        return Routed(teachers, by="domain")
    return Ensemble(teachers, mean="probabilities") if kind == "ensemble" else MeanTeacher(0.8)


class Several(nn.Module):
    """The same by hand."""

    def __init__(self, kind: str, teachers: list[nn.Module], student: nn.Module) -> None:
        super().__init__()
        self.kind, self.teachers, self.student = kind, nn.ModuleList(teachers), student
        self.average, self.steps = copy.deepcopy(student), 0

    @torch.no_grad()
    def forward(self, domain: Tensor, **inputs: Any) -> Any:
        z = [net(**inputs) for net in self.teachers]
        z = [getattr(x, "logits", x) for x in z]
        if self.kind == "routed":
            z = torch.where(domain.view(-1, *[1] * (z[0].ndim - 1)) == 0, z[0], z[1])
        elif self.kind == "ensemble":
            z = ((z[0].softmax(-1) + z[1].softmax(-1)) / 2).log()
        else:
            d = min(0.8, 1 - 1 / (self.steps + 1)) if self.steps else 1.0
            for a, w in zip(self.average.parameters(), self.student.parameters(), strict=True):
                a.copy_(d * a + (1 - d) * w)
            self.steps += 1
            z = self.average.eval()(**inputs)
            z = getattr(z, "logits", z)
        return type("Output", (), {"logits": z})()


@pytest.mark.parametrize("tokens", [False, True], ids=["images", "tokens"])
@pytest.mark.parametrize("kind", ["ensemble", "routed", "mean"])
def test_several_teachers_in_the_trainer_of_transformers(hf: Any, kind: str, tokens: bool) -> None:
    """Also in two micro-batches a step; the column of the batch reaches no model."""
    make = gpt if tokens else vit
    nets, student, method = [make(16, 0), make(16, 2)], make(8, 1), KD(hard=0.5)
    plain = copy.deepcopy(student)
    data = domains_of(sentences(48) if tokens else images(48))
    own: dict[str, Any] = {"method": method, "task": Labeled(shift=tokens), "selfcheck": False}
    teacher = several(kind, nets if tokens else [Unpacked(net) for net in nets])
    trainer = hf(student, data, batch=8, accumulate=2, teacher=teacher, **own)
    trainer.train()
    steps = trainer.steps()
    if kind != "routed":
        steps = [[{**part, "domain": torch.zeros(8)} for part in parts] for parts in steps]
    by_hand = Student(plain)
    want = hand_written(by_hand, Several(kind, [net.eval() for net in nets], plain), KD(hard=0.5), steps, 0.05)
    torch.testing.assert_close([trainer.losses[i] for i in range(3)], want, rtol=1e-5, atol=1e-6)
    alike(student, plain, atol=1e-5)


class Student(nn.Module):
    """Takes the column and leaves it out."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, domain: Tensor, **inputs: Any) -> Any:
        return self.net(**inputs)


@pytest.mark.parametrize("tokens", [False, True], ids=["images", "tokens"])
def test_an_average_of_the_student_is_resumed_by_the_trainer_of_transformers(
    hf: Any, tokens: bool, tmp_path: Path
) -> None:
    """Both to the same bits, with weights that transformers saves under other names, or tied ones."""
    make, data = (gpt, sentences()) if tokens else (vit, images())
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
    own: dict[str, Any] = {"method": KD(hard=0.5), "task": Labeled(shift=tokens), "options": options}

    def trained(seed: int, checkpoint: Path | None = None) -> tuple[Any, MeanTeacher]:
        teacher = MeanTeacher(0.8)
        trainer = hf(make(8, seed), data, teacher=teacher, selfcheck=False, **own)
        trainer.train(checkpoint and str(checkpoint))
        return trainer, teacher

    (_, whole), (trainer, again) = trained(1), trained(5, tmp_path / "checkpoint-2")
    assert whole.state is not None and again.state is not None
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(again), strict=True))
    assert int(again.state.steps) == 4  # pyright: ignore[reportArgumentType]
    trainer.train()  # the optimizer is the same, and a step is still one update
    assert int(again.state.steps) == 8  # pyright: ignore[reportArgumentType]
    (tmp_path / "checkpoint-2" / TEACHER).unlink()
    with pytest.raises(ValueError, match=rf"{TEACHER} does not exist, so MeanTeacher cannot resume"):
        trained(1, tmp_path / "checkpoint-2")


def weights(teacher: MeanTeacher) -> list[Tensor]:
    """Of the average and of the student that it follows."""
    return [*teacher.models[0].parameters(), *teacher._student.parameters()]


@LIGHTNING
@pytest.mark.parametrize("kind", ["ensemble", "routed", "mean"])
def test_several_teachers_in_lightning(pl: Any, kind: str, tmp_path: Path) -> None:
    """Equal to a loop by hand, also resumed after the first epoch, in two micro-batches a step."""
    from tempering.integrations.lightning import DistillModule

    (x, y), nets = flat(), [mlp(16, 0), mlp(16, 2)]
    parts = list(zip(x.split(8), y.split(8), (torch.arange(IMAGES) % 2).split(8), strict=True))[:6]
    data = [{"x": x, "labels": y, "domain": domain} for x, y, domain in parts]
    seen = data if kind == "routed" else [{"x": part["x"], "labels": part["labels"]} for part in data]

    def fitted(seed: int, epochs: int, checkpoint: Path | None = None) -> Any:
        teacher = several(kind, copy.deepcopy(nets))
        optimizer = partial(torch.optim.SGD, lr=0.1)
        module = DistillModule(mlp(8, seed), teacher, method=KD(hard=0.5), optimizer=optimizer, selfcheck=False)
        options: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
        options |= {"enable_model_summary": False, "enable_checkpointing": False, "accumulate_grad_batches": 2}
        trainer = pl.Trainer(max_epochs=epochs, devices=1, default_root_dir=tmp_path, **options)
        loader = torch.utils.data.DataLoader(seen, batch_size=None)
        trainer.fit(module, loader, loader, ckpt_path=checkpoint)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return module, teacher

    whole, _ = fitted(1, 2)
    first, _ = fitted(1, 1)
    again, teacher = fitted(3, 2, tmp_path / "last.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(whole.student.parameters(), again.student.parameters(), strict=True))
    plain = mlp(8, 1)
    by_hand, optimizer = Several(kind, [net.eval() for net in nets], plain), torch.optim.SGD(plain.parameters(), lr=0.1)
    for step in range(6):
        pair = data[2 * (step % 3) : 2 * (step % 3) + 2]
        x, y, domain = (torch.cat([part[name] for part in pair]) for name in ("x", "labels", "domain"))
        rows = Rows(plain(x), by_hand(domain, input=x).logits, y)
        optimizer.zero_grad()
        total(KD(hard=0.5)(rows, (step + 1) / 6), rows).backward()
        optimizer.step()
    alike(again.student, plain)
    if kind == "mean":
        assert int(teacher.state.steps) == 6 and first is not None


# the teacher's outputs as a column of the data


def with_column(teacher: nn.Module, data: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    batch = {name: torch.stack([x[name] for x in data]) for name in data[0] if name != "labels"}
    with torch.no_grad():
        logits = teacher.eval()(**batch).logits
    return [{**x, "teacher_outputs": z} for x, z in zip(data, logits, strict=True)]


@pytest.mark.parametrize("kind", ["images", "texts"])
def test_the_teachers_outputs_are_a_column_in_the_trainer(hf: Any, kind: str) -> None:
    net, data, task = (vit, images(), None) if kind == "images" else (gpt, sentences(), tasks.LanguageModeling())
    teacher, found = net(16, 0), []
    options = {"eval_strategy": "no", "per_device_eval_batch_size": 10}
    stored = with_column(teacher, data)
    column = InBatch() if kind == "images" else Ensemble([InBatch()])
    for source, rows in ((teacher, data), (column, stored)):
        student = net(8, 1)
        trainer = hf(
            student, rows, options=options, eval_dataset=rows, teacher=source, method=KD(), task=task, selfcheck=False
        )
        trainer.train()
        found.append((student, trainer.losses, trainer.evaluate()["eval_loss"]))
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-6) and found[0][2] == pytest.approx(found[1][2], rel=1e-6)
    alike(found[0][0], found[1][0])
    with pytest.raises(ValueError, match='"teacher_outputs", also those of scored splits'):
        hf(net(8, 1), stored, options=options, eval_dataset=data, teacher=InBatch(), method=KD(), task=task).evaluate()


@LIGHTNING
def test_the_teachers_outputs_are_a_column_in_lightning_and_the_engine(pl: Any) -> None:
    from tempering.integrations.lightning import DistillModule

    x, y = flat()
    teacher = mlp(16, 0)
    with torch.no_grad():
        batch = {"inputs": x, "labels": y, "teacher_outputs": teacher(x)}
    batches = [{name: value[i : i + 24] for name, value in batch.items()} for i in range(0, len(x), 24)]
    pairs = [(b["inputs"], b["labels"]) for b in batches]
    sgd = partial(torch.optim.SGD, lr=0.1)
    settings = {"method": "dtkd", "optimizer": sgd, "selfcheck": False}
    students = []
    for source, data in ((teacher, pairs), (InBatch(), batches)):
        students.append(mlp(8, 1))
        kd.distill(students[-1], source, data, epochs=1, validation=data, quiet=True, accelerator="cpu", **settings)
        students.append(mlp(8, 1))
        loader = torch.utils.data.DataLoader(data, batch_size=None)
        options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = pl.Trainer(max_epochs=1, accelerator="cpu", enable_model_summary=False, **options)
        trainer.fit(DistillModule(students[-1], source, **settings), loader, loader)
    alike(students[0], students[2], 0.0)
    alike(students[1], students[3], 0.0)
    with pytest.raises(ValueError, match=r"a live teacher as well.*teachers.InBatch\(\)"):
        kd.distill(mlp(8, 1), teacher, batches, epochs=1, quiet=True, accelerator="cpu", **settings)
    with pytest.raises(ValueError, match=r"InBatch needs batches that are mappings"):
        kd.distill(mlp(8, 1), InBatch(), pairs, epochs=1, quiet=True, accelerator="cpu", **settings)
    with pytest.raises(ValueError, match=r"A teacher's logits are 'teacher_outputs'"):
        Classification().inputs((x, y, batch["teacher_outputs"]))
    with pytest.raises(TypeError, match=r"'teacher_outputs' of the data they are teachers.InBatch"):
        kd.distill(mlp(8, 1), batch["teacher_outputs"], pairs, epochs=1, quiet=True, accelerator="cpu", **settings)


# torch.compile of the whole module


@LIGHTNING
@pytest.mark.parametrize("method", [KD, PKT])
def test_a_compiled_module_of_lightning_compiles_the_student(pl: Any, method: Any) -> None:
    from tempering.integrations.lightning import DistillModule

    graphs: list[Any] = []

    def backend(graph: Any, examples: Any) -> Any:
        graphs.append(graph)
        return graph

    found = []
    for compiled in (False, True):
        task = Classification(features={"hidden": ("0", "0")} if method is PKT else None)
        module = DistillModule(mlp(8, 1), mlp(16, 0), method=method(), task=task, selfcheck=False)
        trainer = fit(pl, torch.compile(module, backend=backend) if compiled else module, flat(), batch=36, epochs=1)
        found.append((module.student, dict(trainer.callback_metrics)))
        assert bool(graphs) == compiled
    alike(found[0][0], found[1][0], 0.0)
    assert found[0][1] == found[1][1] and "val_accuracy" in found[0][1]
