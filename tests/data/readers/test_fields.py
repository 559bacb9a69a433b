import json
from pathlib import Path

import numpy as np
import pytest

from tests.data.readers.conftest import ANSWERED, ASKED, BLUE, RED, to_row
from uni_x.data.readers.fields import row_from_fields
from uni_x.data.schema import Message, check_content
from uni_x.errors import DataError


def codes_of(*first, count=16):
    return [list(range(start, start + count)) for start in first]


def test_published_codes_come_as_a_json_string_or_a_list():
    codes = list(range(1024))
    for value in (json.dumps(codes), codes):
        row = to_row(data_type="t2i", vqcode_512=value, text="a cat", caption="not this")
        (grid,) = row.images
        assert (grid.height, grid.width, grid.codes.dtype) == (32, 32, np.uint16)
        assert grid.codes.tolist() == codes
        assert row.caption == "a cat"
        check_content(row)


def test_several_pictures_are_a_list_of_lists():
    row = to_row(vqcode_512=json.dumps(codes_of(0, 70_000)), data_type="interleaved", text="<image> then <image>")
    assert [grid.codes.dtype for grid in row.images] == [np.uint16, np.uint32]
    assert row.images[1].codes.tolist() == codes_of(70_000)[0]
    assert row.text == "<image> then <image>"
    check_content(row)


def test_a_caption_serves_where_the_text_is_null():
    assert to_row(data_type="image_text", vqcode_512=codes_of(0)[0], text=None, caption="a cat").caption == "a cat"
    assert to_row(data_type="text", caption="a document").text == "a document"


def test_published_conversations_are_turns_or_a_text_to_cut():
    text = "Hi^^^turn_split^^^Hello^^^pair_split^^^And?^^^turn_split^^^Bye"
    row = to_row(data_type="i2t", vqcode_512=codes_of(0)[0], text=text)
    contents = [(message.role, message.content) for message in row.messages]
    assert contents == [("user", "Hi"), ("assistant", "Hello"), ("user", "And?"), ("assistant", "Bye")]
    check_content(row)
    assert to_row(data_type="i2t", vqcode_512=codes_of(0)[0], conversations=ASKED).messages == ANSWERED


def test_the_size_of_the_image_leads_the_first_question():
    turns = [{"from": "system", "value": "Be brief."}, *ASKED]
    row = to_row(data_type="i2t_multi", vqcode_512=codes_of(0), conversations=turns, width=640, height=480)
    question = "Image Size: Width is 640 Height is 480. <image>What is it?"
    assert row.messages == (Message("system", "Be brief."), Message("user", question), ANSWERED[1])


def test_a_caption_that_is_described_gets_a_question():
    row = to_row(data_type="i2t_reverse", vqcode_512=codes_of(0)[0], caption="a cat")
    assert row.messages == (Message("user", "The caption of this image is:"), Message("assistant", "a cat"))
    check_content(row)


def test_ready_ids_count_where_there_is_no_text():
    assert to_row(data_type="text", text="words", input_ids=[1, 2]).text == "words"
    assert to_row(text="words", input_ids=[1, 2]).input_ids is None
    for fields in ({}, {"data_type": "text", "text": None}, {"text": ""}):
        assert to_row(input_ids=[1, 2], **fields).input_ids == (1, 2)


@pytest.mark.parametrize(
    ("fields", "messages"),
    [
        (
            {"instruction": "Add.", "input": "1 and 2", "output": "3", "text": "the whole prompt"},
            [("user", "Add.\n1 and 2"), ("assistant", "3")],
        ),
        ({"instruction": "Greet.", "input": "", "output": "Hi"}, [("user", "Greet."), ("assistant", "Hi")]),
        (
            {"id": "flan", "system_prompt": "Think.", "question": "1?", "response": "2"},
            [("system", "Think."), ("user", "1?"), ("assistant", "2")],
        ),
        ({"system_prompt": "", "question": "1?", "response": "2"}, [("user", "1?"), ("assistant", "2")]),
        (
            {"conversations": [{"from": "human", "value": "1?"}, {"from": "gpt", "value": "2"}]},
            [("user", "1?"), ("assistant", "2")],
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
                    {"role": "assistant", "content": "A cat."},
                ],
                "images": [RED],
            },
            [("user", "<image>What?"), ("assistant", "A cat.")],
        ),
        (
            {"images": [{"bytes": RED, "path": None}], "texts": [{"user": "1?", "assistant": "2"}] * 2},
            [("user", "1?"), ("assistant", "2"), ("user", "1?"), ("assistant", "2")],
        ),
    ],
)
def test_conversations_of_every_kind(fields, messages):
    row = to_row(**fields)
    assert [(message.role, message.content) for message in row.messages] == messages
    check_content(row)


def test_a_picture_with_one_text_is_a_caption_unless_the_text_places_it():
    assert to_row(image=RED, text="a cat").caption == "a cat"
    assert to_row(images=[RED], caption="a cat", text="elsewhere").caption == "a cat"
    for name in ("caption", "text", "content", "txt"):
        assert to_row(**{"image": RED, name: "see <image>"}).text == "see <image>"
    assert to_row(images=[RED, BLUE], text="<image> and <image>").images == (RED, BLUE)
    assert to_row(text="words").text == to_row(content="words").text == "words"
    assert to_row(text="HTML has <image> too").text == "HTML has <image> too"  # check_content decides


def test_the_first_field_with_a_picture_counts():
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A cat."}]
    assert to_row(images=[], image=RED, messages=turns).images == (RED,)
    assert to_row(images=[], image=RED, caption="a cat").images == (RED,)
    assert to_row(image={"bytes": None, "path": None}, img=RED, file_name="a.png", caption="a cat").images == (RED,)
    assert to_row(images=[BLUE], image=RED, text="a cat").images == (BLUE,)
    assert to_row(images=[], text="words").images == ()


@pytest.mark.parametrize(
    "name", ["image", "image_path", "image_file", "image_url", "img", "img_path", "file_name", "filename", "path"]
)
def test_every_usual_name_of_a_picture_is_looked_up(name):
    row = row_from_fields({name: "a.png", "text": "a cat"}, "row", "source", Path)
    assert (row.images, row.caption) == ((Path("a.png"),), "a cat")


def test_files_that_are_no_pictures_are_not_taken_for_one():
    row = to_row(path="source/main.py", file_name="main.py", content="print()")
    assert (row.images, row.text) == ((), "print()")


def test_what_is_empty_gives_way_to_what_is_not():
    assert to_row(image=RED, caption="a cat", text="").caption == "a cat"
    assert to_row(image=RED, data_type="t2i", caption="a cat", text=" ").caption == "a cat"
    assert to_row(messages=[], caption="", text="words").text == "words"
    turns = [{"role": "system", "content": ""}, *ASKED]
    assert to_row(image=RED, conversations=turns).messages == ANSWERED


def test_the_first_of_several_captions_counts():
    for name in ("caption", "captions", "text"):
        assert to_row(**{"image": RED, name: ["", " a cat ", "a dog"]}).caption == "a cat"
    with pytest.raises(DataError, match=r"^captions: it is empty"):
        to_row(image=RED, captions=[""])


def test_ids_and_sources_of_its_own():
    assert to_row(text="a").id == "row"
    assert [to_row(text="a", **{name: 7}).id for name in ("id", "uid", "key", "__key__")] == ["7"] * 4
    assert to_row(text="a", id="", uid=True, key="k").id == "k"
    assert to_row(text="a", id="\ud83d").id == "\\ud83d"
    assert (to_row(text="a").source, to_row(text="a", source="web").source) == ("source", "web")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"vqcode_512": "[1, 2, 3]", "text": "a"}, "vqcode_512: 3 codes do not fill a square grid"),
        ({"vqcode_512": "[[1], [1, 2]]", "text": "a"}, r"vqcode_512\[1\]: 2 codes do not fill"),
        ({"vqcode_512": "[1, 2", "text": "a"}, "vqcode_512: not a JSON list"),
        ({"vqcode_512": "[" * 200_000, "text": "a"}, "vqcode_512: not a JSON list"),
        ({"vqcode_512": "7", "text": "a"}, "vqcode_512: a list is needed, not int"),
        ({"vqcode_512": [-1], "text": "a"}, "flat list of codes from 0 on"),
        ({"vqcode_512": [2**32], "text": "a"}, "flat list of codes from 0 on"),
        ({"vqcode_512": [0.5], "text": "a"}, "flat list of codes from 0 on"),
        ({"vqcode_512": [[1], []], "text": "a"}, "flat list of codes from 0 on"),
        ({"data_type": "i2t", "text": "no turns"}, r"not told apart by \^\^\^turn_split"),
        ({"data_type": "i2t", "text": "^^^turn_split^^^".join("abc")}, "text: 3 turns in pair 0"),
        ({"data_type": "t2i", "vqcode_512": [1]}, "neither text nor caption"),
        ({"conversations": [{"from": "tool", "value": "a"}]}, r"conversations\[0\]\.from: 'tool' is none of human"),
        ({"conversations": [{"value": "a"}]}, r"conversations\[0\]\.role: None is none of"),
        ({"conversations": ["a"]}, r"conversations\[0\]: an object is needed, not str"),
        ({"conversations": "a"}, "conversations: a list is needed, not str"),
        ({"messages": [{"role": "user", "content": None}]}, r"messages\[0\]\.content: it is empty"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, r"content\[0\]: neither a text nor an im"),
        ({"texts": [{"user": "a"}]}, r"texts\[0\]\.assistant: a text is needed"),
        ({"instruction": 1, "output": "a"}, "instruction: a text is needed, not int"),
        ({"image": 3, "caption": "a"}, "image: a picture is needed, not int"),
        ({"images": [RED, None], "text": "a"}, r"images\[1\]: the picture is empty"),
        ({"image": "a.png", "caption": "a"}, "image: the picture itself is needed, not the name of a file"),
        ({"caption": ["a"]}, "caption: a text is needed, not list"),
        ({"image": RED, "caption": None}, "^caption: it is empty"),
        ({"image": RED, "caption": " "}, "^caption: it is empty"),
        ({"text": ""}, "^text: it is empty"),
        ({"text": "\ud83d"}, "^text: it is not valid Unicode"),
        ({"conversations": None}, "^conversations: it is empty"),
        ({"conversations": [{"from": "human", "value": ""}]}, r"^conversations\[0\]\.value: it is empty"),
        ({"texts": [{"user": "a", "assistant": ""}]}, r"^texts\[0\]\.assistant: it is empty"),
        ({"instruction": "", "input": "", "output": "a"}, "^instruction: it is empty"),
        ({"question": "a", "response": ""}, "^response: it is empty"),
        ({"data_type": "i2t", "caption": "a^^^turn_split^^^"}, "^caption, pair 0: it is empty"),
        ({"image": None, "caption": "a"}, "^image: the picture is empty"),
        ({"images": [], "caption": "a"}, "^images: the picture is empty"),
        ({"image": "", "caption": "a"}, "^image: the picture is empty"),
        ({"image": b"", "caption": "a"}, "^image: the picture is empty"),
        ({"images": [RED, {"bytes": None, "path": None}], "text": "a"}, r"^images\[1\]: the picture is empty"),
        ({"video": "a.mp4", "text": "a"}, "^video: texts and pictures are read, videos and sound are not"),
        ({"input_ids": "[1, 2]"}, "^input_ids: a list is needed, not str"),
        ({"input_ids": [1, 2.0]}, r"^input_ids\[1\]: a whole number is needed, not float"),
        ({"input_ids": [[1, 2]]}, r"^input_ids\[0\]: a whole number is needed, not list"),
        ({"input_ids": [1, 2], "image": RED}, "^input_ids: ready ids are read in rows of text alone"),
        ({"input_ids": None}, "^input_ids: it is empty"),
        ({"url": "a", "size": 3}, r"no caption, messages or text in it.*\(its fields: url, size\)"),
        ({}, r"\(its fields: none\)"),
    ],
)
def test_fields_that_fit_nothing_are_refused_with_a_reason(fields, reason):
    with pytest.raises(DataError, match=reason):
        to_row(**fields)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"conversations": ASKED}, "conversations: 1 <image> for 0 images"),
        (
            {"conversations": ASKED[:1], "image": RED},
            "conversations: a conversation must end with the assistant's turn",
        ),
        ({"texts": [{"user": "<image>", "assistant": "2"}]}, "texts: 1 <image> for 0 images"),
        ({"instruction": "<image>", "output": "a"}, "instruction: 1 <image> for 0 images"),
        ({"content": "<image>"}, "content: 1 <image> for 0 images"),
        ({"caption": "<image>"}, "images: a caption goes with exactly one image, found 0"),
        ({"caption": "<image>", "images": [RED, BLUE]}, "caption: 1 <image> for 2 images"),
    ],
)
def test_what_does_not_fit_is_told_in_the_names_of_the_source(fields, reason):
    with pytest.raises(DataError) as caught:
        check_content(to_row(**fields))
    assert str(caught.value) == f"sample 'row', {reason}"
