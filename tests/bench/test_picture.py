import pytest
from matplotlib.figure import Figure

from fused_preact.bench import picture

FUSED = "fused channels_last"


def document(dtype, ratio, instructions):
    """A result of one case, whose forward and total are `ratio` times faster."""
    spread = {"median": ratio, "low": ratio * 0.9, "high": ratio * 1.1}
    row = {"contender": FUSED, "baseline": "eager NCHW", "ratio": spread, "goal": None, "reached": None}
    rows = [{**row, "quantity": quantity} for quantity in ("forward", "total")]
    rows.append({**row, "quantity": "saved_bytes", "ratio": dict.fromkeys(spread, 2.0), "goal": 2.0, "reached": True})
    contenders = {"eager NCHW": {"saved_bytes": 2**21}, FUSED: {"saved_bytes": 2**20}}
    return {
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
