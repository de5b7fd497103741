"""Names that are no path here: answered at once, in words that say what was looked for and where."""

import re
import socket

import huggingface_hub
import pytest

from sklformat.distill.models import hub, loading


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """An empty directory, no proxy, and a hub that is this machine's; nothing may wait for it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub.urllib.request, "getproxies", dict)
    monkeypatch.setattr("time.sleep", lambda _: pytest.fail("waits to ask again"))
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", place)
        yield server, place


@pytest.mark.parametrize("name", ["./no", "/no/such", "~/no", "../no", "a/b/c", "runs/tiny", "no/", "/", "a\\b", "."])
def test_a_path_is_looked_for_here_only(name, tmp_path, monkeypatch):
    """What can be no name of the hub, or begins with a directory that is here, is not asked for anywhere else."""
    (tmp_path / "runs").mkdir()
    monkeypatch.setattr(hub, "_is_reachable", lambda _: pytest.fail("asks the hub"))
    if name in ("/", "."):
        assert "" == hub.why_not_asked(name)  # it is here
        return
    for load, what in ((loading.load_tokenizer, "tokenizer"), (loading.load_model, "model")):
        with pytest.raises(OSError, match=f"^{re.escape(name)}: cannot load a {what}; there is no such directory$"):
            load(name)


def test_a_mistyped_path_is_given_the_name_beside_it(tmp_path):
    """A directory of nearly the same name is named."""
    (tmp_path / "runs" / "teacher").mkdir(parents=True)
    with pytest.raises(OSError, match=r"; there is no such directory; did you mean runs/teacher\?$"):
        loading.load_tokenizer("runs/taecher")


@pytest.mark.parametrize("name", ["typo", "someone/typo", "someone/typo.v2"])
def test_a_hub_that_does_not_answer_is_asked_once(name, alone):
    """A name that is not here is looked for in the hub's cache, without a second's wait for the hub."""
    server, place = alone
    assert "" == hub.why_not_asked(name)  # it answers: transformers may ask
    server.close()
    words = (
        f"{name}: cannot load a tokenizer; there is no such directory, it is not (or not whole) in the Hugging Face "
        f"cache, and the hub ({place}) cannot be reached"
    )
    with pytest.raises(OSError, match=f"^{re.escape(words)}$"):
        loading.load_tokenizer(name)
    with pytest.raises(OSError, match=f"^{re.escape(words.replace('a tokenizer', 'a model'))}$"):
        loading.load_model(name)


def test_a_hub_that_must_not_be_asked_is_not(monkeypatch):
    """HF_HUB_OFFLINE is kept, and named."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "_is_reachable", lambda _: pytest.fail("asks the hub"))
    with pytest.raises(OSError, match=r"cache, and HF_HUB_OFFLINE says not to ask the hub$"):
        loading.load_tokenizer("someone/typo")


def test_a_hub_without_the_name_says_so(tmp_path, monkeypatch):
    """Where the hub answers, its own words are in the message."""

    def from_pretrained(*_, local_files_only, **__):
        assert not local_files_only
        raise OSError("someone/typo is not a valid model identifier\nmore")

    monkeypatch.setattr(loading.transformers.AutoTokenizer, "from_pretrained", from_pretrained)
    words = "there is no such directory, and the Hugging Face hub does not give it (someone/typo is not a valid model"
    with pytest.raises(OSError, match=f"^someone/typo: cannot load a tokenizer; {re.escape(words)}"):
        loading.load_tokenizer("someone/typo")


def test_a_proxy_is_taken_to_reach_the_hub(alone, monkeypatch):
    """Behind a proxy this machine cannot connect by itself, so transformers is left to try."""
    alone[0].close()
    monkeypatch.setattr(hub.urllib.request, "getproxies", lambda: {"https": "http://proxy:3128"})
    assert "" == hub.why_not_asked("someone/typo")
    monkeypatch.setattr(hub.urllib.request, "getproxies", lambda: {"no": "localhost"})
    assert "cannot be reached" in hub.why_not_asked("someone/typo")
