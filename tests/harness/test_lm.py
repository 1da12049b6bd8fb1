"""What lm-eval asks and what it gets: order, windows, kept answers, generated text."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from data.tokens import ByteTokenizer
from harness.answers import Answers, answers_path
from harness.evaluation import run_tasks
from harness.rows import RowShape
from harness.scoring import Scored
from harness.tasks import load_tasks
from tests.harness import local

lm_room = pytest.importorskip("harness.lm")  # it imports lm-eval
HarnessLM = lm_room.HarnessLM

END, LONGEST, BATCH = ByteTokenizer.end_id, 16, 4


class Fake:
    """Scores rows in batches of 4 by a hash of their tokens; may be killed after some batches."""

    def __init__(self, batches: int | None = None, sources: bool = False) -> None:
        self.shape = RowShape(longest=LONGEST, sources=sources)
        self.left, self.asked = batches, []

    def __call__(self, rows):
        order = sorted(range(len(rows)), key=lambda n: -len(rows[n].given))
        for start in range(0, len(order), BATCH):
            if self.left is not None:
                if self.left == 0:
                    raise RuntimeError("killed")
                self.left -= 1
            some = order[start : start + BATCH]
            self.asked += [rows[n] for n in some]
            yield [
                Scored(n, -(hash((*rows[n].given, *rows[n].wanted)) % 97) / 7, n % 2 == 0)
                for n in some
            ]


def lm_of(scorer=None, answers=None, generate=None):
    return HarnessLM(scorer or Fake(), ByteTokenizer(), answers or Answers(), generate)


def asks(*args: tuple) -> list:
    return [SimpleNamespace(args=one, task_name="mine") for one in args]


def ids(text: str) -> list[int]:
    return list(text.encode())


def test_answers_come_in_the_order_of_the_requests():
    scorer = Fake()
    texts = [("a" * n, "bc") for n in (3, 9, 1, 5, 9, 7)]
    got = lm_of(scorer).loglikelihood(asks(*texts))
    assert len(scorer.asked) == 5, "equal requests are asked once"
    alone = [lm_of().loglikelihood(asks(one))[0][0] for one in texts]
    assert [log_prob for log_prob, _ in got] == alone
    assert got[1] == got[4]


def test_spaces_at_the_end_of_a_context_belong_to_the_continuation():
    scorer = Fake()
    lm_of(scorer).loglikelihood(asks(("ab  ", "cd"), ("", "xy")))
    rows = {tuple(row.given): list(row.wanted) for row in scorer.asked}
    assert rows == {tuple(ids("ab")): ids("  cd"), (END,): ids("xy")}


def test_a_source_ends_and_its_target_does_not():
    scorer = Fake(sources=True)
    lm_of(scorer).loglikelihood(asks(("ab ", "cd")))
    assert [(list(row.given), list(row.wanted)) for row in scorer.asked] == [
        ([*ids("ab"), END], ids(" cd"))
    ]


def test_windows_score_each_token_once_after_as_many_as_fit():
    scorer, text = Fake(), "".join(chr(97 + n % 26) for n in range(40))
    lm_of(scorer).loglikelihood_rolling(asks((text,)))
    rows = sorted(scorer.asked, key=lambda row: row.given[0] != END)
    assert rows[0].given == [END]
    assert sorted(token for row in rows for token in row.wanted) == sorted(ids(text))
    whole = [END, *ids(text)]
    for row in rows:
        both = [*row.given, *row.wanted]
        assert len(both) == LONGEST + 1
        assert any(whole[n : n + len(both)] == both for n in range(len(whole)))
    assert lm_of().loglikelihood_rolling(asks(("",))) == [0.0]


@pytest.mark.parametrize("batches", [0, 1, 3])
def test_a_killed_run_asks_for_the_rest_alone(tmp_path, batches):
    folder, path = local.task_folder(tmp_path / "tasks"), tmp_path / "kept" / "answers.jsonl"
    load = lambda: load_tasks(["both"], folder, generates=False)
    whole = Fake()
    whole.shape = RowShape(longest=48)
    want = run_tasks(lm_of(whole), load(), None)

    def kept() -> list[str]:
        return [json.loads(line)["key"] for line in path.read_text().splitlines()]

    killed = Fake(batches)
    killed.shape = RowShape(longest=48)
    answers = Answers(path)
    with pytest.raises(RuntimeError, match="killed"):
        run_tasks(lm_of(killed, answers), load(), None)
    answers.close()
    assert len(kept()) == len(killed.asked) == batches * BATCH

    path.write_bytes(path.read_bytes() + b'{"key": "torn')
    rest = Fake()
    rest.shape = RowShape(longest=48)
    answers = Answers(path)
    assert run_tasks(lm_of(rest, answers), load(), None) == want
    answers.close()
    assert len(rest.asked) == len(whole.asked) - batches * BATCH
    assert len(set(kept())) == len(kept())

    none = Fake(0)
    none.shape = RowShape(longest=48)
    answers = Answers(path)
    assert run_tasks(lm_of(none, answers), load(), None) == want, "nothing is asked any more"
    answers.close()


def test_another_checkpoint_has_other_answers(tmp_path):
    text = ByteTokenizer()
    source = tmp_path / "checkpoints" / "4"
    source.mkdir(parents=True)
    (source / "weights").write_bytes(b"1234")
    one = answers_path(tmp_path, 4, source, "model", text)
    assert one == answers_path(tmp_path, 4, source, "model", text)
    others = {
        one,
        answers_path(tmp_path, 8, source, "model", text),
        answers_path(tmp_path, 4, source, "another", text),
        answers_path(tmp_path, None, source, "model", text),
    }
    (source / "weights").write_bytes(b"12345")
    others.add(answers_path(tmp_path, 4, source, "model", text))
    assert len(others) == 5
    assert {path.parent for path in others} == {tmp_path / "tasks"}


def test_text_is_generated_by_what_was_given(tmp_path):
    folder = local.task_folder(tmp_path / "tasks")
    given: list[tuple[str, dict]] = []

    def generate(prompts, how):
        given.extend(zip(prompts, how, strict=True))
        return [f"{prompt[:3]}!\nmore" for prompt in prompts]

    path = tmp_path / "answers.jsonl"
    answers = Answers(path)
    lm = lm_of(answers=answers, generate=generate)
    metrics = run_tasks(lm, load_tasks(["answers"], folder, generates=True), 5)
    assert metrics["answers"]["samples"] == 5
    assert metrics["answers"]["exact_match"] == 0.0
    assert len(given) == 5
    assert all(how["until"] == ["\n"] and how["max_gen_toks"] == 8 for _, how in given)
    texts = [json.loads(line)["answer"] for line in path.read_text().splitlines()]
    assert sorted(texts) == sorted(f"{prompt[:3]}!" for prompt, _ in given), "cut at `until`"

    run_tasks(lm, load_tasks(["answers"], folder, generates=True), 5)
    assert len(given) == 5, "kept, too"
    drawn = asks(("a", {"do_sample": True}), ("a", {"do_sample": True}))
    lm.generate_until(drawn)
    assert len(given) == 7, "two draws are two texts"
    answers.close()


def test_no_text_without_a_generator(tmp_path):
    with pytest.raises(ValueError) as error:
        lm_of().generate_until(asks(("a", {})))
    assert str(error.value) == "--tasks: mine generates text, and no generator is here"
    folder = local.task_folder(tmp_path / "tasks")
    with pytest.raises(ValueError, match="--tasks=answers: it generates text"):
        load_tasks(["answers"], folder, generates=False)


def test_a_continuation_that_cannot_be_scored_is_named():
    for continuation, words in (("", "has no token"), ("b" * 17, "17 tokens, more than")):
        scorer = Fake()
        with pytest.raises(ValueError, match=words):
            lm_of(scorer).loglikelihood(asks(("a", "b"), ("a", continuation)))
        assert not scorer.asked, "nothing was begun"
