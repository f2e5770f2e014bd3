"""Qwen2-VL and Qwen2.5-VL by hand: torch and safetensors only. Start reading at `qwen_vl.py`."""
