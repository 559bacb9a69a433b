import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from uni_x.data.check import Codes, FolderChecks
from uni_x.data.encode import encode
from uni_x.data.overlap import BenchmarkTexts
from uni_x.data.readers import open_source
from uni_x.data.schema import Sample
from uni_x.data.shards import iterate_samples, parquet_schema
from uni_x.errors import DataError, UsageError
from uni_x.images import ImageTokenizer
from uni_x.recipe import PatchNetwork, TokenizerConfig
from uni_x.workflows.data import check_folders

CODEBOOK_SIZE = 64


def check(folder, **options):
    return FolderChecks(**options).check(folder)


@pytest.fixture
def encoded(tmp_path, picture_folder, image_tokenizer):
    """A folder that `encode` finished: 18 of 20 pictures in shards of eight rows."""
    parts = open_source(str(picture_folder))
    encode(parts, image_tokenizer, tmp_path / "encoded", source="pictures", shard_size=8)
    return tmp_path / "encoded"


@pytest.fixture
def stored(tmp_path):
    """Writes rows as they are into a shard of a folder of their own."""

    def write(*rows, schema=None):
        folder = tmp_path / "stored"
        folder.mkdir(exist_ok=True)
        table = pa.Table.from_pylist(list(rows), schema=schema or parquet_schema(CODEBOOK_SIZE))
        pq.write_table(table, folder / f"part-{len(list(folder.iterdir()))}.parquet")
        return folder

    return write


@pytest.fixture
def benchmark(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_text(content, encoding="utf-8")
        return path

    return write


def image(codes=(0, 1, 2, 3), height=2, width=2):
    return {"codes": codes, "height": height, "width": width}


def captioned(sample_id, caption="a red heart", **more):
    return {"id": sample_id, "images": [image()], "caption": caption, **more}


def said(report, kind):
    """Places and messages of a kind."""
    found = [finding for finding in report.findings if finding.kind == kind]
    return [(e.shard, e.row, e.id, e.message) for finding in found for e in finding.examples]


def kinds(report):
    return {finding.kind: finding.count for finding in report.findings}


def test_a_sound_folder_has_no_findings(encoded, image_tokenizer):
    report = check(encoded, codes=Codes(CODEBOOK_SIZE, image_tokenizer.grid))
    assert report.ok
    assert report.findings == ()
    assert (report.shards, report.samples, report.images) == (3, 18, 18)


def test_a_folder_without_a_manifest_is_checked_alike(encoded_folder, samples):
    assert check(encoded_folder(samples), codes=Codes(CODEBOOK_SIZE)).ok


def test_faults_of_rows_name_shard_row_id_and_field(stored):
    question = {"role": "user", "content": "<image>What is it?"}
    null, of_nobody = {"role": "assistant", "content": None}, {"role": None, "content": "A heart."}
    folder = stored(
        captioned("whole"),
        captioned("empty", " "),
        {
            "id": "marks",
            "images": [image((4, 4, 4, 4))],
            "messages": [question, null],
        },
        {"id": "role", "images": [image((5, 5, 5, 5))], "messages": [question, of_nobody]},
        {"id": "turns", "images": [image((6, 6, 6, 6))], "messages": [question]},
        {"id": "places", "images": [image((7, 7, 7, 7))], "text": "no place"},
        {"id": "none", "images": [image((8, 8, 8, 8))]},
        {"id": None, "images": [image((9, 9, 9, 9))], "caption": "a star"},
        {"id": "null image", "images": [None], "caption": "a star"},
        {"id": "null message", "images": [], "messages": [None]},
        {"id": "grid", "images": [image((1, 2, 3))], "caption": "a star"},
        {"id": "codes", "images": [image((0, 1, 2, 64))], "caption": "a star"},
    )
    report = check(folder, codes=Codes(CODEBOOK_SIZE))
    assert kinds(report) == {"schema": 10, "codes": 1}
    name = "part-0.parquet"
    assert said(report, "schema") == [
        (name, 2, "empty", "caption: it is empty"),
        (name, 3, "marks", "messages[1].content: it is null"),
        (name, 4, "role", "messages[1].role: it is null"),
        (name, 5, "turns", "messages: a conversation must end with the assistant's turn"),
        (name, 6, "places", "text: 0 <image> for 1 image"),
        (name, 7, "none", "exactly one of caption, messages and text must be given, found none"),
        (name, 8, None, "id: it is null"),
        (name, 9, "null image", "images[0]: it is null"),
        (name, 10, "null message", "messages[0].role: it is null"),
        (name, 11, "grid", "images[0].codes: 3 codes do not fill a grid of 2 x 2"),
    ]
    assert said(report, "codes") == [(name, 12, "codes", "images[0]: code 64 is not in a codebook of 64")]


def test_codes_of_other_integer_types_are_judged_one_by_one(stored):
    images = pa.list_(pa.struct([("codes", pa.list_(pa.int64())), ("height", pa.int64()), ("width", pa.int64()),
                                 ("pixel_height", pa.int64()), ("pixel_width", pa.int64())]))  # fmt: skip
    schema = pa.schema([("id", pa.int64()), ("images", images), ("caption", pa.large_string())])
    folder = stored(
        captioned(1),
        {"id": 2, "images": [image((0, -1, 2, 3))], "caption": "a star"},
        {"id": 3, "images": [image((0, None, 2, 3))], "caption": "two stars"},
        {"id": 4, "images": [image((0, 2**40, 2, 3))], "caption": "three stars"},
        schema=schema,
    )
    report = check(folder, codes=Codes(CODEBOOK_SIZE))
    assert [(row, row_id) for _, row, row_id, _ in said(report, "schema")] == [(2, "2"), (3, "3"), (4, "4")]
    assert said(report, "schema")[0][3] == "images[0].codes: a code is null, below 0 or above 4294967295"
    assert kinds(report) == {"schema": 3}


def test_text_that_is_not_utf_8_is_a_fault_of_its_row(stored, tmp_path):
    folder = stored(captioned("a", "XYZ one"), captioned("b", "two"))
    path = folder / "part-0.parquet"
    table = pq.read_table(path)
    raw = pa.array([b"\xff\xfe one", b"two"], pa.binary())
    broken = table.set_column(2, "caption", pa.Array.from_buffers(pa.string(), 2, raw.buffers()))
    pq.write_table(broken, path)
    report = check(folder)
    assert said(report, "schema") == [("part-0.parquet", 1, "a", "caption: it is not valid Unicode (a lone surrogate)")]


def test_a_code_is_held_against_the_manifests_codebook_where_none_is_given(encoded):
    manifest = json.loads((encoded / "manifest.json").read_text())
    (encoded / "manifest.json").write_text(json.dumps({**manifest, "codebook_size": 2}))
    report = check(encoded)
    assert kinds(report)["codes"] > 0
    assert "is not in a codebook of 2" in said(report, "codes")[0][3]
    assert "codes" not in kinds(check(encoded, codes=Codes(CODEBOOK_SIZE)))


def test_images_of_another_grid_than_the_tokenizers_are_found(stored):
    folder = stored(captioned("a"), {"id": "b", "images": [image((1, 2), 1, 2)], "caption": "a star"})
    assert check(folder).ok
    report = check(folder, codes=Codes(CODEBOOK_SIZE, (2, 2)))
    message = "images[0]: 1 x 2 codes, the tokenizer makes 2 x 2"
    assert said(report, "codes") == [("part-0.parquet", 2, "b", message)]


def test_repeated_ids_and_contents_name_where_they_were_before(stored):
    stored(captioned("a"), captioned("b", "a star"))
    folder = stored(captioned("c"), captioned("b", "a car"), captioned("d", "a car", source="elsewhere"))
    report = check(folder)
    assert kinds(report) == {"id": 1, "content": 2}
    assert report.ok  # these are remarks
    assert said(report, "id") == [("part-1.parquet", 2, "b", "it has the id of part-0.parquet, row 2")]
    assert said(report, "content") == [
        ("part-1.parquet", 1, "c", "it has the texts and codes of part-0.parquet, row 1"),
        ("part-1.parquet", 3, "d", "it has the texts and codes of part-1.parquet, row 2"),
    ]


def test_the_same_text_with_other_codes_or_another_grid_is_other_content(stored):
    caption = {"caption": "a star"}
    folder = stored(
        {"id": "a", "images": [image((0, 1, 2, 3))], **caption},
        {"id": "b", "images": [image((0, 1, 3, 2))], **caption},
        {"id": "c", "images": [image((0, 1, 2, 3), 1, 4)], **caption},
        {"id": "d", "images": [], "text": "a star"},
    )
    assert check(folder).ok


def test_rows_without_an_id_do_not_repeat_each_others(stored):
    report = check(stored(captioned(None, "one"), captioned(None, "two")))
    assert kinds(report) == {"schema": 2}


def test_repeats_are_found_over_many_batches(encoded_folder, make_image):
    texts = [Sample(f"text-{number}", text=f"document {number % 900}") for number in range(1000)]
    report = check(encoded_folder(texts), limit=3)
    assert kinds(report) == {"content": 100}
    assert [found[:3] for found in said(report, "content")] == [
        ("part-00090.parquet", 1, "text-900"),
        ("part-00090.parquet", 2, "text-901"),
        ("part-00090.parquet", 3, "text-902"),
    ]


def test_rows_of_large_row_groups_keep_their_images_and_messages(tmp_path):
    """Batches of a row group are slices of it."""
    rows = [
        {
            "id": f"{number}",
            "images": [image((number % 64, number // 64, 0, 0))] * (number % 3),
            "messages": [
                {"role": "user", "content": "<image>" * (number % 3) + f"Is it {number}?"},
                {"role": "assistant", "content": "Yes" if number != 700 else ""},
            ],
        }
        for number in range(1000)
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=parquet_schema(CODEBOOK_SIZE)), tmp_path / "a.parquet")
    report = check(tmp_path, codes=Codes(CODEBOOK_SIZE))
    assert said(report, "schema") == [("a.parquet", 701, "700", "messages[1].content: it is empty")]
    assert kinds(report) == {"schema": 1}
    assert report.images == sum(number % 3 for number in range(1000))


def test_a_shard_that_cannot_be_read_is_a_finding_and_the_others_are_checked(stored):
    stored(captioned("a"))
    stored(captioned("b", "a star"))
    folder = stored(captioned("c", " "))
    damaged = folder / "part-1.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-20])
    report = check(folder)
    assert kinds(report) == {"unreadable": 1, "schema": 1}
    shard, row, _, message = said(report, "unreadable")[0]
    assert (shard, row) == ("part-1.parquet", None)
    assert message.startswith("not a whole Parquet file")
    assert said(report, "schema")[0][:3] == ("part-2.parquet", 1, "c")
    assert report.samples == 2


def test_a_row_group_that_is_damaged_leaves_those_before_it(tmp_path):
    rows = [captioned(f"sample-{number}", f"heart {number}") for number in range(600)]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=parquet_schema(CODEBOOK_SIZE)), path, row_group_size=300)
    start = pq.read_metadata(path).row_group(1).column(0).dictionary_page_offset
    content = bytearray(path.read_bytes())
    content[start : start + 40] = b"\xff" * 40
    path.write_bytes(content)
    report = check(tmp_path)
    assert report.samples == 300
    assert kinds(report) == {"unreadable": 1}
    assert said(report, "unreadable")[0][:2] == ("a.parquet", 301)


def test_missing_and_foreign_columns_are_named(stored):
    stored({"caption": "a star"}, schema=pa.schema([("caption", pa.string())]))
    schema = pa.schema([("id", pa.string()), ("images", pa.list_(pa.string()))])
    folder = stored({"id": "a", "images": ["b"]}, schema=schema)
    messages = [message for *_, message in said(check(folder), "unreadable")]
    assert messages[0] == "the column 'id' is missing; it has caption"
    assert messages[1].startswith("the column 'images' cannot be read as list<")


def test_an_unfinished_folder_is_found(encoded):
    manifest = json.loads((encoded / "manifest.json").read_text())
    del manifest["counts"]
    (encoded / "manifest.json").write_text(json.dumps({**manifest, "finished": False}))
    assert kinds(check(encoded)) == {"unfinished": 1}


def test_a_missing_shard_does_not_add_up_with_the_manifest(encoded):
    (encoded / "part-00000-00001.parquet").unlink()
    report = check(encoded)
    assert kinds(report) == {"manifest": 4}
    messages = [message for *_, message in said(report, "manifest")]
    assert messages[:2] == [
        "20 rows were read by manifest.json, 12 by the shards",
        "18 rows were written by manifest.json, 11 by the shards",
    ]


def test_a_shard_that_was_put_there_or_rewritten_is_named(encoded, stored):
    first = encoded / "part-00000-00000.parquet"
    table = pq.read_table(first)
    pq.write_table(table.slice(0, 3), first)
    report = check(encoded)
    assert said(report, "manifest")[0] == (
        "part-00000-00000.parquet", None, None, "7 samples were written, it holds 3",
    )  # fmt: skip
    foreign = stored(captioned("a"))
    shutil.copy(foreign / "part-0.parquet", encoded / "part-z.parquet")
    assert ("part-z.parquet", None, None, "`uni-x encode` has not written it, as it has the folder") in said(
        check(encoded), "manifest"
    )


def test_rejects_that_are_missing_do_not_add_up(encoded):
    (encoded / "rejects.jsonl").write_text("")
    assert said(check(encoded), "manifest") == [(None, None, None, "2 rows were rejected, rejects.jsonl has 0")]


@pytest.mark.parametrize("content", ["[1]", "not JSON", "{}"])
def test_a_foreign_manifest_is_a_finding(encoded, content):
    (encoded / "manifest.json").write_text(content)
    assert said(check(encoded), "manifest") == [(None, None, None, "manifest.json is not one of `uni-x encode`")]


def test_only_the_first_of_many_are_kept(stored):
    folder = stored(*(captioned(f"{number}", " " * (number + 1)) for number in range(30)))
    (finding,) = check(folder, limit=4).findings
    assert (finding.kind, finding.count) == ("schema", 30)
    assert [example.row for example in finding.examples] == [1, 2, 3, 4]


def test_nothing_to_check_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        check(tmp_path / "nothing")
    with pytest.raises(DataError, match="no Parquet shards in it; `uni-x encode` makes them"):
        check(tmp_path)


def test_a_folder_of_folders_and_a_shard_are_not_a_folder_of_shards(encoded):
    message = r"no Parquet shards in it, but in its folders; name each \(encoded\)"
    with pytest.raises(DataError, match=message):
        check(encoded.parent)
    with pytest.raises(DataError, match=message):  # training says the same
        list(iterate_samples(encoded.parent, CODEBOOK_SIZE))
    with pytest.raises(DataError, match=r"part-00000-00000.parquet: a file, not a folder of shards"):
        check(encoded / "part-00000-00000.parquet")


def test_a_folder_without_samples_is_an_error(tmp_path, stored, image_tokenizer):
    assert said(check(stored()), "empty") == [(None, None, None, "nothing was encoded")]
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "broken.png").write_bytes(b"not a picture")
    (pictures / "broken.txt").write_text("a star")
    encode(open_source(str(pictures)), image_tokenizer, tmp_path / "encoded", source="pictures")
    report = check(tmp_path / "encoded")
    assert not report.ok
    assert said(report, "empty") == [(None, None, None, "rejects.jsonl says why")]


def test_prompts_of_a_benchmark_are_found_in_captions_questions_and_texts(stored, benchmark):
    prompts = benchmark("prompts.txt", "A red heart, left of a car!\n\ntwo stars\n")
    asked = benchmark("asked.jsonl", json.dumps({"question": "Is there a heart?", "answer": "Is it not"}) + "\n")
    question = [{"role": "user", "content": "<image>\nIs there a HEART"}, {"role": "assistant", "content": "Yes"}]
    folder = stored(
        captioned("drawn", "a red heart left of  a car"),
        captioned("inside", "I see two stars"),
        {"id": "asked", "images": [image((4, 4, 4, 4))], "messages": question},
        {"id": "told", "images": [], "text": "Two stars."},
        captioned("other", "Is it not"),
    )
    assert check(folder).ok
    report = check(folder, benchmarks=[prompts, asked])
    assert kinds(report) == {"benchmark": 3}
    assert said(report, "benchmark") == [
        ("part-0.parquet", 1, "drawn", "caption: it is the text of prompts.txt, line 1"),
        ("part-0.parquet", 3, "asked", "messages[0].content: it is the text of asked.jsonl, line 1"),
        ("part-0.parquet", 4, "told", "text: it is the text of prompts.txt, line 3"),
    ]


LONG = "a photo of a red heart above a car"  # nine words
CHINESE = "一张照片，里面有一只红色的猫在桌子上面"  # eighteen characters


@pytest.mark.parametrize(
    ("known", "text", "inside"),
    [
        (LONG, f"This is {LONG}, and more.", True),
        (LONG, f"This is {LONG.upper()}", True),
        (LONG, f"{LONG}s", None),
        (LONG, f"not {LONG[:-4]}", None),
        ("one two three four five six seven", "zero one two three four five six seven", None),
        ("one two three four five six seven eight", "zero one two three four five six seven eight", True),
        (CHINESE, f"看：{CHINESE}。真好", True),
        (CHINESE, CHINESE.replace("，", " "), False),
        ("里面有一只红色的猫在桌子上面", f"看{CHINESE}", None),
        ("ＡＢＣ　ｄｅｆ", "abc — DEF", False),
        ("Straße", "STRASSE", False),
        ("दिल की फोटो", "दल क फट", None),
        ("!?", "!?", None),
    ],
)
def test_texts_match_whole_and_long_ones_inside_others(benchmark, known, text, inside):
    texts = BenchmarkTexts([benchmark("known.txt", f"{known}\nsomething else\n")])
    match = texts.find(text)
    assert (None if match is None else match.inside) == inside
    assert match is None or match.where == "known.txt, line 1"


def test_a_long_text_is_found_behind_another_with_the_same_beginning(benchmark):
    texts = BenchmarkTexts([benchmark("known.txt", f"{LONG} in rain\n{LONG} in snow\n")])
    assert texts.find(f"See {LONG} in snow.").where == "known.txt, line 2"
    assert texts.find(f"See {LONG} in sun.") is None


def test_benchmarks_are_read_from_tables(tmp_path, benchmark):
    tsv = benchmark("mme.tsv", 'index\timage\tquestion\n0\tQUJD\t"Is it\ta ""heart""?"\n1\tQUJD\tA star?\n')
    parquet = tmp_path / "t2i.parquet"
    pq.write_table(
        pa.table({"prompt": ["a blue car", None], "image": [b"\xff", b""], "caption": [None, "a sea"]}), parquet
    )
    jsonl = benchmark("bench.jsonl", '{"prompt": "a cat", "text": ["x"]}\n{"caption": "a dog", "text": "a cow"}\n')
    texts = BenchmarkTexts([tsv, parquet, jsonl])
    assert texts.find('is it a "heart"').where == "mme.tsv, row 1"
    assert texts.find("a star").where == "mme.tsv, row 2"
    assert texts.find("A blue car.").where == "t2i.parquet, row 1"
    assert texts.find("a sea").where == "t2i.parquet, row 2"
    assert texts.find("a dog").where == texts.find("a cow").where == "bench.jsonl, line 2"
    assert texts.find("QUJD") is None
    assert texts.find("x") is None


def test_benchmarks_are_read_from_json_lists_and_folders_of_texts(tmp_path, benchmark):
    strings = benchmark("strings.json", '["a cat", "a dog"]')
    objects = benchmark("objects.json", '[{"prompt": "a cow", "id": "a pig"}, {"id": 1}]')
    (folder := tmp_path / "prompts").mkdir()
    benchmark("prompts/0.txt", "\ufeffa red heart\nleft of a car\n")
    benchmark("prompts/1.txt", "a sea")
    benchmark("prompts/notes.md", "a hill")
    texts = BenchmarkTexts([strings, objects, folder])
    found = {text: match and match.where for text in ("a cat", "a dog", "a cow") if (match := texts.find(text))}
    assert found == {
        "a cat": "strings.json, element 1",
        "a dog": "strings.json, element 2",
        "a cow": "objects.json, element 1",
    }
    assert texts.find("A red heart left of a car.").where == "prompts, 0.txt"
    assert texts.find("a sea").where == "prompts, 1.txt"
    assert texts.find("a hill") is texts.find("a pig") is None
    (empty := tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: no text in it; looked for files that end in \.txt"):
        BenchmarkTexts([empty])


def test_questions_behind_a_quotation_mark_that_is_never_closed_are_found(uni_x, stored, benchmark):
    questions = ['"How wide is it', "Is it a star?", '6" of rain', '"Who" said so?', "What is the time?"]
    rows = "".join(f"{number}\t{question}\n" for number, question in enumerate(questions))
    path = benchmark("bench.tsv", f"index\tquestion\n{rows}")
    folder = stored(*(captioned(f"{number}", question) for number, question in enumerate(questions)))
    code, out, _ = uni_x("data", "check", folder, "--benchmark", path)
    assert code == 1
    for number in range(5):
        assert f"caption: it is the text of bench.tsv, row {number + 1}\n" in out


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("a.csv", "prompt\na\n", UsageError, "a benchmark's file ends in one of .txt, .jsonl, .tsv, .parquet"),
        ("a.txt", "\n\n", DataError, "no text in it; looked for lines of text"),
        ("a.jsonl", '{"answer": "a"}\n', DataError, "no text in it; looked for prompt, question, text, caption"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt"\n', DataError, "line 2: not valid JSON"),
        (
            "a.tsv",
            "index\tanswer\n0\ta\n",
            DataError,
            "none of the columns prompt, question, text, caption; it has",
        ),
        ("a.tsv", "index\tprompt\n0\ta\tb\n", DataError, "row 1: 3 fields under a header of 2"),
        ("a.parquet", "no", DataError, "not a whole Parquet file"),
        ("a.json", "[", DataError, "not valid JSON"),
        ("a.json", '{"prompt": "a"}', DataError, "a JSON list of texts or objects is needed, not dict"),
        ("a.json", '["a", 1]', DataError, "element 2: a text or an object is needed, not int"),
    ],
)
def test_benchmarks_that_cannot_be_read_are_errors(benchmark, name, content, error, message):
    path = benchmark(name, content)
    with pytest.raises(error, match=f"{name}: .*") as caught:
        BenchmarkTexts([path])
    assert message in str(caught.value)


def test_a_benchmark_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        BenchmarkTexts([tmp_path / "a.txt"])


@pytest.fixture
def tokenizer_folder(image_tokenizer, tmp_path):
    image_tokenizer.save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def test_the_lines_say_what_is_wrong_and_where(stored, tokenizer_folder):
    stored(captioned("star", "a star"), captioned("again", "a star"))
    folder = stored(*(captioned(f"{number}", " " * (number + 1)) for number in range(3)))
    (checked,) = check_folders([folder], tokenizer_folder, examples=2)
    assert not checked.ok
    assert list(checked.lines) == [
        f"{folder}: 5 samples with 5 images in 2 shards",
        "  error: samples that cannot be trained on: 3",
        "    part-1.parquet, row 1 ('0'): caption: it is empty",
        "    part-1.parquet, row 2 ('1'): caption: it is empty",
        "    and 1 more",
        "  remark: samples with the texts and codes of an earlier one: 1",
        "    part-0.parquet, row 2 ('again'): it has the texts and codes of part-0.parquet, row 1",
    ]


def test_another_image_tokenizer_is_told_in_one_line_without_what_follows_from_it(encoded, tmp_path, tokenizer_folder):
    (checked,) = check_folders([encoded], tokenizer_folder)
    assert (checked.ok, checked.lines[1:]) == (True, ("  no errors",))
    network = PatchNetwork(patch_size=4, embed_dim=4, encoder_sizes=(8,), decoder_sizes=(8,))
    other = TokenizerConfig(resolution=16, codebook_size=2, network=network)
    ImageTokenizer(other).save_pretrained(tmp_path / "other")
    (checked,) = check_folders([encoded], str(tmp_path / "other"))
    message = "encoded with another image tokenizer; check against that one, or encode again with this one"
    assert (checked.ok, checked.lines[1:]) == (False, (f"  error: {message}",))
    manifest = encoded / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "image_tokenizer": "/theirs"}))
    (checked,) = check_folders([encoded], str(tmp_path / "other"))
    assert checked.lines[1] == f"  error: {message.replace('that one', 'that one (/theirs)')}"


def test_folders_of_different_image_tokenizers_are_told_apart(encoded, tmp_path, stored):
    shutil.copytree(encoded, tmp_path / "same")
    shutil.copytree(encoded, tmp_path / "other")
    manifest = tmp_path / "other" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "tokenizer": "0" * 64}))
    alike = [encoded, tmp_path / "same", stored(captioned("a"))]
    assert [checked.lines for checked in check_folders(alike)][-1] == ()
    *_, last = check_folders([*alike, tmp_path / "other"])
    groups = f"{encoded}, {tmp_path / 'same'} | {tmp_path / 'other'}"
    message = f"remark: encoded with different image tokenizers, of which a model takes one: {groups}"
    assert (last.ok, last.lines) == (True, (message,))


def test_what_folders_have_in_common_names_both(encoded_folder, make_image):
    def captions(*numbers):
        return [Sample(f"{number}", (make_image(number),), caption=f"star {number}") for number in numbers]

    first = encoded_folder(captions(*range(12)), "first")
    empty = encoded_folder([], "empty")
    others = [Sample("11", (make_image(),), caption="a sun"), Sample("moon", (make_image(3),), caption="star 3")]
    second = encoded_folder([*captions(20, 20), *others], "second")
    assert check(second).findings[0].count == 1
    empty.joinpath("part-00000.parquet").write_bytes(b"cut off")
    *_, last, _ = check_folders([first, empty, second])
    assert (last.ok, list(last.lines)) == (
        True,
        [
            "all folders together",
            "  remark: samples with the id of one in an earlier folder: 1",
            f"    {second}/part-00000.parquet, row 3 ('11'): it has the id of {first}/part-00001.parquet, row 2",
            "  remark: samples with the texts and codes of one in an earlier folder: 1",
            f"    {second}/part-00000.parquet, row 4 ('moon'): it has the texts and codes of "
            f"{first}/part-00000.parquet, row 4",
        ],
    )


def test_rows_without_an_id_do_not_repeat_those_of_another_folder(stored, tmp_path):
    folder = stored(captioned(None, "a star"))
    shutil.copytree(folder, other := tmp_path / "other")
    lines = [line for checked in check_folders([folder, other]) for line in checked.lines]
    assert [line.partition(":")[2] for line in lines if "earlier folder" in line] == [
        " samples with the texts and codes of one in an earlier folder: 1"
    ]


def test_the_command_exits_with_1_for_errors_and_0_for_remarks(uni_x, stored, benchmark):
    """And tells of every folder."""
    folder = stored(captioned("a"), captioned("b"))
    code, out, _ = uni_x("data", "check", folder)
    assert (code, out.splitlines()[-1]) == (0, "  no errors")
    prompts = benchmark("prompts.txt", "a red heart")
    code, out, _ = uni_x("data", "check", folder, folder, "--benchmark", prompts, "--examples", "1")
    assert (code, out.count("error: samples with a text of a benchmark: 2"), out.count("and 1 more")) == (1, 2, 4)
