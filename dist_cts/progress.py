"""Progress of a run: one step counter, from which episode and inner step follow."""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass
class Progress:
    """`step` counts the inner steps per task over all episodes of K steps; a resume needs no other counter."""

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
        """Whether no episode is under way: the next inner step is the first of an episode."""
        return self.step % self.inner_steps_per_episode == 0

    def episodes(self, M: int) -> Iterator[int]:
        """The remaining episodes of M, the current one first."""
        while self.step < M * self.inner_steps_per_episode and not self.stopping:
            yield self.step // self.inner_steps_per_episode + 1

    def inner_steps(self, K: int) -> Iterator[int]:
        """The remaining inner steps k of this episode; ends early when the run is stopping."""
        for k in range(self.step % K + 1, K + 1):
            if self.stopping:
                return
            self.step += 1
            yield k
