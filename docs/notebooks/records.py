# %% [markdown]
# # Records and a report
#
# A run with a folder writes plain files: `facts.json`, `steps.jsonl`, `epochs.jsonl`. Tables and reports are made
# from them alone, at any time, without torch.

# %% tags=["parameters"]
EPOCHS = 8

# %%
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import tempering as kd
from tempering.experiments.presets import PRESETS, method_of

data = kd.data.digits(batch_size=64)
torch.manual_seed(0)
teacher = kd.models.build("digits_large", classes=10, channels=1)
kd.distill(teacher, None, data.train, method="supervised", epochs=3, quiet=True)
for seed in (0, 1, 2):
    for name in ("kd-matched", "dtkd"):
        torch.manual_seed(seed)
        kd.distill(
            kd.models.build("digits_small", classes=10, channels=1),
            teacher,
            data.train,
            method=method_of(name),
            optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9),
            epochs=EPOCHS,
            seed=seed,
            test=data.test,
            out=f"runs/{name}-{seed}",
            log_every=5,
            facts={"label": PRESETS[name].label},
            quiet=True,
        )
print(sorted(path.name for path in Path("runs/dtkd-0").iterdir() if path.name[0] != "."))

# %% [markdown]
# ## A table
#
# Runs of one seed are paired: the difference is taken within seeds.

# %%
from tempering.reports.compare import compare
from tempering.reports.records import find_runs, load_run
from tempering.reports.table import markdown

records = [load_run(path) for path in find_runs(["runs"])]
print(markdown(compare(records)))

# %% [markdown]
# ## Temperatures over the run
#
# A step's record has the mean and the 5 and 95 % quantiles of both temperatures.

# %%
run = next(record for record in records if "DTKD" in str(record.facts["label"]))
print(sorted(run.steps[-1]))

# %%
figure, axes = plt.subplots()
for record in records:
    axes.plot(
        [step["step"] for step in record.steps],
        [step["loss"] for step in record.steps],
        label=str(record.facts["label"]),
        alpha=0.7,
    )
axes.set(xlabel="step", ylabel="loss", title="Losses of six runs, from steps.jsonl")
axes.legend()

# %% [markdown]
# ## A report
#
# One HTML file that opens offline; on the command line `tempering report runs --out report.html`.

# %%
from tempering.reports.page import write_page

write_page(records, "report.html")
print(Path("report.html").stat().st_size // 1024, "KiB")
