import pytest
from matplotlib.figure import Figure

from fused_preact.bench import picture
from fused_preact.errors import UserError

FUSED = "fused channels_last"


def document(dtype, ratio, instructions):
    """A result of one case, whose forward and total are `ratio` times faster."""
    spread = {"median": ratio, "low": ratio * 0.9, "high": ratio * 1.1}
    row = {"contender": FUSED, "baseline": "eager NCHW", "ratio": spread, "goal": None, "reached": None}
    rows = [{**row, "quantity": quantity} for quantity in ("forward", "total")]
    rows.append({**row, "quantity": "saved_bytes", "ratio": dict.fromkeys(spread, 2.0), "goal": 2.0, "reached": True})
    contenders = {"eager NCHW": {"saved_bytes": 2**21}, FUSED: {"saved_bytes": 2**20}}
    return {
        "date": "2026-11-28T14:23:31+00:00",
        "device": {"model": "A processor", "threads": 2, "bf16_instructions": instructions},
        "versions": {"torch": "2.13"},
        "malloc": {"setting": "default"},
        "cases": [{"group": "G", "label": "a case", "dtype": dtype, "contenders": contenders, "rows": rows}],
    }


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws a document, and returns the figure instead of its file."""
    saved = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **options: saved.append((figure, options)))

    def draw(made):
        picture.draw(made, tmp_path / "x.png")
        return saved[-1]

    return draw


def test_bars_have_the_ratios_and_the_goal_is_marked(drawn):
    """The picture shows what the document says: bar lengths, amounts, and a mark at the goal."""
    figure, options = drawn(document("fp32", 1.7, []))
    time, memory = figure.axes
    assert [bar.get_width() for bar in time.patches] == [1.7, 1.7]
    assert [bar.get_width() for bar in memory.patches] == [2.0]
    assert {"2.00x", "2.00 to 1.00 MiB"} <= {text.get_text() for text in memory.texts}
    (amounts,) = (text for text in memory.texts if text.get_text() == "2.00 to 1.00 MiB")
    assert amounts.xy[0] == 2.0  # behind the bar, where its color is legible
    assert options["transparent"]


def test_memory_modes_have_entries_of_their_own(drawn):
    """Every mode of a case is drawn under the case's label; eager and NCHW are not."""
    made = document("fp32", 1.7, [])
    (case,) = made["cases"]
    for name in ("fused lean channels_last", "fused NCHW"):
        case["contenders"][name] = case["contenders"][FUSED]
        case["rows"] = [*case["rows"], *({**row, "contender": name} for row in case["rows"][:3])]
    figure, _ = drawn(made)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["a case", "a case, lean"]


@pytest.mark.parametrize(("instructions", "cut"), [([], True), (["amx_bf16"], False)])
def test_emulated_bf16_is_cut_and_said(drawn, instructions, cut):
    """An eager baseline that emulates bf16 must not set the scale, and the title says that it does."""
    figure, _ = drawn(document("bf16", 20.0, instructions))
    assert bool(figure.axes[0].get_xlim()[1] < 20) == cut
    assert ("emulates" in figure.get_suptitle()) is cut


def test_what_does_not_fit_is_written_beside(drawn):
    """A number that a short bar cannot hold, white on white, and a goal that would shrink all bars."""
    made = document("fp32", 1.6, [])
    forward, total, saved = made["cases"][0]["rows"]
    total["goal"] = 6.0
    low = {**saved, "ratio": dict.fromkeys(saved["ratio"], 1.0), "goal": 11.0}
    made["cases"].append({**made["cases"][0], "label": "another", "rows": [forward, total, {**saved, "goal": None}]})
    made["cases"][1]["rows"][2]["ratio"] = dict.fromkeys(saved["ratio"], 12.0)
    made["cases"][0]["rows"][2] = low
    figure, _ = drawn(made)
    time, memory = figure.axes
    assert time.get_xlim()[1] < 3
    assert [text.get_text() for text in time.texts].count("goal 6x") == 2
    (short,) = (text for text in memory.texts if text.get_text() == "1.00x")
    assert short.get_position()[0] > 1.0
    assert short.get_color() == picture.TEXT


def test_a_picture_is_written_whole_or_not_at_all(full_disk, tmp_path):
    """On a full disk the one before stays, and one error says why."""
    path = tmp_path / "x.png"
    path.write_bytes(b"before")
    with pytest.raises(UserError, match=r"x\.png: cannot be written: No space left on device"):
        picture.draw(document("fp32", 1.7, []), path)
    assert [(entry.name, entry.read_bytes()) for entry in tmp_path.iterdir()] == [("x.png", b"before")]
