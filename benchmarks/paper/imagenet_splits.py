"""The eight ImageNet splits by the WordNet hierarchy (paper, supplement, Figure 4 and Table 4).

    python benchmarks/paper/imagenet_splits.py --wordnet /usr/share/wordnet/data.noun --ids imagenet_synsets.txt

Writes dist_cts/data/prepare/imagenet_splits/{1..8}.txt. The database comes with the package wordnet-base (WordNet 3.0);
the file of ids has one WordNet id per line, 1,000 in all (in the timm package: data/_info/imagenet_synsets.txt).

The paper gives 14 nodes and their counts, and says nothing about classes with several hypernyms. Every node of its tree
has one parent, since its counts add up to 1,000. Of the plain rules (first or last hypernym, shortest or longest path,
orders of offsets, names and sizes, breadth and depth first) "the last hypernym" comes nearest, with 18 classes too many
or too few over the 14 nodes. So that is the rule, and the script looks for the fewest synsets which, with another of
their hypernyms as the parent, make all counts exact. It prints them, and how many sets are as small: the counts do not
tell these sets apart, so the authors' lists may differ from ours in the classes below those synsets.
"""

import argparse
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

SPLITS = (  # WordNet label, number of classes
    {"bird": 52, "invertebrate": 61},
    {"reptile": 36, "mammal": 95},
    {"domestic_animal": 121},
    {"device": 121},
    {"conveyance": 26, "container": 94},
    {"furnishing": 24, "equipment": 38, "implement": 33},
    {"commodity": 62, "covering": 38, "structure": 55},
)  # the eighth is the rest
COUNTS = {label: count for split in SPLITS for label, count in split.items()}
OUT = Path(__file__).parents[2] / "dist_cts" / "data" / "prepare" / "imagenet_splits"


class Synset(NamedTuple):
    word: str
    hypernyms: list[str]


def read_nouns(path: Path) -> dict[str, Synset]:
    """WordNet's nouns by offset, with their hypernyms in its order (format: man 5 wndb)."""
    nouns = {}
    for line in path.read_text().splitlines():
        if line.startswith("  "):  # the licence
            continue
        fields = line.split(" | ")[0].split()
        pointers = fields[4 + 2 * int(fields[3], 16) :]
        quadruples = [pointers[i : i + 4] for i in range(1, 1 + 4 * int(pointers[0]), 4)]
        nouns[fields[0]] = Synset(fields[4], [to for kind, to, _, _ in quadruples if kind in ("@", "@i")])
    return nouns


def chain(offset: str, nouns: dict[str, Synset], other: dict[str, str]) -> list[str]:
    """The synsets from a class to the root: the parent is the last hypernym, or the one in `other`."""
    path = [offset]
    while nouns[path[-1]].hypernyms:
        path.append(other.get(path[-1]) or nouns[path[-1]].hypernyms[-1])
    return path


def group(ids: list[str], nouns: dict[str, Synset], tops: dict[str, str], other: dict[str, str]) -> dict[str, str]:
    """The label of the paper's node above every class, "" where there is none."""
    labels = {}
    for offset in ids:
        found = [tops[step] for step in chain(offset, nouns, other) if step in tops]
        assert len(found) <= 1, (offset, found)
        labels[offset] = found[0] if found else ""
    return labels


def difference(labels: dict[str, str]) -> tuple[int, ...]:
    counts = Counter(labels.values())
    return tuple(counts[label] - count for label, count in COUNTS.items())


def tops_of(ids: list[str], nouns: dict[str, Synset]) -> dict[str, str]:
    """The synsets of the paper's 14 labels: of those with that first word, the one above most classes."""
    above = Counter(step for offset in ids for step in _ancestors(offset, nouns))
    best = {}
    for offset, synset in nouns.items():
        if synset.word in COUNTS and above[offset] > above[best.get(synset.word, "")]:
            best[synset.word] = offset
    return {offset: word for word, offset in best.items()}


def _ancestors(offset: str, nouns: dict[str, Synset]) -> set[str]:
    return {offset}.union(*(_ancestors(hypernym, nouns) for hypernym in nouns[offset].hypernyms))


def fewest_exceptions(ids: list[str], nouns: dict[str, Synset], tops: dict[str, str]) -> list[dict[str, str]]:
    """The smallest sets of other parents that make all counts exact, sorted by their offsets.

    An integer program: what each change alone does to the counts is added up, so the caller checks the result.
    """
    start = np.array(difference(group(ids, nouns, tops, {})))
    changes, effects = [], []
    for offset in sorted({step for name in ids for step in _ancestors(name, nouns)}):
        for hypernym in nouns[offset].hypernyms[:-1]:
            effect = np.array(difference(group(ids, nouns, tops, {offset: hypernym}))) - start
            if effect.any():
                changes.append((offset, hypernym))
                effects.append(effect)
    rows = [LinearConstraint(np.array(effects).T, -start, -start)]
    for offset in {offset for offset, _ in changes}:
        rows.append(LinearConstraint([[float(offset == name) for name, _ in changes]], 0, 1))
    smallest = []
    while len(smallest) < 10_000:
        found = milp(np.ones(len(changes)), constraints=rows, integrality=1, bounds=Bounds(0, 1))
        chosen = np.round(found.x).astype(bool) if found.success else np.zeros(len(changes), bool)
        if not chosen.any() or (smallest and chosen.sum() > len(smallest[0])):
            break
        smallest.append(dict(change for change, taken in zip(changes, chosen, strict=True) if taken))
        rows.append(LinearConstraint(chosen[None].astype(float), 0, chosen.sum() - 1))  # the next one is another
    return sorted(smallest, key=lambda other: sorted(other.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the lists of ImageNet's classes in eight splits.")
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet/data.noun"))
    parser.add_argument("--ids", type=Path, required=True, help="file with the 1,000 WordNet ids, one per line")
    args = parser.parse_args()
    nouns = read_nouns(args.wordnet)
    ids = sorted(line.strip().removeprefix("n") for line in args.ids.read_text().splitlines() if line.strip())
    tops = tops_of(ids, nouns)
    plain = difference(group(ids, nouns, tops, {}))
    print("last hypernym:", ", ".join(f"{n:+} {label}" for label, n in zip(COUNTS, plain, strict=True) if n))
    sets = fewest_exceptions(ids, nouns, tops)
    other = sets[0]
    labels = group(ids, nouns, tops, other)
    assert not any(difference(labels)), "the exceptions are not independent"
    print(f"{len(other)} exceptions make all counts exact, the first of {len(sets)} sets of that size:")
    for offset, hypernym in other.items():
        print(f"  {nouns[offset].word} under {nouns[hypernym].word}, not {nouns[nouns[offset].hypernyms[-1]].word}")
    OUT.mkdir(exist_ok=True)
    named = {label for split in SPLITS for label in split}
    for number in range(1, 9):
        split = SPLITS[number - 1] if number < 8 else None
        chosen = [i for i in ids if (labels[i] in split if split else labels[i] not in named)]
        title = ", ".join(f"{label} {count}" for label, count in split.items()) if split else "all others"
        lines = [f"# {title}", *(f"n{i} {nouns[i].word}" for i in chosen)]
        (OUT / f"{number}.txt").write_text("\n".join(lines) + "\n")
        print(f"split {number}: {len(chosen)} classes ({title})")


if __name__ == "__main__":
    main()
