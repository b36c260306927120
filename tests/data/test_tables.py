import io
import json
import sys

import numpy as np
import pytest
from PIL import Image

from dist_cts.data.prepare import tables
from dist_cts.data.prepare.archives import NotThere
from tests.data.test_readers import check, save

pyarrow = pytest.importorskip("pyarrow")
pytest.importorskip("pyarrow.parquet")


def encoded(seed):
    """The bytes of a random PNG, and its pixels."""
    pixels, buffer = np.random.default_rng(seed).integers(0, 256, (5, 4, 3), np.uint8), io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue(), pixels


def test_csv_of_paths_and_labels(tmp_path):
    pixels = [save(tmp_path / f"images/{i}.png", i) for i in range(3)]
    (tmp_path / "mine.csv").write_text(
        f"path,label,other\nimages/0.png,10,x\nimages/1.png,9,y\n{tmp_path / 'images/2.png'},10,z\n"
    )
    for root in (tmp_path, tmp_path / "mine.csv"):
        everything, rest = tables.read(root)
        assert rest is None
        assert everything.class_names == ("9", "10")  # by value
        check(everything, [(1, pixels[0]), (0, pixels[1]), (1, pixels[2])])


def test_csv_with_its_own_split_shares_class_names(tmp_path):
    pixels = [save(tmp_path / f"{i}.png", i) for i in range(2)]
    (tmp_path / "train.csv").write_text("label,path\npear,0.png\n")
    (tmp_path / "test.csv").write_text("path,label\n1.png,apple\n")
    train, test = tables.read(tmp_path)
    assert train.class_names == test.class_names == ("apple", "pear")
    check(train, [(1, pixels[0])])
    check(test, [(0, pixels[1])])


def huggingface(names):
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    return {"huggingface": json.dumps({"info": {"features": features}})}


def hf_table(seeds, labels, names=("pear", "apple")):
    rows = [encoded(seed) for seed in seeds]
    images = [{"bytes": data, "path": None} for data, _ in rows]
    table = pyarrow.table({"image": images, "label": labels}).replace_schema_metadata(huggingface(names))
    return table, [(label, pixels) for label, (_, pixels) in zip(labels, rows, strict=True)]


def test_hugging_face_parquet_with_several_files_and_row_groups(tmp_path):
    (tmp_path / "data").mkdir()
    expected = []
    for name, seeds in (("train-00000-of-00002", range(5)), ("train-00001-of-00002", range(5, 8)), ("test-0", [9])):
        table, images = hf_table(seeds, [seed % 2 for seed in seeds])
        pyarrow.parquet.write_table(table, tmp_path / f"data/{name}.parquet", row_group_size=2)
        expected.append(images)
    train, test = tables.read(tmp_path)
    assert train.class_names == test.class_names == ("pear", "apple")  # as ClassLabel declares them
    check(train, expected[0] + expected[1])
    check(test, expected[2])


def test_hugging_face_folders_on_disk(tmp_path):
    expected = []
    for split, seeds in (("train", range(3)), ("test", range(3, 5))):
        (tmp_path / split).mkdir()
        table, images = hf_table(seeds, [0] * len(seeds))
        path = tmp_path / split / "data-00000-of-00001.arrow"
        with pyarrow.ipc.new_stream(str(path), table.schema) as stream:
            stream.write_table(table)
        expected.append(images)
    for part, images in zip(tables.read(tmp_path), expected, strict=True):
        check(part, images)


def test_parquet_of_paths_and_of_bytes(tmp_path):
    pixels = save(tmp_path / "0.png", 0)
    pyarrow.parquet.write_table(pyarrow.table({"path": ["0.png"], "label": ["b"]}), tmp_path / "p.parquet")
    check(tables.read(tmp_path / "p.parquet")[0], [(0, pixels)])
    data, pixels = encoded(1)
    pyarrow.parquet.write_table(pyarrow.table({"img": [data], "labels": [7]}), tmp_path / "b.parquet")
    check(tables.read(tmp_path / "b.parquet")[0], [(0, pixels)])


def test_faults_name_the_file_and_the_row(tmp_path, monkeypatch):
    with pytest.raises(NotThere, match=r"no \.csv"):
        tables.read(tmp_path)
    path = tmp_path / "t.csv"
    path.write_text("file,label\na.png,1\n")
    with pytest.raises(ValueError, match=r"t\.csv: columns file, label"):
        tables.read(path)
    path.write_text("path,label\na.png,1\nb.png,\n")
    with pytest.raises(ValueError, match=r"t\.csv: line 3: path or label is empty"):
        tables.read(path)
    path.write_text("path,label\na,b.png,pear\n")  # not the image a of class b.png
    with pytest.raises(ValueError, match=r"t\.csv: line 2 has more cells"):
        tables.read(path)
    path.write_text("path,label\na.png,1\n")
    with pytest.raises(ValueError, match=r"a\.png: cannot be decoded"):
        tables.read(path)[0].load(0)
    path = tmp_path / "t.parquet"
    path.write_bytes(b"PAR1 and then a web page PAR1")
    with pytest.raises(ValueError, match=r"t\.parquet: cannot be read"):
        tables.read(path)
    table, _ = hf_table(range(2), [0, 2])
    pyarrow.parquet.write_table(table, path)
    with pytest.raises(ValueError, match="declare different classes, or labels outside 2 classes"):
        tables.read(path)
    table = pyarrow.table({"image": [b"text"], "label": [0]})
    pyarrow.parquet.write_table(table, path)
    with pytest.raises(ValueError, match=r"t\.parquet: row 0: cannot be decoded"):
        tables.read(path)[0].load(0)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"pip install 'dist_cts\[parquet\]'"):
        tables.read(path)
