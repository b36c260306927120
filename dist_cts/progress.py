"""How far a run is: the one counter from which episode and inner step follow."""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass
class Progress:
    """How far a run is: `step` inner steps of every task, over all its episodes of K. It is all that a resume needs."""

    inner_steps_per_episode: int  # K
    step: int = 0
    stopping: bool = False

    @property
    def episode(self) -> int:
        """The current episode, from 1."""
        return max(self.step - 1, 0) // self.inner_steps_per_episode + 1

    @property
    def inner_step(self) -> int:
        """The current inner step k, 1 .. K."""
        return max(self.step - 1, 0) % self.inner_steps_per_episode + 1

    @property
    def at_episode_start(self) -> bool:
        """Whether the next inner step is an episode's first, and the newest one, if any, an episode's last."""
        return self.step % self.inner_steps_per_episode == 0

    def episodes(self, M: int) -> Iterator[int]:
        """The episodes that are left of M, the current one first."""
        while self.step < M * self.inner_steps_per_episode and not self.stopping:
            yield self.step // self.inner_steps_per_episode + 1

    def inner_steps(self, K: int) -> Iterator[int]:
        """The inner steps k that are left of this episode; ends early when the run is stopping."""
        for k in range(self.step % K + 1, K + 1):
            if self.stopping:
                return
            self.step += 1
            yield k
