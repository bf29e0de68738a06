import pytest
from matplotlib.figure import Figure

from fused_preact.bench import picture


def document(dtype, ratio, instructions):
    """A result of one case, whose forward and total are `ratio` times faster."""
    spread = {"median": ratio, "low": ratio * 0.9, "high": ratio * 1.1}
    row = {"contender": picture.CONTENDER, "baseline": "eager NCHW", "ratio": spread, "goal": None, "reached": None}
    rows = [{**row, "quantity": quantity} for quantity in ("forward", "total")]
    rows.append({**row, "quantity": "saved_bytes", "ratio": dict.fromkeys(spread, 2.0), "goal": 2.0, "reached": True})
    contenders = {"eager NCHW": {"saved_bytes": 2**21}, picture.CONTENDER: {"saved_bytes": 2**20}}
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

    def draw(*arguments):
        picture.draw(document(*arguments), tmp_path / "x.png")
        return saved[-1]

    return draw


def test_bars_have_the_ratios_and_the_goal_is_marked(drawn):
    """The picture shows what the document says: bar lengths, amounts, and a mark at the goal."""
    figure, options = drawn("fp32", 1.7, [])
    time, memory = figure.axes
    assert [bar.get_width() for bar in time.patches] == [1.7, 1.7]
    assert [bar.get_width() for bar in memory.patches] == [2.0]
    assert "2.00x   2.00 to 1.00 MiB" in [text.get_text() for text in memory.texts]
    assert options["transparent"]


@pytest.mark.parametrize(("instructions", "cut"), [([], True), (["amx_bf16"], False)])
def test_emulated_bf16_is_cut_and_said(drawn, instructions, cut):
    """An eager baseline that emulates bf16 must not set the scale, and the title says that it does."""
    figure, _ = drawn("bf16", 20.0, instructions)
    assert bool(figure.axes[0].get_xlim()[1] < 20) == cut
    assert ("emulates" in figure.get_suptitle()) is cut
