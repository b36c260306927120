"""phi as a file: what a run exports, and what a run or a meta-test can start from."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from pickle import UnpicklingError

import safetensors
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from dist_cts.checkpoint.files import State, check_finite, replace_file, to_host

SNAPSHOTS = "snapshots"  # folder of a run that holds phi_STEP.safetensors
_WEIGHTS = r"\w+_Weights\.\w+"  # how torchvision names its pretrained weights


def export_phi(path: Path, named: State, metadata: Mapping[str, str]) -> None:
    """Writes phi's named tensors as safetensors; at every moment the file is the old one or the new one.

    Raises:
        ValueError: a tensor is not finite.
    """
    check_finite(path.name, named)
    replace_file(path, safetensors.torch.save(to_host(named, {}), dict(metadata)))


def load_phi(source: str | Path) -> dict[str, Tensor]:
    """The named tensors of a start, on the CPU. Executes nothing that it reads.

    `source`: a .safetensors file, a PyTorch state dict (.pt, .pth), or the name of torchvision's pretrained weights
    such as ResNet18_Weights.IMAGENET1K_V1, which are downloaded once. A head among them is dropped by whoever asks for
    the body's tensors.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is torn, or holds something else than named tensors; there are no such weights.
        OSError: the weights cannot be downloaded.
    """
    path = _downloaded(str(source)) if re.fullmatch(_WEIGHTS, str(source)) else Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    if path.suffix not in (".safetensors", ".pt", ".pth"):
        raise ValueError(f"{path}: expected a .safetensors file, or a state dict (.pt, .pth)")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load(path.read_bytes())
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError, ValueError, LookupError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path}: torn, or not a file of named tensors ({reason})") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path}: expected a state dict, which holds named tensors and nothing else")
    return dict(state)


def phi_metadata(source: str | Path) -> dict[str, str]:
    """What a run wrote about its phi: algorithm, step, tasks, cumulative_inner_steps, ...; nothing of other files."""
    if Path(source).suffix != ".safetensors":
        return {}
    with safetensors.safe_open(source, "pt") as file:
        return file.metadata() or {}


def named_starts(arguments: Iterable[str]) -> dict[str, str]:
    """The source for `load_phi` of every start, by name, from arguments [NAME=]SOURCE.

    Without a name it is the run folder's, or that of torchvision's weights. A folder of snapshots gives a start
    NAME@STEP for each.

    Raises:
        ValueError: two starts of one name, or a folder without snapshots.
    """
    starts: dict[str, str] = {}
    for argument in arguments:
        name, _, source = argument.rpartition("=")
        path = Path(source)
        snapshots = sorted(path.glob("phi_*.safetensors"), key=_step) if path.is_dir() else []
        if path.is_dir() and not snapshots:
            raise ValueError(f"{path}: expected a file, or a folder of phi_STEP.safetensors (see snapshot_every)")
        name = name or (source if re.fullmatch(_WEIGHTS, source) else run_folder(path).name)
        found = {f"{name}@{_step(file)}": str(file) for file in snapshots} or {name: source}
        if twice := starts.keys() & found.keys():
            raise ValueError(f"--phi: two starts are called {min(twice)}; give each its own NAME=")
        starts |= found
    return starts


def run_folder(path: Path) -> Path:
    """The run's folder of a phi, of a snapshot or of the folder of all snapshots."""
    folder = path if path.is_dir() else path.parent
    return (folder.parent if folder.name == SNAPSHOTS else folder).resolve()


def _step(snapshot: Path) -> int:
    number = snapshot.stem.removeprefix("phi_")
    if not number.isdecimal():
        raise ValueError(f"{snapshot}: expected the name phi_STEP.safetensors")
    return int(number)


def _downloaded(name: str) -> Path:
    import torchvision  # as slow to import as torch itself

    try:
        url = torchvision.models.get_weight(name).url
    except (ValueError, KeyError):
        known = "for example ResNet18_Weights.IMAGENET1K_V1"
        raise ValueError(f"torchvision has no weights {name}; see torchvision.models.list_models, {known}") from None
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        sha256 = path.stem.rpartition("-")[2]  # its first digits are in the name
        try:
            torch.hub.download_url_to_file(url, str(path), sha256, progress=False)
        except (OSError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:160]
            raise OSError(f"{name} cannot be downloaded ({reason}); put {url} into {path.parent}") from None
    return path
