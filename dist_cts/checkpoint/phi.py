"""phi as a file: exported by a run, loaded as initialization by a run or a meta-test."""

import hashlib
import io
import json
import re
from collections.abc import Iterable, Mapping
from os.path import expanduser
from pathlib import Path
from pickle import UnpicklingError

import safetensors
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from dist_cts.atomic import replace_file
from dist_cts.checkpoint.files import State, check_finite, to_host
from dist_cts.models import ModelConfig, pretrained
from dist_cts.models.from_torchvision import weights_file

SNAPSHOTS = "snapshots"  # folder of a run that holds phi_STEP.safetensors
WRITER = {"written_by": "dist_cts"}  # second mark of a sealed file: one flipped byte cannot remove both
SEAL = "dist_cts_sha256"  # key of the checksum over the file, computed with UNSEALED in its place
UNSEALED = "0" * 64  # placeholder
Source = str | Path | Mapping[str, Tensor]  # of an initialization
_SUFFIXES = (".safetensors", ".pt", ".pth")
_HUB = r"hf:[\w.-]+/[\w.-]+(@[\w./-]+)?"  # a repository of the Hugging Face Hub, and a revision
_WEIGHTS = r"\w+_Weights\.\w+"  # how torchvision names its pretrained weights


def export_phi(path: Path, named: State, metadata: Mapping[str, str]) -> None:
    """Writes phi's named tensors as safetensors, atomically and with a checksum over the file.

    Raises:
        ValueError: a tensor holds NaN or Inf.
        OSError: the file cannot be written.
    """
    check_finite(path.name, named)
    named = {name: tensor.contiguous() for name, tensor in to_host(named, {}).items()}
    data = safetensors.torch.save(named, {**metadata, **WRITER, SEAL: UNSEALED})
    replace_file(path, data.replace(UNSEALED.encode(), _checksum(data).encode(), 1))


def load_phi(source: Source, model: ModelConfig | None = None) -> dict[str, Tensor]:
    """The named tensors of an initialization, on the CPU. Reading executes nothing.

    Args:
        source: a .safetensors file, a PyTorch state dict (.pt, .pth), or the name of torchvision's pretrained weights
            such as ResNet18_Weights.IMAGENET1K_V1, which are downloaded once. Their head is included;
            load_named ignores it. hf:OWNER/NAME[@REVISION] is phi.safetensors of a repository of the Hugging Face Hub.
            Named tensors are returned as they are.
        model: whose pretrained weights `source` may also name: `pretrained` for the default ones, or a tag.

    Raises:
        FileNotFoundError: file not found.
        ValueError: the file is corrupt or does not hold named tensors; unknown weights.
        OSError: the weights cannot be downloaded.
        ImportError: huggingface_hub is not installed.
    """
    if isinstance(source, Mapping):
        return dict(source)
    path = Path(expanduser(source))
    if re.fullmatch(_HUB, str(source)):
        path = _from_hub(str(source))
    elif re.fullmatch(_WEIGHTS, str(source)):
        path = weights_file(str(source))
    elif model is not None and path.suffix not in _SUFFIXES and not path.exists():
        found = pretrained(model, str(source))
        if not isinstance(found, Path):
            return found
        path = found
    if not path.is_file():
        raise FileNotFoundError(f"{path}: {_in_folder(path) if path.is_dir() else 'file not found'}")
    if path.suffix not in _SUFFIXES:
        raise ValueError(f"{path}: expected a .safetensors file or a state dict (.pt, .pth)")
    try:
        data = path.read_bytes()
        if path.suffix == ".safetensors":
            tensors = safetensors.torch.load(data)
            _check_seal(data)
            return tensors
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError, ValueError, LookupError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path}: corrupt, or not a file of named tensors ({reason})") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path}: expected a state dict that holds only named tensors")
    return dict(state)


def phi_metadata(source: str | Path) -> dict[str, str]:
    """The metadata of an exported phi: algorithm, step, tasks, cumulative_inner_steps, ...; empty for other files."""
    path = _from_hub(str(source)) if re.fullmatch(_HUB, str(source)) else Path(source)
    if path.suffix != ".safetensors":
        return {}
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    return {key: value for key, value in metadata.items() if key not in (*WRITER, SEAL)}


def named_starts(arguments: Iterable[str]) -> dict[str, str]:
    """The source of each initialization by name, from arguments [NAME=]SOURCE.

    NAME defaults to the name of the run folder or of the torchvision weights. A folder of snapshots gives one
    initialization NAME@STEP per snapshot.

    Raises:
        ValueError: a duplicate name, or a folder without snapshots.
    """
    starts: dict[str, str] = {}
    for argument in arguments:
        name, _, source = argument.rpartition("=")
        source = expanduser(source)  # the shell does not expand it behind NAME=
        path = Path(source)
        snapshots = sorted(path.glob("phi_*.safetensors"), key=_step) if path.is_dir() else []
        if path.is_dir() and not snapshots:
            raise ValueError(f"{path}: {_in_folder(path)}, or a folder of phi_STEP.safetensors (see snapshot_every)")
        if not name and re.fullmatch(_HUB, source):
            name = path.name.partition("@")[0]
        name = name or (source if re.fullmatch(_WEIGHTS, source) else run_dir_of(path).name)
        found = {f"{name}@{_step(file)}": str(file) for file in snapshots} or {name: source}
        if twice := starts.keys() & found.keys():
            raise ValueError(f"--phi: duplicate name {min(twice)}; give each initialization its own NAME=")
        starts |= found
    return starts


def run_dir_of(path: Path) -> Path:
    """The run folder of a phi, of a snapshot, or of a folder of snapshots."""
    folder = path if path.is_dir() else path.parent
    return (folder.parent if folder.name == SNAPSHOTS else folder).resolve()


def _in_folder(folder: Path) -> str:
    found = next(
        (run / "phi.safetensors" for run in (folder, folder.parent) if (run / "phi.safetensors").is_file()), ""
    )
    return "a folder; expected a file" + (f", such as {found}" if found else "")


def _step(snapshot: Path) -> int:
    number = snapshot.stem.removeprefix("phi_")
    if not number.isdecimal():
        raise ValueError(f"{snapshot}: expected a name like phi_1000.safetensors")
    return int(number)


def _from_hub(source: str) -> Path:
    """phi.safetensors of a repository of the Hugging Face Hub; downloaded once."""
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise ImportError(f"{source}: huggingface_hub is not installed; pip install 'dist_cts[hub]'") from None
    repository, _, revision = source.removeprefix("hf:").partition("@")
    try:
        return Path(hf_hub_download(repository, "phi.safetensors", revision=revision or None))
    except Exception as error:  # its own types, httpx's and OSError
        reason = " ".join(str(error).split())[:160]
        raise OSError(f"{source}: phi.safetensors cannot be downloaded ({reason})") from None


def _check_seal(data: bytes) -> None:
    """Raises ValueError if a sealed file was changed; files without a seal come from elsewhere and are accepted."""
    length = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    if SEAL not in metadata and not WRITER.items() <= metadata.items():
        return
    checksum = metadata.get(SEAL, UNSEALED)
    if _checksum(data.replace(checksum.encode(), UNSEALED.encode(), 1)) != checksum:
        raise ValueError("its checksum does not match its content")


def _checksum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
