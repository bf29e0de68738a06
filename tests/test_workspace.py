"""csrc/cpu/workspace.cpp: scratch memory of calls and threads, where there is little of it."""

import pytest

from test_pool import run

FORWARD = """
def forward(x, weight, stride, pad):
    one = torch.ones(1).expand(x.size(1))
    y, *_ = torch.ops.fused_preact.forward(
        x, None, [weight], [], [one], [one], [], [], [], [True], [1e-5], [stride, stride, pad, pad, 1, 1, 1], [1], [0],
        torch.float32, 3, False)
    return list(y.shape)
"""

# A packed filter of 324 MB, of weights that take none, beside 300 MB that wait in the pool.
WAITING = """
result = run(images(300, 64))
del result
resource.setrlimit(resource.RLIMIT_AS, (megabytes(0) + 200 << 20, -1))
print(json.dumps(forward(torch.zeros(1, 3072, 4, 4), torch.zeros(1, 1, 1, 1).expand(3072, 3072, 3, 3), 1, 1)))
"""

# Of so many channels a strip of 75 MB gives a row of 48 pixels.
MANY = """
x, weight = torch.randn(2, 64, 1, 1), torch.randn(64, 64, 3, 3)
wide = torch.zeros(2, 1, 95, 200_000).permute(0, 3, 1, 2), torch.zeros(1, 1, 1, 1).expand(1, 200_000, 1, 1)
torch.set_num_threads({threads})
forward(x, weight, 1, 1)
"""

SCARCE = """
resource.setrlimit(resource.RLIMIT_AS, (megabytes(0) + 60 << 20, -1))
try:
    found = forward(*wide, 2, 0)
except MemoryError as error:
    found = str(error)
print(json.dumps([found, forward(x, weight, 1, 1)]))
"""

# A filter that torch's convolution copies, of weights that take no memory.
OF_TORCH = """
x, weight = torch.zeros(1, 3072, 4, 4), torch.zeros(1, 1, 1, 1).expand(3072, 3072, 5, 5)
small = torch.randn(2, 64, 1, 1), torch.randn(64, 64, 5, 5)
forward(*small, 1, 2)
resource.setrlimit(resource.RLIMIT_AS, (megabytes(0) + 300 << 20, -1))
try:
    found = forward(x, weight, 1, 2)
except RuntimeError as error:
    found = str(error)
print(json.dumps([found, forward(*small, 1, 2)]))
"""

LARGE = """
before = megabytes(1)
forward(*wide, 2, 0)
print(json.dumps(megabytes(1) - before))
"""

# A filter of 1 MB, which is packed in each call.
REPEATED = """
x, weight = torch.zeros(1, 512, 4, 4), torch.zeros(512, 512, 1, 1)
forward(x, weight, 1, 0)
before = megabytes(1)
for _ in range(100):
    forward(x, weight, 1, 0)
print(json.dumps(megabytes(1) - before))
"""


def test_what_waits_in_the_pool_makes_room():
    """A filter that would be packed before the net ran is packed after it, too."""
    assert run(FORWARD + WAITING) == [1, 3072, 4, 4]


@pytest.mark.parametrize("threads", [1, 2])
def test_a_thread_that_has_no_memory_says_so(threads):
    """As torch does, by an exception, from whichever thread; and the process goes on."""
    assert run(FORWARD + MANY.format(threads=threads) + SCARCE) == ["std::bad_alloc", [2, 64, 1, 1]]


def test_a_convolution_of_torch_that_has_no_memory_says_so():
    """With the words by which an error of memory is known, and the process goes on."""
    found, shape = run(FORWARD + OF_TORCH)
    sizes = "an input of 1 x 3072 x 4 x 4, a filter of 3072 x 3072 x 5 x 5"
    assert found == f"out of memory, or not what aten::convolution takes: {sizes}"
    assert shape == [2, 64, 1, 1]


def test_a_large_strip_is_not_kept():
    """That of very many channels takes 75 MB in each of two threads, which live on."""
    assert run(FORWARD + MANY.format(threads=2) + LARGE) < 40


def test_a_call_takes_the_memory_of_the_call_before():
    """Of its filter's packed form, and so on."""
    assert run(FORWARD + REPEATED) < 20
