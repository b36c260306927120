"""The oracle: Algorithms 1 and 2 of the paper, per parameter, in one process, with nothing of dist_cts in it."""

import copy

import torch
from torch import nn


def optimizer_for(model, inner):
    options = {"lr": inner["lr"], "weight_decay": inner.get("weight_decay", 0.0), "foreach": False}
    if inner["optimizer"] == "adam":
        return torch.optim.Adam(model.parameters(), betas=(inner.get("momentum", 0.9), 0.999), **options)
    nesterov = inner["optimizer"] == "nesterov"
    return torch.optim.SGD(model.parameters(), momentum=inner.get("momentum", 0.0), nesterov=nesterov, **options)


def meta_train(phi, models, batches, inner, *, beta, M, K, algorithm="cts", head="fc"):
    """phi: {name: tensor}; models: one a task; batches(task, step) -> (x, y). Returns phi after M episodes."""
    phi = copy.deepcopy(phi)
    optimizers = [optimizer_for(model, inner) for model in models]
    body = [{n: p for n, p in m.named_parameters() if not n.startswith(head + ".")} for m in models]
    step = 0
    for _ in range(M):
        for theta in body:
            for name, p in theta.items():
                p.data.copy_(phi[name])
        for k in range(1, K + 1):
            for task, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
                x, y = batches(task, step)
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
            step += 1
            if algorithm == "reptile" and k < K:
                continue
            for name in phi:
                delta = -beta * sum(phi[name] - theta[name].data for theta in body) / len(models)
                phi[name] += delta
                if algorithm == "cts":
                    for theta in body:
                        theta[name].data += delta
    return phi
