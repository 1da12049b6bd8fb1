"""Texts as they come: whole characters at once, nothing of what ends them."""

from __future__ import annotations

import random

import pytest

from data.tokens import ByteTokenizer, JsonTokenizer, train_bpe
from generation.text import Text

BYTES = ByteTokenizer()


def pieces(text: Text, tokens) -> list[str]:
    found = []
    for token in tokens:
        if text.reason:
            break
        found.append(text.add(int(token)))
    if not text.reason:
        found.append(text.finish("length"))
    return found


def test_characters_come_whole():
    text = Text(BYTES.decode)
    assert pieces(text, "aé∑b".encode()) == ["a", "", "é", "", "", "∑", "b", ""]
    assert str(text) == "aé∑b"


def test_bytes_that_are_no_character_come_in_the_end():
    text = Text(BYTES.decode)
    assert "".join(pieces(text, b"a\xe2\x88")) == str(text) == "a\ufffd"
    assert "".join(pieces(Text(BYTES.decode), [0x88] * 40)) == "\ufffd" * 40


@pytest.mark.parametrize("stop", [("two",), ("wo t", "three"), ("three", "ee f")])
def test_a_stop_is_never_given_nor_its_beginning(stop):
    whole = "one two three four"
    text = Text(BYTES.decode, stop)
    given = pieces(text, whole.encode())
    end = min(at for at in map(whole.find, stop) if at >= 0)
    assert "".join(given) == str(text) == whole[:end]
    assert text.reason == "stop"


def test_the_beginning_of_a_stop_that_does_not_come_is_given():
    text = Text(BYTES.decode, ("two!",))
    given = pieces(text, b"a two? b")
    assert "".join(given) == "a two? b"
    assert given[2:6] == ["", "", "", "two?"]


def test_the_end_token_ends_it():
    text = Text(BYTES.decode, end_id=BYTES.end_id)
    assert "".join(pieces(text, [104, 105, BYTES.end_id, 104])) == "hi"
    assert (text.reason, text.tokens) == ("end", [104, 105])


def test_pieces_of_a_bpe_are_its_text(tmp_path):
    """Whatever the tokens: those that carry half a character, or a space of their own."""
    samples = ["naïve café ∑∑ 日本語 text " * 20, "def f(x):\n    return x\n" * 20]
    train_bpe(samples, 300, tmp_path / "tokenizer.json")
    tokenizer = JsonTokenizer(tmp_path / "tokenizer.json")
    rng = random.Random(0)
    for _ in range(50):
        words = " ".join(rng.choice(["naïve", "∑", "日本", "def f(x):\n", "🙂"]) for _ in range(9))
        text = Text(tokenizer.decode)
        assert "".join(pieces(text, tokenizer.encode(words))) == words == str(text)
