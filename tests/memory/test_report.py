"""The pages of sweep.py and plan.py: what is in them, and how they behave in headless Chromium."""

from __future__ import annotations

import html
import itertools
import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from layouts import make_job
from memory import report
from memory.components import COMPONENTS
from memory.plan import GIB, plan
from parallel.targets import parse_target
from tests.runs import get_config

LIMIT = 80 * GIB
EVIL = '</script><img src="https://example.com/x" onerror="boom()"> & <!-- | \u2028 "quoted"'

STATE = {"weights (master copy)": 4, "optimizer: first moment": 4, "optimizer: second moment": 4}


def grade(seconds: float, **more) -> dict:
    return {
        "seconds": seconds,
        "communication_seconds": {"fsdp": seconds / 4, "tensor": seconds / 8},
        "exposed_seconds": {"fsdp": 0.0, "tensor": seconds / 8},
        "mfu": 0.4 / seconds,
    } | more


def predicted(gib: float, seconds: float) -> dict:
    """12 GiB of state, 1 of packing, of the rest half activations."""
    half = (gib - 13) / 2
    parts = STATE | {"saved: query": half, "gradients": half, "batch": 0.01, "packing": 0.99}
    components = {name: int(size * GIB) for name, size in parts.items()}
    return grade(seconds, total_bytes=sum(components.values()), components=components)


def compiled(packing: float, seconds: float = 1.1) -> dict:
    """12 GiB of arguments, 20 alive at the peak, and 4 KiB of outputs that are nothing else's."""
    parts = {"state and batch": 12, "activations": 11, "gradients": 8, "attention": 1}
    components = {name: int(size * GIB) for name, size in (parts | {"packing": packing}).items()}
    total = sum(components.values()) + 4096
    return grade(seconds, total_bytes=total, arguments=12 * GIB, components=components)


def row(name: str, **more) -> dict:
    whole = {
        "name": name,
        "overrides": {},
        "target": "gpu:h100:1x8",
        "limit_bytes": LIMIT,
        "predicted": None,
        "compiled": None,
        "measured": None,
        "status": "ok",
        "error": None,
    } | more
    return whole | {"fits": whole["status"] == "ok"}


REFUSED = {"total_bytes": 90 * GIB, "arguments": 12 * GIB, "out_of_memory": True}
RUN = {"total_bytes": 34 * GIB, "state_bytes": 12 * GIB, "seconds": 1.25, "tokens_per_second": 9.0}

ROWS = [
    row("fsdp 2, remat none", predicted=predicted(60, 1.0)),
    row("fsdp 16, remat none", predicted=predicted(40, 1.2)),
    row("data 4, remat full", predicted=predicted(50, 1.5)),  # slower and larger than another
    row("tensor 8, remat full", predicted=predicted(20, 2.0)),
    row("fsdp 8, remat dots", predicted=predicted(30, 1.0), compiled=compiled(2)),
    row("data 8", predicted=predicted(85, 0.8), compiled=REFUSED, status="does not fit"),
    row("fsdp 4", predicted=predicted(45, 0.9), status="failed", error="the compiler died"),
    row(EVIL, status="failed", error=f"config.mesh.data = -1: {EVIL}"),
]

PLAN = row(
    "fsdp 8, zero 3",
    predicted=predicted(30, 1.0),
    compiled=compiled(2),
    measured=RUN,
)
TIMELINE = [
    (0.1, {"activations": 1 * GIB}),
    (0.5, {"activations": 9 * GIB, "attention": 3 * GIB}),
    (0.7, {"activations": 11 * GIB, "gradients": 8 * GIB, "attention": 1 * GIB, "batch": 4096}),
    (1.0, {"gradients": 8 * GIB, "optimizer": 2 * GIB}),
]
BUFFERS = [
    {"bytes": 2 * GIB, "shape": "bf16[8,4096]", "component": "activations", "source": "a.py:1"},
    {"bytes": 1 * GIB, "shape": "f32[8]", "component": "gradients", "source": EVIL},
]


def sweep_page() -> str:
    return report.html(ROWS, title="Layouts on gpu:h100:1x8", limit_bytes=LIMIT)


def plan_page(planned: dict = PLAN, timeline: list = TIMELINE) -> str:
    return report.plan_html(planned, timeline, BUFFERS)


def drawn(page: str) -> dict[str, Any]:
    """The data that a page draws."""
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])


# --- what is in the pages -------------------------------------------------------------------------


def test_every_bar_adds_up_to_its_total():
    layouts = drawn(sweep_page())["layouts"]
    assert [one["name"] for one in layouts] == [one["name"] for one in ROWS]
    for layout, one in zip(layouts, ROWS, strict=True):
        total = ((one["compiled"] or one["predicted"]) or {"total_bytes": 0})["total_bytes"]
        assert sum(layout["parts"].values()) == pytest.approx(total, rel=1e-12)
        assert all(size > 0 for size in layout["parts"].values())


def test_a_plan_has_a_bar_for_every_grade_with_a_total():
    bars = drawn(plan_page())["layouts"]
    assert [bar["name"] for bar in bars] == ["predicted", "compiled", "measured"]
    for bar in bars:
        assert sum(bar["parts"].values()) == pytest.approx(PLAN[bar["name"]]["total_bytes"])
    on_cpu = PLAN | {"compiled": {"status": "failed"}, "measured": RUN | {"total_bytes": None}}
    bars = drawn(plan_page(on_cpu, timeline=[]))["layouts"]
    assert [bar["name"] for bar in bars] == ["predicted"]


@pytest.mark.parametrize("packing", [2, 0, -3])  # negative: buffers share more than is seen
def test_the_top_of_the_timeline_is_the_compiled_total(packing):
    planned = PLAN | {"compiled": compiled(packing)}
    data = drawn(plan_page(planned))
    moments = data["plan"]["timeline"]
    tops = [sum(moment["parts"].values()) for moment in moments]
    assert max(tops) == pytest.approx(planned["compiled"]["total_bytes"])
    assert np.argmax(tops) == 2
    assert all(moment["parts"]["state and batch"] == 12 * GIB for moment in moments)
    assert all(size >= 0 for moment in moments for size in moment["parts"].values())
    bar = data["layouts"][1]["parts"]
    for name in ("activations", "gradients", "attention"):
        assert moments[2]["parts"][name] == pytest.approx(bar[name], rel=1e-3)


def test_components_have_names_of_their_own():
    one = plan(
        make_job(get_config(), parse_target("cpu:8"), {"config.data.path": "texts"}),
        parse_target("cpu:8"),
        name="",
        overrides={},
        limit_bytes=GIB,
    )
    named = {*COMPONENTS, *one["predicted"]["components"]}
    others = {name for name in named if "other" in report._grouped({name: 1})}
    # Of colours that are told apart there are no more.
    assert others == {"batch", "collectives", "other", "teacher"}
    assert "optimizer state" in report._grouped({"optimizer: first moment": 1})
    assert "update" in report._grouped({"optimizer": 1})  # what it needs while it works


def test_small_components_are_other():
    stacks = [{"weights": 1000.0, "update": 1.0}, {"weights": 999.0, "attention": 1.0}]
    assert report._folded(stacks) == [
        {"weights": 1000.0, "other": 1.0},
        {"weights": 999.0, "other": 1.0},
    ]
    stacks[1]["update"] = 100.0  # not small there
    assert report._folded(stacks)[0] == {"weights": 1000.0, "update": 1.0}


# What is seen of linear RGB: Machado et al. 2009, severity 1.
EYES = {
    "normal": np.eye(3),
    "protan": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deutan": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritan": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


def linear(colour: str) -> np.ndarray:
    srgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def oklab(rgb: np.ndarray) -> np.ndarray:
    """https://bottosson.github.io/posts/oklab/: distances are as large as they look."""
    cones = np.array(
        [
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ]
    )
    opponents = np.array(
        [
            [0.2104542553, 0.7936177850, -0.0040720468],
            [1.9779984951, -2.4285922050, 0.4505937099],
            [0.0259040371, 0.7827717662, -0.8086757660],
        ]
    )
    return opponents @ np.cbrt(cones @ np.clip(rgb, 0, 1))


@pytest.mark.parametrize("eyes", EYES)
def test_any_two_colours_are_told_apart(eyes):
    seen = [oklab(np.array(EYES[eyes]) @ linear(colour)) for colour, _ in report.DRAWN.values()]
    assert all(np.linalg.norm(a - b) > 0.1 for a, b in itertools.combinations(seen, 2))


@pytest.mark.parametrize("paper", ["#ffffff", "#0d1117"])
def test_colours_stand_out_from_the_page(paper):
    assert paper in report.PAGE.read_text().replace("#fff;", "#ffffff;")

    def luminance(colour):
        return np.dot([0.2126, 0.7152, 0.0722], linear(colour))

    for colour, _ in report.DRAWN.values():
        dark, light = sorted((luminance(colour), luminance(paper)))
        assert (light + 0.05) / (dark + 0.05) > 1.4


@pytest.mark.parametrize("page", [sweep_page, plan_page])
def test_names_cannot_break_the_page(page):
    text = page()
    assert text.count("</script>") == report.PAGE.read_text().count("</script>") == 2
    assert "<img" not in text
    assert text.isascii()  # written and read alike wherever it is
    assert EVIL in json.dumps(drawn(text), ensure_ascii=False).replace('\\"', '"')


def test_the_page_refers_to_nothing_outside():
    source = report.PAGE.read_text()
    assert set(re.findall(r"https?://[^\"' ]*", source)) == {"http://www.w3.org/2000/svg"}
    assert re.findall(r"\b(?:src|href)=\S*", source) == ['href="data:,">']
    assert not re.search(r"fetch\(|import\b|XMLHttpRequest|WebSocket|url\(|sendBeacon", source)
    assert "default-src 'none'" in source  # and the browser would refuse it


def test_the_table_has_the_fastest_first_and_failures_last():
    lines = report.markdown(ROWS).splitlines()
    columns = lines[0].count("|")
    rows = [re.split(r"(?<!\\)\|", line) for line in lines[2:]]
    assert [len(cells) - 1 for cells in rows] == [columns] * len(ROWS)
    assert [cells[1].strip() for cells in rows[:3]] == ["data 8", "fsdp 4", "fsdp 2, remat none"]
    assert [cells[2].strip() for cells in rows[:3]] == ["no", "failed", "yes"]
    best = [cell.strip() for cell in next(cells for cells in rows if "fsdp 8" in cells[1])]
    assert best[3:7] == ["30.00", "34.00", "-11.8%", ""]
    # 0.4 of the peak in a second would be 0.36 in the 1.1 s that the compiled program takes.
    assert best[7:9] == ["1,100.0 ms", "36.4%"]
    assert rows[-1][2].strip().startswith("failed: config.mesh.data = -1:")


# --- how they behave ------------------------------------------------------------------------------

DRIVE = """{
const found = {};
const all = (where, of) => [...document.querySelectorAll(where)].map(of);
const text = node => node.textContent;
const names = () => all("#rows tr", tr => tr.cells[0].firstChild.textContent);
const header = name => [...document.querySelectorAll("#head th")].find(th => text(th) === name);
const type = words => {
  document.getElementById("filter").value = words;
  document.getElementById("filter").dispatchEvent(new Event("input"));
};
const legend = where => Object.fromEntries(
  all(`${where} span`, span => [span.textContent, span.firstChild.style.background]));
const bars = () => {
  const widths = {};
  for (const part of document.querySelectorAll("#bars .part")) {
    const name = part.textContent.split("\\n")[0];
    widths[name] = (widths[name] || 0) + Number(part.getAttribute("width"));
  }
  return widths;
};
%s
document.body.dataset.found = JSON.stringify(found);
}"""

SWEEP = """
found.fitting = names();
found.best = text(document.getElementById("best"));
document.getElementById("fitting").click();
found.fastest = names();
found.front = document.querySelector("#scatter .front").textContent.split("\\n");
found.points = all("#scatter .point", text).length;
found.columns = all("#head th", text);
found.widths = bars();
found.totals = all("#bars .total", text);
header("predicted GiB").click();
found.smallest = names();
found.sort = all("#head th", th => th.getAttribute("aria-sort"));
header("predicted GiB").click();
found.largest = names();
header("layout").dispatchEvent(new KeyboardEvent("keydown", { key: "Enter" }));
found.named = names();
type("remat FSDP none");
found.filtered = names();
found.shown = text(document.getElementById("shown"));
type("no such layout");
found.none = names().length + document.querySelectorAll("#bars .part, #scatter .point").length;
type("");
"""

PLANNED = """
found.peak = all("#timeline .peak", text);
found.limit = all("#timeline .limit-name", text);
found.lines = all("#timeline line.limit", line => Number(line.getAttribute("y1")));
found.areas = all("#timeline .area", area => area.getAttribute("fill"));
found.timeline = legend("#moments");
found.bars = legend("#legend");
found.note = text(document.getElementById("note"));
found.buffers = all("#buffers tr", tr => tr.cells[0].textContent);
found.hidden = all("section", section => section.hidden && section.id).filter(Boolean);
"""


@dataclass(frozen=True)
class Opened:
    """A page in the browser: what its script found, what the console said, a picture of it."""

    found: dict[str, Any]
    console: list[str]
    picture: np.ndarray  # [height, width, 3], of 0 to 255

    def shows(self, colour: str) -> bool:
        rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        return bool((self.picture == rgb).all(axis=-1).any())


def opened(page: str, script: str, folder: Path, *flags: str) -> Opened:
    """Opens a page offline, runs a script at its end."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed: apt-get install chromium")
    file, picture = folder / "page.html", folder / "page.png"
    file.write_text(page.replace("</body>", f"<script>{script}</script></body>"))
    done = subprocess.run(
        [
            chromium,
            "--headless",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--user-data-dir={folder}/profile",
            *(["--no-sandbox"] if os.geteuid() == 0 else []),
            "--host-resolver-rules=MAP * ~NOTFOUND",
            "--enable-logging=stderr",
            "--virtual-time-budget=1000",
            "--window-size=1200,1600",
            *flags,
            "--dump-dom",
            f"--screenshot={picture}",
            file.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answer = re.search(r'data-found="([^"]*)"', done.stdout)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    pixels = (matplotlib.image.imread(picture)[..., :3] * 255).round().astype(int)
    return Opened(json.loads(html.unescape(answer[1])) if answer else {}, console, pixels)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    return opened(sweep_page(), DRIVE % SWEEP, tmp_path_factory.mktemp("sweep"))


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """In dark mode."""
    dark = "--blink-settings=preferredColorScheme=0"
    return opened(plan_page(), DRIVE % PLANNED, tmp_path_factory.mktemp("plan"), dark)


def test_the_browser_would_tell_of_errors(tmp_path):
    faults = """
        document.getElementById("bars").append(svg("rect", { width: -1 }));
        fetch("https://example.com/").catch(() => 0);
        console.error("said");
        throw new Error("thrown");
    """
    said = "\n".join(opened(sweep_page(), faults, tmp_path).console)
    for words in ("negative value", "Content Security Policy", "said", "thrown"):
        assert words in said


def test_pages_load_offline_without_a_word_on_the_console(sweep, planned):
    assert sweep.console == planned.console == []
    assert sweep.found
    assert planned.found


def test_rows_are_sorted_and_filtered(sweep):
    found = sweep.found
    by_time = [
        *("data 8", "fsdp 4", "fsdp 2, remat none", "fsdp 8, remat dots", "fsdp 16, remat none"),
        *("data 4, remat full", "tensor 8, remat full", EVIL),  # what has no time comes last
    ]
    assert found["fastest"] == by_time
    fit = {one["name"] for one in ROWS if one["fits"]}
    assert found["fitting"] == [name for name in by_time if name in fit]
    assert found["columns"] == [
        *("layout", "fits", "predicted GiB", "compiled GiB", "step ms", "MFU %"),  # none measured
    ]
    assert found["sort"] == ["none", "none", "ascending", "none", "none", "none"]
    sizes = {one["name"]: one["predicted"]["total_bytes"] for one in ROWS if one["predicted"]}
    by_size = sorted(sizes, key=sizes.__getitem__)
    assert found["smallest"] == [*by_size, EVIL]
    assert found["largest"] == [*reversed(by_size), EVIL]
    assert [name for name in found["named"] if name.startswith("fsdp")] == [
        *("fsdp 2, remat none", "fsdp 4", "fsdp 8, remat dots", "fsdp 16, remat none"),
    ]
    assert sorted(found["filtered"]) == ["fsdp 16, remat none", "fsdp 2, remat none"]
    assert found["shown"] == "2 of 8"
    assert found["none"] == 0


def test_the_front_is_what_nothing_beats(sweep):
    points = {}
    for one in ROWS:
        if one["status"] != "failed":
            best = one["predicted"] | (one["compiled"] or {})
            points[one["name"]] = best["seconds"], best["total_bytes"]
    front = [
        name
        for name, (time, size) in points.items()
        if not any(t <= time and s <= size and (t, s) != (time, size) for t, s in points.values())
    ]
    assert sweep.found["front"] == sorted(front, key=lambda name: points[name])
    assert 1 < len(front) < len(points)
    assert sweep.found["best"] == "in the ring the fastest that fits: fsdp 2, remat none"
    assert sweep.found["points"] == len(points)


def test_bars_are_as_long_as_their_totals(sweep):
    sizes = {}
    for one in ROWS:
        if one["predicted"]:
            sizes[one["name"]] = (one["compiled"] or one["predicted"])["total_bytes"]
    widths = sweep.found["widths"]
    assert widths.keys() == sizes.keys()
    scale = widths["data 8"] / sizes["data 8"]
    for name, size in sizes.items():
        assert widths[name] == pytest.approx(size * scale, rel=1e-3)
    assert sweep.found["totals"] == [
        f"{sizes[name] / GIB:.2f} GiB" for name in sweep.found["fastest"] if name in sizes
    ]


def test_the_timeline_has_its_state_its_peak_and_the_limit(planned):
    found = planned.found
    assert found["peak"] == ["peak 34.00 GiB"]
    assert found["note"] == "fits: 34.00 of 80.00 GiB (compiled)"
    assert found["limit"] == ["limit 80.00 GiB"]
    assert len(found["lines"]) == 1
    assert len(found["areas"]) == len(found["timeline"])
    assert next(iter(found["timeline"])) == "state and batch"
    assert found["buffers"] == ["a.py:1", EVIL]
    assert found["hidden"] == ["table-section", "schedule-section", "scatter-section"]


def test_a_component_has_one_colour_everywhere(planned):
    timeline, bars = planned.found["timeline"], planned.found["bars"]
    both = timeline.keys() & bars.keys()
    assert {"state and batch", "activations", "gradients", "attention", "packing"} <= both
    assert all(timeline[name] == bars[name] for name in both)
    assert len(set(bars.values())) == len(bars)
    assert planned.found["areas"] == [report.DRAWN[name][0] for name in timeline]


def test_the_pictures_are_not_blank(sweep, planned):
    assert sweep.shows("#ffffff")
    assert planned.shows("#0d1117")
    for one, names in (
        (sweep, ("weights", "optimizer state", "state and batch", "activations", "gradients")),
        (planned, ("state and batch", "activations", "gradients", "attention", "packing")),
    ):
        assert len(np.unique(one.picture @ [1, 256, 65536])) > 50
        assert all(one.shows(report.DRAWN[name][0]) for name in names)


def test_a_tiny_model_far_below_the_limit_is_seen(tmp_path):
    def small(grade):
        sizes = {name: size / 2**13 for name, size in grade["components"].items()}
        return grade | {
            "components": sizes,
            "total_bytes": grade["total_bytes"] / 2**13,
            "arguments": grade.get("arguments", 0) / 2**13,
        }

    tiny = PLAN | {"predicted": small(PLAN["predicted"]), "compiled": small(PLAN["compiled"])}
    moments = [(at, {name: n / 2**13 for name, n in parts.items()}) for at, parts in TIMELINE]
    page = plan_page(tiny | {"measured": None}, moments)
    one = opened(page, DRIVE % (PLANNED + "found.widths = bars();"), tmp_path)
    assert one.console == []
    assert one.found["peak"] == ["peak 4.25 MiB"]
    assert one.found["limit"] == ["limit 80.00 GiB, 19,275 times the largest"]
    assert one.found["lines"] == []
    assert min(one.found["widths"].values()) > 500
