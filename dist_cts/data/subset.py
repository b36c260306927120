"""Class-balanced subsets of a split."""

import numpy as np

from dist_cts.seeds import hashed_seed


def balanced_subset(labels: np.ndarray, size: int, *seed: int | str) -> np.ndarray:
    """`size` sorted indices into labels [N], class-balanced, drawn from the seed; a plain subset if there is one class.

    Raises:
        ValueError: fewer than `size` images.
    """
    if size > len(labels):
        raise ValueError(f"train_limit={size}: the target has only {len(labels)} training images")
    order = np.random.default_rng(hashed_seed(*seed, "subset")).permutation(len(labels))
    ranks = np.empty(len(labels), dtype=np.int64)  # position of an image within its class, in the drawn order
    for label in np.unique(labels):
        members = order[labels[order] == label]
        ranks[members] = np.arange(len(members))
    # Takes the first image of every class, then the second, ...; the drawn order breaks ties.
    return np.sort(order[np.argsort(ranks[order], kind="stable")[:size]])
