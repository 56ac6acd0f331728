"""Compiled programs read from their text: sums by hand, and against XLA on this processor."""

import jax
import jax.numpy as jnp
import pytest

from dmd_jax.parallel.sharding import batch_sharding, make_mesh, replicated
from dmd_jax.performance.compilation import hlo
from dmd_jax.performance.compilation.kernels import Kernel, kernel_cycles
from dmd_jax.performance.compilation.topology import CHIPS

KERNEL = (
    'custom-call(%p), custom_call_target="tpu_custom_call", operand_layout_constraints='
    "{s8[1,4,4]{2,1,0}, bf16[2,8,40,512]{3,2,1,0}, bf16[2,8,40,256]{3,2,1,0}, "
    "bf16[2,8,40,256]{3,2,1,0}}"
)
# Of the shape that the TPU compiler writes, and no longer than it takes.
TEXT = f"""HloModule step, input_output_alias={{ {{0}}: (0, {{}}, may-alias), {{1, 2}}: (3, {{}}) }}

%fused (a: f32[8]) -> f32[8] {{
  %a = f32[8]{{0}} parameter(0)
  ROOT %n = f32[8]{{0:T(8,128)(2,1)}} negate(%a), backend_config={{"estimated_cycles":"999"}}
}}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %p = (s32[], f32[8]{{0:T(8,128)}}) parameter(0)
  %g = f32[8]{{0}} get-tuple-element(%p), index=1
  %fusion.1 = f32[8]{{0}} fusion(%g), calls=%fused, metadata={{op_name="jit(a)/up_1/conv/neg"}}, \
backend_config={{"estimated_cycles":"10"}}
  %all = f32[16,8]{{1,0}} all-gather(f32[8]{{0}} %fusion.1), channel_id=5, dimensions={{0}}
  %again = f32[16,8]{{1,0}} all-gather(f32[8]{{0}} %fusion.1), channel_id=5, dimensions={{0}}
  %splash_mha_fwd_residuals.3 = f32[8]{{0}} {KERNEL}
  ROOT %t = (s32[], f32[8]{{0:T(8,128)}}) tuple(%g, %fusion.1)
}}

%condition (p: (s32[], f32[8])) -> pred[] {{
  %p = (s32[], f32[8]{{0}}) parameter(0)
  %length = s32[]{{:T(128)}} constant(6)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %less = pred[] compare(%i, %length), direction=LT
}}

%yes (p: f32[8]) -> f32[8] {{
  %p = f32[8]{{0}} parameter(0)
  ROOT %c = f32[8]{{0}} copy(%p), backend_config={{"estimated_cycles":"7"}}
}}

%no (p: f32[8]) -> f32[8] {{
  %p = f32[8]{{0}} parameter(0)
  ROOT %c = f32[8]{{0}} copy(%p), backend_config={{"estimated_cycles":"3"}}
}}

%all-reduce-scatter.4.clone (p: f32[8]) -> f32[2] {{
  %p = f32[8]{{0}} parameter(0)
  %sum = f32[8]{{0}} all-reduce(%p), channel_id=9
  ROOT %own = f32[2]{{0}} slice(%sum), slice={{[2:4]}}
}}

%all-reduce-scatter.5 (q: f32[8]) -> f32[2] {{
  %q = f32[8]{{0}} parameter(0)
  %total = f32[8]{{0}} all-reduce(%q), channel_id=9
  ROOT %mine = f32[2]{{0}} slice(%total), slice={{[2:4]}}
}}

ENTRY %main (x: f32[8]) -> f32[8] {{
  %x = f32[8]{{0}} parameter(0)
  %part = f32[2]{{0}} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.4.clone
  %other = f32[2]{{0}} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.5
  %start = (f32[8]{{0}}, f32[2]{{0}}) reduce-scatter-start(%x), dimensions={{0}}
  %done = f32[2]{{0}} reduce-scatter-done(%start)
  %y = bf16[4,2]{{1,0:T(8,128)(2,1)S(1)}} convert(%x)
  %sums = (f32[8]{{0:T(128)}}, bf16[4,2]{{1,0:T(8,128)}}) all-reduce(%x, %y), channel_id=7
  %both = ((f32[8]{{0}}, bf16[4,2]{{1,0}}), (f32[16]{{0}}, bf16[4,4]{{1,0}})) \
all-gather-start(%x, %y), dimensions={{0}}
  %loop = (s32[], f32[8]{{0:T(8,128)}}) while(%x), condition=%condition, body=%body
  ROOT %if = f32[8]{{0}} conditional(%x, %x), branch_computations={{%yes, %no}}
}}
"""


def test_loops_count_as_often_as_they_run_and_of_branches_the_dearest():
    totals = hlo.totals(hlo.parse(TEXT))
    assert totals.cycles == 6 * 10 + 7  # a fusion's inside has no cycles of its own
    assert totals.collective_bytes == {
        "reduce-scatter": 32 + 32 + 32,
        "all-reduce": 32 + 16,
        "all-gather": 6 * 16 * 8 * 4 + 64 + 32,
    }
    assert totals.operators == {"up/conv/neg": 60, "copy": 7}
    assert totals.kernels == {Kernel("splash_mha_fwd", (2, 8, 40, 512), 256): 6}


def test_donated_arguments_are_in_the_header():
    assert hlo.aliased(TEXT) == 2
    assert hlo.aliased(TEXT.partition("\n")[2]) == 0


@pytest.mark.parametrize(
    "shape, sizes",
    [
        ("(f32[8,128]{1,0:T(8,128)}, s32[], pred[3]{0}, bf16[2,2]{1,0})", [4096, 4, 3, 8]),
        ("f8e4m3fn[16]{0}", [16]),
        ("token[]", []),
    ],
)
def test_sizes_of_shapes(shape, sizes):
    assert hlo.array_bytes(shape) == sizes


def test_what_is_no_compiled_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("HloModule empty")
    with pytest.raises(ValueError, match=r"compares to \[\]"):
        hlo.totals(hlo.parse(TEXT.replace("constant(6)", "parameter(1)")))
    with pytest.raises(ValueError, match="kernel my_kernel.3 of"):
        hlo.totals(hlo.parse(TEXT.replace("splash_mha_fwd_residuals", "my_kernel")))


def test_the_collectives_of_a_program_of_this_process():
    """A matrix split over eight devices, which each of three rounds gathers whole: 16 KB."""
    mesh = make_mesh(1, 8)
    split, whole = batch_sharding(mesh), replicated(mesh)

    def rounds(w):
        def one(w, _):
            w = jax.lax.with_sharding_constraint(w, whole)
            return jax.lax.with_sharding_constraint(jnp.tanh(w @ w), split), None

        return jax.lax.scan(one, w, None, length=3)[0]

    shape = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=split)
    compiled = jax.jit(rounds, out_shardings=split).lower(shape).compile()
    found = hlo.totals(hlo.parse(compiled.as_text())).collective_bytes
    assert found == {"all-gather": 3 * 64 * 64 * 4}


def test_a_kernels_cycles_are_those_of_its_schedule_for_each_block_of_logits():
    kernel = Kernel("splash_mha_fwd", (1, 1, 40, 1024), 1024)
    assert kernel_cycles(kernel, CHIPS["v5e"]) == 4_818
    many = kernel._replace(name="splash_mha_dkv", query=(2, 3, 40, 4096), keys=4096)
    assert kernel_cycles(many, CHIPS["v5p"]) == 2 * 3 * 16 * 10_707 / 2  # of two cores
