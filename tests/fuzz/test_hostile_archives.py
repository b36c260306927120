"""Fuzzed tables, arrays and archives, and headers that claim huge sizes; see hostile.py."""

import gzip
import io
import json
import os
import pickle
import tarfile
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dist_cts.data.prepare import archives, raw, readers, tables
from tests.helpers.hostile import attempt, bounded, content, damaged, idx_bytes, png

pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.mark.parametrize("name", ["../secret.png", "a/../../secret.png", "{outside}", "a/../../table/../secret.png"])
def test_names_in_lists_do_not_lead_out_of_their_folder(tmp_path, name):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    home, secret = tmp_path / "table", tmp_path / "secret.png"
    (home / "a").mkdir(parents=True)
    secret.write_bytes(png(0)[0])
    name = name.format(outside=secret)
    (home / "t.csv").write_text(f"path,label\n{name},1\n")
    rows = {"image": [{"bytes": None, "path": name}], "label": [1]}
    pyarrow.parquet.write_table(pyarrow.table(rows), home / "t.parquet")
    for table in ("t.csv", "t.parquet"):
        with pytest.raises(ValueError, match=rf"{table}: row 0: .*is outside"):
            tables.read(home / table)[0].load(0)
    signs = tmp_path / "signs"
    for file in ("GTSRB/Training/00000/a.ppm", "GTSRB/Final_Test/Images/a.ppm"):
        (signs / file).parent.mkdir(parents=True)
        (signs / file).write_bytes(png(1)[0])
    (signs / "GT-final_test.csv").write_text(f"Filename;ClassId\n{name};0\n")
    with pytest.raises(ValueError, match=r"GT-final_test\.csv.*is outside|is outside"):
        readers.gtsrb(signs)
    with pytest.raises(ValueError, match="is outside"):
        raw.inside(home, name)
    assert raw.inside(home, "a/../b.png") == home / "a/../b.png"


@bounded(max_examples=100)
@given(data=st.data(), suffix=st.sampled_from([".csv", ".parquet", ".arrow"]))
def test_any_table(tmp_path_factory, data, suffix):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    folder = tmp_path_factory.getbasetemp() / "table"
    folder.mkdir(exist_ok=True)
    table = pyarrow.table({"image": [png(i)[0] for i in range(3)], "label": ["pear", "apple", "pear"]})
    features = json.dumps({"info": {"features": {"label": {"names": None}}}})
    table, whole = table.replace_schema_metadata({"huggingface": features}), io.BytesIO()
    if suffix == ".csv":
        (folder / "0.png").write_bytes(png(0)[0])
        whole.write(b"path,label\n0.png,pear\n./0.png,7\n" + f'"{folder}/0.png",x\n'.encode())
    elif suffix == ".parquet":
        parquet.write_table(table, whole, row_group_size=2)
    else:
        with pyarrow.ipc.new_stream(whole, table.schema) as stream:
            stream.write_table(table)
    path = folder / f"t{suffix}"
    path.write_bytes(data.draw(damaged(whole.getvalue())))
    splits = attempt(lambda: tables.read(path), path)
    if splits is not None:
        for index in range(len(splits[0])):
            attempt(lambda index=index: splits[0].load(index), path)


@bounded(max_examples=100)
@given(data=st.data())
def test_any_npy(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "npy"
    folder.mkdir(exist_ok=True)
    buffer = io.BytesIO()
    np.save(buffer, np.arange(3 * 784, dtype=np.uint8).reshape(3, 784))
    whole = buffer.getvalue()
    (folder / "cat.npy").write_bytes(data.draw(damaged(whole[:128])) + whole[128:])
    splits = attempt(lambda: readers.quickdraw(folder, images=1), folder / "cat.npy")
    for name, pixels in content(splits):
        assert (name, pixels.shape, pixels.dtype) == ("cat", (28, 28), np.uint8)


class Touch:
    """Creates a file when unpickled."""

    def __reduce__(self):
        return os.system, ("touch executed",)


def packed_tar(name, size, kind=tarfile.REGTYPE):
    """A tar of one header, which claims `size` bytes."""
    member = tarfile.TarInfo(f"train/{name}")
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT) + bytes(1024)


def packed_zip(size):
    """A zip whose directory claims `size` bytes for its one file."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("train/a.png", b"small")
        archive.filelist[0].file_size = size
    return buffer.getvalue()


def packed_npy(header):
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(1568)


CLAIMS = {
    "huge idx": ("train-images-idx3-ubyte", b"\0\0\x08\x03" + b"\xff" * 12),
    "idx whose size wraps to 0": ("train-images-idx3-ubyte", b"\0\0\x08\x04" + b"\x80\0\0\0" * 2 + b"\0\0\0\4" * 2),
    "idx of 255 dimensions": ("train-images-idx3-ubyte", b"\0\0\x08\xff" + b"\0\0\0\2" * 255),
    "gzip bomb": ("train-images-idx3-ubyte.gz", gzip.compress(idx_bytes(np.zeros((1, 4, 4))) + bytes(200 << 20), 1)),
    "huge tar member": ("archive", packed_tar("a.png", 1 << 40)),
    "tar member of negative size": ("archive", packed_tar("a.png", -512)),
    "huge long name in a tar": ("archive", packed_tar("a.png", 1 << 33, tarfile.GNUTYPE_LONGNAME)),
    "huge zip member": ("archive", packed_zip(1 << 40)),
    "huge npy": ("cat.npy", packed_npy("{'descr': '|u1', 'fortran_order': False, 'shape': (10000000000000, 784)}")),
    "endless npy": ("cat.npy", packed_npy("{'descr': '|u1', 'fortran_order': False, 'shape': (9**9**9, 784)}")),
    "pickle in npy": (
        "cat.npy",
        packed_npy("{'descr': '|O', 'fortran_order': False, 'shape': (2,)}") + pickle.dumps(Touch()),
    ),
    "pickle as npy": ("cat.npy", pickle.dumps(Touch())),
    "zip as npy": ("cat.npy", packed_zip(5)),
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_what_claims_to_be_large_is_refused_without_memory(tmp_path, claim):
    name, data = CLAIMS[claim]
    (tmp_path / name).write_bytes(data)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx_bytes(np.zeros(1)))
    read = {
        "archive": lambda: archives.locate(tmp_path, {"train": "archive"}, "train").bytes("train/a.png"),
        "cat.npy": lambda: readers.quickdraw(tmp_path, images=1),
    }.get(name, lambda: readers.idx(tmp_path, class_names="abc"))
    tracemalloc.start()
    try:
        assert attempt(read, name, "train/a.png") is None
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()


def test_an_archive_that_unpacks_to_far_more_than_its_size_is_refused(tmp_path, monkeypatch):
    bomb = packed_tar("a.png", 300 << 20)[:512] + bytes(300 << 20)
    (tmp_path / "archive").write_bytes(gzip.compress(bomb, 1))
    written = []
    monkeypatch.setattr(archives.tempfile, "TemporaryFile", lambda: written.append(io.BytesIO()) or written[0])
    with pytest.raises(ValueError, match=r"archive: cannot be read: it unpacks to more than 100 times its size$"):
        archives.locate(tmp_path, {"train": "archive"}, "train")
    assert written[0].tell() < 200 << 20


def test_names_in_an_archive_lead_nowhere_and_its_links_are_not_followed(tmp_path):
    file, pixels = png(1)
    (tmp_path / "secret.png").write_bytes(png(2)[0])
    with tarfile.open(tmp_path / "archive", "w") as tar:
        for name in ("train/a.png", "../../train/b.png", "/train/c.png"):
            member = tarfile.TarInfo(name)
            member.size = len(file)
            tar.addfile(member, io.BytesIO(file))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            member = tarfile.TarInfo(f"train/{kind.decode()}.png")
            member.type, member.linkname = kind, "../secret.png"
            tar.addfile(member)
    (tmp_path / "data").mkdir()
    (tmp_path / "archive").rename(tmp_path / "data" / "archive")
    before = sorted(tmp_path.rglob("*"))
    files = archives.locate(tmp_path / "data", {"train": "archive"}, "train")
    assert files.below("train") == ["train/a.png", "train/b.png", "train/c.png"]
    assert all(np.array_equal(np.asarray(files.image(name)), pixels) for name in files.below("train"))
    assert sorted(tmp_path.rglob("*")) == before


def test_an_image_that_claims_to_be_huge_is_refused(tmp_path):
    """A PNG of 65,000 x 65,000 pixels in its header: PIL refuses it before it allocates."""
    buffer = io.BytesIO()
    Image.new("L", (4, 4)).save(buffer, "png")
    data = bytearray(buffer.getvalue())
    data[16:24] = (65_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.png: cannot be decoded: .*decompression bomb"):
        raw.open_image(tmp_path / "a.png")
