"""The compiled operators, as anyone can call them: no argument may crash them or make them read beyond it.

What people are told about their arguments is `test_checks.py`'s business, and right results that of `test_ops.py`.
"""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from fused_preact import kernels, reference, schedule

C, K, H, W = 5, 7, 6, 5
NONE, IDENTITY, ACTIVATED, _ = range(4)  # codes of the shortcuts


def make(N: int = 2, *, training: bool = True, dtype: torch.dtype = torch.float32) -> SimpleNamespace:
    """Arguments of both operators for a chain of two units, the first of stride 2, with biases and a projection."""
    generator = torch.Generator().manual_seed(0)
    accumulation = kernels.accumulation_type(dtype)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    def rows(*, low: float = 0.0) -> list[torch.Tensor]:
        return [normal(channels, dtype=accumulation).abs() + low for channels in (C, K)]

    return SimpleNamespace(
        x=normal(N, C, H, W),
        residual=None,
        weight=[normal(K, C, 3, 3), normal(4, K, 1, 1)],
        bias=[normal(K), normal(4)],
        bn_weight=rows(),
        bn_bias=rows(),
        running_mean=rows(),
        running_var=rows(low=0.5),
        shortcut_weight=[normal(4, C, 1, 1)],
        training=[training] * 2,
        eps=[1e-5] * 2,
        geometry=[2, 2, 1, 1, 1, 1, 1, *[1, 1, 0, 0, 1, 1, 1], 2, 2, 0, 0, 1, 1, 1],
        units=[2],
        shortcut=[ACTIVATED],
        dtype=dtype,
        memory=0,
        tf32=False,
        needs=[True] * 8,
        dy=normal(N, 4, 3, 3),
        y=None,
        kept=[normal(N, K, 3, 3)],
        rows=[normal(5, n, dtype=accumulation) for n in (C, K)],
    )


def forward(a: SimpleNamespace):
    return torch.ops.fused_preact.forward(
        a.x, a.residual, a.weight, a.bias, a.bn_weight, a.bn_bias, a.running_mean, a.running_var, a.shortcut_weight,
        a.training, a.eps, a.geometry, a.units, a.shortcut, a.dtype, a.memory, a.tf32,
    )  # fmt: skip


def backward(a: SimpleNamespace):
    return torch.ops.fused_preact.backward(
        a.dy, a.x, a.y, a.kept, a.rows, a.weight, a.bias, a.shortcut_weight, a.training, a.geometry, a.units,
        a.shortcut, a.dtype, a.memory, a.tf32, a.needs,
    )  # fmt: skip


def geometry(index: int, value: int) -> list[int]:
    changed = make().geometry
    changed[index] = value
    return changed


F = torch.zeros
BAD_FOR_BOTH = {
    "x has three dimensions": (dict(x=F(2, C, H)), "x: expected 4 dimensions, got 3"),
    "x has no channel": (dict(x=F(2, 0, H, W)), "x: expected no empty dimension"),
    "x has no row": (dict(x=F(2, C, 0, W)), "x: expected no empty dimension"),
    "x has no column": (dict(x=F(2, C, H, 0)), "x: expected no empty dimension"),
    "x is integer": (dict(x=F(2, C, H, W, dtype=torch.int32)), "x: expected Float .*got Int"),
    "x is half": (dict(x=F(2, C, H, W).half()), "x: expected Float .*got Half"),
    "x is wider than dtype": (dict(dtype=torch.bfloat16), "x: expected BFloat16 .*got Float"),
    "x is narrower than dtype": (dict(dtype=torch.float64, memory=1), "x: expected Double .*got Float"),
    "x is uncountable": (dict(x=F(()).expand(2**40, C, 2**10, 2**10)), r"weight\[0\]: expected an input and a filter"),
    "dtype is integer": (dict(dtype=torch.int64), "dtype: expected float32, bfloat16 or float64, got Long"),
    "dtype is half": (dict(dtype=torch.float16), "dtype: expected float32, bfloat16 or float64, got Half"),
    "weight is missing": (dict(weight=[F(K, C, 3, 3)]), "weight: expected 2 tensors, got 1"),
    "weight has other channels": (dict(weight=[F(K, C + 1, 3, 3), F(4, K, 1, 1)]), r"weight\[0\]: .*got .*\[7, 6,"),
    "weights do not meet": (dict(weight=[F(K, C, 3, 3), F(4, K - 1, 1, 1)]), r"weight\[1\]: expected .*\[4, 7, 1, 1\]"),
    "weight is of another type": (dict(weight=[F(K, C, 3, 3).int(), F(4, K, 1, 1)]), r"weight\[0\]: .*got Int"),
    "weight has no output": (dict(weight=[F(0, C, 3, 3), F(4, 0, 1, 1)]), r"weight\[0\]: expected no empty dimension"),
    "filter is larger than x": (dict(weight=[F(K, C, 9, 3), F(4, K, 1, 1)]), r"weight\[0\]: expected a filter within"),
    "filter is wider than x": (dict(weight=[F(K, C, 3, 9), F(4, K, 1, 1)]), r"weight\[0\]: expected a filter within"),
    "filter has no row": (dict(weight=[F(K, C, 0, 3), F(4, K, 1, 1)]), r"weight\[0\]: expected no empty dimension"),
    "filter has no column": (dict(weight=[F(K, C, 3, 0), F(4, K, 1, 1)]), r"weight\[0\]: expected no empty dimension"),
    "weight is a matrix": (dict(weight=[F(K, C), F(4, K, 1, 1)]), r"weight\[0\]: expected 4 dimensions"),
    "no unit": (dict(weight=[], training=[], units=[], shortcut=[]), "units: expected one value for each"),
    "shortcut is unknown": (dict(shortcut=[4]), "shortcut: expected 0 .*got 4"),
    "shortcut is negative": (dict(shortcut=[-1]), "shortcut: expected 0 .*got -1"),
    "memory is negative": (dict(memory=-1), "memory: expected 0 .*got -1"),
    "memory is unknown": (dict(memory=4), "memory: expected 0 .*got 4"),
    "a block has no unit": (dict(units=[0]), "units: expected from 1 to 2 units, got 0"),
    "a block has too many units": (dict(units=[3]), "units: expected from 1 to 2 units, got 3"),
    "a later block has too many units": (
        dict(units=[1, 2], shortcut=[ACTIVATED, IDENTITY], shortcut_weight=make().weight[:1], geometry=[1] * 21),
        "units: expected from 1 to 1 units, got 2",
    ),
    "units are left over": (dict(units=[1], shortcut=[NONE]), "geometry: expected weights.* of 1, 0 and 7 values"),
    "two blocks without a shortcut": (dict(units=[1, 1], shortcut=[NONE, NONE]), "shortcut: expected 0 .*got .* of 2"),
    "the first of two blocks without a shortcut": (
        dict(units=[1, 1], shortcut=[NONE, IDENTITY]), r"shortcut: expected 0 \(none\) in a stage of one .*got .* of 2"
    ),
    "shortcut has no weight": (dict(shortcut_weight=[]), r"shortcut_weight\[0\]: expected a tensor"),
    "shortcut needs no weight": (dict(shortcut=[NONE]), "geometry: expected .*of 2, 0 and 14 values, got 2, 1 and 21"),
    "shortcut does not fit": (dict(geometry=geometry(14, 1)), r"shortcut_weight\[0\]: expected an output of"),
    "identity changes the shape": (
        dict(shortcut=[IDENTITY], shortcut_weight=[], geometry=make().geometry[:14]), "shortcut: identity expects"
    ),
    "a shortcut's weight is left over": (
        dict(shortcut_weight=[F(4, C, 1, 1)] * 2), "geometry: expected .*of 2, 1 and 21 values, got 2, 2 and 21"
    ),
    "geometry is short": (dict(geometry=make().geometry[:-1]), "geometry: expected 7 integers for each"),
    "geometry is long": (dict(geometry=make().geometry + [1] * 7), "geometry: expected .*21 values, got .*28"),
    "stride is zero": (dict(geometry=geometry(0, 0)), "geometry: expected strides.*got 0"),
    "stride of columns is zero": (dict(geometry=geometry(1, 0)), "geometry: expected strides.*got 0"),
    "stride is too large": (dict(geometry=geometry(0, 2**31)), "geometry: expected strides.*got 2147483648"),
    "padding is negative": (dict(geometry=geometry(2, -1)), "geometry: .*paddings from 0, got -1"),
    "padding overflows": (dict(geometry=geometry(3, 2**62)), "geometry: .*got 4611686018427387904"),
    "the padded input overflows": (
        dict(geometry=[1, 1, 2**30, 2**30, 1, 1, 1, *make().geometry[7:]]),
        r"weight\[0\]: expected a padded input and a packed filter that memory can hold",
    ),
    "the result overflows": (
        dict(x=F(1, C, H, W).expand(2**40, C, H, W), geometry=[1, 1, 2**10, 2**10, 1, 1, 1, *make().geometry[7:]]),
        r"weight\[0\]: expected a result that memory can hold",
    ),
    "dilation": (dict(geometry=geometry(4, 4)), r"weight\[0\]: expected a filter within .* of 8 x 7, got 9 x 3"),
    "dilation of columns": (dict(geometry=geometry(5, 4)), r"weight\[0\]: expected a filter within .*, got 3 x 9"),
    "a huge dilation": (dict(geometry=geometry(4, 2**31 - 1)), r"weight\[0\]: expected a filter within"),
    "dilation is zero": (dict(geometry=geometry(4, 0)), "geometry: expected .*dilations and groups from 1.*got 0"),
    "a dilated filter": (dict(weight=[F(()).expand(K, C, 2**40, 3)] * 2, geometry=geometry(4, 2**24)), "be counted"),
    "groups are zero": (dict(geometry=geometry(6, 0)), "geometry: expected .*dilations and groups from 1.*got 0"),
    "groups": (dict(geometry=geometry(6, 5)), r"weight\[0\]: expected 5 groups of whole channels, got 5 in and 7 out"),
    "groups of outputs": (dict(geometry=geometry(6, 7)), r"weight\[0\]: expected 7 groups of whole channels, got 5 in"),
    "bias is short": (dict(bias=[F(K)]), "bias: expected 2 tensors"),
    "bias is a number": (dict(bias=[F(()), F(4)]), r"bias\[0\]: expected .*\[7\], got .*\[\]"),
    "bias has other channels": (dict(bias=[F(K), F(5)]), r"bias\[1\]: expected .*\[4\].*got .*\[5\]"),
}  # fmt: skip
BAD_FORWARD = {
    "gamma is short": (dict(bn_weight=[F(C)]), "bn_weight: expected 2 tensors"),
    "gamma has other channels": (dict(bn_weight=[F(C - 1), F(K)]), r"bn_weight\[0\]: expected .*\[5\].*got .*\[4\]"),
    "beta is of another type": (dict(bn_bias=[F(C), F(K).half()]), r"bn_bias\[1\]: expected Float.*got Half"),
    "running mean is missing": (dict(training=[True, False], running_mean=[]), "running_mean: expected 2 tensors"),
    "running variance is missing": (dict(training=[True, False], running_var=[]), "running_var: expected 2 tensors"),
    "running variance is short": (dict(running_var=[F(C), F(K - 1)]), r"running_var\[1\]: expected"),
    "eps is short": (dict(eps=[1e-5]), "eps: expected 2 numbers, got 1"),
    "residual beside a shortcut": (dict(residual=F(2, 4, 3, 3)), "residual: expected none beside"),
    "residual has another shape": (
        dict(residual=F(2, 4, 3, 1), shortcut=[NONE], shortcut_weight=[], geometry=make().geometry[:14]),
        r"residual: expected .*\[2, 4, 3, 3\].*got .*\[2, 4, 3, 1\]",
    ),
    "residual is of another type": (
        dict(residual=F(2, 4, 3, 3).double(), shortcut=[NONE], shortcut_weight=[], geometry=make().geometry[:14]),
        "residual: expected Float.*got Double",
    ),
    "residual in front of two blocks": (
        dict(residual=F(2, 4, 3, 3), units=[1, 1], shortcut=[NONE, IDENTITY]), "shortcut: expected 0 .*got .* of 2"
    ),
    "batch is empty": (dict(x=F(0, C, H, W)), "x: expected at least one image"),
}  # fmt: skip
BAD_BACKWARD = {
    "dy has another shape": (dict(dy=F(2, 4, 3, 2)), r"dy: expected .*\[2, 4, 3, 3\].*got .*\[2, 4, 3, 2\]"),
    "dy is of another type": (dict(dy=F(2, 4, 3, 3).double()), "dy: expected Float .*got Double"),
    "kept is short": (dict(kept=[]), "kept: expected more than 0 tensors"),
    "kept is long": (dict(kept=[F(2, K, 3, 3)] * 2), "kept: expected 1 tensors, got 2"),
    "kept has another shape": (dict(kept=[F(2, K, 3, 2)]), r"kept\[0\]: expected"),
    "kept is of another type": (dict(kept=[F(2, K, 3, 3).double()]), r"kept\[0\]: expected Float.*got Double"),
    "rows are short": (dict(rows=[F(5, C), F(4, K)]), r"rows\[1\]: expected .*\[5, 7\]"),
    "rows are missing": (dict(rows=[F(5, C)]), "rows: expected 2 tensors"),
    "rows have other channels": (dict(rows=[F(5, C), F(5, K - 1)]), r"rows\[1\]: expected .*\[5, 7\]"),
    "rows are of another type": (dict(rows=[F(5, C).double(), F(5, K)]), r"rows\[0\]: expected Float .*got Double"),
    "nothing was kept": (dict(memory=3), "memory: expected what forward kept for backward, got none"),
    "needs is short": (dict(needs=[True] * 7), "needs: expected 8 values, got 7"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), (BAD_FOR_BOTH | BAD_FORWARD).values(), ids=BAD_FOR_BOTH | BAD_FORWARD)
def test_forward_refuses(change, message):
    """Arguments that do not fit together end in an error that names one of them."""
    with pytest.raises(RuntimeError, match=message):
        forward(SimpleNamespace(**{**vars(make()), **change}))


def test_the_cpu_does_not_hear_of_tf32():
    """It multiplies float32 as it is, whatever it is told."""
    a = make()
    without = torch.utils._pytree.tree_leaves((forward(a), backward(a)))
    a.tf32 = True
    assert all(map(torch.equal, torch.utils._pytree.tree_leaves((forward(a), backward(a))), without))


@pytest.mark.parametrize(("change", "message"), (BAD_FOR_BOTH | BAD_BACKWARD).values(), ids=BAD_FOR_BOTH | BAD_BACKWARD)
def test_backward_refuses(change, message):
    """Arguments that do not fit together end in an error that names one of them."""
    with pytest.raises(RuntimeError, match=message):
        backward(SimpleNamespace(**{**vars(make()), **change}))


def two_blocks(memory: int) -> SimpleNamespace:
    """Backward's arguments for two blocks of two units around which x is added."""
    a = make()
    a.weight, a.bias, a.shortcut_weight = [torch.randn(C, C, 1, 1) for _ in range(4)], [], []
    a.bn_weight, a.bn_bias, a.running_mean, a.running_var = [torch.ones(C)] * 4, [torch.ones(C)] * 4, [], []
    a.training, a.eps, a.geometry = [True] * 4, [1e-5] * 4, [1, 1, 0, 0, 1, 1, 1] * 4
    a.units, a.shortcut, a.memory, a.needs = [2, 2], [IDENTITY] * 2, memory, [True] * 9
    a.y, a.kept, a.rows = forward(a)
    a.dy = torch.randn_like(a.y)
    return a


@pytest.mark.parametrize(
    ("memory", "change", "message"),
    [
        (1, dict(y=None), "y: expected a tensor where"),
        (1, dict(y=F(2, C, H, W + 1)), r"y: expected .*\[2, 5, 6, 5\].*got .*\[2, 5, 6, 6\]"),
        (1, dict(y=F(2, C, H, W).double()), "y: expected Float.*got Double"),
        (0, dict(kept=[F(2, C, H, W), F(2, C, H, 1), F(2, C, H, W)]), r"kept\[1\]: expected .*got .*\[2, 5, 6, 1\]"),
    ],
    ids=["no y", "y has another shape", "y is of another type", "a block's input has another shape"],
)
def test_backward_of_two_blocks_refuses(memory, change, message):
    """What a stage of several blocks reads besides."""
    a = two_blocks(memory)
    backward(a)
    with pytest.raises(RuntimeError, match=message):
        backward(SimpleNamespace(**{**vars(a), **change}))


def test_the_result_of_no_image_overflows_too():
    """What one image would take is counted, for strides are made of it."""
    a = make(0, training=False)
    a.geometry = [1, 1, 2**30, 2**30, 1, 1, 1, *make().geometry[7:]]
    with pytest.raises(RuntimeError, match=r"weight\[0\]: expected a padded input .* that memory can hold"):
        forward(a)


@pytest.mark.parametrize("of", ["strip", "filter", "gradient", "input", "packed filter", "strip of dy"])
def test_what_kernels_make_of_hostile_geometry_overflows_too(of):
    """Of a result of a few values the strip, or the packed filter, may be more than can be counted."""
    one, step = F(1, 1, 1, 1), 2**31 - 1
    a = make(1)
    a.x, a.weight, a.geometry = one, [one], [step, step, step - 1, step - 1, 1, 1, 1]
    a.bn_weight, a.bn_bias, a.running_mean, a.running_var = [F(1)], [F(1)], [F(1)], [F(1)]
    a.bias, a.shortcut_weight, a.units, a.shortcut, a.training, a.eps = [], [], [1], [NONE], [False], [1e-5]
    if of in ("filter", "gradient"):
        a.weight, a.geometry = [one.expand(1, 1, 2**31, 2**30)], [1, 1, 2**30, 2**29, 1, 1, 1]
    if of == "input":
        a.x, a.geometry = one.expand(1, 1, 2**31, 2**30), [step, step, 0, 0, 1, 1, 1]
    if of == "packed filter":
        a.weight, a.geometry = [one.expand(1, 1, 2**27, 2**27)], [1, 1, 2**26, 2**26, 1, 1, 1]
    if of == "strip of dy":
        a.weight, a.geometry = [one.expand(2**20, 1, 1, 1)], [2**25, 2**25, 2**24, 2**24, 1, 1, 1]
    a.dy, a.kept, a.rows, a.needs = F(1, 1, 1, 1), [], [F(5, 1)], [False, True, False]
    with pytest.raises(RuntimeError, match=r"weight\[0\]: expected .* that memory can hold"):
        (backward if of == "gradient" else forward)(a)


def test_gradients_have_the_types_of_what_they_are_of(isa):
    """Of filters, biases and projections of another type than the convolutions'."""
    a = make(dtype=torch.bfloat16)
    a.weight, a.bias = [w.float() for w in a.weight], [b.float() for b in a.bias]
    a.shortcut_weight = [w.float() for w in a.shortcut_weight]
    _, dweight, dbias, _, _, dshortcut_weight = backward(a)
    assert {t.dtype for t in dweight + dbias + dshortcut_weight} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["f32", "bf16", "f64"])
def test_an_empty_batch_in_eval(dtype, isa):
    """No image gives empty results, and zero for every gradient that is a sum over images."""
    a = make(0, training=False, dtype=dtype)
    y, kept, a.rows = forward(a)
    assert y.shape == (0, 4, 3, 3)
    assert [h.shape for h in kept] == [(0, K, 3, 3)]
    dx, *sums = backward(a)
    assert dx.shape == a.x.shape
    sums = torch.utils._pytree.tree_leaves(sums)
    assert len(sums) == 9
    assert all(s.numel() > 0 and not s.any() for s in sums)


def test_an_empty_batch_in_training_has_no_gradient_of_nan(isa):
    """Backward of no image is zero in training too, although forward refuses to begin it."""
    _, *sums = backward(make(0))
    assert not any(s.any() for s in torch.utils._pytree.tree_leaves(sums))


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_any_strides_are_read_right(training, isa):
    """Parameters, filters and gradients that are transposed, sliced or expanded views count as what they show."""
    a, b = make(training=training), make(training=training)
    b.x = torch.stack([a.x, a.x], -1)[..., 1]
    b.weight = [w.transpose(0, 1).contiguous().transpose(0, 1) for w in a.weight]
    for name in "bias", "bn_weight", "bn_bias", "running_mean", "running_var":
        setattr(b, name, [torch.stack([t, t], -1)[:, 0] for t in getattr(a, name)])
    y, kept, rows = forward(a)
    y2, kept2, rows2 = forward(b)
    a.dy = b.dy = torch.ones(()).expand_as(y)
    a.kept, a.rows = kept, rows
    b.kept = [h.contiguous() for h in kept2]
    b.rows = [r.t().contiguous().t() for r in rows2]
    assert all(map(torch.equal, [y, *kept, *rows], [y2, *kept2, *rows2]))
    results, results2 = (torch.utils._pytree.tree_leaves(backward(arguments)) for arguments in (a, b))
    assert all(map(torch.equal, results, results2))


def test_needs_change_no_other_result(isa):
    """A gradient has the same bits whichever others are asked for, and those not asked for are empty."""
    a = make()
    _, a.kept, a.rows = forward(a)
    every = torch.utils._pytree.tree_leaves(backward(a))
    # Where the results of each entry of needs stand: dx, dweight, dbias, gamma with beta, the shortcut's weight.
    places = [[0], [1], [2], [3], [4], [5, 7], [6, 8], [9]]
    for only in range(len(places)):
        a.needs = [i == only for i in range(len(places))]
        for i, result in enumerate(torch.utils._pytree.tree_leaves(backward(a))):
            expected = every[i] if i in places[only] else every[i].new_empty(0)
            assert torch.equal(result, expected), (only, i)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("shape", [(21, 9, 3, 11), (3, 48, 9, 70), (2, 70, 33, 8), (3, 40, 24, 34)], ids=str)
@pytest.mark.parametrize("size", [1, 3], ids=lambda size: f"{size}x{size}")
def test_gradients_made_together_are_those_made_apart(size, shape, threads, isa):
    """dgrad and wgrad take turns over many tiles where both are asked for, on any number of threads: no bit differs."""
    N, channels, out_channels, width = shape
    generator = torch.Generator().manual_seed(1)

    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator)

    x, dy = normal(N, channels, width, width), normal(N, out_channels, width, width)
    weight, bias, rows = normal(out_channels, channels, size, size), normal(out_channels), normal(5, channels)

    def gradients(*needs: bool) -> tuple[torch.Tensor, ...]:
        dx, [dweight], [dbias], [dgamma], [dbeta], _ = torch.ops.fused_preact.backward(
            dy, x, None, [], [rows], [weight], [bias], [], [True], [1, 1, size // 2, size // 2, 1, 1, 1], [1], [NONE],
            torch.float32, 0, False, list(needs),
        )  # fmt: skip
        return dx, dweight, dbias, dgamma, dbeta

    torch.set_num_threads(threads)
    try:
        together = gradients(True, True, True, True)
    finally:
        torch.set_num_threads(1)
    dx, _, _, dgamma, dbeta = gradients(True, False, False, True)
    _, dweight, dbias, _, _ = gradients(False, True, True, False)
    assert all(map(torch.equal, together, (dx, dweight, dbias, dgamma, dbeta)))


@pytest.mark.parametrize("pad", [0, 1, 4], ids=lambda pad: f"pad {pad}")
@pytest.mark.parametrize("stride", [1, 2, 3, 5], ids=lambda stride: f"stride {stride}")
@pytest.mark.parametrize("size", [(1, 1), (3, 3), (2, 3), (5, 1)], ids=lambda size: f"{size[0]}x{size[1]}")
def test_any_geometry_stays_inside(size, stride, pad, isa):
    """Filters, strides and paddings that no network has give right results too: a caller may come with any."""
    a = make()
    a.weight, a.bias, a.shortcut, a.shortcut_weight = [torch.randn(K, C, *size)], a.bias[:1], [NONE], []
    a.geometry, a.training, a.eps, a.needs = [stride, stride, pad, pad, 1, 1, 1], [True], [1e-5], [True] * 4
    a.units = [1]
    for name in "bn_weight", "bn_bias", "running_mean", "running_var":
        setattr(a, name, getattr(a, name)[:1])
    y, a.kept, a.rows = forward(a)
    a.dy = torch.randn_like(y)

    x, *norms = a.x.double(), a.weight, a.bias, a.bn_weight, a.bn_bias, a.running_mean, a.running_var
    norms = [[t.double() for t in tensors] for tensors in norms]
    facts = a.units, a.shortcut, torch.float64, a.memory, False
    expected, kept, rows = schedule.forward(reference, x, None, *norms, [], a.training, a.eps, a.geometry, *facts)
    saved = a.dy.double(), x, None, kept, rows, norms[0], norms[1], []
    gradients = schedule.backward(reference, *saved, a.training, a.geometry, *facts, a.needs)
    results = zip(*map(torch.utils._pytree.tree_leaves, ([y, backward(a)], [expected, gradients])), strict=True)
    for got, right in results:
        torch.testing.assert_close(got.double(), right, rtol=1e-4, atol=1e-4)


def test_calls_from_many_threads_do_not_meet(isa):
    """Scratch memory belongs to a thread: calls of different sizes at the same time give the bits they give alone."""

    def run(N: int) -> list[torch.Tensor]:
        a = make(N)
        y, a.kept, a.rows = forward(a)
        return torch.utils._pytree.tree_leaves([y, a.kept, a.rows, backward(a)])

    sizes = [1, 7, 2, 19] * 8
    alone = {N: run(N) for N in set(sizes)}
    with ThreadPoolExecutor(4) as pool:
        for N, results in zip(sizes, pool.map(run, sizes), strict=True):
            assert all(map(torch.equal, results, alone[N])), N
