"""The model card of a run: README.md beside phi.safetensors, as the Hugging Face Hub shows it."""

from pathlib import Path
from typing import Any

from dist_cts.atomic import replace_file
from dist_cts.losses import RESERVED
from dist_cts.run.curves import read_records
from dist_cts.yaml_file import read_yaml

TABLE = "meta_test/meta_test.md"  # in the run folder, once there was a meta-test


def write_card(run: Path) -> None:
    """Writes RUN/README.md from the run's configuration, metrics and, if there was one, meta-test.

    Raises:
        FileNotFoundError: `run` has no config.yaml or no metrics.jsonl.
        OSError: the card cannot be written.
    """
    config = read_yaml(run / "config.yaml")
    sections = [_summary(run.resolve().name, config), _figures(run)]
    if (run / TABLE).is_file():
        tables = (run / TABLE).read_text().partition("\nThe best of")[0].rstrip()
        sections.append(f"## Meta-test\n\nMean ± 95 % interval after adaptation to tasks not seen before.\n\n{tables}")
    sections.append(_loading(config["model"]))
    replace_file(run / "README.md", ("\n\n".join(sections) + "\n").encode())


def _summary(name: str, config: dict[str, Any]) -> str:
    tasks, model, inner = config["tasks"], config["model"], config["inner"]
    return f"""---
library_name: dist_cts
tags: [meta-learning, initialization, {config["algorithm"]}]
---

# {name}

A shared initialization for `{model["name"]}`, meta-learned by `{config["algorithm"]}` from {len(tasks)} task(s):
{", ".join(task["name"] for task in tasks)}.

| setting | value |
|---|---|
| episodes M, inner steps K | {config["episodes"]}, {config["inner_steps"]} |
| beta | {config["meta_lr"]:g} |
| inner optimizer | {inner["optimizer"]}, alpha {inner["lr"]:g}, momentum {inner["momentum"]:g} |
| batch size | {config["batch_size"]} |
| seed | {config["seed"]} |

`config.yaml` has every key, `environment.json` versions and commit."""


def _figures(run: Path) -> str:
    last: dict[str, dict[str, Any]] = {}
    for record in read_records(run):
        last[record["task"]] = last.get(record["task"], {}) | record
    keys = [key for key in dict.fromkeys(key for record in last.values() for key in record) if key not in RESERVED]
    step = max((record["step"] for record in last.values()), default=0)
    lines = ["| task | " + " | ".join(key.replace("_", " ") for key in keys) + " |", "|---" * (len(keys) + 1) + "|"]
    for task, record in last.items():
        cells = (f"{record[key]:.4g}" if record.get(key) is not None else "" for key in keys)
        lines.append(f"| {task} | " + " | ".join(cells) + " |")
    table = "\n".join(lines)
    return f"## Meta-training\n\nEach task's own parameters at step {step}, on its latest training batches.\n\n{table}"


def _loading(model: dict[str, Any]) -> str:
    prefix, _, name = model["name"].rpartition(":")
    if prefix == "timm":
        imports, build = "import timm\n", f'timm.create_model("{name}", num_classes=10)'
    elif prefix == "torchvision" or name in ("resnet18", "resnet34"):
        imports, build = "import torchvision\n", f'torchvision.models.get_model("{name}", num_classes=10)'
    else:
        imports = "from dist_cts.models import ModelConfig, build\n"
        build = f"build(ModelConfig(name={name!r}, width={model['width']:g}), 10)[0]"
    return f"""## Load

```python
{imports}from dist_cts import load_phi

model = {build}
model.load_state_dict(load_phi("phi.safetensors"), strict=False)  # the classifier head is not part of it
```

As the start of a run: `init=phi.safetensors`; in a meta-test: `--phi phi.safetensors`. On the Hub: `hf:OWNER/NAME`."""
