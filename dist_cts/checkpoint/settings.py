"""Whether a checkpoint's configuration fits the run that resumes from it."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dist_cts.config import Config

# Keys that may differ in a resumed run: duration, location, logging, retention. A section name covers all its keys.
MAY_DIFFER = (
    *("episodes", "run_dir", "device", "deterministic", "placement", "timeout_seconds", "max_minutes", "nonfinite"),
    *("step", "loss_limit", "checkpoint", "log_every", "eval_every", "check_every", "snapshot_every", "data.root"),
    *("data.cache", "data.resident_limit_gib", "data.workers", "data.dataset_workers", "data.verify"),
    *("loggers", "project"),
)


def with_new_keys(saved: dict[str, Any], config: Config) -> dict[str, Any]:
    """The saved values, with defaults for keys added since the checkpoint."""
    try:
        return type(config).model_validate(saved).model_dump(mode="json")
    except ValueError:  # a key was removed: the comparison names it
        return saved


def config_difference(saved: Mapping[str, Any], now: Mapping[str, Any], may_differ: Sequence[str] = ()) -> list[str]:
    """The keys whose values differ, such as `inner.lr was 0.05, is 0.1`, except keys and sections in `may_differ`."""
    before, after = dict(_leaves(saved)), dict(_leaves(now))
    return [
        f"{key} was {_names(before.get(key, 'absent'))}, is {_names(after.get(key, 'absent'))}"
        for key in sorted(before.keys() | after.keys())
        if (key in before, before.get(key)) != (key in after, after.get(key))
        and not any(key == free or key.startswith(f"{free}.") for free in may_differ)
    ]


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _names(value: Any) -> Any:
    """A list of sections that only have a name, such as `tasks`, as these names."""
    if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
        return value
    given = [{key: part for key, part in item.items() if part is not None} for item in value]
    return [item["name"] if item.keys() == {"name"} else item for item in given]
