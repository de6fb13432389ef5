# %% [markdown]
# # DTKD on digits
#
# A teacher of 94,000 parameters and a student of 438, on the digits of scikit-learn (8 x 8 pixels). Three students
# start from the same weights and see the same batches: without a teacher, with KD at DTKD's total weights, and with
# DTKD.

# %% tags=["parameters"]
EPOCHS = 12

# %%
from functools import partial

import matplotlib.pyplot as plt
import torch

import tempering as kd
from tempering.experiments.presets import method_of

data = kd.data.digits(batch_size=64)
torch.manual_seed(0)
teacher = kd.models.build("digits_large", classes=10, channels=1)
teacher_run = kd.distill(
    teacher, None, data.train, method="supervised", epochs=EPOCHS // 3 + 1, test=data.test, quiet=True
)
print(f"teacher: {teacher_run.last['test']['accuracy']:.3f}")

# %% [markdown]
# ## Three students
#
# `distill` checks models, data and method before it trains: the line below is the result of this self-check.

# %%
runs = {}
for name in ("supervised", "kd-matched", "dtkd"):
    torch.manual_seed(0)  # the same initial weights
    runs[name] = kd.distill(
        kd.models.build("digits_small", classes=10, channels=1),
        teacher,
        data.train,
        method=method_of(name),
        optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9),
        epochs=EPOCHS,
        test=data.test,
        quiet=True,
    )
print(runs["dtkd"].facts["selfcheck"]["line"])

# %%
figure, axes = plt.subplots()
for name, run in runs.items():
    axes.plot(
        [epoch["epoch"] for epoch in run.epochs],
        [epoch["test"]["accuracy"] for epoch in run.epochs],
        marker="o",
        label=name,
    )
axes.axhline(teacher_run.last["test"]["accuracy"], color="gray", linestyle="--", label="teacher")
axes.set(xlabel="epoch", ylabel="test accuracy", title="One seed: the order of the students may change with it")
axes.legend()

# %% [markdown]
# ## What one seed does not show
#
# The difference between two runs of one seed is mostly noise. `tempering compare` repeats runs with several seeds and
# gives the paired difference with its interval; [resume, compare, tune](../how-to/experiments.md) has the commands.

# %%
for name, run in runs.items():
    scores = run.last["test"]
    print(f"{name:12} accuracy {scores['accuracy']:.3f}  loss {scores['loss']:.3f}  ece {scores['ece']:.3f}")
