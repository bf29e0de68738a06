"""docs/design.md: what it copies from the sources is as it stands there."""

from pathlib import Path

from fused_preact import ops

DESIGN = Path(__file__).resolve().parents[1] / "docs" / "design.md"


def test_its_schemas_are_those_of_the_operators():
    """Who calls the operators by the page calls them as they are; blanks and lines apart."""
    text = "".join(DESIGN.read_text().split())
    for name, schema in ("forward", ops.FORWARD), ("backward", ops.BACKWARD):
        assert name + "".join(schema.split()) in text
