import io
import tarfile

import pytest

from tests.data.readers.conftest import BLUE, RED, read, reasons
from uni_x.data.readers import open_source
from uni_x.pictures import open_picture


@pytest.fixture
def webdataset():
    return pytest.importorskip("webdataset")


def write_tar(webdataset, path, rows):
    with webdataset.TarWriter(str(path)) as writer:
        for row in rows:
            writer.write(row)
    return path


def test_tars_written_by_webdataset(webdataset, tmp_path):
    with webdataset.ShardWriter(str(tmp_path / "%02d.tar"), maxcount=2, verbose=0) as writer:
        for number in range(5):
            writer.write({"__key__": f"sub.d/{number}", "jpg": BLUE, "txt": f"number {number}"})
    (tmp_path / "00_stats.json").write_text('{"count": 5}')
    parts = open_source(str(tmp_path))
    assert [part.name for part in parts] == ["00.tar", "01.tar", "02.tar"]
    rows = read(tmp_path)
    assert [row.id for row in rows] == [f"{number // 2:02d}.tar:sub.d/{number}" for number in range(5)]
    assert [row.caption for row in rows] == [f"number {number}" for number in range(5)]
    assert {row.images for row in rows} == {(BLUE,)}


def test_rows_of_a_tar_in_all_their_forms(webdataset, tmp_path):
    path = write_tar(
        webdataset,
        tmp_path / "a.tar",
        [
            {"__key__": "a", "png": RED, "json": {"key": "own", "caption": "red", "image": "elsewhere.png"}},
            {"__key__": "b", "webp": RED, "caption": "red"},
            {"__key__": "c", "img10.jpg": BLUE, "img2.jpg": RED, "json": {"messages": [
                {"role": "user", "content": "<image><image>?"}, {"role": "assistant", "content": "!"}]}},
            {"__key__": "d", "json": {"vqcode_512": "[1]", "caption": "codes", "data_type": "t2i"}},
            {"__key__": "e", "png": RED[:20], "txt": "cut off"},
            {"__key__": "f", "jpg": RED, "txt": "named wrong"},
        ],
    )  # fmt: skip
    rows = read(path)
    assert not reasons(rows)
    assert [row.id for row in rows] == ["own", *(f"a.tar:{key}" for key in "bcdef")]
    assert [row.images for row in rows[:3]] == [(RED,), (RED,), (RED, BLUE)]
    assert rows[3].images[0].codes.tolist() == [1]
    assert rows[4].images == (RED[:20],)  # decoding it will tell
    assert open_picture(rows[5].images[0]).size == (6, 4)


def test_rows_of_a_tar_that_cannot_be_used(tmp_path):
    path = tmp_path / "a.tar"
    members = [
        ("a.png", RED), ("b.txt", b"no picture"), ("c.png", RED), ("c.txt", b"\xff"), ("d.png", RED),
        ("d.json", b"{"), ("e.png", RED), ("e.PNG", RED), ("e.txt", b"two"), ("README", b""), ("._f.txt", b"litter"),
        ("g.png", RED), ("g.txt", b" good \n"), ("h.jpg", RED), ("h.txt", b""),
    ]  # fmt: skip
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for name, kind in (("i.txt", tarfile.SYMTYPE), ("j.png", tarfile.LNKTYPE), ("k", tarfile.DIRTYPE)):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, "g.png"
            tar.addfile(link)
    rows = read(path)
    found = reasons(rows)
    assert list(found) == [f"a.tar:{key}" for key in ["a", "b", "c", "d", "e", "README", "h", "i", "j"]]
    assert found["a.tar:a"] == "neither txt, caption nor json in it (its members end in png)"
    assert found["a.tar:b"].startswith("no picture stands beside the caption")
    assert found["a.tar:c"] == "caption: not valid UTF-8 (byte 1)"
    assert found["a.tar:d"].startswith("not valid JSON")
    assert found["a.tar:e"] == "two members of the row end in .png"
    assert found["a.tar:h"] == "caption: it is empty"
    assert found["a.tar:README"] == "nothing in its name says what it is, such as .jpg: README"
    assert found["a.tar:i"] == "links in a tar are not followed; pack the file itself: i.txt"
    assert found["a.tar:j"] == "links in a tar are not followed; pack the file itself: j.png"
    assert rows[6].caption == "good"


def test_a_tar_cut_anywhere_gives_its_whole_rows_and_one_rejection(webdataset, tmp_path):
    rows = [{"__key__": f"{number}", "png": RED, "txt": f"number {number}"} for number in range(4)]
    whole = write_tar(webdataset, tmp_path / "whole.tar", rows).read_bytes()
    path = tmp_path / "a.tar"
    with tarfile.open(tmp_path / "whole.tar") as tar:
        begun = [member.offset_data for member in tar if member.name.endswith(".png")]
        end = tar.offset
    for cut in range(0, end + 1, 256):
        path.write_bytes(whole[:cut])
        *good, last = read(path)
        assert last.id == "a.tar:rest"
        assert "the rest of a.tar is lost" in last.reason
        assert not reasons(good)
        # a row counts as whole once the next one has begun
        assert len(good) == sum(offset <= cut for offset in begun[1:])
    assert not reasons(read(tmp_path / "whole.tar"))


def test_rows_behind_the_end_of_a_tar_are_told(webdataset, tmp_path):
    path = tmp_path / "a.tar"
    whole = write_tar(webdataset, path, [{"__key__": f"{key}", "png": RED, "txt": key} for key in "abcd"]).read_bytes()
    with tarfile.open(path) as tar:
        start = tar.getmember("c.png").offset
    for content, good in (
        (whole[:start] + bytes(512) + whole[start + 512 :], ["a"]),  # a header that was zeroed
        (whole + whole, ["a", "b", "c"]),
        (whole + bytes(2**21) + b"x", ["a", "b", "c"]),
    ):
        path.write_bytes(content)
        *rows, last = read(path)
        assert [row.caption for row in rows] == good
        assert last.id == "a.tar:rest"
        assert f"is lost, from row {len(good) + 1} on: it goes on behind its end at byte " in last.reason
    path.write_bytes(whole + bytes(2**21))
    assert not reasons(read(path))


def test_a_damaged_header_is_not_the_end(webdataset, tmp_path):
    rows = [{"__key__": f"{number}", "png": RED, "txt": f"number {number}"} for number in range(4)]
    content = bytearray(write_tar(webdataset, tmp_path / "a.tar", rows).read_bytes())
    with tarfile.open(tmp_path / "a.tar") as tar:
        start = tar.getmember("2.png").offset
    content[start : start + 512] = b"\xff" * 512
    (tmp_path / "a.tar").write_bytes(content)
    *good, last = read(tmp_path / "a.tar")
    assert [row.caption for row in good] == ["number 0"]
    assert f"breaks off or is damaged at byte {start:,}" in last.reason
    (tmp_path / "a.tar").write_bytes(b"no tar" * 1000)
    assert list(reasons(read(tmp_path / "a.tar"))) == ["a.tar:rest"]
