"""Text comes back from its ids unchanged, and bytes are counted exactly."""

import itertools
import json

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from data.config import DataConfig
from data.sources import open_documents
from data.tokens import END, ByteTokenizer, JsonTokenizer, open_tokenizer, train_bpe

STRANGE = "caf\u00e9 \u4f60\u597d \U0001f600\r\n\ttab  two\x0b" + END + " \u0301end\n\n"


@pytest.fixture(scope="module")
def real_texts():
    documents = open_documents(DataConfig())()
    return [document.text for document in itertools.islice(documents, 0, 200, 10)]


@pytest.fixture(scope="module")
def bpe(real_texts, tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    train_bpe(real_texts, 600, path)
    return JsonTokenizer(path)


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request, bpe):
    return ByteTokenizer() if request.param == "bytes" else bpe


def test_round_trip_and_bytes(tokenizer, real_texts):
    sizes = tokenizer.token_bytes()
    assert sizes.shape == (tokenizer.vocab_size,)
    assert sizes[tokenizer.end_id] == 0
    for text in [*real_texts, STRANGE, ""]:
        ids = tokenizer.encode(text)
        assert tokenizer.end_id not in ids
        assert tokenizer.decode(ids) == text
        assert sizes[ids].sum() == len(text.encode())
    together = tokenizer.encode_batch([STRANGE, "", "x"])
    for ids, text in zip(together, [STRANGE, "", "x"], strict=True):
        np.testing.assert_array_equal(ids, tokenizer.encode(text))
    assert tokenizer.decode([*tokenizer.encode("a"), tokenizer.end_id]) == "a"


def test_bpe_fills_its_vocabulary_and_is_reproducible(bpe, real_texts, tmp_path):
    assert bpe.vocab_size == 600
    assert len(bpe.encode(real_texts[0])) < 0.6 * len(real_texts[0].encode())
    train_bpe(real_texts, 600, tmp_path / "again.json")
    assert JsonTokenizer(tmp_path / "again.json").fingerprint == bpe.fingerprint


def test_bpe_is_trained_once(tmp_path):
    config = DataConfig(tokenizer="bpe")
    first = open_tokenizer(config, 300, tmp_path, lambda: ["one two three"] * 9)
    content = (tmp_path / "tokenizer.json").read_bytes()
    again = open_tokenizer(config, 300, tmp_path, lambda: pytest.fail("trained twice"))
    assert again.fingerprint == first.fingerprint
    assert (tmp_path / "tokenizer.json").read_bytes() == content


def word_level(path, *special):
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(list(special))
    backend.save(str(path))
    return path


def test_any_tokenizer_json(tmp_path):
    path = word_level(tmp_path / "words.json", "</s>", "<stop>")
    found = open_tokenizer(DataConfig(tokenizer=str(path)), 5, tmp_path, list)
    assert (found.vocab_size, found.end_id) == (5, 3)
    named = open_tokenizer(DataConfig(tokenizer=str(path), end_token="<stop>"), 5, tmp_path, list)
    assert named.end_id == 4
    assert named.token_bytes().tolist() == [5, 1, 1, 4, 0]
    assert found.fingerprint != named.fingerprint


def test_bytes_of_a_byte_fallback_tokenizer(tmp_path):
    """SentencePiece's way: a mark for a space, `<0x..>` for what is not in the vocabulary."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    fallback = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "</s>", *fallback])
    backend.train_from_iterator(["the cat and the caf\u00e9 on the mat"] * 5, trainer)
    content = json.loads(backend.to_str())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] == "</s>"]
    (tmp_path / "sp.json").write_text(json.dumps(content))
    tokenizer = JsonTokenizer(tmp_path / "sp.json")
    text = "the caf\u00e9 on \u4f60 mat"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())


def test_errors_name_the_keys(tmp_path):
    def message(vocab_size, **config):
        with pytest.raises(ValueError) as error:
            open_tokenizer(DataConfig(**config), vocab_size, tmp_path, list)
        return str(error.value)

    assert message(256) == (
        "config.data.tokenizer = 'bytes' has 257 tokens, more than config.model.vocab_size = 256; "
        "raise config.model.vocab_size to at least 257, or choose another tokenizer"
    )
    assert "config.model.vocab_size = 256" in message(256, tokenizer="bpe")
    assert message(300, tokenizer="no/such.json") == (
        "config.data.tokenizer = 'no/such.json': no such file; choose bytes, bpe or the path of a "
        "tokenizer.json"
    )
    (tmp_path / "bad.json").write_text("{}")
    assert "not a tokenizer.json" in message(300, tokenizer=str(tmp_path / "bad.json"))
    (tmp_path / "binary.json").write_bytes(b"\xff\x00")
    assert "not a tokenizer.json" in message(300, tokenizer=str(tmp_path / "binary.json"))
    words = str(word_level(tmp_path / "words.json", "<stop>"))
    assert "config.data.end_token = ''" in message(300, tokenizer=words)
    assert "config.data.end_token = '<x>'" in message(300, tokenizer=words, end_token="<x>")
