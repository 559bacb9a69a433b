import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from uni_x.data.readers import SourceOptions, open_source
from uni_x.data.readers.fields import row_from_fields
from uni_x.data.schema import Message, Rejection


def make_picture(colour="red", format="PNG", size=(6, 4)):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, format)
    return buffer.getvalue()


RED, BLUE = make_picture("red"), make_picture("blue", "JPEG")
ASKED = [{"from": "human", "value": "<image>What is it?"}, {"from": "gpt", "value": "A square."}]
ANSWERED = (Message("user", "<image>What is it?"), Message("assistant", "A square."))


def read(source, **options):
    """All rows of a source, read twice to show that they are the same and in the same order."""
    parts = open_source(str(source), SourceOptions(**options))
    rows = [load() for part in parts for load in part.rows()]
    again = [load() for part in open_source(str(source), SourceOptions(**options)) for load in part.rows()]
    assert [row.id for row in again] == [row.id for row in rows]
    for row in rows:
        row.id.encode()
        if isinstance(row, Rejection):
            row.reason.encode()
            assert "\n" not in row.reason
    return rows


def reasons(rows):
    return {row.id: row.reason for row in rows if isinstance(row, Rejection)}


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def to_row(**fields):
    return row_from_fields(fields, "row", "source", None)


def write_parquet(path, rows, **options):
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path
