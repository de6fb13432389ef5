# %% [markdown]
# # Features by module name
#
# Any module's output can be compared, by the names in `model.named_modules()`. The models are not changed.

# %% tags=["parameters"]
EPOCHS = 6

# %%
from functools import partial

import matplotlib.pyplot as plt
import torch

import tempering as kd

data = kd.data.digits(batch_size=64)
torch.manual_seed(0)
teacher = kd.models.build("digits_large", classes=10, channels=1)
student = kd.models.build("digits_small", classes=10, channels=1)
print([name for name, _ in student.named_modules() if name and "." not in name])
print([name for name, _ in teacher.named_modules() if name and "." not in name])

# %%
images = next(iter(data.test))[0]
for model in (student, teacher):
    with kd.FeatureExtractor(model, ["stage1", "pool"]) as features:
        model(images)
        print({name: tuple(features[name].shape) for name in ("stage1", "pool")})

# %% [markdown]
# The channels differ. FitNet learns a projection, which belongs to the method and is not part of the student.

# %%
kd.distill(teacher, None, data.train, method="supervised", epochs=EPOCHS // 3 + 1, quiet=True)
task = kd.tasks.Classification(features={"maps": ("stage1", "stage1"), "pooled": ("pool", "pool")})
methods = {
    "KD": kd.methods.KD(),
    "KD + FitNet": kd.methods.Sum(kd.methods.KD(), kd.methods.FitNet(hard=0.0, names=["maps"])),
    "KD + PKT": kd.methods.Sum(kd.methods.KD(), kd.methods.PKT(hard=0.0, names=["pooled"])),
}
runs = {}
for name, method in methods.items():
    torch.manual_seed(0)
    runs[name] = kd.distill(
        kd.models.build("digits_small", classes=10, channels=1),
        teacher,
        data.train,
        method=method,
        task=task,
        optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9),
        epochs=EPOCHS,
        test=data.test,
        quiet=True,
    )

# %%
figure, axes = plt.subplots()
for name, run in runs.items():
    axes.plot(
        [epoch["epoch"] for epoch in run.epochs],
        [epoch["test"]["accuracy"] for epoch in run.epochs],
        marker="o",
        label=name,
    )
axes.set(xlabel="epoch", ylabel="test accuracy", title="Feature terms next to KD, one seed")
axes.legend()

# %% [markdown]
# A name that does not exist is refused with the closest ones:

# %%
try:
    kd.FeatureExtractor(student, ["stag1"])
except ValueError as error:
    print(error)
