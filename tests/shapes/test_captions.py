import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from unclip_pl.shapes.captions import PHRASES, TEMPLATES, caption, conditional, fields, fill, parse
from unclip_pl.shapes.render import ATTRIBUTES, VALUES, Attributes, draw_attributes


@pytest.mark.parametrize("template", TEMPLATES)
def test_parse_inverts_every_caption(template: str) -> None:
    names = fields(template)
    said = {name: [(v, phrase) for v in VALUES[name] for phrase in PHRASES.get(v, (v,))] for name in names}
    for chosen in itertools.product(*said.values()):
        text = fill(template, {name: phrase for name, (_, phrase) in zip(names, chosen, strict=True)})
        assert parse(text) == {name: value for name, (value, _) in zip(names, chosen, strict=True)}, text


def test_caption_states_what_it_says() -> None:
    rng = np.random.default_rng(0)
    stated_by: Counter[str] = Counter()
    for attributes in draw_attributes(1000, split="train", rng=rng):
        text, stated = caption(attributes, rng)
        assert parse(text) == stated
        assert stated.items() <= attributes._asdict().items()
        stated_by.update(list(stated))
    # Each attribute is said often and left out often: a caption has many right images.
    assert all(300 < stated_by[name] < 900 for name in ATTRIBUTES)


def test_the_prompts_say_what_can_be_drawn() -> None:
    lines = (Path(__file__).parents[2] / "data/prompts/shapes.txt").read_text().splitlines()
    assert len({tuple(parse(line).items()) for line in lines}) == len(lines)
    assert all(len(parse(line)) >= 2 for line in lines)


def test_captions_repeat_by_seed() -> None:
    star = Attributes("star", "red", "large", "top", "navy")
    texts = [[caption(star, rng)[0] for _ in range(20)] for rng in (np.random.default_rng(1), np.random.default_rng(1))]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 4


@pytest.mark.parametrize(
    ("text", "stated"),
    [
        (
            "a large red star on a navy background",
            {"shape": "star", "color": "red", "size": "large", "background": "navy"},
        ),
        ("A Large, RED star; on NAVY!", {"shape": "star", "color": "red", "size": "large", "background": "navy"}),
        ("navy background, tiny heart", {"shape": "heart", "size": "small", "background": "navy"}),
        ("an orange ring in the centre", {"shape": "ring", "color": "orange", "position": "center"}),
        ("a circle against the grey background", {"shape": "circle", "background": "gray"}),
        ("a black circle", {"shape": "circle"}),
        ("a blue circle on a red background", {"shape": "circle", "color": "blue"}),
        ("a red or green cross", {"shape": "cross"}),
        ("a photo of a dog", {}),
        ("", {}),
    ],
)
def test_hand_written(text: str, stated: dict[str, str]) -> None:
    assert parse(text) == stated


def test_conditional_equals_the_renderer() -> None:
    n = 60_000
    drawn = draw_attributes(n, split="train", rng=np.random.default_rng(2))
    for stated in ({}, {"color": "blue"}, {"shape": "ring", "size": "small"}, {"background": "navy", "color": "cyan"}):
        match = [a for a in drawn if stated.items() <= a._asdict().items()]
        for name in set(ATTRIBUTES) - set(stated):
            true = conditional(stated, name, "train")
            assert true.sum() == pytest.approx(1)
            found = np.array([sum(getattr(a, name) == v for a in match) for v in VALUES[name]])
            assert not found[true == 0].any()
            assert np.abs(found / len(match) - true).max() < 4.5 * 0.5 / len(match) ** 0.5


def test_conditional_knows_the_held_out_pairs() -> None:
    heart = VALUES["shape"].index("heart")
    assert conditional({"color": "blue"}, "shape", "train")[heart] == 0
    assert conditional({"color": "blue"}, "shape", "val")[heart] == 0
    assert conditional({"color": "blue"}, "shape", "heldout")[heart] == 1 / 8


def test_conditional_refuses_what_is_stated_or_unknown() -> None:
    with pytest.raises(ValueError, match="unstated"):
        conditional({"color": "blue"}, "color", "train")
    with pytest.raises(ValueError, match="unstated"):
        conditional({}, "weight", "train")
    with pytest.raises(ValueError, match="No picture"):
        conditional({"color": "mauve"}, "shape", "train")
