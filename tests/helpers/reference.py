"""Reference implementation of Algorithms 1 and 2: per parameter, in one process, without code of dist_cts."""

import copy
import math
from itertools import pairwise

import torch
from torch import nn


def optimizer_for(model, inner):
    options = {"lr": inner["lr"], "weight_decay": inner.get("weight_decay", 0.0), "foreach": False}
    if inner["optimizer"] in ("adam", "adamw"):
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[inner["optimizer"]]
        return kind(model.parameters(), betas=(inner.get("momentum", 0.9), 0.999), **options)
    nesterov = inner["optimizer"] == "nesterov"
    return torch.optim.SGD(model.parameters(), momentum=inner.get("momentum", 0.0), nesterov=nesterov, **options)


def body_of(model, head):
    """The parameters that phi covers; `head`: the name of the head, or a set of names that phi leaves out."""
    outside = {n for n, _ in model.named_parameters() if n.startswith(head + ".")} if isinstance(head, str) else head
    return {n: p for n, p in model.named_parameters() if n not in outside}


def loss_of(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def lr_at(inner, k, K):
    """alpha at the inner step with index k = 0 .. K - 1."""
    warmup = inner.get("warmup", 0)
    if k < warmup:
        return inner["lr"] * (k + 1) / (warmup + 1)
    angle = math.pi * (k - warmup) / (K - warmup)
    share = {"constant": 1, "linear": 1 - angle / math.pi, "cosine": math.cos(angle / 2) ** 2}
    return inner["lr"] * share[inner.get("schedule", "constant")]


def sgd_step(model, optimizer, batch, head, lr, clip=0, freeze=False, pull=lambda name, p: 0):
    """One inner step; returns the point before it: theta, its loss and its gradient."""
    optimizer.param_groups[0]["lr"] = lr
    optimizer.zero_grad()
    loss = loss_of(model, batch)
    loss.backward()
    body = body_of(model, head)
    point = (
        {n: p.detach().clone() for n, p in body.items()},
        loss.item(),
        {n: p.grad.clone() for n, p in body.items()},
    )
    for name, p in body.items():
        p.grad += pull(name, p.detach())
    if clip:
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    for name, p in body.items() if freeze else ():
        p.data.copy_(point[0][name])
    return point


def fomaml(model, batch, head):
    body = body_of(model, head)
    return dict(zip(body, torch.autograd.grad(loss_of(model, batch), body.values()), strict=True))


def leap(path, stabilizer=True):
    """Per segment the gradient of its length with the far end held fixed, at its start."""
    total = {n: torch.zeros_like(p) for n, p in path[0][0].items()}
    for (theta, loss, gradient), (theta_next, loss_next, _) in pairwise(path):
        rise = -abs(loss_next - loss) if stabilizer else loss_next - loss
        length = (sum(((theta_next[n] - theta[n]) ** 2).sum() for n in theta) + rise**2) ** 0.5
        for n in theta:
            total[n] += (theta[n] - theta_next[n] - rise * gradient[n]) / length
    return total


def imaml(model, batch, head, lam, iterations):
    """Textbook conjugate gradient on I + H / lam, in double precision, with H by finite differences."""
    model = copy.deepcopy(model).double()
    batch = (batch[0].double(), batch[1])
    centre = {n: p.detach().clone() for n, p in body_of(model, head).items()}

    def gradient(shift, epsilon):
        for n, p in body_of(model, head).items():
            p.data.copy_(centre[n] + epsilon * shift[n])
        return fomaml(model, batch, head)

    def dot(a, b):
        return sum((a[n] * b[n]).sum() for n in a)

    b = gradient(centre, 0)
    x, r, p = {n: torch.zeros_like(v) for n, v in b.items()}, dict(b), dict(b)
    for _ in range(iterations):
        up, down = gradient(p, 1e-5), gradient(p, -1e-5)
        image = {n: p[n] + (up[n] - down[n]) / 2e-5 / lam for n in p}
        step = dot(r, r) / dot(p, image)
        x = {n: x[n] + step * p[n] for n in x}
        r_next = {n: r[n] - step * image[n] for n in r}
        p = {n: r_next[n] + dot(r_next, r_next) / dot(r, r) * p[n] for n in p}
        r = r_next
    return {n: v.float() for n, v in x.items()}


def meta_train(phi, models, batches, inner, *, beta, M, K, algorithm="cts", head="fc", **options):
    """phi: {name: tensor}; models: one per task; batches(task, step) -> (x, y). Returns phi after M episodes.

    options: every, outer {momentum, nesterov, schedule}, delay (in steps), wire (dtype to which a task's meta-gradient
    is rounded), scale, gradient ("fomaml" within an episode), draw(m) -> the tasks of episode m, lam, iterations,
    direction(step) -> {name: tensor}.
    """
    phi = copy.deepcopy(phi)
    optimizers = [optimizer_for(model, inner) for model in models]
    body = [body_of(model, head) for model in models]
    clip, freeze = inner.get("clip", 0), inner.get("freeze_body", False)
    outer = {"momentum": 0, "nesterov": False, "schedule": "constant"} | options.get("outer", {})
    velocity = {n: torch.zeros_like(p) for n, p in phi.items()}
    once = algorithm in ("reptile", "fomaml", "fomaml++", "imaml", "leap")
    every = K if once else options.get("every", 1)
    step = 0
    for m in range(M):
        beta_m = (
            beta * {"constant": 1, "linear": 1 - m / M, "cosine": math.cos(math.pi * m / M / 2) ** 2}[outer["schedule"]]
        )
        drawn = options["draw"](m) if "draw" in options else range(len(models))
        for task in drawn:
            for name, p in body[task].items():
                p.data.copy_(phi[name])
        starts = [copy.deepcopy((m.state_dict(), o.state_dict())) for m, o in zip(models, optimizers, strict=True)]
        paths = [[] for _ in models]
        late = []  # (step, meta-update) not yet applied

        def pull(name, p, phi=phi):
            return options["lam"] * (p - phi[name]) if algorithm == "imaml" else 0

        for k in range(1, K + 1):
            for task in drawn:
                batch, lr = batches(task, step), lr_at(inner, k - 1, K)
                paths[task].append(sgd_step(models[task], optimizers[task], batch, head, lr, clip, freeze, pull))
            step += 1
            if k % every == 0:
                gradients = []
                for task in drawn:
                    model = models[task]
                    if algorithm == "fomaml" or options.get("gradient") == "fomaml":
                        gradients.append(fomaml(model, batches(task, step - 1), head))
                    elif algorithm == "fomaml++":
                        gradients.append({n: sum(point[2][n] for point in paths[task]) / K for n in phi})
                    elif algorithm == "imaml":
                        gradients.append(
                            imaml(model, batches(task, step - 1), head, options["lam"], options["iterations"])
                        )
                    elif algorithm == "leap":
                        gradients.append(leap(paths[task]))
                    else:
                        gradients.append({n: phi[n] - body[task][n].data for n in phi})
                if "wire" in options:
                    gradients = [{n: g.to(options["wire"]).float() for n, g in task.items()} for task in gradients]
                delta = {n: -beta_m * sum(gradient[n] for gradient in gradients) / len(drawn) for n in phi}
                late.append((step, delta))
            while late and (k == K or late[0][0] + options.get("delay", 0) <= step):
                delta = late.pop(0)[1]
                velocity = {n: outer["momentum"] * velocity[n] + delta[n] for n in phi}
                ahead = {n: delta[n] + outer["momentum"] * velocity[n] for n in phi}
                delta = ahead if outer["nesterov"] else velocity
                for name in phi:
                    phi[name] += delta[name]
                if algorithm == "random_shifting":
                    length = sum((d**2).sum() for d in delta.values()).sqrt()
                    direction = options["direction"](step)
                    scale = length / sum((d**2).sum() for d in direction.values()).sqrt()
                    delta = {n: scale * d for n, d in direction.items()}
                for task, theta in ((task, body[task]) for task in drawn):
                    if algorithm == "accurate" and k < K:
                        models[task].load_state_dict(starts[task][0])
                        optimizers[task].load_state_dict(copy.deepcopy(starts[task][1]))
                    for name, p in theta.items():
                        if algorithm in ("cts", "random_shifting"):
                            p.data += options.get("scale", 1) * delta[name]
                        elif algorithm == "mtl" or (algorithm == "accurate" and k < K):
                            p.data.copy_(phi[name])
                    if algorithm == "accurate" and k < K:
                        for i in range(k):
                            batch, lr = batches(task, step - k + i), lr_at(inner, i, K)
                            sgd_step(models[task], optimizers[task], batch, head, lr, clip, freeze)
    return phi
