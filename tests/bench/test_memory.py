"""Peak resident memory, from a file in place of the system's."""

from fused_preact.bench import memory
from fused_preact.bench.contenders import Contender


def test_what_was_there_before_the_step_is_subtracted(small_net, monkeypatch, tmp_path):
    """The system counts in units of 1024 bytes, and parameters and libraries too."""
    status = tmp_path / "status"
    status.write_text("Name:\tpython\nVmHWM:\t    350 kB\nVmRSS:\t    100 kB\n")
    monkeypatch.setattr(memory, "STATUS", status)
    assert memory._measure(small_net, Contender("eager", "channels_last")) == 250 * 1024


def test_a_system_that_does_not_tell(small_net, monkeypatch, tmp_path):
    """Has no figure, and no error."""
    monkeypatch.setattr(memory, "STATUS", tmp_path / "none")
    assert memory.peak_rss(small_net, Contender("eager", "channels_last")) is None
