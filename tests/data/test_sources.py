"""Every source gives its documents; every bad input is one clear line."""

import json
import logging
import os
import sys

import numpy as np
import pytest

from data import stdlib
from data.config import DataConfig
from data.dataset import open_data
from data.documents import held_out, score
from data.sources import open_documents, training_texts


def open_tiny(tmp_path, vocab_size=257, **config):
    config = DataConfig(**({"sequence_length": 8, "batch_size": 2} | config))
    return open_data(config, vocab_size, tmp_path / "run", seed=0)


def documents_of(data, corpus):
    """The texts of a corpus, from its tokens."""
    ranges = zip(corpus.starts, corpus.lengths, strict=True)
    return [data.tokenizer.decode(corpus.take(np.arange(a, a + n))) for a, n in ranges]


def test_standard_library(tmp_path, caplog):
    stdlib.stdlib_files.cache_clear()
    with caplog.at_level(logging.WARNING):
        data = open_tiny(tmp_path)
    pinned = stdlib.platform.python_version() in stdlib.STDLIB_PINNED
    assert pinned is (not caplog.records)
    summary = data.summary
    assert summary.tokens + summary.held_out_tokens > 5_000_000
    assert summary.documents > 400
    assert 0.02 < summary.held_out_documents / summary.documents < 0.08
    assert summary.padding_waste < 0.001
    assert summary.fingerprint in repr(summary)
    assert f"{summary.tokens:,}" in str(summary)
    root, files, _ = stdlib.stdlib_files()
    names = [file.relative_to(root).as_posix() for file in files]
    assert "argparse.py" in names
    assert not any({"test", "tests", "site-packages"} & set(name.split("/")) for name in names)
    again = open_tiny(tmp_path)
    assert again.summary == summary


def test_unknown_standard_library_is_reported_once(monkeypatch, caplog):
    monkeypatch.setattr(stdlib.platform, "python_version", lambda: "3.99.0")
    stdlib.stdlib_files.cache_clear()
    with caplog.at_level(logging.WARNING):
        stdlib.stdlib_files()
        list(zip(open_documents(DataConfig())(), range(3), strict=False))
    stdlib.stdlib_files.cache_clear()
    assert len(caplog.records) == 1
    assert "Python 3.99.0" in caplog.text


def test_text_files_are_split_by_name_not_by_place(text_folder, tmp_path):
    data = open_tiny(tmp_path, source="text", path=str(text_folder / "*.py"))
    train, held = documents_of(data, data.training), documents_of(data, data.evaluation)
    assert not set(train) & set(held)
    assert {*train, *held} == {file.read_text() for file in text_folder.iterdir()}
    moved = text_folder.rename(text_folder.with_name("elsewhere"))
    again = open_tiny(tmp_path, source="text", path=str(moved / "*.py"))
    assert documents_of(again, again.evaluation) == held
    assert again.summary.fingerprint == data.summary.fingerprint
    (moved / "new.py").write_text("print()\n")
    more = open_tiny(tmp_path, source="text", path=str(moved / "*.py"))
    assert set(held) <= set(documents_of(more, more.evaluation))
    assert more.summary.fingerprint != data.summary.fingerprint


def test_split_holds_out_one_in_twenty_and_never_nothing_or_all():
    assert (
        0.04 < held_out(np.array([score(str(i)) for i in range(10_000)], np.uint64)).mean() < 0.06
    )
    assert held_out(np.array([2**63, 2**63 - 1], np.uint64)).tolist() == [False, True]
    assert held_out(np.array([1, 2], np.uint64)).tolist() == [True, False]


def test_a_file_alone_is_cut_in_two(tmp_path):
    lines = [f"line {i}\n" for i in range(100)]
    (tmp_path / "all.txt").write_text("".join(lines))
    data = open_tiny(tmp_path, source="text", path=str(tmp_path / "all.txt"))
    (train,), (held,) = documents_of(data, data.training), documents_of(data, data.evaluation)
    assert train + held == "".join(lines)
    assert held.startswith("line ")
    assert 0 < len(held) < 0.1 * len(train)


def test_own_held_out_files(text_folder, tmp_path):
    (tmp_path / "held.txt").write_text("held out\n")
    data = open_tiny(
        tmp_path,
        source="text",
        path=str(text_folder / "*.py"),
        eval_path=str(tmp_path / "held.txt"),
    )
    assert documents_of(data, data.evaluation) == ["held out\n"]
    assert data.summary.documents == 60


def test_fingerprint_knows_what_is_held_out(text_folder, tmp_path):
    everything, *parts = (str(text_folder / name) for name in ("*.py", "[0-4]*.py", "5*.py"))
    by_name = open_tiny(tmp_path, source="text", path=everything)
    by_path = open_tiny(tmp_path, source="text", path=parts[0], eval_path=parts[1])
    shards = by_name.training.shards, by_path.training.shards
    np.testing.assert_array_equal(*shards)  # the same tokens in the same order
    assert by_name.summary.fingerprint != by_path.summary.fingerprint


def test_bpe_never_sees_what_is_held_out(text_folder):
    config = DataConfig(source="text", path=str(text_folder / "*.py"))
    documents = open_documents(config)
    train = list(training_texts(documents))
    everything = [document.text for document in documents()]
    assert 0 < len(everything) - len(train) < 10
    assert set(train) < set(everything)


def write_lines(path, rows):
    path.write_text(
        "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)
    )
    return path


def test_json_lines(tmp_path):
    rows = [{"body": f"text {i}\n\u4f60", "other": i} for i in range(30)]
    path = write_lines(tmp_path / "rows.jsonl", [*rows, "\n"])
    data = open_tiny(tmp_path, source="jsonl", path=str(path), text_field="body")
    train, held = documents_of(data, data.training), documents_of(data, data.evaluation)
    assert sorted(train + held) == sorted(row["body"] for row in rows)
    assert train
    assert held


@pytest.mark.parametrize("ending", ["bin", "npy"])
@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_token_files(tmp_path, ending, dtype):
    texts = [f"document {i} " * (1 + i % 3) for i in range(40)]
    ids = [[*text.encode(), 256] for text in texts]
    ids[-1].pop()  # the last end may be missing
    for number, part in enumerate((ids[:15], ids[15:])):
        tokens = np.array([i for one in part for i in one], dtype)
        name = tmp_path / f"{number}.{ending}"
        tokens.tofile(name) if ending == "bin" else np.save(name, tokens)
    found = tmp_path / f"*.{ending}"
    data = open_tiny(tmp_path, source="tokens", path=str(found), token_dtype=dtype)
    train, held = documents_of(data, data.training), documents_of(data, data.evaluation)
    assert sorted(train + held) == sorted(texts)
    assert train
    assert held
    again = open_tiny(tmp_path, source="tokens", path=str(found), token_dtype=dtype)
    assert again.summary == data.summary
    with data.train() as loader:
        batch = next(loader)
    assert batch["tokens"].max() < 257

    lone = tmp_path / "lone.npy"
    np.save(lone, np.frombuffer(b"x" * 100, np.uint8).astype(dtype))
    lone = open_tiny(tmp_path, source="tokens", path=str(lone))
    assert (lone.summary.tokens, lone.summary.held_out_tokens) == (95, 5)
    own = {"path": str(tmp_path / f"1.{ending}"), "eval_path": str(tmp_path / f"0.{ending}")}
    own = open_tiny(tmp_path, source="tokens", token_dtype=dtype, **own)
    assert sorted(documents_of(own, own.evaluation)) == sorted(texts[:15])


def test_changed_file_is_read_again(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\n" * 50)
    first = open_tiny(tmp_path, source="text", path=str(path))
    path.write_text("two\n" * 50)
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    second = open_tiny(tmp_path, source="text", path=str(path))
    assert documents_of(second, second.training)[0].startswith("two")
    assert first.summary.fingerprint != second.summary.fingerprint


def bad(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    return str(path)


def test_bad_inputs(tmp_path):
    """Each message names key, value and place, and says what would be right."""

    def message(**config):
        with pytest.raises(ValueError) as error:
            open_tiny(tmp_path, **config)
        assert "\n" not in str(error.value)
        assert "config." in str(error.value)
        return str(error.value)

    def of(source, path, **config):
        text = message(source=source, path=path, **config)
        assert text.startswith(f"config.data.path = '{path}'"), text
        return text

    missing, folder = str(tmp_path / "no_such.txt"), str(tmp_path)
    empty = bad(tmp_path, "empty.txt", b"")
    for source in ("text", "jsonl", "tokens"):
        assert "no such file" in of(source, missing)
        assert "is empty" in of(source, empty)
        assert "no file matches" in of(source, str(tmp_path / "*.nothing"))
        assert "a folder" in of(source, folder)
    nul, latin = (
        bad(tmp_path, "nul.txt", b"a\0b"),
        bad(tmp_path, "latin.txt", "caf\u00e9".encode("latin1")),
    )
    for source in ("text", "jsonl"):
        assert "binary" in of(source, nul)
        assert "not UTF-8 (byte 3)" in of(source, latin)
    assert "too little text" in of("text", bad(tmp_path, "a.txt", b"a"))

    good = b'{"text": "good"}\n'
    torn = of("jsonl", bad(tmp_path, "torn.jsonl", good + b'{"text": "to'))
    assert f"{tmp_path}/torn.jsonl:2: not JSON" in torn
    field = of("jsonl", bad(tmp_path, "field.jsonl", good + b'{"body": "x"}\n'))
    assert "field.jsonl:2: no field config.data.text_field = 'text' in it, only body" in field
    kind = of("jsonl", bad(tmp_path, "kind.jsonl", b'{"text": 5}\n'))
    assert "kind.jsonl:1: field config.data.text_field = 'text' holds int, not text" in kind
    assert "list.jsonl:1: list, not an object" in of("jsonl", bad(tmp_path, "list.jsonl", b"[1]\n"))
    assert "no document" in message(source="jsonl", path=bad(tmp_path, "blank.jsonl", b"\n\n"))

    odd = bad(tmp_path, "odd.bin", b"abc")
    assert "3 bytes, no multiple of the 2 of config.data.token_dtype = 'uint16'" in of(
        "tokens", odd
    )
    large = bad(tmp_path, "large.bin", np.arange(300, dtype=np.uint16).tobytes())
    assert "holds token 299, but config.model.vocab_size = 257" in of("tokens", large)
    np.save(tmp_path / "float.npy", np.ones(5))
    np.save(tmp_path / "square.npy", np.ones((5, 5), np.uint16))
    assert "float64" in of("tokens", str(tmp_path / "float.npy"))
    assert "[5, 5]" in of("tokens", str(tmp_path / "square.npy"))
    assert "not a whole .npy file" in of("tokens", bad(tmp_path, "x.npy", b"\x93NUMPY\x01\x00"))

    held = message(source="text", path=str(tmp_path / "a.txt"), eval_path=missing)
    assert held.startswith(f"config.data.eval_path = '{missing}': no such file")
    assert "no such folder" in of("dataset", missing)
    assert "no .parquet or .arrow" in of("dataset", folder)
    (tmp_path / "both").mkdir()
    bad(tmp_path, "both/a.parquet", b"x"), bad(tmp_path, "both/a.arrow", b"x")
    assert "both .parquet and .arrow" in of("dataset", str(tmp_path / "both"))
    tiny = bad(tmp_path, "tiny.jsonl", b'{"text": ""}\n')
    held = message(source="jsonl", path=bad(tmp_path, "ok.jsonl", good), eval_path=tiny)
    assert held.startswith(f"config.data.eval_path = '{tiny}': too little text")
    assert not list((tmp_path / "run").rglob("*.partial"))  # nothing half done is kept


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"source": "web"}, "choose one of stdlib, text"),
        ({"packing": "tight"}, "choose one of packed, buckets, none"),
        ({"source": "tokens", "path": "x", "token_dtype": "int8"}, "choose one of uint16, uint32"),
        ({"sequence_length": 0}, "at least 1"),
        ({"batch_size": -3}, "at least 1"),
        ({"batch_size": "8"}, "whole number"),
        ({"prefetch_mib": True}, "whole number"),
        ({"path": "x"}, "reads no path"),
        ({"path": 3}, "give a string"),
        ({"source": "text"}, "needs a file"),
        ({"tokenizer": ""}, "choose bytes, bpe"),
        ({"source": "tokens", "path": "x", "tokenizer": "bpe"}, "no BPE can be trained"),
        ({"buckets": (8, 256)}, "read only with config.data.packing"),
        ({"packing": "buckets"}, "rising order"),
        ({"packing": "buckets", "buckets": (256, 8)}, "rising order"),
        ({"packing": "buckets", "buckets": (8, 16)}, "config.data.sequence_length = 256"),
    ],
)
def test_bad_config(config, words):
    with pytest.raises(ValueError) as error:
        DataConfig(**config)
    key = list(config)[-1] if "packing" not in config or len(config) == 1 else "buckets"
    key = "buckets" if config.get("packing") == "buckets" else key
    key = "path" if config == {"source": "text"} else key
    assert str(error.value).startswith(f"config.data.{key} = ")
    assert words in str(error.value)


def test_dataset_without_the_extra(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError) as error:
        open_tiny(tmp_path, source="dataset", path=str(tmp_path))
    assert str(error.value) == (
        "config.data.source = 'dataset': the package datasets is not installed; "
        "run pip install -e '.[hf]'"
    )


@pytest.mark.filterwarnings("default")  # the library's own
@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_dataset(tmp_path, kind):
    datasets = pytest.importorskip("datasets")
    texts = [f"row {i} \u4f60" for i in range(30)]
    table = datasets.Dataset.from_dict({"text": texts, "n": list(range(30))})
    folder = tmp_path / "rows"
    if kind == "parquet":
        folder.mkdir()
        table.to_parquet(folder / "part.parquet")
    else:
        table.save_to_disk(folder)
    data = open_tiny(tmp_path, source="dataset", path=str(folder))
    train, held = documents_of(data, data.training), documents_of(data, data.evaluation)
    assert sorted(train + held) == sorted(texts)
    assert train
    assert held
    with pytest.raises(ValueError) as error:
        open_tiny(tmp_path, source="dataset", path=str(folder), text_field="body")
    assert "row 0: no field config.data.text_field = 'body' in it, only text, n" in str(error.value)
    for file in folder.glob("*." + kind):
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError) as error:
        open_tiny(tmp_path, source="dataset", path=str(folder))
    assert str(error.value).startswith(f"config.data.path = '{folder}': not readable as {kind} (")
    assert "\n" not in str(error.value)
