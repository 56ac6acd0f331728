"""The TPU compiler's refusals, as it writes them."""

from dmd_jax.performance.compilation.refusal import refusal

TEMPORARIES = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
    "(96.12G) exceeds available HBM (15.75G)."
)
PROGRAM = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in hbm. \
Used 19.90G of 15.75G hbm. Exceeded hbm capacity by 4.15G.

Total hbm usage >= 20.15G:
    reserved        258.00M
    program          19.90G

  Largest program allocations in hbm:

  1. Size: 1.50G
     Operator: op_name="jit(train_step)/UNet2DConditionModel/down_blocks_0/attn1/dot_general"
     Shape: bf16[2,8,4096,4096]{3,2,1,0:T(8,128)(2,1)}
     Unpadded size: 1.50G
     ==========================

  2. Size: 512.00M
     Shape: f32[8,512,512,64]{3,2,1,0:T(8,128)}
     Unpadded size: 256.00M
"""


def test_the_memory_and_the_largest_buffers_are_found():
    found = refusal(RuntimeError(PROGRAM))
    assert (found["used"], found["available"]) == ("19.90G", "15.75G")
    assert found["largest"] == [
        {
            "size": "1.50G",
            "shape": "bf16[2,8,4096,4096]{3,2,1,0:T(8,128)(2,1)}",
            "operator": "jit(train_step)/UNet2DConditionModel/down_blocks_0/attn1/dot_general",
        },
        {"size": "512.00M", "shape": "f32[8,512,512,64]{3,2,1,0:T(8,128)}", "operator": ""},
    ]
    found = refusal(RuntimeError(TEMPORARIES))
    assert (found["used"], found["available"], found["largest"]) == ("96.12G", "15.75G", [])


def test_any_other_refusal_is_its_first_line():
    found = refusal(RuntimeError("INTERNAL: no such thing\nsecond line"))
    assert found == {"message": "INTERNAL: no such thing", "largest": []}
