"""From pictures and questions to chains of thought for a cold start: `python -m grpo.bridge`.

A multimodal model describes a picture, a text-only reasoner thinks over the description, and filters keep
what is right and well formed (Vision-R1, arXiv 2503.06749, section 3.3.1).
"""
