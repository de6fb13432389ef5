# %% [markdown]
# # A cached teacher
#
# A teacher's logits on fixed images do not change, so it needs to run once. `record` writes them by sample id, and
# `Cached` looks them up; it refuses other data, other augmentation and another teacher.

# %% tags=["parameters"]
EPOCHS = 4

# %%
import time
from functools import partial

import matplotlib.pyplot as plt
import torch

import tempering as kd

data = kd.data.digits(batch_size=64)
torch.manual_seed(0)
model = kd.models.build("digits_large", classes=10, channels=1)
kd.distill(model, None, data.train, method="supervised", epochs=2, quiet=True)
live = kd.teachers.Live(model)
cached = kd.teachers.record(live, data.train, "teacher-logits", quiet=True)

# %%
images, labels, ids = next(iter(data.train))
difference = (cached(images, ids=ids) - live(images)).abs().max()
print(f"largest difference to the live teacher, from rounding to fp16: {float(difference):.4f}")

# %% [markdown]
# ## The same run with both
#
# The cache stores fp16, so the runs are close but not bit-equal; `precision="fp32"` stores more.

# %%
runs, seconds = {}, {}
for name, teacher in {"live": live, "cached": cached}.items():
    torch.manual_seed(0)
    start = time.perf_counter()
    runs[name] = kd.distill(
        kd.models.build("digits_small", classes=10, channels=1),
        teacher,
        data.train,
        method="dtkd",
        optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9),
        epochs=EPOCHS,
        test=data.test,
        quiet=True,
    )
    seconds[name] = time.perf_counter() - start

# %%
figure, (left, right) = plt.subplots(1, 2)
for name, run in runs.items():
    left.plot([e["epoch"] for e in run.epochs], [e["test"]["loss"] for e in run.epochs], marker="o", label=name)
left.set(xlabel="epoch", ylabel="test loss", title="The same students")
left.legend()
right.bar(list(seconds), list(seconds.values()))
right.set(ylabel="seconds", title="Time of the run")
figure.tight_layout()

# %% [markdown]
# ## What is refused

# %%
other = kd.models.build("digits_large", classes=10, channels=1)
try:
    kd.teachers.Cached("teacher-logits", teacher=kd.teachers.Live(other))
except ValueError as error:
    print(str(error)[:300])
