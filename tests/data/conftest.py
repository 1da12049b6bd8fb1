"""A little real text, so that every test here is quick."""

import pytest

TEXTS = [
    f"def f{i}(x):\n"
    + "".join(f"    x += {i * j}  # caf\u00e9 \u4f60\u597d\n" for j in range(i % 7))
    for i in range(60)
]


@pytest.fixture
def text_folder(tmp_path):
    """A folder with the texts, a file each; `config.data.path` is `<folder>/*.py`."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for i, text in enumerate(TEXTS):
        (folder / f"{i:02}.py").write_text(text)
    return folder


@pytest.fixture
def open_texts(text_folder, tmp_path):
    """`open_texts(vocab_size=..., seed=..., objective=..., **config)` opens those files."""
    from data.config import DataConfig
    from data.dataset import open_data

    def build(vocab_size=400, seed=0, objective=None, **config):
        wanted = {"sequence_length": 16, "batch_size": 8} | config
        config = DataConfig(source="text", path=str(text_folder / "*.py"), **wanted)
        return open_data(config, vocab_size, tmp_path / "run", seed=seed, objective=objective)

    return build
