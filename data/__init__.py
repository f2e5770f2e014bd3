"""From files to token ids and pixels: examples, pictures, prompts, answers. No `torch.nn`, nothing of
`models/` or `grpo/`."""
