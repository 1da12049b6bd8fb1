"""Pairs, captions and labels: a row is one example, cut with its end kept."""

import itertools
import json
import sys

import numpy as np
import pytest

from data.config import DataConfig
from data.dataset import open_data
from data.docstrings import docstring_documents, docstring_pairs
from data.images import to_patches
from data.objective import ObjectiveConfig
from data.parts import ImageShape
from data.stdlib import largest_packages, stdlib_files

PAIRS = ObjectiveConfig("seq2seq")
CAPTIONS = ObjectiveConfig("captioning")
DIGITS = ObjectiveConfig("classification", tasks={"digit": 10, "parity": 2})
EIGHT = ImageShape(image_size=8, patch_size=2, channels=1)
END = 256


def open_with(tmp_path, objective, image=None, vocab_size=300, **config):
    config = {
        "sequence_length": 16,
        "source_length": 24,
        "batch_size": 8,
        "packing": "none",
    } | config
    return open_data(
        DataConfig(**config), vocab_size, tmp_path / "run", objective=objective, image=image
    )


def epoch(data):
    """All training rows, in any order."""
    rows = data.summary.rows
    with data.train() as loader:
        batches = list(itertools.islice(loader, -(-rows // data.config.batch_size)))
    return {name: np.concatenate([batch[name] for batch in batches])[:rows] for name in batches[0]}


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_pairs_of_a_file_are_cut_with_their_ends(tmp_path):
    rows = [{"de": "ja " * (i % 12), "en": "yes" * (i % 8), "id": i} for i in range(60)]
    path = write_rows(tmp_path / "pairs.jsonl", rows)
    data = open_with(tmp_path, PAIRS, source="jsonl", path=path, text_field="en", source_field="de")
    wanted = {}
    for row in rows:
        source = [*row["de"].encode()[:23], END]
        target = [*row["en"].encode()[:15], END]
        wanted[tuple(source + target)] = (source, target)
    batch, found = epoch(data), set()
    for i in range(data.summary.rows):
        n, m = (int((batch[name][i] > 0).sum()) for name in ("source_segments", "segments"))
        source, target = batch["source_tokens"][i][:n].tolist(), batch["targets"][i][:m].tolist()
        assert wanted[tuple(source + target)] == (source, target)
        found.add(tuple(source + target))
        assert batch["tokens"][i][:m].tolist() == [END, *target[:-1]]  # bytes have no padding token
        for name, length in (("source_", n), ("", m)):
            assert batch[f"{name}positions"][i][:length].tolist() == list(range(length))
            assert batch[f"{name}segments"][i][:length].tolist() == [1] * length
            for array in ("tokens", "segments", "positions"):
                assert not batch[name + array][i][length:].any()
    assert len(found) > 20
    assert data.summary.documents + data.summary.held_out_documents == 60


CODE = '''
@decorated(
    "x")
def f(x):
    # before
    """Adds one.

    Or more.
    """
    return x + 1  # after


class A(B):
    "A class."

    def m(self): "on the line of its code"

    async def n(self):
        r\'\'\'Waits.\'\'\'
        if self:
            def inner():
                """Inside."""
'''


CLASS = '''class A(B):

    def m(self): "on the line of its code"

    async def n(self):
        r\'\'\'Waits.\'\'\'
        if self:
            def inner():
                """Inside."""
'''


def test_code_and_its_docstring():
    pairs = list(docstring_pairs(CODE))
    assert pairs == [
        (
            '@decorated(\n    "x")\ndef f(x):\n    # before\n    return x + 1  # after\n',
            "Adds one.\n\nOr more.",
        ),
        (CLASS, "A class."),
        (
            'async def n(self):\n    if self:\n        def inner():\n            """Inside."""\n',
            "Waits.",
        ),
        ("def inner():\n", "Inside."),
    ]
    assert list(docstring_pairs("def f(: pass")) == []
    assert list(docstring_pairs('def f():\n    """Doc."""; x = 1\n')) == []


@pytest.mark.slow
def test_docstrings_of_the_standard_library(tmp_path):
    data = open_with(tmp_path, PAIRS, source="docstrings", sequence_length=64, source_length=128)
    documents = docstring_documents()
    assert data.summary.documents + data.summary.held_out_documents == len(documents) > 5000
    assert 0.02 < data.summary.held_out_documents / len(documents) < 0.1
    found = next(d for d in documents if d.source.startswith("def dedent(text):"))
    assert found.text.startswith("Remove any common leading whitespace from every line")
    assert found.text not in found.source
    files = {document.score for document in documents}  # those of one are held out together
    assert 300 < len(files) < len(documents) / 5
    text = data.tokenizer.decode
    with data.held_out(1) as loader:
        batch = next(loader)
    row = int(np.argmax(batch["source_segments"].sum(axis=1)))
    source, target = (
        text(batch[name][row][batch[segments][row] > 0])
        for name, segments in (("source_tokens", "source_segments"), ("targets", "segments"))
    )
    assert any(d.source.startswith(source) and d.text.startswith(target) for d in documents)
    again = open_with(tmp_path, PAIRS, source="docstrings", sequence_length=64, source_length=128)
    assert again.summary == data.summary


def test_a_bpe_learns_from_both_sides(tmp_path):
    rows = [{"de": "qqqq" * 9, "en": "zzzz" * 9}] * 40
    path = write_rows(tmp_path / "pairs.jsonl", rows)
    config = {"source": "jsonl", "path": path, "text_field": "en", "source_field": "de"}
    tokenizer = open_with(tmp_path, PAIRS, tokenizer="bpe", **config).tokenizer
    assert len(tokenizer.encode("qqqqqqqq")) == len(tokenizer.encode("zzzzzzzz")) < 4


def slow_patches(image, size):
    """Patch by patch, pixel by pixel."""
    height, width, channels = image.shape
    return [
        [
            image[top + y, left + x, channel]
            for y in range(size)
            for x in range(size)
            for channel in range(channels)
        ]
        for top in range(0, height, size)
        for left in range(0, width, size)
    ]


@pytest.mark.parametrize(("size", "channels"), [(2, 1), (4, 3), (8, 1)])
def test_patches_equal_the_plain_loop(size, channels):
    images = np.random.default_rng(0).integers(0, 255, (3, 8, 8, channels))
    found = to_patches(images, size)
    assert found.shape == (3, (8 // size) ** 2, size * size * channels)
    assert found.tolist() == [slow_patches(image, size) for image in images]


def test_digits_with_captions(tmp_path):
    from sklearn.datasets import load_digits

    data = open_with(tmp_path, CAPTIONS, EIGHT, source="digits", sequence_length=40)
    summary = data.summary
    assert summary.documents + summary.held_out_documents == summary.rows + 93 == 1797
    batch, digits = epoch(data), load_digits()
    assert batch["patches"].dtype == np.float32
    assert batch["patches"].shape == (summary.rows, 16, 4)
    assert batch["patches"].min() == 0
    assert batch["patches"].max() == 1
    scans = to_patches(digits.images[:, :, :, None].astype(np.float32) / 16, 2)
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    digit_of = {scan.tobytes(): names[d] for scan, d in zip(scans, digits.target, strict=True)}
    for i in range(summary.rows):
        m = int((batch["segments"][i] > 0).sum())
        assert batch["targets"][i][m - 1] == batch["tokens"][i][0] == END
        caption = data.tokenizer.decode(batch["targets"][i][:m])
        assert caption == f"a scan of the digit {digit_of[batch['patches'][i].tobytes()]}"
    assert len({row.tobytes() for row in batch["patches"]}) == summary.rows


def test_digits_with_labels(tmp_path):
    from sklearn.datasets import load_digits

    data = open_with(tmp_path, DIGITS, EIGHT, vocab_size=1, source="digits", tokenizer="bpe")
    batch, digits = epoch(data), load_digits()
    scans = to_patches(digits.images[:, :, :, None].astype(np.float32) / 16, 2)
    digit_of = {scan.tobytes(): d for scan, d in zip(scans, digits.target, strict=True)}
    wanted = np.array([digit_of[row.tobytes()] for row in batch["patches"]])
    np.testing.assert_array_equal(batch["label_digit"], wanted)
    np.testing.assert_array_equal(batch["label_parity"], wanted % 2)
    assert batch["label_digit"].dtype == np.int32
    assert str(data.summary).startswith(
        "data: digits for classification, 1,704 documents, 93 held out; "
    )
    other = open_with(tmp_path, CAPTIONS, EIGHT, source="digits")
    held = [
        {image.tobytes() for image in d.evaluation.images[d.evaluation.columns["image"]]}
        for d in (data, other)
    ]
    assert held[0] == held[1]  # the same scans, whatever the objective


def test_digits_without_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ValueError) as error:
        open_with(tmp_path, CAPTIONS, EIGHT, source="digits")
    assert str(error.value) == (
        "config.data.source = 'digits': the package scikit-learn is not installed; run pip install "
        "-e '.[images]'"
    )


def test_digits_of_another_size(tmp_path):
    with pytest.raises(ValueError) as error:
        open_with(tmp_path, CAPTIONS, ImageShape(16, 4, 3), source="digits")
    assert str(error.value) == (
        "config.vision.image_size = 16, config.vision.channels = 3: config.data.source = 'digits' "
        "has 8 x 8 pixels of one channel; set them to 8 and 1"
    )


def write_images(folder):
    """Three colours as files of two kinds and sizes, 20 of each, and the jsonl that names them."""
    from PIL import Image

    colours = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
    (folder / "files").mkdir()
    rows = []
    for number, name in enumerate(20 * list(colours)):
        path = f"files/{number}.{'png' if number % 2 else 'bmp'}"
        image = Image.new("RGB", (6 + number % 5, 9), colours[name])
        image.save(folder / path)
        rows.append({"image": path, "text": f"all {name}", "colour": list(colours).index(name)})
    return write_rows(folder / "images.jsonl", rows), list(colours.values())


def test_own_images(tmp_path):
    path, colours = write_images(tmp_path)
    shape = ImageShape(image_size=4, patch_size=2, channels=3)
    objective = ObjectiveConfig("captioning", tasks={"colour": 3})
    data = open_with(tmp_path, objective, shape, source="images", path=path)
    batch = epoch(data)
    assert batch["patches"].shape == (data.summary.rows, 4, 12)
    for i, label in enumerate(batch["label_colour"]):
        wanted = np.array(colours[label], np.float32) / 255
        np.testing.assert_array_equal(batch["patches"][i], np.tile(wanted, (4, 4)))
        caption = data.tokenizer.decode(batch["targets"][i])
        assert caption.removesuffix("\0").startswith(f"all {['red', 'green', 'blue'][label]}")
    grey = ImageShape(image_size=4, patch_size=4, channels=1)
    labels = ObjectiveConfig("classification", tasks={"colour": 3})
    batch = epoch(open_with(tmp_path, labels, grey, source="images", path=path))
    assert batch.keys() == {"patches", "label_colour"}
    assert batch["patches"].shape == (data.summary.rows, 1, 16)
    assert {round(float(p.mean()) * 255) for p in batch["patches"]} == {76, 150, 29}  # their luma


def test_a_changed_image_is_read_again(tmp_path):
    from PIL import Image

    path, _ = write_images(tmp_path)
    labels = ObjectiveConfig("classification", tasks={"colour": 3})
    shape = ImageShape(image_size=2, patch_size=2, channels=1)
    first = open_with(tmp_path, labels, shape, source="images", path=path)
    for file in (tmp_path / "files").iterdir():
        Image.new("RGB", (20, 20), (9, 9, 9)).save(file)
    second = open_with(tmp_path, labels, shape, source="images", path=path)
    assert first.summary.fingerprint != second.summary.fingerprint
    np.testing.assert_array_equal(epoch(second)["patches"], np.float32(9 / 255))


def test_bad_images_and_labels(tmp_path):
    write_images(tmp_path)
    shape = ImageShape(image_size=4, patch_size=2, channels=3)
    labels = ObjectiveConfig("classification", tasks={"colour": 3})
    good = json.loads((tmp_path / "images.jsonl").read_text().splitlines()[0])

    def message(row, objective=labels):
        write_rows(tmp_path / "bad.jsonl", [good, row])
        with pytest.raises(ValueError) as error:
            open_with(tmp_path, objective, shape, source="images", path=str(tmp_path / "bad.jsonl"))
        text = str(error.value)
        where = f"config.data.path = '{tmp_path}/bad.jsonl': {tmp_path}/bad.jsonl:2: "
        assert text.startswith(where)
        assert "\n" not in text
        return text.removeprefix(where)

    assert message(good | {"image": "no.png"}) == (
        f"no such image '{tmp_path}/no.png'; a path is relative to the file that names it"
    )
    (tmp_path / "text.png").write_text("not an image")
    assert "text.png' is no whole image (" in message(good | {"image": "text.png"})
    torn = (tmp_path / "files/1.png").read_bytes()[:-40]
    (tmp_path / "torn.png").write_bytes(torn)
    assert "torn.png' is no whole image (" in message(good | {"image": "torn.png"})
    assert message({"text": "x"}) == "no field 'image' in it, only text; every line needs it"
    assert message(good | {"image": 5}) == "field 'image' holds int, not text; give a text"
    for wrong in (3, -1, "red", True, None):
        assert message(good | {"colour": wrong}) == (
            f"field 'colour' holds {wrong!r}; config.objective.tasks.colour = 3 wants a whole "
            "number from 0 to 2"
        )
    assert message({"image": good["image"]}, CAPTIONS) == (
        "no field config.data.text_field = 'text' in it, only image; name the field that holds the "
        "text"
    )
    assert not list((tmp_path / "run").rglob("*.partial"))


def test_packages_of_the_standard_library(tmp_path):
    objective = ObjectiveConfig("classification", tasks={"package": 3})
    data = open_with(tmp_path, objective, source="stdlib", sequence_length=256)
    names = largest_packages(3)
    root, files, _ = stdlib_files()
    sizes = {}
    for file in files:
        first, *rest = file.relative_to(root).parts
        if rest:
            sizes[first] = sizes.get(first, 0) + file.stat().st_size
    assert names == sorted(sizes, key=sizes.get, reverse=True)[:3]
    wanted = {}  # the first 256 bytes of every file tell where it is from
    for file in files:
        package = file.relative_to(root).parts[0]
        if package in names:
            wanted.setdefault(file.read_bytes().replace(b"\r\n", b"\n")[:200], set()).add(
                names.index(package)
            )
    with data.train() as loader:
        batches = list(itertools.islice(loader, 60))
    seen = set()
    for batch in batches:
        for tokens, label in zip(batch["tokens"], batch["label_package"].tolist(), strict=True):
            known = wanted.get(bytes(t for t in tokens[:200] if t < 256))
            if known is not None:
                assert label in known
                seen.add(label)
            assert 0 <= label < 3
    assert len(seen) >= 2
    with pytest.raises(ValueError) as error:
        largest_packages(10_000)
    assert str(error.value).startswith(
        "config.objective.tasks.package = 10000: the standard library"
    )
