"""The folder of a model: built in, on disk, in a run folder, or on the hub."""

import sys
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

import torch
from tqdm import tqdm

from data.chat import Chat
from data.sources import hub
from data.templates import IMAGE, VIDEO, VISION_END, VISION_START
from grpo.storage import adapter, checkpoint
from models import lora, weights
from models.config import ModelConfig
from models.qwen_vl import QwenVL

BUILT_IN = Path(__file__).parent.parent.parent / "models" / "tiny"
# of a hub model: no pickles, no code
HUB_FILES = ("*.safetensors", "*.json", "merges.txt", "chat_template.jinja")


def model_folder(name: str, revision: str | None = None, files: Sequence[str] = HUB_FILES) -> Path:
    """The folder of a model. "tiny" is built in; a run folder gives its newest undamaged checkpoint; a name
    that is no folder here may be a model of the hub. revision, files: of a hub model, which is downloaded
    once (`data/sources/hub.py`). Of a checkpoint, `files` must be undamaged. Raises ValueError."""

    def wanted(name: str) -> bool:
        return not name.startswith("optimizer") and any(fnmatch(name, pattern) for pattern in files)

    if name == "tiny":
        return BUILT_IN
    folder = Path(name)
    if (folder / "checkpoints").is_dir():
        found, line = checkpoint.newest(folder, wanted)
        if found is None:
            raise ValueError(line or f"{folder}: a run folder without a complete checkpoint")
        if line:
            tqdm.write(line, file=sys.stderr)
        return found
    if not folder.exists() and (named := hub.parts_of(name)) and not named[2]:
        try:
            return hub.snapshot(named[0], files, "model", named[1] or revision)
        except hub.HubError as error:
            raise ValueError(f"model {name!r}: there is no such folder, and from the hub: {error}") from error
    if not (folder / "config.json").is_file() and not adapter.is_adapter(folder):
        raise ValueError(
            f"model {name!r}: no config.json in {folder.absolute()}; give a folder in Hugging Face layout, a "
            "run folder, 'tiny', or a model of the hub such as Qwen/Qwen2-VL-2B"
        )
    if (folder / "state.json").is_file() and (wrong := checkpoint.damage(folder, wanted)):
        advice = "take another checkpoint, or remove state.json if the change is yours"
        raise ValueError(f"damaged: {folder / wrong}; {advice}")
    return folder


def base_folder(folder: Path) -> Path:
    """The folder of the model that an adapter belongs to; of any other folder, itself. Raises ValueError."""
    if not adapter.is_adapter(folder):
        return folder
    values = adapter.read_config(folder)
    try:
        base = model_folder(values["base_model_name_or_path"], values.get("revision"))
    except ValueError as error:
        raise ValueError(f"{folder / adapter.CONFIG}: base_model_name_or_path: {error}") from error
    if adapter.is_adapter(base):
        merge = f"merge it first: python -m grpo.export {base} DIR"
        raise ValueError(f"{folder / adapter.CONFIG}: its base {base} is an adapter too; {merge}")
    return base


def load_model(
    folder: Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> QwenVL:
    """The policy of a folder of `model_folder`. An adapter is added to the weights of its base. Raises
    ValueError."""
    policy = weights.load(base_folder(folder), dtype=dtype, device=device)
    if adapter.is_adapter(folder):
        found = adapter.read(folder)
        lora.attach(policy, found.pairs(policy, folder), found.alpha / found.rank)
        lora.merge(policy)
        policy.requires_grad_(True)
    return policy


def check_agreement(chat: Chat, model: ModelConfig) -> None:
    """Raise ValueError if the processor's or the tokenizer's file is of another model than config.json."""
    pictures, vision, token = chat.pictures, model.vision, chat.tokenizer.token_to_id
    table = (
        ("the processor's patch_size", pictures.patch, "patch_size", vision.patch_size),
        ("the processor's merge_size", pictures.merge, "spatial_merge_size", vision.spatial_merge_size),
        (
            "the processor's temporal_patch_size",
            pictures.temporal,
            "temporal_patch_size",
            vision.temporal_patch_size,
        ),
        (IMAGE, token(IMAGE), "image_token_id", model.image_token_id),
        (VIDEO, token(VIDEO), "video_token_id", model.video_token_id),
        (VISION_START, token(VISION_START), "vision_start_token_id", model.vision_start_token_id),
        (VISION_END, token(VISION_END), "vision_end_token_id", model.vision_end_token_id),
    )
    wrong = [
        f"{what} is {theirs}, and {key} in config.json is {ours}"
        for what, theirs, key, ours in table
        # a tokenizer without videos
        if theirs not in (ours, None)
    ]
    highest = max(*chat.tokenizer.get_vocab().values(), *chat.stop_ids)
    if highest >= model.vocab_size:
        wrong.append(f"the tokenizer or eos_token_id has token {highest}, vocab_size is {model.vocab_size}")
    if wrong:
        raise ValueError(f"{chat.folder}: {'; '.join(wrong)}; take all files from one model")
