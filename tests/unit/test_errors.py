"""Errors: one family, every C status one of them, and where a fault is in every message."""

from pathlib import Path

import pytest

import sklformat as skl
from sklformat import errors, native
from sklformat._native import ffi


def test_every_status_has_an_exception():
    """Each status of skl.h but SKL_OK becomes an exception, with its pinned value."""
    statuses = {name: value for value, name in ffi.typeof("skl_status").elements.items()}
    assert statuses.pop("SKL_OK") == 0
    assert dict.fromkeys(errors.STATUS_ERRORS) == dict.fromkeys(statuses)
    assert list(range(1, 8)) == sorted(statuses.values())
    for name, value in statuses.items():
        with pytest.raises(errors.STATUS_ERRORS[name]) as caught:
            native.check(value)
        assert type(caught.value) is errors.STATUS_ERRORS[name]


def test_every_reason_has_a_text():
    """Each reason of skl.h makes a message with the position or the value in it, and no reason is shown as a number."""
    fault = ffi.new("skl_fault *")
    for value, name in ffi.typeof("skl_reason").elements.items():
        fault.reason, fault.position, fault.value = value, 12345, 67890
        with pytest.raises(ValueError, match=r".+") as caught:
            native.check(ffi.typeof("skl_status").relements["SKL_ERR_ARG"], fault)
        text = str(caught.value)
        if name == "SKL_REASON_NONE":
            assert text == "SKL_ERR_ARG"
        elif name != "SKL_REASON_RESERVED":
            assert "12345" in text or "67890" in text


def test_one_family():
    """Every public error is a SklError, the file's faults are FormatErrors, and a ring's timeout is a TimeoutError."""
    names = [name for name in skl.__all__ if name.endswith("Error")]
    assert all(issubclass(getattr(skl, name), skl.SklError) for name in names)
    faults = {name for name in names if issubclass(getattr(skl, name), skl.FormatError)}
    known = "FormatError CorruptError TruncatedError UnsupportedError MissingShardError UnfinishedError UnreadableError"
    assert set(known.split()) == faults
    assert issubclass(skl.RingTimeoutError, TimeoutError)
    assert issubclass(skl.UnreadableError, OSError)
    assert issubclass(skl.UnfinishedError, skl.MissingShardError)


def test_message_says_where():
    """path, section with sequence, and byte come before the message, as far as they are known."""
    error = skl.CorruptError("bad", path="a.skl", offset=91, section="block", sequence=17)
    assert str(error) == "a.skl: block 17: byte 91: bad"
    assert str(skl.CorruptError("bad", section="index")) == "index: bad"
    assert str(skl.CorruptError("bad")) == "bad"
    assert (Path("a.skl"), 91, "block", 17) == (error.path, error.offset, error.section, error.sequence)
    assert skl.AlignmentError("no", sequence_index=3).sequence_index == 3
