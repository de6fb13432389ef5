"""The loss in the trainer of sentence-transformers, with the real package, and students that it loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.lazy_modules import needs

pytestmark = needs("sentence_transformers", "sentence-transformers is not installed")

TEXTS = ["red fish", "blue bird", "a red bird", "two blue fish", "green tree", "one tall tree"]


@pytest.fixture(scope="module")
def tools() -> Any:
    from tempering.integrations import sentence_embeddings

    return sentence_embeddings


def encoder(width: int, seed: int, **more: Any) -> Any:
    from transformers import BertConfig, BertModel

    from tempering.models import Encoder

    torch.manual_seed(seed)
    sizes = {"vocab_size": 300, "hidden_size": width, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(**sizes, intermediate_size=16, max_position_embeddings=32)
    return Encoder(BertModel(config, add_pooling_layer=False), **more).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from tempering.data.glue import trained_tokenizer

    made = trained_tokenizer([(text,) for text in TEXTS], vocabulary=280)
    made.model_max_length = 16
    return made


@pytest.fixture(scope="module")
def models(tools: Any, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved students of two sizes, and a teacher."""
    folder = tmp_path_factory.mktemp("models")
    for name, width, seed in (("student", 8, 1), ("same size", 12, 2), ("teacher", 12, 3)):
        tools.as_sentence_transformer(encoder(width, seed), tokenizer, folder / name)
    return folder


def load(folder: Path) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu").eval()


def columns(model: Any, *texts: list[str]) -> list[dict[str, Tensor]]:
    return [model.preprocess(part) for part in texts]


def vectors(model: Any, texts: list[str]) -> Tensor:
    return model(dict(model.preprocess(texts)))["sentence_embedding"]


@pytest.mark.parametrize(("pooling", "normalize"), [("mean", False), ("cls", True)])
def test_saved_students_have_the_same_embeddings(
    pooling: Any, normalize: bool, tools: Any, tokenizer: Any, tmp_path: Path
) -> None:
    student = encoder(8, 1, pooling=pooling, normalize=normalize)
    want = student(tokenizer(TEXTS, padding=True, return_tensors="pt"))
    saved = tools.as_sentence_transformer(student, tokenizer, tmp_path)
    torch.testing.assert_close(torch.tensor(load(tmp_path).encode(TEXTS)), want.detach(), rtol=1e-4, atol=1e-5)
    assert saved.get_embedding_dimension() == 8


def test_a_router_has_the_student_for_queries_and_the_teacher_for_documents(models: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Router

    student, teacher = load(models / "same size"), load(models / "teacher")
    router = Router.for_query_document([*student], [*teacher])
    SentenceTransformer(modules=[router], device="cpu").save_pretrained(str(tmp_path))
    made = load(tmp_path)
    torch.testing.assert_close(made.encode_query(TEXTS), student.encode(TEXTS), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(made.encode_document(TEXTS), teacher.encode(TEXTS), rtol=1e-5, atol=1e-6)


def test_losses_are_those_of_the_tasks(tools: Any, models: Path) -> None:
    from tempering.methods import KD, EmbeddingKD, MarginMSE, RegressionKD
    from tempering.tasks import Embeddings, Ranking, Similarity

    student, teacher = load(models / "student"), load(models / "teacher")
    parts = [TEXTS[:2], TEXTS[2:4], TEXTS[4:]]
    s, t = ([vectors(model, part) for part in parts] for model in (student, teacher))
    features = columns(student, *parts)
    scores = torch.tensor([[3.0, 1.0], [0.5, 2.0]])
    ours = 20.0 * torch.stack([F.cosine_similarity(s[0], d) for d in s[1:]], 1)
    want = F.kl_div((ours / 2).log_softmax(1), (scores / 2).softmax(1), reduction="batchmean") * 4.0
    method = KD(soft=1.0, hard=0.0, temperature=2.0)
    torch.testing.assert_close(tools.DistillLoss(student, method)(features, scores), want)
    theirs = 20.0 * torch.stack([F.cosine_similarity(t[0], d) for d in t[1:]], 1)
    want = ((ours[:, 0] - ours[:, 1]) - (theirs[:, 0] - theirs[:, 1])).square().mean()
    got = tools.DistillLoss(student, MarginMSE(), teacher=teacher)(features)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    all_pairs = [20.0 * F.normalize(z[0]) @ F.normalize(torch.cat(z[1:])).T for z in (s, t)]
    want = F.kl_div((all_pairs[0] / 2).log_softmax(1), (all_pairs[1] / 2).softmax(1), reduction="batchmean") * 4.0
    got = tools.DistillLoss(student, method, task=Ranking(candidates="batch"), teacher=teacher)(features)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    loss = tools.DistillLoss(student, EmbeddingKD(), task=Embeddings(), teacher=teacher, teacher_columns=1)
    project = loss.method.projectors[0]
    assert project.weight.shape == (12, 8) and not any("teacher" in n for n, _ in loss.named_parameters())
    want = (project(torch.cat(s)) - t[0].repeat(3, 1)).square().mean()
    torch.testing.assert_close(loss(features), want)
    torch.testing.assert_close(loss(features, None), want)
    stored = tools.DistillLoss(student, loss.method, task=Embeddings(), teacher_size=12)
    torch.testing.assert_close(stored(features, t[0].detach()), want)
    by_column = (project(torch.cat(s)) - torch.cat(t)).square().mean()
    torch.testing.assert_close(stored(features, torch.stack(t, 1).detach()), by_column)
    gold = torch.tensor([0.2, 0.9])
    cosines = [F.cosine_similarity(z[0], z[1]) for z in (s, t)]
    want = (cosines[0] - cosines[1]).square().mean() + (cosines[0] - gold).square().mean()
    got = tools.DistillLoss(student, RegressionKD(), task=Similarity(), teacher=teacher)(features[:2], gold)
    torch.testing.assert_close(got, want)
    student.zero_grad()
    got.backward()
    slope = student[0].model.embeddings.word_embeddings.weight.grad
    assert slope.abs().sum() > 0 and all(p.grad is None for p in teacher.parameters())


def test_its_trainer_trains_the_student_and_the_projection(tools: Any, models: Path, tmp_path: Path) -> None:
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

    from tempering.methods import EmbeddingKD
    from tempering.tasks import Embeddings

    student, teacher = load(models / "student"), load(models / "teacher")
    loss = tools.DistillLoss(student, EmbeddingKD(), task=Embeddings(), teacher=teacher)
    before = loss.method.projectors[0].weight.detach().clone()
    with torch.no_grad():
        first = float(loss.eval()(columns(student, TEXTS)))
    args = SentenceTransformerTrainingArguments(
        str(tmp_path), num_train_epochs=20, per_device_train_batch_size=3, learning_rate=0.02, report_to=[],
        save_strategy="no", disable_tqdm=True, use_cpu=True, logging_strategy="no",
    )  # fmt: skip
    data = Dataset.from_dict({"text": TEXTS})
    SentenceTransformerTrainer(model=student, args=args, train_dataset=data, loss=loss).train()
    with torch.no_grad():
        last = float(loss.eval()(columns(student, TEXTS)))
    assert last < 0.5 * first and (loss.method.projectors[0].weight - before).abs().max() > 1e-3
    assert not teacher.training and all(p.requires_grad is False for p in teacher.parameters())


def test_what_it_cannot_do_is_named(tools: Any, models: Path) -> None:
    from tempering.methods import KD, EmbeddingKD, Mutual
    from tempering.tasks import Classification, Embeddings
    from tempering.training.config import SelfCheckError

    student = load(models / "student")
    with pytest.raises(ValueError, match="shares weights with the student"):
        tools.DistillLoss(student, "kd", teacher=student)
    with pytest.raises(TypeError, match="Mutual owns its step"):
        tools.DistillLoss(student, Mutual())
    with pytest.raises(TypeError, match="needs a task of encoders"):
        tools.DistillLoss(student, KD(), task=Classification())
    with pytest.raises(SelfCheckError, match=r"KD does not suit tasks.Embeddings"):
        tools.DistillLoss(student, KD(), task=Embeddings())
    with pytest.raises(ValueError, match=r"needs a teacher=, or its \(N, K\) scores as labels; got none"):
        tools.DistillLoss(student, KD())(columns(student, *[TEXTS[:2]] * 3))
    with pytest.raises(ValueError, match="two candidates or more; got 2 columns"):
        tools.DistillLoss(student, KD())(columns(student, *[TEXTS[:2]] * 2), torch.zeros(2, 1))
    with pytest.raises(ValueError, match="embeddings as labels; got"):
        tools.DistillLoss(student, EmbeddingKD(), task=Embeddings())(columns(student, TEXTS), torch.zeros(6))
    with pytest.raises(ValueError, match="needs a model of transformers in the encoder"):
        from tempering.models import Encoder

        tools.as_sentence_transformer(Encoder(torch.nn.Linear(2, 2)), None, models)
