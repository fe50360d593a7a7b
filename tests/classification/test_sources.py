"""Sources of labeled images, each written as real files."""

import json
import os
import pickle
import sys
from dataclasses import replace

import numpy as np
import pytest

from tests.raising import carries, raises
from tests.training.images import DATA, gradient, save
from veneer.classification.data.image_folder import SPLITS
from veneer.classification.data.sources import Example, open_source
from veneer.training.data.image_io import DataError

CLOTHING = DATA / "clothing-160"


def classes(root, names=("cat", "dog"), each=2):
    for seed, name in enumerate(names):
        for number in range(each):
            save(root / name / f"{number}.png", 20, 16, seed=10 * seed + number)
    return root


def seen(source):
    return {(each.name, source.classes[each.label], each.split) for each in source.examples}


def test_class_folders(tmp_path):
    source = open_source(classes(tmp_path))
    assert source.classes == ("cat", "dog")
    assert seen(source) == {(f"{name}/{n}.png", name, None) for name in ("cat", "dog") for n in range(2)}
    assert not source.has_splits
    assert source.notes == ()
    assert np.array_equal(source.read(source.examples[3]), gradient(20, 16, seed=11))


@pytest.mark.parametrize("names", [("train", "val", "test"), ("Training", "dev", "TEST"), ("train", "valid", "test")])
def test_split_folders(tmp_path, names):
    for name in names:
        classes(tmp_path / name, each=1)
    source = open_source(tmp_path)
    words = ("train", "validation", "test")
    assert seen(source) == {(f"{n}/{c}/0.png", c, w) for n, w in zip(names, words, strict=True) for c in ("cat", "dog")}
    assert source.counts("test") == {"cat": 1, "dog": 1}


def test_class_named_train(tmp_path):
    source = open_source(classes(tmp_path, ("plane", "train", "test")))
    assert source.classes == ("plane", "test", "train")
    assert not source.has_splits


def test_ignored_files_are_noted(tmp_path):
    classes(tmp_path / "train")
    for name in (".hidden.png", "Thumbs.db", "desktop.ini", ".DS_Store"):
        (tmp_path / "train" / "cat" / name).write_bytes(b"x")
    save(tmp_path / "train" / ".cache" / "a.png")
    save(tmp_path / "train" / "__MACOSX" / "a.png")
    save(tmp_path / "train" / "loose.png")
    save(tmp_path / "extra" / "a.png")
    save(tmp_path / "train" / "dog" / "old" / "deep" / "a.png")
    (tmp_path / "train" / "dog" / "list.txt").write_text("x")
    (tmp_path / "train" / "fish").mkdir()
    source = open_source(tmp_path)
    names = {each.name for each in source.examples}
    assert names == {f"train/{c}/{n}.png" for c in ("cat", "dog") for n in range(2)} | {"train/dog/old/deep/a.png"}
    assert source.classes == ("cat", "dog")
    notes = "\n".join(source.notes)
    assert "extra/" in notes
    assert "1 images outside the class folders ignored: train/loose.png" in notes
    assert "1 files without an image suffix ignored: train/dog/list.txt" in notes
    assert "no images in train/fish; skipped" in notes
    assert len(source.notes) == 4


def test_circular_links_are_not_followed(tmp_path):
    classes(tmp_path)
    (tmp_path / "cat" / "again").symlink_to(tmp_path, target_is_directory=True)
    names = {each.name for each in open_source(tmp_path).examples}
    assert names >= {"cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png"}
    assert max(name.count("again") for name in names) == 1


def test_order_is_independent_of_the_file_system(tmp_path, monkeypatch):
    source = open_source(classes(tmp_path, each=5))
    listed = type(tmp_path).iterdir
    monkeypatch.setattr(type(tmp_path), "iterdir", lambda self: sorted(listed(self), reverse=True))
    again = open_source(tmp_path)
    assert again.examples == source.examples
    assert again.digest == source.digest


def test_digest_covers_names_labels_and_splits(tmp_path):
    source = open_source(classes(tmp_path))
    first = source.examples[0]
    changed = [replace(first, name="x"), replace(first, label=1), replace(first, split="test")]
    digests = {replace(source, examples=(each, *source.examples[1:])).digest for each in (first, *changed)}
    assert len(digests) == 4


@pytest.mark.parametrize(
    ("make", "where", "given"),
    [
        (lambda p: p / "nothing", None, "missing"),
        (lambda p: p, "classes", ()),
        (lambda p: save(p / "a.png").parent, "classes", ("a.png",)),
        (lambda p: save(p / "a.png"), "suffix", ".png"),
        (lambda p: classes(p / "test").parent, "splits", ("test",)),
        (lambda p: classes(classes(p / "val").parent / "dev").parent, "validation", ("dev", "val")),
    ],
)
def test_errors_of_invalid_sources(tmp_path, make, where, given):
    path = make(tmp_path)
    with raises(DataError, file=path, where=where, given=given):
        open_source(path)


def test_folder_without_read_permission(tmp_path):
    classes(tmp_path)
    (tmp_path / "dog").chmod(0)
    try:
        if os.access(tmp_path / "dog", os.R_OK):
            pytest.skip("the superuser may read everything")
        with raises(DataError, file=tmp_path / "dog", given="unreadable"):
            open_source(tmp_path)
    finally:
        (tmp_path / "dog").chmod(0o755)


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("heading", ["", "path,label,split\n", "Split,FileName,Class\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_csv(tmp_path, separator, heading, mark):
    classes(tmp_path)
    rows = [
        ("cat/0.png", "a cat", "train"),
        ("cat/1.png", "a cat", "test"),
        ("dog/0.png", "dog", "train"),
        ("dog/1.png", "dog", "val"),
    ]
    order = (2, 0, 1) if heading.startswith("Split") else (0, 1, 2)
    text = heading + "".join(",".join(row[at] for at in order) + "\r\n" for row in rows) + "\n"
    (tmp_path / "list.csv").write_text(mark + text.replace(",", separator), encoding="utf-8")
    source = open_source(tmp_path / "list.csv")
    assert source.classes == ("a cat", "dog")
    assert seen(source) == {(path, label, "validation" if split == "val" else split) for path, label, split in rows}
    assert source.read(source.examples[0]).size == (20, 16)


def test_csv_with_quoted_and_absolute_paths(tmp_path):
    save(tmp_path / "a, b.png")
    save(tmp_path / "far" / "c.png")
    (tmp_path / "near").mkdir()
    table = tmp_path / "list.csv"
    table.write_text(f'"a, b.png",one\n{tmp_path / "far" / "c.png"},two\n"a, b.png",one\n')
    source = open_source(table)
    assert {each.name for each in source.examples} == {"a, b.png", "far/c.png"}
    assert source.notes == (f"{table}: 1 duplicate lines ignored.",)


@pytest.mark.parametrize(
    ("text", "where", "given", "expected"),
    [
        ("cat/0.png,cat\ncat/9.png,cat\n", "line 2", "cat/9.png", "file"),
        ("path,label\ncat/0.png,cat\n\n\ncat/9.png,cat\n", "line 5", "cat/9.png", "file"),
        ("cat/0.png,cat\ncat/1.png,\n", "line 2", "", "label"),
        ("cat/0.png,cat\n,dog\n", "line 2", "", "path"),
        ("cat/0.png,cat,train\ncat/1.png,cat,later\n", "line 2", "later", tuple(SPLITS)),
        ("cat/0.png,cat,train\ncat/1.png,cat,\n", "line 2", "", "split"),
        ("cat/0.png,cat\ncat/0.png,dog\n", "line 2", "cat/0.png", "line 1"),
        ("cat/0.png,cat\n../x.png,cat\n", "line 2", "../x.png", "folder"),
    ],
)
def test_csv_errors_name_the_line(tmp_path, text, where, given, expected):
    classes(tmp_path)
    (tmp_path / "list.csv").write_text(text)
    with raises(DataError, file=tmp_path / "list.csv", where="lines") as caught:
        open_source(tmp_path / "list.csv")
    carries(*caught.value.given, where=where, given=given, expected=expected)
    assert where in str(caught.value)


def test_csv_in_the_current_folder_stays_inside_it(tmp_path, monkeypatch):
    save(tmp_path / "secret.png", 32, 32)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "list.csv").write_text("path,label\n../secret.png,cat\n")
    monkeypatch.chdir(tmp_path / "data")
    with raises(DataError, file="list.csv", where="lines") as caught:
        open_source("list.csv")
    carries(caught.value.given[0], where="line 2", given="../secret.png", expected="folder")


def test_csv_errors_list_the_first_lines(tmp_path):
    (tmp_path / "list.csv").write_text("".join(f"none/{n}.png,cat\n" for n in range(20)))
    with raises(DataError, file=tmp_path / "list.csv", where="lines") as caught:
        open_source(tmp_path / "list.csv")
    assert [each.where for each in caught.value.given] == [f"line {n}" for n in range(1, 21)]
    assert "line 8" in str(caught.value)
    assert "line 9" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "where", "given"),
    [
        ("color,size\nred,3\n", "heading", ("color", "size")),
        ("cat/0.png\n", "heading", ("cat/0.png",)),
        ("path,label\n", "classes", 0),
        ("", "classes", 0),
    ],
)
def test_csv_without_rows_or_header(tmp_path, text, where, given):
    classes(tmp_path)
    (tmp_path / "list.csv").write_text(text)
    with raises(DataError, file=tmp_path / "list.csv", where=where, given=given):
        open_source(tmp_path / "list.csv")


def test_csv_that_is_not_utf8(tmp_path):
    (tmp_path / "list.csv").write_bytes("a.png,Bär\n".encode("latin-1"))
    with raises(DataError, file=tmp_path / "list.csv", where="byte 7", expected="UTF-8"):
        open_source(tmp_path / "list.csv")


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_image_folder_with_metadata(tmp_path, kind):
    for split in ("train", "test"):
        for number in range(2):
            save(tmp_path / split / f"{number}.png", 20, 16, seed=number)
        rows = [{"file_name": f"{number}.png", "label": number} for number in range(2)]
        if kind == "csv":
            text = "file_name,label\n" + "".join(f"{row['file_name']},{row['label']}\n" for row in rows)
        else:
            text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / split / f"metadata.{kind}").write_text(text)
    source = open_source(tmp_path)
    assert seen(source) == {(f"{split}/{n}.png", str(n), split) for split in ("train", "test") for n in range(2)}


def test_metadata_without_labels_is_ignored(tmp_path):
    classes(tmp_path)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "cat/0.png", "text": "a cat"}\n')
    assert open_source(tmp_path).classes == ("cat", "dog")


@pytest.mark.parametrize(("line", "given", "expected"), [("{", None, "JSON"), ("[1]", [1], ("file_name", "label"))])
def test_metadata_errors_name_the_line(tmp_path, line, given, expected):
    save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "label": "x"}\n' + line)
    with raises(DataError, file=tmp_path / "metadata.jsonl", where="line 2", given=given, expected=expected):
        open_source(tmp_path)


def dataset(datasets, root):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["dog", "cat"])})
    data = [save(root / f"{n}.png", 20, 16, seed=n).read_bytes() for n in range(4)]
    rows = {"image": [{"bytes": each, "path": None} for each in data], "label": [0, 1, 0, 1]}
    table = pytest.importorskip("pyarrow").table(rows, schema=features.arrow_schema)
    return datasets.Dataset(datasets.table.InMemoryTable(table), fingerprint="given")  # its own pickles half of pyarrow


@pytest.mark.parametrize("form", ["parquet", "disk", "dict"])
def test_hugging_face_dataset_folder(tmp_path, form):
    datasets = pytest.importorskip("datasets", reason="writes the folders that are read")
    data, out = dataset(datasets, tmp_path / "pictures"), tmp_path / "out"
    both = datasets.DatasetDict({"train": data, "test": data})
    if form == "parquet":
        (out / "data").mkdir(parents=True)
        for split, part in both.items():
            part.to_parquet(out / "data" / f"{split}-00000-of-00001.parquet")
    else:
        (both if form == "dict" else data).save_to_disk(out)
    source = open_source(out)
    assert source.classes == ("cat", "dog")
    train = [each for each in source.examples if each.split in ("train", None)]
    assert [source.classes[each.label] for each in train] == ["dog", "cat", "dog", "cat"]
    assert source.has_splits == (form != "disk")
    for number, each in enumerate(train):
        assert np.array_equal(source.read(each), gradient(20, 16, seed=number))


def test_parquet_without_hugging_face_metadata(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="writes the file that is read")
    parquet = pytest.importorskip("pyarrow.parquet", reason="as well")

    data = [save(tmp_path / "p" / f"{n}.png", seed=n).read_bytes() for n in range(2)]
    table = pyarrow.table({"image": [{"bytes": each, "path": None} for each in data], "label": ["b", "a"]})
    (tmp_path / "q").mkdir()
    parquet.write_table(table, tmp_path / "q" / "some.parquet")
    source = open_source(tmp_path / "q")
    assert seen(source) == {("row/0000000", "b", None), ("row/0000001", "a", None)}
    assert np.array_equal(source.read(source.examples[1]), gradient(80, 64, seed=1))
    parquet.write_table(pyarrow.table({"picture_of": [1], "label": [1]}), tmp_path / "q" / "some.parquet")
    file = tmp_path / "q" / "some.parquet"
    with raises(DataError, file=file, where="columns", given=("picture_of", "label"), expected="image"):
        open_source(tmp_path / "q")
    (tmp_path / "q" / "some.parquet").write_bytes(b"PAR1")
    with raises(DataError, file=file, given="damaged"):
        open_source(tmp_path / "q")


def test_rows_without_label_are_skipped(tmp_path):
    """The datasets library stores -1 for the hidden labels of public test splits."""
    pyarrow = pytest.importorskip("pyarrow", reason="writes the file that is read")
    parquet = pytest.importorskip("pyarrow.parquet", reason="as well")
    features = {"photo": {"_type": "Image"}, "kind": {"_type": "ClassLabel", "names": ["x", "y"]}}
    head = {"huggingface": json.dumps({"info": {"features": features}})}

    def write(*labels):
        table = pyarrow.table({"photo": [{"bytes": b"0", "path": None}] * len(labels), "kind": list(labels)})
        parquet.write_table(table.replace_schema_metadata(head), tmp_path / "validation.parquet")
        parquet.write_table(table.replace_schema_metadata(head), tmp_path / "train_2.parquet")
        return open_source(tmp_path)

    source = write(1, -1, 0)
    assert seen(source) == {(f"{s}/{n:07d}", "yx"[n // 2], s) for s in ("train", "validation") for n in (0, 2)}
    assert source.notes == (f"{tmp_path}: 2 rows without a label skipped.",)
    with raises(DataError, where="label", given=2, expected=2):
        write(1, 2)


def test_missing_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "train.parquet").write_bytes(b"PAR1")
    with raises(DataError, file=tmp_path / "train.parquet", expected="pyarrow"):
        open_source(tmp_path)


@pytest.mark.parametrize("kind", ["folder", "csv", "digits"])
def test_a_source_can_be_sent_to_other_processes(tmp_path, kind):
    classes(tmp_path)
    (tmp_path / "list.csv").write_text("cat/0.png,cat\ndog/0.png,dog\n")
    source = open_source({"folder": tmp_path, "csv": tmp_path / "list.csv", "digits": "digits"}[kind])
    received = pickle.loads(pickle.dumps(source))
    assert received.examples == source.examples
    assert [received.content(each) for each in source.examples[:2]] == [source.content(each) for each in source.examples[:2]]


@pytest.mark.parametrize("data", [None, "digits"])
def test_digits(data):
    from sklearn.datasets import load_digits

    source, table = open_source(data), load_digits()
    assert (len(source), source.classes, source.mirror) == (1797, tuple("0123456789"), False)
    for place in (0, 5, 1796):
        pixels = np.asarray(source.read(source.examples[place]))
        assert pixels.shape == (8, 8, 3)
        assert np.abs(pixels[..., 1] - table.images[place] * 255 / 16).max() <= 0.5
        assert source.examples[place] == Example(f"digits/{place:04d}", int(table.target[place]))


@pytest.mark.skipif(not CLOTHING.is_dir(), reason="../shared/data/clothing-160 is not there")
def test_clothing_photos():
    source = open_source(CLOTHING)
    assert len(source.classes) == 10
    assert [sum(source.counts(split).values()) for split in ("train", "validation", "test")] == [3068, 341, 372]
    folder = CLOTHING / "train" / "t-shirt"
    assert source.counts("train")["t-shirt"] == len(list(folder.iterdir()))
    assert source.notes == ()
