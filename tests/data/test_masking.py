"""Masked language modelling: the 80/10/10 rule token by token, and its rates."""

import itertools

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from data.draws import row_keys, uniform
from data.masking import CHOICE, FATE, VALUE, mask_tokens
from data.objective import ObjectiveConfig

MLM = ObjectiveConfig(name="masked_lm")
VOCAB, MASK = 60, 57
SPECIAL = np.isin(np.arange(VOCAB), [0, 31, 57, 58])


def rows_of_text(rows, length, seed=0):
    """Packed rows of three documents each and some padding; special tokens among them."""
    rng = np.random.default_rng(seed)
    segments = np.sort(rng.integers(1, 4, (rows, length)), axis=1)
    real = np.arange(length) < rng.integers(length // 2, length + 1, rows)[:, None]
    tokens = rng.integers(0, VOCAB, (rows, length)).astype(np.int32)
    arrays = {"tokens": tokens, "segments": segments.astype(np.int32), "positions": tokens}
    return {name: array * real for name, array in arrays.items()}


def slow_masking(batch, keys, rate):
    """The rule, one token after the other."""
    rows, length = batch["tokens"].shape
    draws = [uniform(keys, length, what) for what in (CHOICE, FATE, VALUE)]
    text = [token for token in range(VOCAB) if not SPECIAL[token]]
    tokens, counted = batch["tokens"].copy(), np.zeros((rows, length), np.int32)
    for row, column in itertools.product(range(rows), range(length)):
        token = batch["tokens"][row, column]
        choice, fate, value = (draw[row, column] for draw in draws)
        if batch["segments"][row, column] == 0 or SPECIAL[token] or choice >= rate:
            continue
        counted[row, column] = 1
        if fate < 0.8:
            tokens[row, column] = MASK
        elif fate < 0.9:
            tokens[row, column] = text[int(value * len(text))]
    return {"tokens": tokens, "targets": batch["tokens"], "counted": counted}


@pytest.mark.parametrize("rate", [0.15, 0.6])
def test_it_equals_the_plain_loop(rate):
    batch, keys = rows_of_text(16, 40), row_keys(np.arange(16), 0)
    found = mask_tokens(batch, keys, rate=rate, mask_id=MASK, special=SPECIAL)
    wanted = slow_masking(batch, keys, rate)
    assert found.keys() == batch.keys() | wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == np.int32
    for name in ("segments", "positions"):  # packed documents stay as they lie
        np.testing.assert_array_equal(found[name], batch[name])


def assert_share(count, n, share):
    """Within 5 standard deviations of a binomial: one in a million."""
    assert abs(count - n * share) < 5 * np.sqrt(n * share * (1 - share)), (count, n, share)


def test_rates():
    batch, keys = rows_of_text(2000, 300), row_keys(np.arange(2000), 9)
    found = mask_tokens(batch, keys, rate=0.15, mask_id=MASK, special=SPECIAL)
    can = (batch["segments"] > 0) & ~SPECIAL[batch["tokens"]]
    chosen = found["counted"] == 1
    assert not (chosen & ~can).any()
    assert_share(chosen.sum(), can.sum(), 0.15)
    n, text = int(chosen.sum()), int((~SPECIAL).sum())
    assert n > 50_000
    now, before = found["tokens"][chosen], batch["tokens"][chosen]
    assert_share((now == MASK).sum(), n, 0.8)
    assert_share((now == before).sum(), n, 0.1 + 0.1 / text)  # some are replaced by themselves
    replaced = now[(now != MASK) & (now != before)]
    assert_share(len(replaced), n, 0.1 * (1 - 1 / text))
    assert not SPECIAL[replaced].any()
    for token in np.flatnonzero(~SPECIAL):  # all tokens of text are equally likely
        assert_share((replaced == token).sum(), len(replaced), 1 / text)
    np.testing.assert_array_equal(found["tokens"][~chosen], batch["tokens"][~chosen])
    per_row = chosen.sum(axis=1) / np.maximum(can.sum(axis=1), 1)
    assert per_row.std() > 0.01  # each token by itself, not a fixed number of a row


def test_rows_of_a_corpus(open_texts):
    """The rows are those of the other objectives, packed, with their ends never masked."""
    data, plain = open_texts(objective=MLM), open_texts()
    assert data.tokenizer.mask_id == 257
    assert data.tokenizer.vocab_size == 258
    seen = []
    with data.train() as loader, plain.train() as others:
        for batch, other in itertools.islice(zip(loader, others, strict=False), 30):
            np.testing.assert_array_equal(batch["targets"], other["tokens"])
            for name in ("segments", "positions"):
                np.testing.assert_array_equal(batch[name], other[name])
            assert batch["tokens"].max() <= 257
            seen.append(batch)
    first, second = (
        np.concatenate([batch[name] for batch in seen]) for name in ("tokens", "targets")
    )
    counted = np.concatenate([batch["counted"] for batch in seen])
    assert max(batch["segments"].max() for batch in seen) > 1
    assert (first == 257).sum() > 100
    assert (counted[first != second] == 1).all()


def test_special_tokens_of_a_file_are_never_chosen(tmp_path, open_texts):
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "def", "x", "caf\u00e9", "+="])}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["[PAD]", "[UNK]", "[MASK]", "[SEP]"])
    backend.save(str(tmp_path / "words.json"))
    data = open_texts(objective=MLM, tokenizer=str(tmp_path / "words.json"))
    tokenizer = data.tokenizer
    assert (tokenizer.mask_id, tokenizer.end_id, tokenizer.start_id) == (6, 7, 0)
    assert np.flatnonzero(tokenizer.special).tolist() == [0, 1, 6, 7]
    with data.train() as loader:
        batches = list(itertools.islice(loader, 20))
    counted = np.concatenate([batch["counted"] for batch in batches]) == 1
    targets = np.concatenate([batch["targets"] for batch in batches])
    tokens = np.concatenate([batch["tokens"] for batch in batches])
    assert (targets == 1).any()  # unknown words are there, and stay
    assert counted.any()
    assert set(targets[counted]) <= {2, 3, 4, 5}
    assert set(tokens[counted]) <= {2, 3, 4, 5, 6}


def test_a_tokenizer_without_a_mask_is_refused(tmp_path, open_texts):
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "[SEP]": 1}, unk_token="[UNK]"))
    backend.save(str(tmp_path / "words.json"))
    with pytest.raises(ValueError) as error:
        open_texts(objective=MLM, tokenizer=str(tmp_path / "words.json"))
    assert str(error.value) == (
        f"config.data.tokenizer = '{tmp_path}/words.json' has no mask token (<|mask|>, [MASK], "
        "<mask>), which config.objective.name = 'masked_lm' needs; choose bytes, bpe or a "
        "tokenizer.json that has one"
    )


def test_the_mask_counts_in_the_vocabulary(open_texts):
    with pytest.raises(ValueError) as error:
        open_texts(objective=MLM, vocab_size=257)
    assert "'bytes' has 258 tokens, more than config.model.vocab_size = 257" in str(error.value)
    with pytest.raises(ValueError) as error:
        open_texts(objective=MLM, vocab_size=257, tokenizer="bpe")
    assert str(error.value) == (
        "config.model.vocab_size = 257: config.data.tokenizer = 'bpe' has a token for each byte "
        "and one for the end of a document, and 1 for the objective; give at least 258"
    )
    assert open_texts(objective=MLM, tokenizer="bpe").tokenizer.mask_id == 1


def test_token_files_with_ids_that_the_tokenizer_does_not_know(tmp_path):
    """Ids between the tokenizer's and the model's vocabulary stand for no text."""
    from data.config import DataConfig
    from data.dataset import open_data

    np.save(tmp_path / "a.npy", np.tile(np.array([65, 66, 280, 256], np.uint16), 400))
    config = DataConfig(
        source="tokens", path=str(tmp_path / "a.npy"), sequence_length=16, batch_size=8
    )
    data = open_data(config, 300, tmp_path / "run", objective=ObjectiveConfig("masked_lm", 0.9))
    with data.train() as loader:
        batch = next(loader)
    assert set(batch["targets"][batch["counted"] == 1]) == {65, 66}
    assert batch["tokens"].max() == 280
