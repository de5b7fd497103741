"""The colours of the page of ``sklformat view``: text that can be read, and steps that every eye tells apart."""

import itertools
import re
from importlib.resources import files

import numpy as np
import pytest

STEPS = ["c0", "c1", "c2", "c3", "c4"]
# Text and what may be behind it: the page, its fields and its records are on paper, tokens and the legend on steps.
PAIRS = [("ink", "paper"), ("soft", "paper"), ("bad", "paper"), *(("ink", step) for step in STEPS)]
# Borders of fields, bars and outlines are no text.
SHAPES = [("line", "paper"), ("bar", "paper"), *(("ink", step) for step in STEPS)]
# Machado, Oliveira, Fernandes 2009, "A Physiologically-based Model for Simulation of Color Vision Deficiency", severity
# 1.0, on linear RGB; the last has no colour at all.
EYES = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    "grey": [[0.2126, 0.7152, 0.0722]] * 3,
}


def themes():
    """Names and colours of the light theme, and of the dark one."""
    css = files("sklformat.views").joinpath("page.css").read_text()
    blocks = re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    light, dark = (dict(re.findall(r"--(\w+): (#[0-9a-f]{6});", block)) for block in blocks)
    assert light.keys() == dark.keys() == {"ink", "paper", "soft", "line", "bad", "bar", *STEPS}
    return {"light": light, "dark": dark}


def linear(colour):
    """Linear RGB of sRGB in hexadecimal."""
    value = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def luminance(rgb):
    return float(np.clip(rgb, 0, 1) @ [0.2126, 0.7152, 0.0722])


def contrast(one, other):
    """As WCAG 2 defines it, 1 to 21."""
    low, high = sorted([luminance(linear(one)), luminance(linear(other))])
    return (high + 0.05) / (low + 0.05)


def lightness(rgb):
    """L* of CIELAB, 0 to 100."""
    y = luminance(rgb)
    return 116 * y ** (1 / 3) - 16 if y > 216 / 24389 else y * 24389 / 27


def test_the_ruler():
    """Black on white is 21, and a middle grey is of lightness 53.6."""
    assert 21 == pytest.approx(contrast("#000000", "#ffffff"))
    assert 53.6 == pytest.approx(lightness(linear("#808080")), abs=0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_can_be_read(theme):
    """Every pair of text and background is of contrast 4.5 or more, every shape of 3 or more."""
    colours = themes()[theme]
    assert {} == {pair: c for pair in PAIRS if (c := contrast(*(colours[name] for name in pair))) < 4.5}
    assert {} == {pair: c for pair in SHAPES if (c := contrast(*(colours[name] for name in pair))) < 3}


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("eyes", EYES)
def test_steps_are_told_apart(theme, eyes):
    """From each step of confidence to the next the lightness changes one way, by 5 or more, for every kind of eye."""
    colours = themes()[theme]
    steps = [lightness(np.array(EYES[eyes]) @ linear(colours[step])) for step in STEPS]
    sign = 1 if theme == "light" else -1  # what is sure fades into the paper
    assert 5 <= min(sign * (b - a) for a, b in itertools.pairwise(steps)), steps


def test_colours_are_named_once():
    """Nothing is coloured but by the names, so that these tests see every colour there is."""
    css = files("sklformat.views").joinpath("page.css").read_text()
    rest = re.sub(r":root \{.*?\}", "", css, flags=re.DOTALL)
    assert [] == re.findall(r"#[0-9a-fA-F]{3,8}\b(?=[;\s}])|\b(?:rgb|hsl|lab|lch|color)a?\(", rest)
    named = re.findall(r"(?:^|[\s;{])(?:color|background): ([^;}]+)", rest)
    assert {"inherit"} == {value for value in named if not re.fullmatch(r"var\(--\w+\)", value)}
