"""Span corruption: against T5's way written out, and nothing of a document is lost."""

import collections
import itertools

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from data.draws import row_keys, uniform
from data.objective import ObjectiveConfig
from data.spans import KEPT, NOISE, Spans, corrupt_spans, segment_lengths

SPANS = ObjectiveConfig(name="span_corruption")
T5 = Spans(0.15, 3.0)
END, START, FIRST = 1000, 0, 900  # the end, the start, the first sentinel


def slow_segments(items, segments, draws):
    """Lengths: a part ends where one of the `segments - 1` smallest draws stands."""
    ends = sorted(range(items - 1), key=lambda i: (draws[i], i))[: segments - 1]
    borders = [0, *(end + 1 for end in sorted(ends)), items]
    return [b - a for a, b in itertools.pairwise(borders)]


def slow_corruption(tokens, key, spans, width):
    """(source, target) of one piece, token by token: Raffel et al. 2020, figure 2."""
    n = max(len(tokens), 2)
    noise = min(max(round(n * spans.rate), 1), n - 1)
    number = min(max(round(noise / spans.span_length), 1), noise, n - noise)
    draws = {what: uniform(key[None], width, what)[0] for what in (NOISE, KEPT)}
    kept = slow_segments(n - noise, number, draws[KEPT])
    left_out = slow_segments(noise, number, draws[NOISE])
    flags = [f for a, b in zip(kept, left_out, strict=True) for f in [False] * a + [True] * b]
    source, target = [], []
    for wanted, out in ((False, source), (True, target)):
        sentinel, before = FIRST, wanted
        for token, flag in zip(tokens, flags, strict=False):
            if flag == wanted:
                out.append(token)
            elif before == wanted:
                out.append(sentinel)
                sentinel += 1
            before = flag
        out.append(END)
    return source, target


def whole(source, target):
    """The text again: each sentinel of the source is what follows it in the target."""
    pieces = collections.defaultdict(list)
    for token in target[:-1]:
        if FIRST <= token < END:
            sentinel = token
        else:
            pieces[sentinel].append(token)
    parts = [pieces[t] if FIRST <= t < END else [t] for t in source[:-1]]
    return [token for part in parts for token in part]


def corrupted(counts, spans=T5, source_length=64, target_length=40, key=0):
    """Rows of `counts` tokens, all different, corrupted; and what they were."""
    width = spans.piece_length(source_length, target_length)
    counts = np.asarray(counts)
    assert counts.max() <= width
    segments = (np.arange(width) < counts[:, None]).astype(np.int32)
    tokens = (
        np.arange(segments.size).reshape(segments.shape).astype(np.int32) % 800 + 1
    ) * segments
    keys = row_keys(np.arange(len(counts)), key)
    batch = corrupt_spans(
        {"tokens": tokens, "segments": segments, "positions": tokens},
        keys,
        spans=spans,
        sentinels=tuple(range(FIRST, END)),
        start_id=START,
        end_id=END,
        source_length=source_length,
        target_length=target_length,
    )
    rows = [row[:n].tolist() for row, n in zip(tokens, counts, strict=True)]
    return batch, rows, keys, width


SETTINGS = [T5, Spans(0.5, 1.0), Spans(0.8, 2.0), Spans(0.15, 40.0)]


@pytest.mark.parametrize("spans", SETTINGS)
def test_it_equals_the_plain_loop(spans):
    width = spans.piece_length(64, 40)
    batch, rows, keys, _ = corrupted(range(1, width + 1), spans)
    for i, (row, key) in enumerate(zip(rows, keys, strict=True)):
        source, target = slow_corruption(row, key, spans, width)
        if len(row) > 1:
            assert whole(source, target) == row
        n, m = len(source), len(target)
        assert batch["source_tokens"][i].tolist() == source + [0] * (64 - n)
        assert batch["source_segments"][i].tolist() == [1] * n + [0] * (64 - n)
        assert batch["source_positions"][i].tolist() == [*range(n)] + [0] * (64 - n)
        assert batch["targets"][i].tolist() == target + [0] * (40 - m)
        assert batch["tokens"][i].tolist() == [START, *target[:-1]] + [0] * (40 - m)
        assert batch["segments"][i].tolist() == [1] * m + [0] * (40 - m)
        assert batch["positions"][i].tolist() == [*range(m)] + [0] * (40 - m)
    assert {array.dtype for array in batch.values()} == {np.dtype(np.int32)}


def test_lengths_are_those_of_t5():
    """A source of 512 is made from 568 tokens and has a target of 114: what T5 was trained with."""
    assert T5.piece_length(512, 114) == T5.piece_length(512, 10**4) == 568
    assert T5.lengths(np.array([568])) == (np.array([512]), np.array([114]))
    assert T5.piece_length(512, 113) < 568
    assert T5.piece_length(2, 100) == T5.piece_length(100, 2) == 0
    assert T5.piece_length(3, 3) >= 2


@pytest.mark.parametrize("spans", SETTINGS)
def test_shorter_pieces_fit_too(spans):
    most = spans.piece_length(100, 60)
    source, target = spans.lengths(np.arange(1, most + 1))
    assert source.max() <= 100
    assert target.max() <= 60
    longer = spans.lengths(np.array([most + 1]))
    assert longer[0] > 100 or longer[1] > 60


def test_a_row_of_padding_stays_one():
    batch, *_ = corrupted([0, 5])
    assert not any(array[0].any() for array in batch.values())
    assert batch["targets"][1].any()


def test_all_divisions_are_equally_likely():
    n = 30_000
    draws = uniform(row_keys(np.arange(n), 0), 8, 0)
    lengths = segment_lengths(np.full(n, 6), np.full(n, 3), draws)
    assert (lengths.sum(axis=1) == 6).all()
    counts = collections.Counter(map(tuple, lengths.tolist()))
    wanted = {c for c in itertools.product(range(1, 5), repeat=3) if sum(c) == 6}
    assert set(counts) == wanted
    share = 1 / len(wanted)  # within 5 standard deviations of a binomial: one in a million
    assert max(abs(c - n * share) for c in counts.values()) < 5 * np.sqrt(n * share * (1 - share))


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_source_and_target_are_the_document(open_texts, tokenizer):
    """Every document of the corpus comes back from the rows of an epoch."""
    config = {"packing": "none", "sequence_length": 12, "source_length": 24, "batch_size": 1}
    data = open_texts(objective=SPANS, tokenizer=tokenizer, **config)
    assert len(data.tokenizer.sentinels) == 100
    rows = data.summary.rows
    with data.train() as loader:
        batches = list(itertools.islice(loader, rows))
    found = []
    order = {token: FIRST + 10**6 + i for i, token in enumerate(data.tokenizer.sentinels)}
    for batch in batches:
        source, target = (
            batch[name][0][batch[segments][0] > 0].tolist()
            for name, segments in (("source_tokens", "source_segments"), ("targets", "segments"))
        )
        assert source[-1] == target[-1] == data.tokenizer.end_id
        assert batch["tokens"][0, 0] == data.tokenizer.start_id
        pieces, sentinel = collections.defaultdict(list), None
        for token in target[:-1]:
            sentinel = token if token in order else sentinel
            pieces[sentinel].append(token)
        text = [
            t for token in source[:-1] for t in (pieces[token][1:] if token in order else [token])
        ]
        found.append(data.tokenizer.decode(text))
    corpus, plan = data.training, data.plans[0]
    pieces = [
        data.tokenizer.decode(corpus.take(np.arange(start, start + count)))
        for start, count in zip(plan.start, plan.count, strict=True)
    ]
    assert sorted(found) == sorted(pieces)
    texts = [
        data.tokenizer.decode(corpus.take(np.arange(start, start + n)))
        for start, n in zip(corpus.starts, corpus.lengths, strict=True)
    ]
    assert "".join(pieces) == "".join(texts)


def test_the_share_left_out(open_texts):
    config = {"packing": "none", "sequence_length": 128, "source_length": 256}
    data = open_texts(objective=SPANS, **config)
    with data.train() as loader:
        batch = next(loader)
    sentinels = np.asarray(data.tokenizer.sentinels)
    inside = ~np.isin(batch["targets"], sentinels) & (batch["segments"] > 0)
    noise = (inside.sum(axis=1) - 1).astype(float)
    kept = (~np.isin(batch["source_tokens"], sentinels) & (batch["source_segments"] > 0)).sum(
        axis=1
    )
    tokens = noise + kept - 1
    np.testing.assert_allclose(noise, np.maximum(np.rint(0.15 * tokens), 1))


def test_too_short_and_too_long_rows_are_refused(open_texts):
    def message(**config):
        with pytest.raises(ValueError) as error:
            open_texts(objective=SPANS, packing="none", **config)
        return str(error.value)

    assert message(source_length=2) == (
        "config.data.source_length = 2, config.data.sequence_length = 16: too short for "
        "config.objective.name = 'span_corruption'; 3 is the least"
    )
    assert message(source_length=4096, sequence_length=4096) == (
        "config.data.source_length = 4096, config.data.sequence_length = 4096: rows of 227 spans, "
        "but there are 100 sentinels; shorten them, or raise config.objective.span_length = 3.0"
    )


def test_sentinels_of_a_file(tmp_path, open_texts):
    """As T5's: the first sentinel is the last id, the padding token the decoder's first input."""
    words = ["<pad>", "</s>", "<unk>", "def", "x", "+=", "#", *"0123456789"]
    special = [f"<extra_id_{n}>" for n in reversed(range(9))]
    backend = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<pad>", "</s>", "<unk>", *special])
    backend.save(str(tmp_path / "t5.json"))
    config = {"packing": "none", "source_length": 12, "sequence_length": 8}
    data = open_texts(objective=SPANS, tokenizer=str(tmp_path / "t5.json"), **config)
    last = len(words) + 8
    assert data.tokenizer.sentinels == tuple(range(last, last - 9, -1))
    with data.train() as loader:
        batch = next(loader)
    assert (batch["targets"][:, 0] == last).all()
    assert (batch["tokens"][:, 0] == 0).all()
    assert (batch["source_tokens"] == last).any(axis=1).all()


def test_a_tokenizer_without_sentinels_is_refused(tmp_path, open_texts):
    Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>")).save(
        str(tmp_path / "words.json")
    )
    with pytest.raises(ValueError) as error:
        open_texts(objective=SPANS, packing="none", tokenizer=str(tmp_path / "words.json"))
    assert str(error.value) == (
        f"config.data.tokenizer = '{tmp_path}/words.json' has no token <extra_id_0>, which "
        "config.objective.name = 'span_corruption' needs; choose bytes, bpe or a tokenizer.json "
        "that has it"
    )
