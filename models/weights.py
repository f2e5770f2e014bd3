"""Weights in Hugging Face folders: safetensors only, strict both ways, the hub's names.

`load` builds the policy on the meta device and assigns one tensor at a time, so the peak is the policy itself
and one tensor (`tests/bench/load_2b.py` measures it).
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from models.config import ModelConfig
from models.qwen_vl import QwenVL

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5e9
# transformers' names since it nests the towers: in memory always, in some folders also on disk.
RENAMED = (("model.visual.", "visual."), ("model.language_model.", "model."))
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def hub_name(key: str) -> str:
    """The hub's name of a tensor that may bear transformers' in-memory name."""
    for theirs, ours in RENAMED:
        if key.startswith(theirs):
            return ours + key[len(theirs) :]
    return key


def load(
    folder: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> QwenVL:
    """Read a policy from a Hugging Face folder (config.json and one or more safetensors files).

    Raises ValueError that names the file and the tensor: missing, unexpected, of a wrong shape, in a damaged
    or absent shard.
    """
    folder = Path(folder)
    config = ModelConfig.from_folder(folder)
    with torch.device("meta"):
        policy = QwenVL(config)
    expected, found, head = dict(policy.named_parameters()), {}, None
    files, index = _files(folder)
    for file in files:
        for key, tensor in _tensors(file, index):
            name = hub_name(key)
            if name == HEAD and config.tie_word_embeddings:
                head = (file, tensor.to(device=device, dtype=dtype))
                continue
            if name not in expected:
                raise ValueError(
                    f"{file}: unexpected tensor {key!r} for a {config.architecture} of "
                    f"{config.num_hidden_layers} layers"
                )
            if name in found:
                raise ValueError(f"{file}: tensor {key!r} is also in {found[name]}")
            if tensor.shape != expected[name].shape:
                shapes = f"{tuple(tensor.shape)}, config.json asks for {tuple(expected[name].shape)}"
                raise ValueError(f"{file}: tensor {key!r} has shape {shapes}")
            # A copy, never the memory-mapped file: a checkpoint may replace that file while we train.
            _assign(policy, name, tensor.to(device=device, dtype=dtype, copy=True))
            found[name] = file
    missing = [name for name in expected if name not in found]
    if missing:
        raise ValueError(
            f"{folder}: {len(missing)} tensors are missing, first {missing[0]!r} (read "
            f"{', '.join(f.name for f in files)})"
        )
    if head is not None and not torch.equal(head[1], policy.model.embed_tokens.weight):
        raise ValueError(
            f"{head[0]}: {HEAD!r} differs from {EMBEDDING!r}, but config.json says tie_word_embeddings"
        )
    return policy


def init(config: ModelConfig, seed: int) -> QwenVL:
    """A random policy: matrices normal with `initializer_range`, biases 0, norms 1 (as transformers does).
    A function of (config, seed)."""
    policy = QwenVL(config)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, config.initializer_range, generator=random)
            else:
                parameter.fill_(0.0 if name.endswith(".bias") else 1.0)
    return policy


def save(policy: QwenVL, folder: str | Path, *, max_shard_bytes: float = SHARD_BYTES) -> list[Path]:
    """Write config.json and the weights under the hub's names; `transformers` and vLLM read it as it is. A
    tied head is written once. → what was written.

    Files of tensors on the meta device are another rank's (`rank_copy`), and the first file's rank writes the
    index and config.json.
    max_shard_bytes: start another file before one grows beyond it (a larger tensor gets a file of its own).
    """
    folder, written = Path(folder), []
    folder.mkdir(parents=True, exist_ok=True)
    tensors, layout = policy.state_dict(), file_layout(policy, max_shard_bytes)
    for number, (name, keys) in enumerate(layout.items()):
        if tensors[keys[0]].is_meta:
            continue
        save_file(
            {key: tensors[key].detach().cpu().contiguous() for key in keys},
            folder / name,
            metadata={"format": "pt"},
        )
        written.append(folder / name)
        if number == 0:
            if len(layout) > 1:
                where, total = (
                    {key: name for name, keys in layout.items() for key in keys},
                    sum(tensor.nbytes for tensor in tensors.values()),
                )
                written.append(
                    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})
                )
            dtype = str(next(policy.parameters()).dtype).removeprefix("torch.")
            written.append(
                _write_json(folder / "config.json", {**policy.config.to_dict(), "torch_dtype": dtype})
            )
    return written


def file_layout(policy: QwenVL, max_shard_bytes: float = SHARD_BYTES) -> dict[str, list[str]]:
    """{file: its tensors}, as `save` writes them. A function of the model alone: on any number of ranks
    the files are the same."""
    shards, size = [[]], 0
    for name, tensor in policy.state_dict().items():
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{n + 1:05}-of-{len(shards):05}.safetensors": shard for n, shard in enumerate(shards)}


def rank_copy(
    policy: QwenVL,
    rank: int,
    ranks: int,
    onto_cpu: Callable[[str, Tensor], Tensor],
    *,
    max_shard_bytes: float = SHARD_BYTES,
) -> QwenVL:
    """The part of a policy that one of several ranks is to save: on the CPU the tensors of every `ranks`-th
    file from the rank-th on, the others on the meta device.

    Sharded parameters are put together one after the other, so every rank has to call it.  onto_cpu: (name,
    whole tensor) → what the copy holds of it.
    """
    with torch.device("meta"):
        copy = QwenVL(policy.config)
    number = {key: n for n, keys in enumerate(file_layout(policy, max_shard_bytes).values()) for key in keys}
    for name, tensor in policy.state_dict().items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        mine = number[name] % ranks == rank
        _assign(
            copy,
            name,
            onto_cpu(name, whole) if mine else torch.empty(whole.shape, dtype=whole.dtype, device="meta"),
        )
    return copy


def _files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The safetensors files to read, and the index's map from tensor to file (empty without an index)."""
    single, index = folder / SINGLE, folder / INDEX
    if index.is_file():
        try:
            where = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{index}: not an index of safetensors shards: {error!r}") from error
        for name in where.values():
            if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
                raise ValueError(f"{index}: {name!r} is no safetensors file of this folder")
        return [folder / name for name in sorted(set(where.values()))], where
    if single.is_file():
        return [single], {}
    raise ValueError(f"{folder}: neither {SINGLE} nor {INDEX}; only safetensors weights are read")


def _tensors(file: Path, index: dict[str, str]):
    """Yield (key, tensor) of one file, checked against the index."""
    if not file.is_file():
        first = next(key for key, name in index.items() if name == file.name)
        raise ValueError(f"{file}: this shard is missing; it should hold {first!r}")
    try:
        with safe_open(file, framework="pt") as opened:
            keys = list(opened.keys())
        for key, name in index.items():
            if name == file.name and key not in keys:
                raise ValueError(f"{file}: tensor {key!r} is missing, {INDEX} says it is here")
        for key in keys:
            # Opened anew for each: what was read of a memory-mapped file counts as ours for as long as the
            # file is open.
            with safe_open(file, framework="pt") as opened:
                yield key, opened.get_tensor(key)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: damaged or truncated ({error}); copy or download it again") from error


def _assign(policy: QwenVL, name: str, tensor: Tensor) -> None:
    """Put a real parameter in the place of the meta one."""
    module, _, leaf = name.rpartition(".")
    setattr(policy.get_submodule(module), leaf, nn.Parameter(tensor))


def _write_json(path: Path, values: dict) -> Path:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return path
