import os
import tarfile

import pytest

from tests.data.readers.conftest import ANSWERED, ASKED, RED, read, reasons, write_jsonl, write_parquet
from uni_x.data.encode import encode
from uni_x.data.readers import SourceOptions, open_source
from uni_x.errors import DataError


def names(source, **options):
    return [part.name for part in open_source(str(source), SourceOptions(**options))]


@pytest.fixture
def captioned(tmp_path):
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "cat.png").write_bytes(RED)
    (tmp_path / "more" / "cat.txt").write_text("a cat")
    return tmp_path


def test_what_is_no_source_is_refused_with_the_kinds_there_are(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.md").write_text("notes")
    for name in ("empty", "notes.md", "nowhere/at/all"):
        with pytest.raises(DataError, match=r"a source is a folder of pictures with captions; .*\.parquet") as caught:
            open_source(str(tmp_path / name))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "mend"), [("a.tar.gz", "gunzip"), ("a.tgz", "gunzip"), ("A.TAR.XZ", "unxz")])
def test_packed_tars_are_refused_with_the_mend(tmp_path, name, mend):
    with tarfile.open(tmp_path / name, "w:xz" if mend == "unxz" else "w:gz"):
        pass
    write_jsonl(tmp_path / "b.jsonl", [{"text": "a"}])
    for source in (tmp_path, tmp_path / name):
        with pytest.raises(DataError) as caught:
            open_source(str(source))
        assert str(caught.value) == f"{tmp_path / name}: only plain tars are read; unpack it first ({mend})"
    assert names(tmp_path, kind="jsonl") == ["b.jsonl"]


def test_encoded_folders_are_no_source(picture_folder, image_tokenizer, tmp_path):
    encode([], image_tokenizer, tmp_path / "out", source="nothing")
    with pytest.raises(DataError, match="encoded already"):
        open_source(str(tmp_path / "out"))
    write_parquet(tmp_path / "out" / "part-00000.parquet", [{"text": "a"}])
    with pytest.raises(DataError, match="encoded already"):
        open_source(str(tmp_path / "out" / "part-00000.parquet"))


def test_a_folder_of_several_kinds_is_asked_for_one(captioned):
    write_jsonl(captioned / "b.jsonl", [{"text": "a"}])
    write_jsonl(captioned / "a.jsonl", [{"text": "a"}])
    write_parquet(captioned / "c.parquet", [{"text": "a"}])
    with pytest.raises(DataError) as caught:
        open_source(str(captioned))
    assert str(caught.value) == (
        f"{captioned}: holds several kinds of source: parquet files such as c.parquet, jsonl files such as a.jsonl, "
        "pictures with captions; choose one with --kind parquet or jsonl or pictures, or name a single file"
    )
    assert names(captioned, kind="jsonl") == ["a.jsonl", "b.jsonl"]
    assert names(captioned, kind="parquet") == names(captioned / "c.parquet") == ["c.parquet"]
    assert [row.id for row in read(captioned, kind="pictures")] == ["more/cat.png"]
    with pytest.raises(DataError, match="no source of the kind tar in it"):
        names(captioned, kind="tar")
    with pytest.raises(DataError, match=r"c\.parquet: no folder, and --kind chooses among the files of one"):
        names(captioned / "c.parquet", kind="parquet")


def test_pictures_without_captions_belong_to_the_rows_beside_them(tmp_path):
    (tmp_path / "cat.png").write_bytes(RED)
    write_jsonl(tmp_path / "rows.jsonl", [{"image": "cat.png", "conversations": ASKED}])
    (row,) = read(tmp_path)
    assert (row.messages, row.images) == (ANSWERED, (tmp_path / "cat.png",))


def test_files_about_tars_and_notes_of_datasets_are_no_source(tmp_path):
    with tarfile.open(tmp_path / "00.tar", "w"):
        pass
    (tmp_path / "00_stats.json").write_text("{}")
    (tmp_path / "dataset_infos.json").write_text("{}")
    write_parquet(tmp_path / "00.parquet", [{"text": "a"}])
    assert names(tmp_path) == ["00.tar"]
    write_parquet(tmp_path / "01.parquet", [{"text": "a"}])
    with pytest.raises(DataError, match=r"tar files such as 00\.tar, parquet files such as 01\.parquet"):
        names(tmp_path)


def test_tars_are_read_as_they_are_whatever_a_card_says(tmp_path):
    for name in ("train-0.tar", "test-0.tar"):
        with tarfile.open(tmp_path / name, "w"):
            pass
    (tmp_path / "README.md").write_text("---\nconfigs:\n- config_name: default\n---\n")
    assert names(tmp_path, split="train") == ["train-0.tar"]


def test_several_tables_of_captions_are_asked_for_one(captioned):
    (captioned / "captions.csv").write_text("file_name,caption\nmore/cat.png,red\n")
    assert [row.caption for row in read(captioned)] == ["red"]
    write_jsonl(captioned / "metadata.jsonl", [{"file_name": "more/cat.png", "caption": "rot"}])
    with pytest.raises(DataError, match=r"several tables of captions: captions\.csv, metadata\.jsonl; name the one"):
        names(captioned)
    assert [row.caption for row in read(captioned / "metadata.jsonl")] == ["rot"]
    assert [row.caption for row in read(captioned / "captions.csv")] == ["red"]


def test_options_that_mean_nothing_to_a_source_are_refused(captioned, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    with pytest.raises(DataError, match="has no splits, by the names of its files; leave --split"):
        names(path, split="test")
    for source, options in ((captioned, {"kind": "pictures"}), ("owner/name", {})):
        with pytest.raises(DataError, match=r"holds its pictures itself, .* leave --pictures out"):
            names(source, pictures=tmp_path, **options)


@pytest.mark.skipif(os.name != "posix", reason="symbolic links need rights elsewhere")
def test_pictures_that_rows_name_lie_in_the_folder_of_the_source_or_in_one_that_is_named(tmp_path):
    (folder := tmp_path / "source" / "rows").mkdir(parents=True)
    (elsewhere := tmp_path / "elsewhere").mkdir()
    for path in (folder / "in.png", elsewhere / "out.png"):
        path.write_bytes(RED)
    (folder / "within.png").symlink_to(folder / "in.png")
    (folder / "leaving.png").symlink_to(elsewhere / "out.png")
    (folder / "leaving").symlink_to(elsewhere)
    inside = [folder / "in.png", "../rows/in.png", f"{folder}/../rows/in.png", "within.png"]
    outside = [elsewhere / "out.png", "../../elsewhere/out.png", "leaving.png", "leaving/out.png", "../gone.png"]
    relative = ["out.png"]
    gone = ["gone.png", folder / "gone.png", "", "a\0.png", "x" * 300]
    images = [*inside, *outside, *relative, *gone]
    path = write_jsonl(folder / "a.jsonl", [{"image": str(image), "caption": str(image)} for image in images])

    found = {row.caption: row.images for row in read(path) if not hasattr(row, "reason")}
    assert list(found) == [str(image) for image in inside]
    assert all(images[0].read_bytes() == RED for images in found.values())
    why = list(reasons(read(path)).values())
    leaving = "the picture is outside the folder of the file that names it (--pictures allows another): "
    assert why[:5] == [leaving + str(image) for image in outside]
    assert why[5:8] == [f"the picture is missing: {image}" for image in ("out.png", "gone.png", folder / "gone.png")]
    assert why[8] == "image: the picture is empty"
    assert all(reason.startswith("the picture is missing: ") for reason in why[9:])

    rows = read(path, pictures=elsewhere)
    assert [row.caption for row in rows if not hasattr(row, "reason")] == list(map(str, images[:8] + relative))
