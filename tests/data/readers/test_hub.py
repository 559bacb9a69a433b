import http.server
import json
import os
import subprocess
import sys
import threading
import urllib.parse
from pathlib import Path
from typing import ClassVar

import pyarrow as pa
import pytest

import uni_x
from tests.data.readers.conftest import RED, read, reasons, write_jsonl
from tests.data.readers.test_parquet import odd_columns
from uni_x.data.readers import SourceOptions, open_source
from uni_x.errors import DataError


@pytest.fixture
def datasets():
    library = pytest.importorskip("datasets")
    library.disable_progress_bars()
    return library


@pytest.fixture
def cache(datasets, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def dataset(datasets):
    named = datasets.List({"bytes": datasets.Value("binary"), "path": datasets.Value("string")})
    features = datasets.Features(
        {"id": datasets.Value("int64"), "image": datasets.Image(), "images": named, "caption": datasets.Value("string")}
    )
    red, cut = {"bytes": RED, "path": None}, {"bytes": RED[:20], "path": "a.png"}
    rows = [{"id": number, "image": red, "images": None, "caption": f"number {number}"} for number in range(5)]
    rows[1].update(image=None, images=[cut])
    rows[2].update(image=None, images=[{"bytes": None, "path": "/etc/hostname"}])
    return datasets.Dataset.from_list(rows, features=features)


@pytest.mark.parametrize("streaming", [False, True])
def test_saved_datasets(datasets, dataset, tmp_path, streaming):
    dataset.save_to_disk(tmp_path / "saved", num_shards=2)
    datasets.DatasetDict({"train": dataset, "test": dataset.select([4])}).save_to_disk(tmp_path / "dict")
    parts = open_source(str(tmp_path / "saved"), SourceOptions(streaming=streaming))
    assert [part.name for part in parts] == (["train-00000", "train-00001"] if streaming else ["train-00000"])
    rows = read(tmp_path / "saved", streaming=streaming)
    assert [row.id for row in rows] == ["0", "1", "2", "3", "4"]
    assert [rows[number].images for number in (0, 1, 3)] == [(RED,), (RED[:20],), (RED,)]
    assert rows[4].caption == "number 4"
    assert rows[0].source == "saved"
    assert reasons(rows) == {"2": "the picture is not in the dataset, only the name of a file: /etc/hostname"}
    assert [row.id for row in read(tmp_path / "dict", split="test", streaming=streaming)] == ["4"]
    with pytest.raises(DataError, match="no split 'val' in it; it has train, test"):
        open_source(str(tmp_path / "dict"), SourceOptions("val", streaming))


@pytest.mark.parametrize("streaming", [False, True])
def test_values_of_saved_datasets_that_python_has_none_for_cost_their_row_where_they_are_wanted(
    datasets, tmp_path, streaming
):
    for name, column in odd_columns().items():
        for wanted in ("id", "other"):
            table = pa.table({"text": ["a", "b"], wanted: column})
            datasets.Dataset(table).save_to_disk(tmp_path / f"{name}-{wanted}")
        assert [row.text for row in read(tmp_path / f"{name}-other", streaming=streaming)] == ["a", "b"]
        bad, *others = read(tmp_path / f"{name}-id", streaming=streaming)
        assert bad.reason.startswith("id: a value of the type ")
        assert len(others) == 1


def write_splits(dataset, folder):
    folder.mkdir(parents=True)
    dataset.select([0, 1, 3]).to_parquet(folder / "train-00000-of-00001.parquet")
    dataset.select([4]).to_parquet(folder / "test-00000-of-00001.parquet")


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("streaming", [False, True])
def test_a_cloned_repository_is_read_by_its_splits(dataset, tmp_path, monkeypatch, streaming):
    write_splits(dataset, tmp_path / "json" / "data")
    monkeypatch.chdir(tmp_path)
    rows = read("json", streaming=streaming)  # the library has a reader of that name
    assert [(row.id, row.source, row.images) for row in rows] == [
        ("0", "json", (RED,)), ("1", "json", (RED[:20],)), ("3", "json", (RED,)),
    ]  # fmt: skip
    assert [row.id for row in read("json", split="test", streaming=streaming)] == ["4"]
    with pytest.raises(DataError, match="json: no dataset with a split 'val' that can be read"):
        open_source("json", SourceOptions("val", streaming))


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("streaming", [False, True])
def test_a_repository_is_read_as_its_card_says(tmp_path, streaming):
    (repository := tmp_path / "repository").mkdir()
    (repository / "a.png").write_bytes(RED)
    rows = [{"image": "a.png", "caption": "red"}, {"image": "/etc/hostname", "caption": "another file"}]
    write_jsonl(repository / "one.jsonl", rows)
    write_jsonl(repository / "two.jsonl", [{"text": "words"}])
    card = "---\nlicense: mit\nconfigs:\n- config_name: default\n  data_files: one.jsonl\n- config_name: other\n"
    (repository / "README.md").write_text(f"{card}  data_files: two.jsonl\n---\n# A dataset\n")
    good, bad = read(repository, streaming=streaming)
    assert (good.caption, good.images) == ("red", (repository / "a.png",))
    assert bad.reason.startswith("the picture is outside the folder")
    assert [row.text for row in read(f"{repository}:other", streaming=streaming)] == ["words"]
    by_kind = open_source(str(repository), SourceOptions(kind="jsonl"))
    assert [part.name for part in by_kind] == ["one.jsonl", "two.jsonl"]


def test_files_of_several_splits_are_not_mixed(dataset, tmp_path):
    write_splits(dataset, data := tmp_path / "data")
    with pytest.raises(DataError, match="data: holds several splits; choose one with --split test or train"):
        open_source(str(data))
    assert [row.id for row in read(data, split="test")] == ["4"]
    with pytest.raises(DataError, match="no split 'val' in it; it has test, train"):
        open_source(str(data), SourceOptions("val"))
    assert [row.id for row in read(data / "test-00000-of-00001.parquet")] == ["4"]


def test_a_saved_dataset_without_splits_is_asked_for_none(dataset, tmp_path):
    dataset.save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match="saved: a data set without splits; leave --split test out"):
        open_source(str(tmp_path / "saved"), SourceOptions("test"))


def test_a_large_saved_dataset_has_several_parts(datasets, tmp_path):
    datasets.Dataset.from_dict({"text": [f"{number}" for number in range(25_000)]}).save_to_disk(tmp_path / "saved")
    parts = open_source(str(tmp_path / "saved"))
    assert [part.name for part in parts] == ["train-00000", "train-00001", "train-00002"]
    rows = [list(part.rows()) for part in parts]
    assert [len(part) for part in rows] == [10_000, 10_000, 5_000]
    assert [(part[0]().id, part[0]().text) for part in rows] == [
        (f"train:{number + 1}", f"{number}") for number in (0, 10_000, 20_000)
    ]


def test_saved_datasets_that_are_damaged_are_told(dataset, tmp_path):
    dataset.save_to_disk(tmp_path / "saved")
    (file,) = (tmp_path / "saved").glob("*.arrow")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(DataError, match="not a saved dataset that can be read"):
        open_source(str(tmp_path / "saved"))


def test_the_library_is_named_where_it_is_missing(dataset, tmp_path, monkeypatch):
    dataset.save_to_disk(tmp_path / "saved")
    monkeypatch.setitem(sys.modules, "datasets", None)
    for name in (str(tmp_path / "saved"), "owner/name", "squad"):
        with pytest.raises(DataError, match=r'pip install "uni-x\[data\]"'):
            open_source(name)


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as a dataset of the folder `train` needs."""

    files: ClassVar[dict[str, bytes]]

    def do_GET(self):
        path = urllib.parse.unquote(self.path.partition("?")[0])
        commit = "a" * 40
        entries = [
            {"type": "file", "path": name, "size": len(content), "oid": name} for name, content in self.files.items()
        ]
        if path.startswith("/api/datasets/owner/name/tree/"):
            inside = path.split("/tree/")[1].partition("/")[2]
            folders = [] if inside else [{"type": "directory", "path": "train", "oid": "train"}]
            self.answer(json.dumps(folders + [entry for entry in entries if entry["path"].startswith(inside)]).encode())
        elif path.startswith("/api/datasets/owner/name"):
            siblings = [{"rfilename": name} for name in self.files]
            self.answer(json.dumps({"id": "owner/name", "sha": commit, "siblings": siblings}).encode())
        elif (name := path.partition("/resolve/")[2].partition("/")[2]) in self.files:
            self.answer(self.files[name], ETag=f'"{name}"'.replace("/", "-"), **{"X-Repo-Commit": commit})
        else:
            self.answer(b"{}", status=404, **{"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET  # noqa: N815

    def answer(self, content, status=200, **headers):
        first, _, last = self.headers.get("Range", "").removeprefix("bytes=").partition("-")
        if first and self.command == "GET":
            status, headers["Content-Range"] = 206, f"bytes {first}-{last}/{len(content)}"
            content = content[int(first) : int(last) + 1]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *arguments):
        pass


PICTURES = {
    "train/a.png": RED,
    "train/b.png": RED[:20],
    "train/metadata.csv": b"file_name,text\na.png,red\nb.png,cut off\n",
}
DOCUMENTS = {"train/a.jsonl": b'{"text": "one"}\n{"text": "two"}\n'}

READ_HUB = """
from tests.data.readers.test_parquet import odd_columns
from uni_x.data.readers import SourceOptions, open_source
for streaming in (True, False):
    for part in open_source("owner/name", SourceOptions(streaming=streaming)):
        for row in (load() for load in part.rows()):
            images = [image if isinstance(image, bytes) else image.read_bytes() for image in row.images]
            print(row.id, row.caption or row.text, *(image.hex() for image in images))
"""


@pytest.mark.usefixtures("datasets")
@pytest.mark.parametrize(
    ("files", "rows"),
    [(PICTURES, [f"red {RED.hex()}", f"cut off {RED[:20].hex()}"]), (DOCUMENTS, ["one", "two"])],
    ids=["pictures", "documents"],
)
def test_datasets_of_the_hub_are_read_streamed_or_not(tmp_path, files, rows):
    hub = type("Hub", (Hub,), {"files": files})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        own = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        run = subprocess.run(
            [sys.executable, "-c", READ_HUB],
            env={**os.environ, **own, "NO_PROXY": "127.0.0.1"},
            cwd=Path(uni_x.__file__).parents[1],
            capture_output=True,
            text=True,
        )
        server.shutdown()
    assert run.returncode == 0, run.stderr
    expected = [f"{part}:{number} {row}" for part in ("train-00000", "train") for number, row in enumerate(rows, 1)]
    assert run.stdout.splitlines() == expected


@pytest.mark.usefixtures("datasets")
def test_datasets_that_cannot_be_had_are_told():
    for name in ("owner/name:config", "squad"):
        with pytest.raises(DataError, match=f"{name}: no such file or folder, nor a dataset of the hub"):
            open_source(name)


def test_names_of_files_are_not_looked_up_on_the_hub():
    with pytest.raises(DataError, match=r"gone\.jsonl: no such file or folder \(a source is"):
        open_source("gone.jsonl")
