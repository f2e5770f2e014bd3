"""The peak of learning at real shapes in bfloat16, by fake tensors, against --plan: a tenth apart at most
(docs/results/speed.md)."""

import fake_peak
import pytest

TWO, SEVEN = "Qwen/Qwen2-VL-2B", "Qwen/Qwen2.5-VL-7B-Instruct"
# Two micro-batches are enough: a third adds nothing.
FEW = ["prompts=4", "loss.micro_tokens=13500"]
LONG = ["prompts=2", "group=4", "cap=2048", "loss.micro_tokens=10000"]
CASES = {
    "2B recomputed": (TWO, "visualthinker_sat", FEW),
    "2B": (TWO, "visualthinker_sat", [*FEW, "recompute=false"]),
    "2B adapters": (TWO, "visualthinker_sat_lora", FEW),
    # few tokens, so that the head needs most
    "2B adapters on a CPU": (
        TWO,
        "visualthinker_sat_lora",
        ["prompts=4", "loss.micro_tokens=3500", "device=cpu"],
    ),
    "2B small states": (TWO, "visualthinker_sat", [*FEW, "optim.name=adamw_8bit"]),
    "2B bfloat16 weights": (TWO, "visualthinker_sat", [*FEW, "optim.name=adamw_bf16"]),
    "7B recomputed": (SEVEN, "vision_r1_rl", [*LONG, "stages=[]"]),
    "7B": (SEVEN, "vision_r1_rl", [*LONG, "stages=[]", "recompute=false"]),
    "7B adapters": (SEVEN, "vision_r1_rl_lora", [*LONG, "stages=[]"]),
    "7B small states": (SEVEN, "vision_r1_rl", [*LONG, "stages=[]", "optim.name=adamw_8bit"]),
    "7B bfloat16 weights": (SEVEN, "vision_r1_rl", [*LONG, "stages=[]", "optim.name=adamw_bf16"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_peak_at_real_shapes_is_what_is_planned(case):
    found = fake_peak.measure(*CASES[case])
    assert 0.9 < found["planned"] / found["peak"] < 1.1, found
