# %% [markdown]
# # A small language model in the Hugging Face Trainer
#
# GPT-2s with random weights learn letters in steps of one or three, such as "cdefghij" and "cfilorux". The teacher is
# trained by the plain Trainer; the students by the same Trainer with `DistillMixin` in front. Nothing is downloaded.

# %% tags=["parameters"]
EPOCHS = 40

# %%
import matplotlib.pyplot as plt
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PrinterCallback, Trainer, TrainingArguments

import tempering as kd
from tempering.integrations.huggingface import DistillMixin


class KDTrainer(DistillMixin, Trainer):
    pass


def gpt(width, layers):
    sizes = {"vocab_size": 128, "n_positions": 16, "n_embd": width, "n_layer": layers, "n_head": 2}
    dropout = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0, **sizes, **dropout))


texts = ["".join(chr(97 + (i + step * k) % 26) for k in range(8)) for i in range(26) for step in (1, 3)]
data = [{"input_ids": list(text.encode()), "labels": list(text.encode())} for text in texts]
print(texts[4], texts[5])

# %% [markdown]
# Every letter but the first is a row. The second letter is a coin toss, which a teacher's probabilities say and a label
# does not.


# %%
def arguments(epochs):
    return TrainingArguments(
        "runs",
        num_train_epochs=epochs,
        per_device_train_batch_size=26,
        learning_rate=1e-2,
        logging_steps=4,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )


def curve(trainer):
    return [(log["step"], log["loss"]) for log in trainer.state.log_history if "loss" in log]


torch.manual_seed(0)
teacher = gpt(64, 2)
trainer = Trainer(teacher, arguments(EPOCHS), train_dataset=data)
trainer.remove_callback(PrinterCallback)
trainer.train()
curves = {"teacher": curve(trainer)}

# %% [markdown]
# ## Students
#
# The Trainer's log has the loss, its terms, and the agreement with the teacher.

# %%
task = kd.tasks.LanguageModeling()
methods = {"student alone": kd.methods.Supervised(), "KD, T = 2": kd.methods.KD(temperature=2.0, soft=0.9, hard=0.1)}
scores = {}
for name, method in methods.items():
    torch.manual_seed(0)
    student = gpt(16, 1)
    trainer = KDTrainer(
        student,
        arguments(EPOCHS),
        train_dataset=data,
        eval_dataset=data,
        teacher=teacher,
        method=method,
        task=task,
        selfcheck=False,  # a teacher after a few steps may still guess
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    curves[name], scores[name] = curve(trainer), trainer.evaluate()

# %%
figure, axes = plt.subplots()
for name, points in curves.items():
    axes.plot(*zip(*points, strict=True), marker=".", label=name)
axes.set(xlabel="step", ylabel="loss", title="Losses in training; those of different methods have different units")
axes.legend()

# %%
for name, score in scores.items():
    print(f"{name:14} cross entropy {score['eval_cross_entropy']:.3f}  agreement {score['eval_agreement']:.2f}")

# %% [markdown]
# TRL's `SFTTrainer` works in the same way. On-policy texts, packing and PEFT: [language models](../language.md).
