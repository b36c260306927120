"""Large-scale meta-learning with continual trajectory shifting: Algorithm 2 of the paper.

phi    shared initialization, one flat vector, bit-identical on all ranks      φ
theta  one task's parameters, one flat vector per learner                      θ^(t)
delta  the step's meta-update, -beta * mean over tasks of the meta-gradient    Δ_k
"""

from collections.abc import Callable

import torch

from dist_cts.algorithms.outer import PLAIN, OuterConfig, accelerate, beta_at
from dist_cts.algorithms.table import Algorithm
from dist_cts.distributed.reducer import MetaReducer
from dist_cts.state import TrainState

CONTROL_PERIOD = 10  # steps between exchanges of the control tail where no meta-update carries it


@torch.no_grad()
def meta_train(
    state: TrainState,
    algorithm: Algorithm,
    reducer: MetaReducer,
    *,
    beta: float,
    M: int,
    K: int,
    outer: OuterConfig = PLAIN,
    after_step: Callable[[], None] = lambda: None,
) -> None:
    """Meta-trains phi [N] in place over M episodes of K inner steps; `state.learners` are this rank's.

    Every rank runs this with the same phi, M, K and progress. `after_step` is called after every inner step (logging,
    checkpoints) and may set `progress.stopping`, on all ranks at the same step.
    """
    phi, learners, progress = state.phi, state.learners, state.progress
    period = algorithm.period or K
    if outer.momentum and state.velocity is None:
        state.velocity = torch.zeros_like(phi)
    for m in progress.episodes(M):
        if progress.at_episode_start:
            for learner in learners:
                learner.reset(phi)  # theta <- phi
                algorithm.begin(learner)
        for k in progress.inner_steps(K):
            for learner in learners:
                learner.inner_step(algorithm.observe)  # theta <- theta - alpha grad L(theta)
            if k % period == 0:
                gradients = [algorithm.meta_gradient(learner, phi) for learner in learners]
                reducer.start(gradients, progress.step, scale=-beta_at(m, M, beta, outer))
            elif k % CONTROL_PERIOD == 0:
                reducer.exchange(progress.step)
            for delta in reducer.finished(progress.step, flush=k == K):  # of step k - delay; at k = K of all steps
                delta = accelerate(delta, state.velocity, outer)
                phi += delta  # meta-update
                for learner in learners:
                    algorithm.shift(learner, phi, delta, progress)  # theta <- theta + delta
            after_step()
