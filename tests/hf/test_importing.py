"""Import: equal on every layout, refused before anything is read, and back as it was."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from config_sources import with_checkpoint
from configs import tiny
from experiment import read_model
from hf import importing, writing
from hf.family import computed
from hf.files import open_folder
from parallel.pipeline import PipelineConfig
from parallel.precision import PrecisionConfig
from tests.hf import synthetic
from tests.hf.synthetic import CONFIGS, DECODERS, LLAMA
from training.naming import named

INTERLEAVED = PipelineConfig(schedule="interleaved", microbatches=4)
LAYOUTS = {
    "data": {"data": 8},
    "fsdp": {"fsdp": 8, "zero": 3},
    "zero 1": {"fsdp": 2, "tensor": 2, "zero": 1},
    "tensor": {"tensor": 8},
    "mixed": {"data": 2, "fsdp": 2, "tensor": 2, "zero": 3},
    "expert": {"expert": 4, "data": 2},
    "expert and others": {"expert": 2, "fsdp": 2, "tensor": 2, "zero": 3},
    "stages": {"pipe": 4, "fsdp": 2, "zero": 3, "pipeline": PipelineConfig(microbatches=4)},
    "spread stages": {"pipe": 2, "tensor": 2, "zero": 1, "pipeline": INTERLEAVED},
}


NAMES_OF_EXPERTS = {  # gate, up, down of one
    "mixtral": [f"block_sparse_moe.experts.{{}}.w{n}.weight" for n in (1, 3, 2)],
    "qwen3 moe": [f"mlp.experts.{{}}.{n}_proj.weight" for n in ("gate", "up", "down")],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of each family, in three files."""
    root = tmp_path_factory.mktemp("folders")
    return {
        name: synthetic.write_folder(root / name, config, synthetic.random_tensors(config), files=3)
        for name, config in CONFIGS.items()
    }


@pytest.fixture(scope="module")
def whole(folders):
    """The parameters of each on one device."""
    found = {}
    for name, folder in folders.items():
        with synthetic.opened(folder) as laid:
            found[name] = synthetic.on_host(synthetic.read(laid, CONFIGS[name], folder))
    return found


@pytest.mark.parametrize("family", DECODERS)
def test_one_parameter_of_each_kind(folders, whole, family):
    config = CONFIGS[family]
    tensors = {
        n: np.asarray(t.map()) for n, t in open_folder(folders[family], "--hf").tensors.items()
    }
    ours = named(whole[family])
    D, N, H = config.embed_dim, config.heads, config.head_dim
    if family == "gpt2":
        fused = tensors["transformer.h.3.attn.c_attn.weight"]
        query, table = fused[:, :D].reshape(D, N, H), tensors["transformer.wte.weight"]
        value = ours["stack/blocks/attention/value"][3]
        np.testing.assert_array_equal(value, fused[:, 2 * D :].reshape(D, N, H))
    else:
        query = tensors["model.layers.3.self_attn.q_proj.weight"].T.reshape(D, N, H)
        table = tensors["model.embed_tokens.weight"]
    if family in NAMES_OF_EXPERTS:
        names = (f"model.layers.3.{name.format(5)}" for name in NAMES_OF_EXPERTS[family])
        for part, name in zip(("gate", "up", "down"), names, strict=True):
            np.testing.assert_array_equal(ours[f"stack/blocks/mlp/{part}"][3, 5], tensors[name].T)
    np.testing.assert_array_equal(ours["stack/blocks/attention/query"][3], query)
    np.testing.assert_array_equal(ours["embedding"][:250], table)
    assert not ours["embedding"][250:].any()


def cells():
    """The kinds of tensors: one a layer, fused, one an expert."""
    for layout, kind in LAYOUTS.items():
        if "expert" not in kind:
            yield "llama", layout
            yield "gpt2", layout
            yield "bert", layout
    for layout in ("expert", "expert and others", "stages"):
        yield "qwen3 moe", layout


@pytest.mark.parametrize(("family", "layout"), list(cells()))
def test_the_same_on_every_layout_and_back(folders, whole, family, layout, tmp_path, monkeypatch):
    monkeypatch.setattr(importing, "PIECE", 1 << 9)  # several pieces of each
    config, folder = CONFIGS[family], folders[family]
    with synthetic.opened(folder, **LAYOUTS[layout]) as laid:
        params = synthetic.read(laid, config, folder)
        for (name, array), axes in zip(
            named(params).items(), jax.tree.leaves(laid.model.axes), strict=True
        ):
            assert array.sharding.spec == laid.model.rules.at_rest(axes, array.shape), name
        jax.tree.map(np.testing.assert_array_equal, synthetic.on_host(params), whole[family])
        synthetic.write(laid, config, params, tmp_path / "out", like=folder)
    same_folders(tmp_path / "out", folder)


def same_folders(one: Path, other: Path) -> None:
    """Names, shapes, dtypes, values and config."""
    first, second = open_folder(one, "--one"), open_folder(other, "--other")
    assert first.config == second.config
    assert first.tensors.keys() == second.tensors.keys()
    for name, stored in first.tensors.items():
        assert stored.kind == second.tensors[name].kind
        np.testing.assert_array_equal(stored.map(), second.tensors[name].map())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", CONFIGS)
def test_a_round_trip_in_half_precision(family, dtype, tmp_path):
    config = CONFIGS[family]
    tensors = synthetic.random_tensors(config, dtype)
    folder = synthetic.write_folder(tmp_path / "in", config, tensors)
    with synthetic.opened(folder) as laid:
        params = synthetic.read(laid, config, folder)
        assert {p.dtype.name for p in jax.tree.leaves(params)} == {"float32"}
        synthetic.write(laid, config, params, tmp_path / "out", like=folder, shard_bytes=20_000)
        assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
        synthetic.write(laid, config, params, tmp_path / "wide", like=folder, dtype="float32")
    same_folders(tmp_path / "out", folder)
    wide = open_folder(tmp_path / "wide", "--wide")
    assert {stored.kind for stored in wide.tensors.values()} == {"F32"}
    assert wide.config["torch_dtype"] == "float32"


def test_master_weights_in_half_precision(folders):
    with synthetic.opened(folders["llama"]) as laid:
        precision = PrecisionConfig(params="bfloat16", compute="bfloat16")
        params = synthetic.read(laid, LLAMA, folders["llama"], precision)
    assert {p.dtype for p in jax.tree.leaves(params)} == {np.dtype(ml_dtypes.bfloat16)}


def test_files_keep_to_their_size_and_the_library_reads_them(folders, tmp_path):
    with synthetic.opened(folders["llama"]) as laid:
        params = synthetic.read(laid, LLAMA, folders["llama"])
        synthetic.write(laid, LLAMA, params, tmp_path / "out", shard_bytes=50_000)
    read = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        tensors = load_file(file)
        assert sum(t.nbytes for t in tensors.values()) <= 50_000
        read |= tensors
    for name, stored in open_folder(folders["llama"], "--hf").tensors.items():
        np.testing.assert_array_equal(read[name], stored.map())


@pytest.mark.parametrize("piece", [1 << 9, 1 << 14])
@pytest.mark.parametrize("family", NAMES_OF_EXPERTS)
def test_experts_in_one_tensor(whole, family, piece, tmp_path, monkeypatch):
    """As transformers 5 holds them: the same parameters, and back in that form."""
    monkeypatch.setattr(importing, "PIECE", piece)  # a part of one expert; some experts
    config = CONFIGS[family]
    tensors = in_one_tensor(family, synthetic.random_tensors(config))
    assert {n: t.shape for n, t in tensors.items()} == {
        n: t.shape for n, t in synthetic.random_tensors(config, fused=True).items()
    }
    folder = synthetic.write_folder(tmp_path / "in", config, tensors)
    with synthetic.opened(folder, expert=2, tensor=2, fsdp=2, zero=3) as laid:
        params = synthetic.read(laid, config, folder)
        jax.tree.map(np.testing.assert_array_equal, synthetic.on_host(params), whole[family])
        synthetic.write(laid, config, params, tmp_path / "out", like=folder)
    same_folders(tmp_path / "out", folder)


def in_one_tensor(family: str, apart: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The experts of each layer in one tensor, gate and up beside each other."""
    config, names = CONFIGS[family], NAMES_OF_EXPERTS[family]
    found = {n: t for n, t in apart.items() if ".experts." not in n}
    for layer in range(config.layers):
        start = f"model.layers.{layer}."
        gate, up, down = (
            np.stack([apart[start + name.format(e)] for e in range(config.experts.number)])
            for name in names
        )
        found[f"{start}mlp.experts.gate_up_proj"] = np.concatenate([gate, up], axis=1)
        found[f"{start}mlp.experts.down_proj"] = down
        block = names[0].partition(".")[0]
        found[f"{start}mlp.gate.weight"] = found.pop(f"{start}{block}.gate.weight")
    return found


def test_gpt2_as_it_was_published(tmp_path):
    """Without the prefix, with masks as buffers, and with the head that is the table again."""
    config = CONFIGS["gpt2"]
    tensors = {
        name.removeprefix("transformer."): array
        for name, array in synthetic.random_tensors(config).items()
    }
    masks = {f"h.{layer}.attn.bias": np.ones((1, 1, 64, 64), np.float32) for layer in range(4)}
    folder = synthetic.write_folder(tmp_path / "in", config, tensors | masks)
    with synthetic.opened(folder) as laid:
        params = synthetic.read(laid, config, folder)
        synthetic.write(laid, config, params, tmp_path / "out", like=folder)
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == tensors.keys()


BERT_NORM = "bert.encoder.layer.3.output.LayerNorm"


def test_bert_as_it_was_published(tmp_path):
    """With old names of gains, the second objective's weights, and positions as a buffer."""
    config = CONFIGS["bert"]
    tensors = synthetic.random_tensors(config)
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): array
        for name, array in tensors.items()
    }
    assert f"{BERT_NORM}.gamma" in old
    more = {
        "bert.embeddings.position_ids": np.arange(64, dtype=np.int64)[None],
        "bert.pooler.dense.weight": np.ones((32, 32), np.float32),
        "bert.pooler.dense.bias": np.ones(32, np.float32),
        "cls.seq_relationship.weight": np.ones((2, 32), np.float32),
        "cls.seq_relationship.bias": np.ones(2, np.float32),
    }
    folder = synthetic.write_folder(tmp_path / "in", config, old | more)
    with synthetic.opened(folder) as laid:
        params = synthetic.read(laid, config, folder)
        synthetic.write(laid, config, params, tmp_path / "out", like=folder)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == tensors.keys()
    np.testing.assert_array_equal(written[f"{BERT_NORM}.weight"], tensors[f"{BERT_NORM}.weight"])
    np.testing.assert_array_equal(
        named(params)["stack/blocks/mlp_norm/gain"][3], tensors[f"{BERT_NORM}.weight"]
    )


def test_of_another_bert_nothing_is_ignored(tmp_path):
    config = CONFIGS["bert, classes"]
    tensors = synthetic.random_tensors(config)
    tensors["cls.seq_relationship.weight"] = np.ones((2, 32), np.float32)
    folder = synthetic.write_folder(tmp_path / "in", config, tensors)
    refused(folder, "unexpected, 1: cls.seq_relationship.weight", config=config)


@pytest.mark.parametrize(
    ("family", "name", "tasks"),
    [("bert", "masked_lm", {}), ("bert, classes", "classification", {"label": 3})],
)
def test_an_encoders_heads_say_the_objective(folders, family, name, tasks):
    config = with_checkpoint(tiny.get_config(), folders[family], "--hf", [])
    assert (config.objective.name, config.objective.tasks.to_dict()) == (name, tasks)
    assert computed(read_model(config)) == computed(CONFIGS[family])


def test_parameters_that_the_family_does_not_have(folders):
    words = "without a place in it, 3: final_norm/bias", "config.model.norm = 'layer'"
    refused(folders["llama"], *words, config=replace(LLAMA, norm="layer"))
    words = "it has beside config.model's, 2: embed_norm/bias", "config.model.embed_norm = False"
    refused(folders["bert"], *words, config=replace(CONFIGS["bert"], embed_norm=False))


@pytest.mark.parametrize(
    "heads",
    [
        {"tasks": (("label", 3),)},
        {"tasks": (("label", 3),), "token_head": False},
    ],
)
def test_other_heads_than_a_checkpoint_has(folders, heads):
    words = "BertForMaskedLM predicts tokens, with config.objective.tasks = {}", "config.objective"
    refused(folders["bert"], *words, config=replace(CONFIGS["bert"], **heads))


@pytest.mark.parametrize(
    ("family", "copies"),
    [
        ("qwen3", {"lm_head.weight": "model.embed_tokens.weight"}),
        (
            "bert",
            {
                "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
                "cls.predictions.decoder.bias": "cls.predictions.bias",
            },
        ),
        (
            "roberta",
            {
                "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
                "lm_head.decoder.bias": "lm_head.bias",
            },
        ),
    ],
)
def test_a_tied_head_that_is_stored_goes_back(family, copies, tmp_path):
    config = CONFIGS[family]
    tensors = synthetic.random_tensors(config)
    tensors |= {copy: tensors[name] for copy, name in copies.items()}
    folder = synthetic.write_folder(tmp_path / "in", config, tensors)
    with synthetic.opened(folder) as laid:
        params = synthetic.read(laid, config, folder)
        synthetic.write(laid, config, params, tmp_path / "out", like=folder)
    same_folders(tmp_path / "out", folder)


# --- What is refused -------------------------------------------------------------------------


def changed(tmp_path: Path, change) -> Path:
    tensors = synthetic.random_tensors(LLAMA)
    change(tensors)
    return synthetic.write_folder(tmp_path / "in", LLAMA, tensors)


def refused(folder: Path, *words: str, config=LLAMA) -> None:
    with synthetic.layout(config=config) as laid, pytest.raises(ValueError) as error:
        synthetic.read(laid, config, folder)
    text = str(error.value)
    assert text.startswith(f"config.init_from = '{folder}'")
    assert "\n" not in text
    for word in words:
        assert word in text


def test_missing_tensors(tmp_path):
    def change(tensors):
        for layer in range(4):
            del tensors[f"model.layers.{layer}.mlp.up_proj.weight"]

    refused(changed(tmp_path, change), "missing, 4: model.layers.0.mlp.up_proj.weight,", ", ...")


def test_unexpected_tensors(tmp_path):
    def change(tensors):
        tensors["model.layers.0.self_attn.q_norm.weight"] = np.ones(8, np.float32)

    refused(changed(tmp_path, change), "unexpected, 1: model.layers.0.self_attn.q_norm.weight")


def test_an_expert_is_missing(tmp_path):
    config = CONFIGS["mixtral"]
    tensors = synthetic.random_tensors(config)
    name = "model.layers.2.block_sparse_moe.experts.7.w3.weight"
    del tensors[name]
    folder = synthetic.write_folder(tmp_path / "in", config, tensors)
    refused(folder, f"tensors missing, 1: {name}", config=config)


def test_another_number_of_experts(folders):
    config = CONFIGS["mixtral"]
    config = replace(config, experts=replace(config.experts, number=16))
    words = "missing, 96", "of another shape, 4", "config.experts.number = 16 (8 there)"
    refused(folders["mixtral"], *words, config=config)


def test_wrong_shapes(tmp_path):
    def change(tensors):
        tensors["lm_head.weight"] = np.ones((251, 32), np.float32)

    refused(changed(tmp_path, change), "lm_head.weight is [251, 32] and should be [250, 32]")


def test_dtypes_that_are_not_read(tmp_path):
    def change(tensors):
        tensors["lm_head.weight"] = np.ones((250, 32), np.int8)

    refused(changed(tmp_path, change), "lm_head.weight is I8, read are F32, F16, BF16")


def test_another_model(folders):
    config = replace(LLAMA, layers=5, mlp_dim=96)
    words = "config.model.layers = 5 (4 there)", "config.model.mlp_dim = 96 (64 there)"
    refused(folders["llama"], "missing, 9", "of another shape, 12", *words, config=config)


def test_a_folder_that_is_there_is_not_written_over(folders, tmp_path):
    with synthetic.opened(folders["llama"]) as laid:
        params = synthetic.read(laid, LLAMA, folders["llama"])
        with pytest.raises(ValueError, match="is there already"):
            synthetic.write(laid, LLAMA, params, tmp_path)


def test_nothing_is_left_of_a_write_that_fails(folders, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    with synthetic.opened(folders["llama"]) as laid:
        params = synthetic.read(laid, LLAMA, folders["llama"])
        monkeypatch.setattr(writing.os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            synthetic.write(laid, LLAMA, params, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_the_family_of_like_cannot_say(folders, tmp_path):
    config = CONFIGS["qwen3"]
    with synthetic.opened(folders["qwen3"]) as laid:
        params = synthetic.read(laid, config, folders["qwen3"])
        with pytest.raises(ValueError, match=r"--like = .* LlamaForCausalLM does not compute"):
            synthetic.write(laid, config, params, tmp_path / "out", like=folders["llama"])
    assert not list(tmp_path.iterdir())


def test_keys_that_nobody_reads_are_carried_along(folders, tmp_path):
    config = replace(LLAMA, rope_factor=4.0)  # trained on with another one
    with synthetic.opened(folders["llama"]) as laid:
        params = synthetic.read(laid, config, folders["llama"])
        synthetic.write(laid, config, params, tmp_path / "out", like=folders["llama"])
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["bos_token_id"] == 3
    assert written["rope_scaling"]["factor"] == 4.0
