"""What does not go together is refused in one line that names the keys, before any file is read."""

import pytest

from data.agree import check_lengths, check_source, without_effect
from data.config import DataConfig
from data.objective import NAMES, ObjectiveConfig

FAMILIES = {"captioning": "vision_language", "classification": "encoder"}


def refused(objective, family="decoder", **config):
    with pytest.raises(ValueError) as error:
        check_source(DataConfig(**config), objective, family)
    assert "\n" not in str(error.value)
    return str(error.value)


GOOD = [
    ({}, {}, "decoder"),
    ({"packing": "buckets", "buckets": (8, 256)}, {"name": "prefix_lm"}, "decoder"),
    ({"source": "text", "path": "x"}, {"name": "masked_lm"}, "encoder"),
    ({"packing": "none"}, {"name": "masked_lm", "tasks": {"package": 4}}, "encoder"),
    ({"packing": "none"}, {"name": "span_corruption"}, "encoder_decoder"),
    ({"source": "docstrings", "packing": "none"}, {"name": "seq2seq"}, "encoder_decoder"),
    ({"source": "digits", "packing": "none"}, {"name": "captioning"}, "vision_language"),
    (
        {"source": "digits", "packing": "none"},
        {"name": "classification", "tasks": {"parity": 2}},
        "vision",
    ),
]


@pytest.mark.parametrize(("data", "objective", "family"), GOOD)
def test_what_goes_together(data, objective, family):
    check_source(DataConfig(**data), ObjectiveConfig(**objective), family)


def test_sources():
    docstrings = {"source": "docstrings", "packing": "none"}
    assert refused(ObjectiveConfig(), **docstrings) == (
        "config.data.source = 'docstrings': config.objective.name = 'causal_lm' learns from "
        "stdlib, text, jsonl, tokens, dataset"
    )
    assert refused(ObjectiveConfig("seq2seq"), packing="none") == (
        "config.data.source = 'stdlib': config.objective.name = 'seq2seq' learns from docstrings, "
        "jsonl"
    )
    assert refused(ObjectiveConfig("captioning"), "vision_language", packing="none") == (
        "config.data.source = 'stdlib': config.objective.name = 'captioning' learns from digits, "
        "images"
    )
    lines = {"source": "jsonl", "path": "x", "packing": "none"}
    assert refused(ObjectiveConfig("seq2seq"), **lines) == (
        "config.data.source_field = '': config.objective.name = 'seq2seq' makes the text of "
        "config.data.text_field from another; name the field that holds it"
    )
    assert refused(ObjectiveConfig(), source_field="de", **lines) == (
        "config.data.source_field = 'de': config.objective.name = 'causal_lm' reads no source; "
        "leave it empty"
    )


def test_families():
    digits = ObjectiveConfig("classification", tasks={"digit": 10})
    assert refused(digits, "encoder", source="digits", packing="none") == (
        "config.data.source = 'digits': config.model.family = 'encoder' takes a source of texts"
    )
    packages = ObjectiveConfig("classification", tasks={"package": 3})
    assert refused(packages, "vision", packing="none") == (
        "config.data.source = 'stdlib': config.model.family = 'vision' takes digits, images"
    )


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("causal_lm", "masked_lm")])
def test_packing_of_rows_of_one_text(name):
    tasks = {"tasks": {"package": 3}} if name == "classification" else {}
    source = {"seq2seq": "docstrings", "captioning": "digits"}.get(name, "stdlib")
    line = refused(ObjectiveConfig(name, **tasks), FAMILIES.get(name, "decoder"), source=source)
    right = "buckets or none" if name in ("prefix_lm", "classification") else "none"
    assert line == (
        f"config.data.packing = 'packed': config.objective.name = '{name}' has one example a row; "
        f"set it to {right}"
    )


def test_packing_of_labelled_rows():
    assert refused(ObjectiveConfig("masked_lm", tasks={"package": 3}), "encoder") == (
        "config.data.packing = 'packed': config.objective.tasks = {'package': 3} have one label a "
        "row; set it to buckets or none"
    )


def test_tasks():
    def line(tasks, name="classification", family="encoder", **config):
        return refused(ObjectiveConfig(name, tasks=tasks), family, packing="none", **config)

    assert line({"kind": 2}) == (
        "config.objective.tasks = {'kind': 2}: config.data.source = 'stdlib' has one task, such as "
        "{'package': 8}: the 8 largest"
    )
    assert line({"kind": 2}, "masked_lm", source="text", path="x") == (
        "config.objective.tasks = {'kind': 2}: config.data.source = 'text' has no labels; choose "
        "stdlib, jsonl, digits, images, or leave the tasks empty"
    )
    for wrong in ({"digit": 9}, {"digit": 10, "kind": 2}):
        assert line(wrong, family="vision", source="digits") == (
            f"config.objective.tasks = {wrong}: config.data.source = 'digits' has the tasks "
            "{'digit': 10, 'parity': 2}; choose among them"
        )
    pairs = {"source": "jsonl", "path": "x", "source_field": "de"}
    assert line({"kind": 2}, "seq2seq", "encoder_decoder", **pairs) == (
        "config.objective.tasks = {'kind': 2}: config.data.source = 'jsonl', config.objective.name "
        "= 'seq2seq': not built; leave the tasks empty"
    )


def test_lengths():
    plain, spans = ObjectiveConfig(), ObjectiveConfig("span_corruption")
    data = DataConfig(sequence_length=64, source_length=100)
    check_lengths(data, plain, 64)
    for objective, longest, key in (
        (plain, 63, "sequence_length = 64"),
        (spans, 64, "source_length = 100"),
    ):
        with pytest.raises(ValueError) as error:
            check_lengths(data, objective, longest)
        assert str(error.value) == (
            f"config.data.{key} is longer than config.model.max_length = {longest}; shorten it, or "
            "raise max_length"
        )
    assert without_effect(data, spans) == without_effect(DataConfig(), plain) == []
    assert without_effect(data, plain) == [
        "config.data.source_length has no effect: config.objective.name is 'causal_lm'"
    ]


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"name": "mlm"}, "config.objective.name = 'mlm': choose one of causal_lm, prefix_lm, "),
        ({"mask_rate": 0.0}, "config.objective.mask_rate = 0.0: a share between 0 and 1"),
        ({"mask_rate": 1.0}, "config.objective.mask_rate = 1.0: a share between 0 and 1"),
        ({"span_length": 0.5}, "config.objective.span_length = 0.5: tokens, at least 1"),
        ({"task_weight": 0.0}, "config.objective.task_weight = 0.0: above 0; "),
        ({"tasks": {"a b": 3}}, "config.objective.tasks = {'a b': 3}: 'a b' should be a name "),
        ({"tasks": {"a": 1}}, "config.objective.tasks.a = 1: the number of classes, at least 2"),
        ({"name": "classification"}, "config.objective.tasks = {}: config.objective.name = "),
    ],
)
def test_bad_objectives(keys, line):
    with pytest.raises(ValueError) as error:
        ObjectiveConfig(**keys)
    assert str(error.value).startswith(line)


def test_keys_without_effect():
    assert ObjectiveConfig("span_corruption", 0.3, 2.0).without_effect() == []
    assert ObjectiveConfig("masked_lm", 0.3, 2.0, task_weight=0.5).without_effect() == [
        "config.objective.span_length has no effect: config.objective.name is 'masked_lm'",
        "config.objective.task_weight has no effect: there are no tasks",
    ]
