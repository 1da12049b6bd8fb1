"""lm-eval's data sets are cached with the tests, not with the user."""

import os

import pytest

os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported


@pytest.fixture(scope="session", autouse=True)
def datasets_cache(tmp_path_factory):
    """Where the datasets library puts what it has read."""
    try:
        import datasets
    except ModuleNotFoundError:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("datasets")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        patch.setattr("datasets.builder.config.HF_DATASETS_CACHE", folder)
        yield
