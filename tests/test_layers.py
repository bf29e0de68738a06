"""What a fused call reads of plain layers, and what it writes back; most of it is tested by the modules that do so."""

from torch import nn

from fused_preact.layers import Pair, running_updates


def test_an_update_changes_a_buffer_once():
    """On a GPU all of an update is one launch: a layer that is used twice takes its batches in two."""
    first, second, conv = nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
    updates = running_updates(Pair("bn", bn, "conv", conv) for bn in (first, second, first, second))
    assert [update.units for update in updates] == [[0, 1], [2, 3]]
    for update in updates:
        assert list(map(id, update.mean)) == [id(first.running_mean), id(second.running_mean)]


def test_batch_norms_of_one_momentum_are_updated_together():
    """Each average of all batches by itself, and those that are not trained or not tracked not at all."""
    norms = [nn.BatchNorm2d(4, momentum=momentum) for momentum in (0.1, 0.5, 0.1, None, None, 0.1, 0.1)]
    norms[5].eval()
    norms[6].track_running_stats = False
    updates = running_updates(Pair("bn", bn, "conv", nn.Conv2d(4, 4, 1)) for bn in norms)
    found = [(update.momentum, update.units) for update in updates]
    assert found == [(0.1, [0, 2]), (0.5, [1]), (None, [3]), (None, [4])]
