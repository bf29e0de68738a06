"""Every shipped tile of the Triton kernels, compiled for each architecture: no GPU is needed for that."""

import pytest

pytest.importorskip("triton")
import triton

if triton.knobs.runtime.interpret:
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

from offline import SHARED, build, cases, compiled, is_amd, small_kernels


@pytest.mark.parametrize(("architecture", "kind", "kernel", "tile"), cases(), ids=str)
def test_a_shipped_tile_fits(architecture, kind, kernel, tile):
    """No spills, shared memory within the limit, and the matrix units of the architecture in the assembly."""
    binary = compiled(architecture, kind, kernel, tile)
    assert binary.spilled == 0
    assert binary.registers <= 255
    assert binary.shared <= SHARED[architecture]
    if is_amd(architecture):
        assert "v_mfma_" in binary.assembly
    elif kind not in ("fp64", "fp32-exact") and architecture != "sm75":
        instruction = {"sm90": "wgmma.mma_async", "sm100": "tcgen05.mma"}.get(architecture, "mma.sync")
        assert instruction in binary.assembly


# Bytes. Triton 3.6, which comes with torch 2.11, spills six registers in the largest dgrad of SM 9.0; later ones four.
MOST_SPILLED = 16 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7) else 24


@pytest.mark.parametrize(
    ("architecture", "kernel", "tile"), [(case[0], *case[2:]) for case in cases() if case[1] == "bf16"], ids=str
)
def test_a_shipped_tile_fits_with_wide_offsets(architecture, kernel, tile):
    """Offsets of 64 bits, those of 2^30 elements and more, may cost a thread a few registers more than it has."""
    binary = compiled(architecture, "bf16", kernel, tile, index=triton.language.int64)
    assert binary.spilled <= MOST_SPILLED
    assert binary.shared <= SHARED[architecture]


@pytest.mark.parametrize("architecture", SHARED)
@pytest.mark.parametrize(
    ("kernel", "tile", "constants"), [k[1:] for k in small_kernels()], ids=[k[0] for k in small_kernels()]
)
def test_a_small_kernel_fits(architecture, kernel, tile, constants):
    """The kernels of statistics, sums and dx neither spill nor exceed shared memory."""
    binary = build(architecture, "fp32", kernel, tile, **constants)
    assert binary.spilled == 0
    assert binary.shared <= SHARED[architecture]


@pytest.mark.parametrize("kernel", ["forward", "dgrad", "wgrad"])
@pytest.mark.parametrize(("taps", "stride"), [(1, 1), (1, 2), (3, 2)])
def test_other_filters_and_strides_fit(kernel, taps, stride):
    """What differs from a 3x3 filter of stride 1 compiles without spills, too, at the largest tile of SM 9.0."""
    from fused_preact.triton.configurations import SHIPPED

    binary = compiled("sm90", "bf16", kernel, SHIPPED["sm90"][2][0], taps, stride)
    assert binary.spilled == 0
