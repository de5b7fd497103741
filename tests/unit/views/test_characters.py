"""Text for a terminal: nothing in it commands the terminal, and its width is known."""

import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from sklformat.views.characters import columns, is_writable, padded, visible

TEXT = st.text(st.characters(exclude_categories=()), max_size=30)  # half surrogates too


@given(TEXT, st.sampled_from(["utf-8", "latin-1", "ascii"]))
def test_nothing_commands_the_terminal(text, encoding):
    """Whatever a text holds, what is shown is printable and fits the encoding, so that no control byte gets out."""
    shown = visible(text, encoding)
    assert shown.isprintable()
    assert is_writable(shown, encoding)
    assert not any(unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") for c in shown)
    assert all(byte >= 0x20 and byte != 0x7F for byte in shown.encode(encoding))


def test_escapes():
    """They are those of Python, so that two texts never look alike; a space stays one, and wide letters are kept."""
    assert "\\x1b[31m\\n\\t\\\\ ü 語 \\u202e\\x9b\\U000e0001\\ud800" == visible(
        "\x1b[31m\n\t\\ ü 語 \u202e\x9b\U000e0001\ud800"
    )
    assert "\\u8a9e\\xfc" == visible("語ü", "ascii")
    assert "\\u0301e\u0301" == visible("\u0301e\u0301")  # the first would join what stands before it


@given(TEXT.map(visible), st.integers(1, 12))
def test_padding_is_exact(text, width):
    """A cell has its width, whatever is in it, and is cut only where it must be."""
    cell = padded(text, width)
    assert width == columns(cell)
    assert cell.startswith(text) == (columns(text) <= width)


def test_columns():
    """Wide characters take two columns, joining ones none."""
    assert (5, 4, 1, 2) == tuple(map(columns, ("plain", "日本", "e\u0301", "\u1112\u1161")))
