from importlib import import_module

import emoji
import numpy as np
import pytest
from PIL import Image

from uni_x.errors import InputError, MissingExtraError
from uni_x.scenes import COLOURS, HELD_OUT_COLOURS, HELD_OUT_PAIRS, KINDS, Scene, Thing, compose, named_pictures
from uni_x.scenes import pictures as pictures_module
from uni_x.scenes.catalogue import COLOURABLE, may_meet, training_colours, with_article
from uni_x.scenes.pictures import OBJECT, TILE, tile


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_every_object_is_the_emoji_it_is_named_after(kind):
    character = chr(int(kind.code, 16))
    entry = emoji.EMOJI_DATA.get(character) or emoji.EMOJI_DATA[character + "\ufe0f"]

    assert entry["en"] == f":{kind.emoji.replace(' ', '_')}:"
    assert kind.name == kind.emoji.split()[-1] or f":{kind.name}:" in entry["alias"]


def test_twenty_objects_of_which_twelve_come_in_eight_colours():
    assert len(KINDS) == 20
    assert len(COLOURABLE) == 12
    assert len(COLOURS) == 8


def test_held_out_combinations_leave_every_colour_and_object_equally_frequent():
    assert sorted(colour for _, colour in HELD_OUT_COLOURS) == sorted(COLOURS)
    assert sorted(name for pair in HELD_OUT_PAIRS for name in pair) == sorted(KINDS)
    assert "brown" not in training_colours("heart")
    assert not may_meet("heart", "star", "ball")
    assert may_meet("heart", "star", "car")


def test_an_article_goes_by_the_next_word():
    assert with_article("heart") == "a heart"
    assert with_article("orange heart") == "an orange heart"


@pytest.mark.parametrize("name", KINDS)
def test_an_object_fills_its_cell_and_stands_in_the_middle(name):
    ink = tile(name, "red" if KINDS[name].colourable else None).min(axis=2) < 250
    rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    extents = [part[-1] + 1 - part[0] for part in (rows, columns)]
    middles = [(part[-1] + 1 + part[0]) / 2 for part in (rows, columns)]

    assert OBJECT - 2 <= max(extents) <= OBJECT + 2
    assert middles == pytest.approx([TILE / 2, TILE / 2], abs=1)


@pytest.mark.parametrize("name", COLOURABLE)
def test_a_colour_is_the_most_frequent_one_beside_white_and_line(name):
    for colour, rgb in COLOURS.items():
        pixels = tile(name, colour).reshape(-1, 3)
        assert (pixels == rgb).all(axis=1).sum() > 40, colour


def test_unknown_objects_and_colours_are_told_with_what_there_is():
    with pytest.raises(InputError, match="no object 'unicorn': the scenes know heart, star"):
        tile("unicorn", None)
    with pytest.raises(InputError, match="it takes one of red, orange"):
        tile("heart", "mauve")
    with pytest.raises(InputError, match="it takes no colour"):
        tile("tree", "red")


def test_a_scene_draws_each_thing_in_its_cell_and_nothing_else():
    picture = np.asarray(compose(Scene((Thing("heart", "red", 0, 3), Thing("tree", None, 2, 1)))))

    assert picture.shape == (128, 128, 3)
    assert (picture[:32, 96:] == tile("heart", "red")).all()
    assert (picture[64:96, 32:64] == tile("tree", None)).all()
    assert (picture < 255).any(axis=2).sum() == sum(
        (tile(*kind) < 255).any(axis=2).sum() for kind in (("heart", "red"), ("tree", None))
    )


@pytest.mark.parametrize("cells", [((0, 0), (0, 0)), ((0, 0), (0, 4)), ((-1, 0), (1, 1))])
def test_a_scene_has_one_thing_to_a_cell_of_the_lattice(cells):
    with pytest.raises(InputError, match="distinct cells"):
        Scene(tuple(Thing("tree", None, *cell) for cell in cells))


def test_the_single_pictures_are_many_and_have_names(monkeypatch):
    # Rendering all of them takes seconds, and the list is what is looked at here.
    monkeypatch.setattr(pictures_module, "_render", lambda svg, size: Image.new("RGB", (size, size)))
    named = {picture.name: picture for picture in named_pictures(16)}

    assert len(named) > 1500
    assert {"red heart", "cat", "pizza", "woman scientist"} <= set(named)
    assert not any("flag" in name.split() or "skin tone" in name for name in named)


def test_a_single_picture_is_rendered_on_white_at_the_size_asked_for():
    picture = next(picture for picture in named_pictures(24) if picture.name == "anchor")

    assert picture.image.size == (24, 24)
    assert picture.image.mode == "RGB"
    assert picture.image.getpixel((0, 0)) == (255, 255, 255)
    assert len(picture.image.getcolors()) > 2


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    def without_resvg(module):
        if module == "resvg_py":
            raise ImportError(module)
        return import_module(module)

    monkeypatch.setattr(pictures_module, "import_module", without_resvg)
    with pytest.raises(MissingExtraError, match=r"resvg-py: install it with `pip install 'uni-x\[quickstart\]'`"):
        next(named_pictures(16))
