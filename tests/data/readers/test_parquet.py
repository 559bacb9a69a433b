import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.data.readers.conftest import ASKED, BLUE, RED, read, reasons, write_parquet
from uni_x.data.prepare import map_ahead
from uni_x.data.readers import open_source
from uni_x.data.schema import Message, Rejection


def test_parquet_of_many_kinds(tmp_path):
    (tmp_path / "disk.png").write_bytes(RED)
    write_parquet(
        tmp_path / "a.parquet",
        [{"images": [{"bytes": RED, "path": "a.png"}], "texts": [{"user": "1?", "assistant": "2"}], "source": "fine"}],
    )
    write_parquet(tmp_path / "b.parquet", [{"image": RED, "caption": "red"}, {"image": BLUE, "caption": "blue"}])
    on_disk = [{"image": {"bytes": None, "path": path}, "caption": "red"} for path in ("disk.png", "../disk.png")]
    write_parquet(tmp_path / "c.parquet", on_disk)
    (tmp_path / "README.md").write_text("not data")
    rows = read(tmp_path)
    ids = ["a.parquet:1", "b.parquet:1", "b.parquet:2", "c.parquet:1", "c.parquet:2"]
    assert [row.id for row in rows] == ids
    assert (rows[0].images, rows[0].source) == ((RED,), "fine")
    assert rows[0].messages == (Message("user", "1?"), Message("assistant", "2"))
    assert [row.images for row in rows[1:4]] == [(RED,), (BLUE,), (tmp_path / "disk.png",)]
    assert rows[1].source == tmp_path.name
    assert list(reasons(rows)) == ["c.parquet:2"]
    assert rows[4].reason.startswith("the picture is outside the folder of the file that names it")


def test_rows_may_be_wanted_late_and_out_of_order(tmp_path):
    texts = [f"{number}" * 500 for number in range(9000)]
    path = write_parquet(tmp_path / "a.parquet", [{"text": text} for text in texts], row_group_size=6000)
    (part,) = open_source(str(path))
    loads = list(part.rows())
    wanted = [8999, 0, 5999, 6000, 3000, 2999]
    assert [loads[number]().text for number in wanted] == [texts[number] for number in wanted]


def test_memory_does_not_follow_the_size_of_a_row_group(tmp_path):
    rng = np.random.default_rng(0)
    rows = [{"image": rng.bytes(10_000), "caption": f"{number}"} for number in range(15_000)]
    path = write_parquet(tmp_path / "a.parquet", rows, row_group_size=15_000)
    assert pq.read_metadata(path).row_group(0).total_byte_size > 140e6
    del rows
    (part,) = open_source(str(path))
    before = pa.total_allocated_bytes()
    held = []
    for _, row in map_ahead(lambda load: load(), part.rows(), threads=4, ahead=64):
        held.append(pa.total_allocated_bytes() - before)
        assert len(row.images[0]) == 10_000
    assert len(held) == 15_000
    assert 0 < max(held) < 60e6


def test_a_parquet_file_cut_in_half_is_one_rejection(tmp_path):
    write_parquet(tmp_path / "a.parquet", [{"text": "a" * 1000}] * 10)
    content = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(content[: len(content) // 2])
    (tmp_path / "c.parquet").write_bytes(b"<html>not found</html>")
    (tmp_path / "d.parquet").write_bytes(b"")
    write_parquet(tmp_path / "e.parquet", [{"text": "b"}])
    rows = read(tmp_path)
    assert len(rows) == 10 + 3 + 1
    assert list(reasons(rows)) == ["b.parquet:rest", "c.parquet:rest", "d.parquet:rest"]
    assert all("not a whole Parquet file" in reason for reason in reasons(rows).values())


def test_a_damaged_row_group_costs_its_own_rows(tmp_path):
    rng = np.random.default_rng(0)
    texts = [rng.bytes(500).hex() for _ in range(6)]
    path = tmp_path / "a.parquet"
    write_parquet(path, [{"text": text} for text in texts], row_group_size=2, compression="zstd", use_dictionary=False)
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    content = bytearray(path.read_bytes())
    content[column.data_page_offset : column.data_page_offset + column.total_compressed_size] = bytes(
        column.total_compressed_size
    )
    path.write_bytes(content)
    rows = read(path)
    assert [row.text for row in rows if not isinstance(row, Rejection)] == texts[:2] + texts[4:]
    assert list(reasons(rows)) == ["a.parquet:3", "a.parquet:4"]
    assert "row group 1 cannot be read" in rows[2].reason


def test_text_that_is_not_unicode_costs_its_own_row(tmp_path):
    offsets = pa.py_buffer(np.array([0, 1, 2, 3], dtype=np.int32))
    text = pa.Array.from_buffers(pa.string(), 3, [None, offsets, pa.py_buffer(b"a\xffb")])
    pq.write_table(pa.table({"text": text}), tmp_path / "a.parquet")
    rows = read(tmp_path / "a.parquet")
    assert [row.text for row in (rows[0], rows[2])] == ["a", "b"]
    assert reasons(rows) == {"a.parquet:2": "text: not valid UTF-8"}


def odd_columns():
    """Columns of two rows; of the first Python has no value in any of them."""
    return {
        "date": pa.array([2**31 - 1, 1], pa.date32()),
        "long": pa.array([2**62, 1], pa.duration("ms")),
        "late": pa.array([2**62, 1], pa.timestamp("ms")),
        "zone": pa.array([2**62, 1], pa.timestamp("ms", "Mars/Olympus")),
    }


def test_values_that_python_has_none_for_cost_their_row_where_they_are_wanted(tmp_path):
    for name, column in odd_columns().items():
        pq.write_table(pa.table({"text": ["a", "b"], name: column}), tmp_path / f"{name}.parquet")
    assert [row.text for row in read(tmp_path)] == ["a", "b"] * 4
    for name, column in odd_columns().items():
        pq.write_table(pa.table({"text": ["a", "b"], "id": column}), tmp_path / f"{name}.parquet")
    found = reasons(read(tmp_path))
    ids = ["date.parquet:1", "late.parquet:1", "long.parquet:1", "zone.parquet:1", "zone.parquet:2"]
    assert list(found) == ids
    assert found["date.parquet:1"].startswith("id: a value of the type date32[day] that cannot be read (")


def test_columns_that_are_not_wanted_are_not_read(tmp_path):
    rng = np.random.default_rng(0)
    rows = [{"text": f"{number}", "embedding": rng.bytes(10_000)} for number in range(2000)]
    path = write_parquet(tmp_path / "a.parquet", rows, use_dictionary=False)
    column = pq.read_metadata(path).row_group(0).column(1)
    content = bytearray(path.read_bytes())
    start, size = column.data_page_offset, column.total_compressed_size
    content[start : start + size] = bytes(size)
    path.write_bytes(content)
    assert [row.text for row in read(path)] == [f"{number}" for number in range(2000)]
    write_parquet(path, [{"embedding": row["embedding"]} for row in rows[:3]])
    reason = "no caption, messages or text in it, nor fields of another known kind (its fields: embedding)"
    assert reasons(read(path)) == {f"a.parquet:{number}": reason for number in (1, 2, 3)}


def test_every_kind_of_row_keeps_its_columns(tmp_path):
    kinds = [
        {"instruction": "Add.", "input": "1 + 1", "output": "2"},
        {"system_prompt": "Be brief.", "question": "1 + 1?", "response": "2"},
        {"texts": [{"user": "1?", "assistant": "2"}]},
        {"vqcode_512": "[1]", "data_type": "i2t_multi", "width": 3, "height": 4, "text": "a?^^^turn_split^^^b"},
        {"file_name": "a.png", "caption": "red", "uid": "own"},
        {"conversations": ASKED[:0], "text": "a", "video": b"x"},
    ]
    (tmp_path / "a.png").write_bytes(RED)
    for number, fields in enumerate(kinds):
        write_parquet(tmp_path / f"{number}.parquet", [fields])
    rows = read(tmp_path)
    assert rows[0].messages == (Message("user", "Add.\n1 + 1"), Message("assistant", "2"))
    assert [message.role for message in rows[1].messages] == ["system", "user", "assistant"]
    assert rows[2].messages == (Message("user", "1?"), Message("assistant", "2"))
    assert rows[3].messages[0].content == "Image Size: Width is 3 Height is 4. a?"
    assert (rows[4].id, rows[4].images) == ("own", (tmp_path / "a.png",))
    assert rows[5].reason == "video: texts and pictures are read, videos and sound are not"
