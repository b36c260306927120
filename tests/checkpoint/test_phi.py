"""phi as a file: atomic writes, checksums, no code execution, and the sources of an initialization."""

import errno
import hashlib
import os
import pickle
import urllib.request
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
import torchvision

from dist_cts import models
from dist_cts.checkpoint.phi import export_phi, load_phi, named_starts, phi_metadata, run_dir_of
from dist_cts.flat import FlatParams, load_named
from dist_cts.models import ModelConfig

WEIGHTS = "ResNet18_Weights.IMAGENET1K_V1"
RESNET18 = ModelConfig(name="resnet18")


def test_an_export_that_fails_leaves_the_old_phi(tmp_path, monkeypatch):
    path = tmp_path / "phi.safetensors"
    export_phi(path, {"w": torch.ones(3)}, {})
    with pytest.raises(ValueError, match="holds NaN or Inf"):
        export_phi(path, {"w": torch.tensor([1.0, float("inf")])}, {})

    def fails(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="No space"):
        export_phi(path, {"w": torch.zeros(3)}, {})
    assert torch.equal(load_phi(path)["w"], torch.ones(3))
    assert list(tmp_path.iterdir()) == [path]


def test_load_phi_says_in_one_line_what_is_wrong(tmp_path):
    whole = tmp_path / "whole.safetensors"
    export_phi(whole, {"w": torch.arange(1000.0)}, {})
    torch.save({"w": torch.arange(1000.0)}, tmp_path / "whole.pth")
    assert torch.equal(load_phi(tmp_path / "whole.pth")["w"], torch.arange(1000.0))

    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"epoch": 3, "w": torch.ones(1)}, tmp_path / "mixed.pt")
    (tmp_path / "text.safetensors").write_text("not tensors")
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "phi.npz").write_bytes(b"")
    for size in (0, 4, 8, 40, 500, whole.stat().st_size - 1):
        (tmp_path / f"torn-{size}.safetensors").write_bytes(whole.read_bytes()[:size])
        (tmp_path / f"torn-{size}.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:size])
    wrong = [path for path in tmp_path.iterdir() if not path.name.startswith("whole")]
    assert len(wrong) == 17
    for path in wrong:
        with pytest.raises(ValueError, match=r"expected|corrupt") as error:
            load_phi(path)
        assert "\n" not in str(error.value)
        assert str(error.value).startswith(f"{path}: ")
    for missing in (tmp_path / "missing.safetensors", tmp_path):
        with pytest.raises(FileNotFoundError, match=r"file not found|a folder; expected a file"):
            load_phi(missing)


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_loading_a_phi_executes_nothing(tmp_path):
    torch.save({"w": Touch(tmp_path / "zip")}, tmp_path / "evil.pth")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"w": Touch(tmp_path / "plain")}, protocol=2))
    for name in ("evil.pth", "plain.pt"):
        with pytest.raises(ValueError, match="corrupt, or not a file of named tensors"):
            load_phi(tmp_path / name)
    assert not (tmp_path / "zip").exists()
    assert not (tmp_path / "plain").exists()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Where torchvision's downloads are kept: an empty folder of this test."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def test_torchvision_s_weights_by_name_are_a_start_without_their_head(hub):
    theirs = torchvision.models.resnet18()  # 1000 classes, as downloaded
    torch.save(theirs.state_dict(), hub / "resnet18-f37072fd.pth")
    model, head = models.build(RESNET18, 7, "seed")
    flat = FlatParams(model, head)
    load_named(flat.body_layout, flat.body, load_phi(WEIGHTS), WEIGHTS)
    for (name, ours), (_, parameter) in zip(model.named_parameters(), theirs.named_parameters(), strict=True):
        assert name.startswith("fc.") or torch.equal(ours, parameter), name
    small = FlatParams(*models.build(ModelConfig(name="tiny"), 7, "seed"))
    with pytest.raises(
        ValueError, match=r"IMAGENET1K_V1 does not fit the model: tensor 'conv1.weight' is \[64, 3, 7, 7\]"
    ):
        load_named(small.body_layout, small.body, load_phi(WEIGHTS), WEIGHTS)


@pytest.mark.parametrize("right", [True, False])
def test_a_download_is_compared_with_the_hash_in_its_name(hub, monkeypatch, right):
    torch.save({"w": torch.ones(2)}, hub / "served")
    digest = hashlib.sha256((hub / "served").read_bytes()).hexdigest()[:8]
    url = f"file://{hub}/served#/weights-{digest if right else '00000000'}.pth"
    monkeypatch.setattr(torchvision.models, "get_weight", lambda name: SimpleNamespace(url=url))
    if right:
        assert torch.equal(load_phi(WEIGHTS)["w"], torch.ones(2))
    else:
        with pytest.raises(OSError, match=r"cannot be downloaded \(invalid hash value .*\); download file://"):
            load_phi(WEIGHTS)
    assert len(list(hub.iterdir())) == 1 + right


def test_without_a_network_one_line_says_where_to_put_the_file(hub, monkeypatch):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # no server listens there
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setattr(urllib.request, "_opener", None)  # which would remember earlier settings
    with pytest.raises(
        OSError, match=rf"cannot be downloaded .*refused.* download https://.*f37072fd.pth to {hub}"
    ) as caught:
        load_phi(WEIGHTS)
    assert "\n" not in str(caught.value)
    (hub / "resnet18-f37072fd.pth").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"resnet18-f37072fd\.pth: corrupt"):
        load_phi(WEIGHTS)


@pytest.mark.parametrize("name", ["ResNet18_Weights.IMAGENET", "ResNet19_Weights.DEFAULT"])
def test_weights_that_torchvision_does_not_have(name):
    with pytest.raises(ValueError, match=f"torchvision has no weights {name}; .* ResNet18_Weights.IMAGENET1K_V1"):
        load_phi(name)


def test_starts_get_their_names(tmp_path):
    run = tmp_path / "cts"
    (run / "snapshots").mkdir(parents=True)
    for step in (100, 20):
        export_phi(run / "snapshots" / f"phi_{step}.safetensors", {"w": torch.ones(1)}, {"step": str(step)})
    phi = run / "phi.safetensors"
    export_phi(phi, {"w": torch.ones(1)}, {})
    snapshots = run / "snapshots"
    assert named_starts([str(phi), f"a={phi}", WEIGHTS]) == {"cts": str(phi), "a": str(phi), WEIGHTS: WEIGHTS}
    assert list(named_starts([str(snapshots)]).items()) == [
        (f"cts@{step}", str(snapshots / f"phi_{step}.safetensors")) for step in (20, 100)
    ]
    assert list(named_starts([f"x={snapshots}"])) == ["x@20", "x@100"]
    assert {run_dir_of(path) for path in (phi, snapshots, snapshots / "phi_20.safetensors")} == {run}
    assert phi_metadata(snapshots / "phi_20.safetensors") == {"step": "20"}
    assert phi_metadata(phi) == phi_metadata(WEIGHTS) == {}
    with pytest.raises(ValueError, match="duplicate name cts; give each initialization its own NAME="):
        named_starts([str(phi), str(phi)])
    with pytest.raises(ValueError, match=rf"{tmp_path}: a folder; expected a file, or a folder of phi_STEP"):
        named_starts([str(tmp_path)])
    (snapshots / "phi_x.safetensors").touch()
    with pytest.raises(ValueError, match=r"phi_x.safetensors: expected a name like phi_1000.safetensors"):
        named_starts([str(snapshots)])


def test_a_flipped_bit_anywhere_in_an_exported_phi_is_refused(tmp_path):
    path = tmp_path / "phi.safetensors"
    export_phi(path, {"w": torch.arange(5.0), "b": torch.ones(2)}, {"step": "3"})
    data = path.read_bytes()
    for position in range(len(data)):
        for bit in range(8):
            path.write_bytes(data[:position] + bytes([data[position] ^ 1 << bit]) + data[position + 1 :])
            with pytest.raises(ValueError, match="corrupt"):
                load_phi(path)
    path.write_bytes(data)
    assert torch.equal(load_phi(path)["w"], torch.arange(5.0))


def test_a_file_from_elsewhere_has_no_seal_and_is_loaded(tmp_path):
    path = tmp_path / "theirs.safetensors"
    safetensors.torch.save_file({"w": torch.ones(2)}, path, {"format": "pt"})
    assert torch.equal(load_phi(path)["w"], torch.ones(2))
