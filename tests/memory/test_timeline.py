"""Drawings of schedules show what is in the table, and those in docs/ are of this code."""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree

import matplotlib.image
import pytest

from memory import timeline
from parallel.schedule_costs import Costs, ideal, lockstep
from parallel.schedule_kinds import FORMS, make_schedule

DOCS = Path(__file__).parents[2] / "docs" / "pipeline"
NAMESPACE = "{http://www.w3.org/2000/svg}"


def test_text_has_a_row_for_each_stage_and_a_column_for_each_tick():
    assert timeline.text(make_schedule("1f1b", 2, 3)) == (
        "1f1b, wide: 2 stages, 3 micro-batches, up to 3, 1 of them in flight; 5 ticks\n"
        "stage 0 |F0|F1      |F2 B0 W0|B1 W1   |B2 W2|\n"
        "stage 1 |  |F0 B0 W0|F1 B1 W1|F2 B2 W2|     |\n"
    )
    assert "|F0.0|F0.1|B0.1|W0.1|B0.0|W0.0|" in timeline.text(make_schedule("zb_v", 1, 1))


def test_figures_are_one_row_for_each_schedule():
    table = timeline.figures([make_schedule("1f1b", 4, 8), make_schedule("zb_v", 4, 8)])
    assert table.splitlines()[2:] == [
        "| 1f1b, wide | 14 | 9 | 9 | 9 | 7, 5, 3, 1 | 7, 5, 3, 1 | 7, 5, 3, 1 |",
        "| zb_v, single | 51 | 1.5 | 0 | 1.5 | 4, 4, 4, 4 | 4, 4, 4, 4 | 8, 8, 8, 8 |",
    ]


def test_a_drawing_has_every_action_of_both_simulations_where_it_happens():
    schedule = make_schedule("zb_h1", 2, 4)
    costs = Costs(weight_grad=2)
    root = ElementTree.fromstring(timeline.svg(schedule, costs))
    numbers = [node.text for node in root.iterfind(f".//{NAMESPACE}g/{NAMESPACE}text")]
    assert sorted(numbers) == sorted(2 * [str(a.microbatch) for *_, a in schedule.actions()])
    boxes = {node.get("fill"): node.get("d").count("M") for node in root.iter(f"{NAMESPACE}path")}
    for colour in timeline.COLOURS.values():
        assert boxes[colour] == 2 * 4  # of the last panel
    texts = [node.text or "" for node in root.iter(f"{NAMESPACE}text")]
    for which, run in (("lockstep", lockstep), ("ideal", ideal)):
        timing = run(schedule, costs)
        words = (f"{which}: {timing.time:g} units", f"{timing.bubble:g} of them bubble")
        assert [text for text in texts if all(word in text for word in words)]


def test_a_fragment_takes_the_pages_colours_and_shares_no_name_with_another():
    first, second = (timeline.fragment(make_schedule(name, 2, 2)) for name in ("1f1b", "zb_v"))
    assert "<svg" in first
    assert "currentColor" in first
    assert 'fill="#fff"' not in first
    ids = [
        ElementTree.fromstring(text).find("./defs/pattern").get("id") for text in (first, second)
    ]
    assert len(set(ids)) == 2


def test_the_drawings_in_docs_are_what_the_command_writes(tmp_path, capsys):
    timeline.main(["--stages=4", "--microbatches=8", f"--out={tmp_path}"])
    written = {file.name: file.read_text() for file in tmp_path.iterdir()}
    assert len(written) == sum(map(len, FORMS.values()))
    assert written == {file.name: file.read_text() for file in DOCS.glob("*.svg")}
    assert "| zb_v, wide | 32 |" in capsys.readouterr().out


def test_a_png_shows_every_colour(tmp_path):
    timeline.png(make_schedule("zb_h1", 2, 4), tmp_path / "x.png")
    pixels = matplotlib.image.imread(tmp_path / "x.png")[..., :3]
    found = {tuple(int(255 * part + 0.5) for part in pixel) for row in pixels for pixel in row}
    wanted = {tuple(bytes.fromhex(colour[1:])) for colour in timeline.COLOURS.values()}
    assert wanted <= found


def test_without_matplotlib_the_png_tells_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit) as caught:
        timeline.main([f"--out={tmp_path}", "--png"])
    assert caught.value.code == (
        "error: a PNG wants matplotlib; run pip install -e '.[dev]', or take the SVG"
    )
    assert not list(tmp_path.iterdir()), "nothing is half-drawn"


def drawn(capsys, *arguments):
    """The titles of what is printed, and of what is left out."""
    timeline.main(arguments)
    lines = capsys.readouterr().out.splitlines()
    titles = [line.partition(":")[0] for line in lines if " ticks" in line and ":" in line]
    return titles, [line for line in lines if line.startswith("left out: ")]


def test_what_does_not_fit_is_left_out_with_a_line(capsys):
    titles, left_out = drawn(capsys, "--stages=4", "--microbatches=6")
    assert len(titles) == sum(map(len, FORMS.values())) - len(FORMS["interleaved"])
    assert left_out == [
        (
            "left out: config.pipeline.microbatches = 6: interleaved needs a multiple of the 4 "
            "stages, such as 4 or 8"
        )
    ]
    titles, left_out = drawn(capsys, "--stages=4", "--microbatches=2")
    assert titles == ["gpipe"]
    assert len(left_out) == len(FORMS) - 1


def test_one_schedule_alone_and_one_of_ones_own(capsys, tmp_path):
    assert drawn(capsys, "--schedule=zb_v", "--microbatches=6") == (
        ["zb_v, single", "zb_v, wide"],
        [],
    )
    file = tmp_path / "mine.py"
    file.write_text(
        "from parallel.schedule import B, F\n"
        "def orders(p, m): return [[a for i in range(m) for a in (F(i), B(i))]] * p\n"
    )
    assert drawn(capsys, f"--orders={file}", f"--out={tmp_path}") == (["mine"], [])
    assert (tmp_path / "mine.svg").read_text().startswith("<svg")


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--schedule=1f1b", "--microbatches=2"], "1f1b needs at least 4 for 4 stages"),
        (["--stages=0"], "config.mesh.pipe = 0"),
        (["--microbatches=0"], "config.pipeline.microbatches = 0: gpipe needs at least 1"),
        (["--orders=none.py"], "config.pipeline.orders = 'none.py': no such file"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(arguments, why):
    with pytest.raises(SystemExit) as caught:
        timeline.main(arguments)
    assert caught.value.code.startswith("error: ")
    assert why in caught.value.code
    assert "\n" not in caught.value.code


def test_a_png_wants_a_folder(capsys):
    with pytest.raises(SystemExit):
        timeline.main(["--png"])
    assert "--png wants --out=FOLDER" in capsys.readouterr().err


def test_the_bubbles_of_the_docs_are_of_this_code():
    text = (DOCS.parent / "pipeline.md").read_text()
    shown = text.split("<!-- bubbles -->\n")[1].split("<!-- /bubbles -->")[0]
    assert shown == timeline.bubbles([(4, 8), (4, 16), (8, 24), (8, 64)])


def test_the_slots_of_the_docs_are_of_this_code():
    text = (DOCS.parent / "pipeline.md").read_text()
    shown = text.split("<!-- slots -->\n")[1].split("<!-- /slots -->")[0]
    every = [make_schedule(name, 4, 8, form=form) for name in FORMS for form in FORMS[name]]
    assert shown == timeline.figures(every)


def test_the_docs_show_every_drawing():
    text = (DOCS.parent / "pipeline.md").read_text()
    assert [f for f in DOCS.iterdir() if f"(pipeline/{f.name})" not in text] == []


def test_sizes_of_bubbles_that_cannot_be_read_are_one_clear_line(capsys):
    with pytest.raises(SystemExit):
        timeline.main(["--bubbles", "4-8"])
    assert "--bubbles=4-8: write 4x8 for p 4 and m 8" in capsys.readouterr().err
