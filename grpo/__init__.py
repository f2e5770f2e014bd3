"""GRPO, and what it needs to run.

Read in the order of the loop: rollout and sampling (Eq. 1), rewards (Eq. 2), objective (Eq. 3-7), logprobs
(Eq. 8), batch; then the rest.
"""
