"""Captions of the shapes: paraphrases that state some attributes and leave the others open, and the way back."""

import re
import string
from collections.abc import Mapping

import numpy as np

from unclip_pl.errors import InputError
from unclip_pl.shapes.render import ATTRIBUTES, BACKGROUNDS, COLORS, VALUES, Attributes, Split, pairs

TEMPLATES = (
    "a {size} {color} {shape} on a {background} background",
    "a {size} {color} {shape} {position} on a {background} background",
    "a {color} {shape}",
    "a {size} {shape} {position}",
    "a {color} {shape} {position}",
    "a {color} shape on {background}",
    "{position}, a {size} {color} {shape}",
    "a picture of a {shape} on a {background} background",
    "a {shape} {position} on {background}",
    "a {size} {color} shape {position}",
)

PHRASES: dict[str, tuple[str, ...]] = {
    "small": ("small", "little"),
    "large": ("large", "big"),
    "center": ("in the center", "in the middle"),
    "left": ("on the left",),
    "right": ("on the right",),
    "top": ("at the top",),
    "bottom": ("at the bottom",),
}
"""Words for a value that is not said by its own name."""

WORDS: dict[str, tuple[str, str]] = {
    **{value: (name, value) for name in ATTRIBUTES if name != "background" for value in VALUES[name]},
    "little": ("size", "small"),
    "tiny": ("size", "small"),
    "big": ("size", "large"),
    "centre": ("position", "center"),
    "middle": ("position", "center"),
}
"""Word -> (attribute, value), of the object. Backgrounds are read by where they stand: "a black circle" has none."""

_GROUND = re.compile(r"\b(?:on|against|over) (?:an? |the )?(\w+)(?: background)?|\b(\w+) background")


def caption(attributes: Attributes, rng: np.random.Generator) -> tuple[str, dict[str, str]]:
    """Write a caption that states some of a picture's attributes.

    The template is drawn without a look at the values, so unstated attributes keep the distribution of `conditional`.

    Returns:
        Text, and the stated attributes by name.
    """
    template = TEMPLATES[rng.integers(len(TEMPLATES))]
    stated = {name: value for name, value in attributes._asdict().items() if name in fields(template)}
    phrases = {name: PHRASES.get(value, (value,)) for name, value in stated.items()}
    return fill(template, {name: said[rng.integers(len(said))] for name, said in phrases.items()}), stated


def fields(template: str) -> tuple[str, ...]:
    """List the attributes that a template states, in its order."""
    return tuple(name for _, name, _, _ in string.Formatter().parse(template) if name)


def fill(template: str, phrases: Mapping[str, str]) -> str:
    """Fill a template's fields, and write `a` as `an` before a vowel."""
    return re.sub(r"\ba(?= [aeiou])", "an", template.format(**phrases))


def parse(caption: str) -> dict[str, str]:
    """Find the attributes that a caption states, ours or hand-written: the exact inverse of `caption`.

    Case, punctuation and unknown words do not matter. An attribute said twice with different values is not stated.
    """
    text = " ".join(re.findall(r"[a-z]+", caption.lower().replace("grey", "gray")))
    found: list[tuple[str, str]] = []

    def take(match: re.Match[str]) -> str:
        word = match[1] or match[2]
        if word not in BACKGROUNDS and word not in COLORS:
            return match[0]
        found.append(("background", word))
        return ""

    rest = _GROUND.sub(take, text)
    found += [WORDS[word] for word in rest.split() if word in WORDS]
    values = {name: {value for key, value in found if key == name} for name in ATTRIBUTES}
    # "on a red background" names no background of ours, but its red is no object's colour either.
    return {name: value for name, said in values.items() if len(said) == 1 and (value := said.pop()) in VALUES[name]}


def conditional(stated: Mapping[str, str], attribute: str, split: Split) -> np.ndarray:
    """Compute the renderer's true distribution of one attribute, given the stated ones.

    It is uniform, but for the (shape, colour) pairs that train and val leave out: there, blue things are never hearts.

    Args:
        stated: attributes by name, from `caption` or `parse`.
        attribute: name of one that is not stated.
        split: split of the pictures.

    Returns:
        (len(VALUES[attribute]),) float64, sums to 1.
    """
    if attribute not in VALUES or attribute in stated:
        raise InputError(
            f"Expected an unstated attribute out of {', '.join(ATTRIBUTES)}. Got {attribute!r}: give another."
        )
    values = VALUES[attribute]
    if attribute not in ("shape", "color"):
        return np.full(len(values), 1 / len(values))
    here, there = (0, "color") if attribute == "shape" else (1, "shape")
    possible = [pair for pair in pairs(split) if stated.get(there, pair[1 - here]) == pair[1 - here]]
    if not possible:
        raise InputError(f"No picture of split {split!r} has {there} {stated[there]!r}. Give another caption.")
    counts = np.array([sum(pair[here] == value for pair in possible) for value in values])
    return counts / counts.sum()
