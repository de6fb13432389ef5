# %% [markdown]
# # What temperatures do
#
# A temperature T divides the logits before the softmax. This notebook shows its effect on one prediction, why the
# loss is multiplied by T^2, and how dynamic policies choose a temperature for every row.

# %%
import matplotlib.pyplot as plt
import torch

import tempering as kd

logits = torch.tensor([6.0, 4.0, 1.0, 0.0, -1.0, -2.0])
figure, axes = plt.subplots()
for i, T in enumerate((1.0, 2.0, 4.0, 8.0)):
    axes.bar(torch.arange(6) + 0.2 * i, (logits / T).softmax(0), width=0.2, label=f"T = {T:g}")
axes.set(xlabel="class", ylabel="probability", title="A higher temperature shows the order of the unlikely classes")
axes.legend()

# %% [markdown]
# ## Why T^2
#
# The gradient of KL(p_T || q_T) with respect to the student's logits is (q_T - p_T) / T, and q_T - p_T itself is
# about proportional to 1 / T. So without a factor the gradient falls with T^2. `KD` multiplies by it.

# %%
torch.manual_seed(0)
student, teacher = torch.randn(256, 10), 2 * torch.randn(256, 10)
Ts = [0.5, 1, 2, 4, 8, 16]


def gradient_norm(T, scaled):
    z = student.clone().requires_grad_()
    rows = kd.Rows(z, teacher)
    loss = kd.total(kd.methods.KD(temperature=T, soft=1.0, hard=0.0)(rows), rows) / (1 if scaled else T**2)
    return float(torch.autograd.grad(loss, z)[0].norm())


figure, axes = plt.subplots()
axes.loglog(Ts, [gradient_norm(T, True) for T in Ts], marker="o", label="T^2 KL")
axes.loglog(Ts, [gradient_norm(T, False) for T in Ts], marker="o", label="KL")
axes.set(xlabel="T", ylabel="norm of the gradient", title="T^2 keeps the gradient's size at high temperatures")
axes.legend()

# %% [markdown]
# ## Temperatures per row
#
# DTKD's policy gives teacher and student T = tau + delta and tau - delta, with delta such that both are equally
# sharp: the log-sum-exp of centered logits over T agrees. The sharper side gets the higher temperature.

# %%
sharper = torch.linspace(0.25, 4, 96)[:, None]  # the teacher's logits over the student's
rows = kd.Rows(student[:96], student[:96].roll(1, 0) * sharper)
figure, axes = plt.subplots()
for solve in ("exact", "max", "std"):
    T = kd.temperature.Sharpness(4.0, solve=solve)(rows)
    axes.plot(sharper, T.teacher, ".", markersize=3, label=f"teacher, {solve}")
axes.axhline(4.0, color="gray", linestyle="--", label="tau")
axes.set(
    xlabel="scale of the teacher's logits",
    ylabel="temperature",
    title="Sharpness(4): the sharper side gets the higher temperature",
)
axes.legend()

# %% [markdown]
# A constant that is added to the logits does not change a softmax, and here it does not change the temperatures. In
# the published closed form it does ([why](../dtkd.md)):

# %%
shifted = kd.Rows(rows.student, rows.teacher + 20.0)
for solve in ("exact", "published"):
    policy = kd.temperature.Sharpness(4.0, solve=solve)
    change = (policy(shifted).teacher - policy(rows).teacher).abs().max()
    print(f"{solve:10} largest change of a temperature: {float(change):.4f}")
