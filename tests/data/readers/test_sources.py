import pytest

from tests.data.readers.conftest import write_parquet
from uni_x.data.readers import open_source
from uni_x.errors import DataError


def test_encoded_folders_are_no_source(picture_folder, image_tokenizer, tmp_path):
    from uni_x.data.encode import encode

    encode([], image_tokenizer, tmp_path / "out", source="nothing")
    with pytest.raises(DataError, match="encoded already"):
        open_source(str(tmp_path / "out"))
    write_parquet(tmp_path / "out" / "part-00000.parquet", [{"text": "a"}])
    with pytest.raises(DataError, match="encoded already"):
        open_source(str(tmp_path / "out" / "part-00000.parquet"))


def test_what_is_no_source_is_refused_with_the_kinds_there_are(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.md").write_text("notes")
    for name in ("empty", "notes.md", "nowhere/at/all"):
        with pytest.raises(DataError, match=r"a source is a folder of pictures with captions; .*\.parquet") as caught:
            open_source(str(tmp_path / name))
        assert "\n" not in str(caught.value)
