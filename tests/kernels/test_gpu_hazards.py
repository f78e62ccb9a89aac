"""What compilers have made wrong of products on Hopper, looked for in machine code."""

import pytest

from halimede.kernels.compile import compile_case
from halimede.kernels.gpu import scaled_cases
from halimede.kernels.inspect import sass
from halimede.kernels.spec import Case, all_kernels
from halimede.kernels.target import TARGETS
from halimede.kernels.warp_group_hazards import overwritten_operands, undefined_uniforms


def _prefill(name: str) -> Case:
    spec = all_kernels()["attention_prefill"]
    return next(case for case in (*spec.cases, *spec.signatures) if case.name == name)


BUILDS = {
    # On an H100 these were wrong, or may have been.
    "attention_prefill": [_prefill("head of 96, e4m3 per token"), _prefill("Llama 3 8B, e4m3")],
    "scaled_matmul": [scaled_cases._case("wide, 64 rows", 64, 4096, 4096, wide=True, laid_out=True)],
}


@pytest.mark.parametrize(
    ("kernel", "case"),
    [pytest.param(kernel, case, id=case.name) for kernel, cases in BUILDS.items() for case in cases],
)
def test_nothing_is_read_too_late_or_never_written(kernel: str, case: Case) -> None:
    for build in compile_case(all_kernels()[kernel], case, TARGETS["sm_90"]):
        code = sass(build)
        assert overwritten_operands(code) == []
        assert undefined_uniforms(code) == []


LOOP = """
        /*0100*/                   UMOV UR8, 0x10 ;
        /*0110*/                   UMOV UR9, 0x20 ;
{prologue}
.L_x_1:
        /*0130*/                   HGMMA.64x64x16.F32.BF16 R24, R76, gdesc[UR8].tnspB, R24, gsb0 ;
        /*0140*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0150*/              @!P4 BRA `(.L_x_1) ;
"""


def test_a_descriptor_that_nobody_wrote_is_noticed() -> None:
    """The first factor is in registers, so the second's address is in the third and fourth register."""
    whole = "        /*0120*/                   UIADD3.64 UR10, UR8, 0x4, URZ ;"
    assert undefined_uniforms(LOOP.format(prologue=whole)) == []
    (found,) = undefined_uniforms(LOOP.format(prologue=""))
    assert "gdesc[UR8]" in found
