"""Weights in Hugging Face folders: safetensors only, strict both ways, the hub's names.

`load` builds the policy on the meta device and assigns one tensor at a time. So the peak is the policy and
one tensor (`tests/bench/load_2b.py` measures it).
"""

import json
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from models.config import ModelConfig
from models.config_values import shown
from models.qwen_vl import QwenVL

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5e9
# (name, whole tensor) -> what a rank's copy holds of it.
OntoCPU = Callable[[str, Tensor], Tensor]
# transformers nests the towers: always in memory, and in Qwen3-VL's folders.
RENAMED = (("model.visual.", "visual."), ("model.language_model.", "model."))
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
# Others need a scale, which is not read.
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def hub_name(key: str) -> str:
    """The hub's name of a tensor that may have transformers' in-memory name."""
    for theirs, ours in RENAMED:
        if key.startswith(theirs):
            return ours + key[len(theirs) :]
    return key


def file_name(key: str, config: ModelConfig) -> str:
    """The name of a parameter in the files that `save` writes."""
    for nested, ours in RENAMED:
        if config.qwen3 and key.startswith(ours):
            return nested + key[len(ours) :]
    return key


def load(
    folder: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> QwenVL:
    """Read a policy from a Hugging Face folder (config.json and one or more safetensors files). Raises
    ValueError with file and tensor: missing, unexpected, of a wrong shape or type, not finite, in a damaged
    or absent shard."""
    folder = Path(folder)
    config = ModelConfig.from_folder(folder)
    try:
        with torch.device("meta"):
            policy = QwenVL(config)
    except RuntimeError as error:
        raise ValueError(f"{folder / 'config.json'}: no model has these sizes: {error}") from error
    expected = dict(policy.named_parameters())
    found: dict[str, Path] = {}
    tied_head = None
    files, index = _files(folder)
    for file in files:
        for key, tensor in _tensors(file, index, config.tie_word_embeddings):
            name = hub_name(key)
            if name == HEAD and config.tie_word_embeddings:
                tied_head = (file, _converted(file, key, tensor, dtype, device))
                continue
            if name not in expected:
                model = f"a {config.architecture} of {config.num_hidden_layers} layers"
                raise ValueError(f"{file}: unexpected tensor {key!r} for {model}")
            if tensor.shape != expected[name].shape:
                shapes = f"{tuple(tensor.shape)}, config.json asks for {tuple(expected[name].shape)}"
                raise ValueError(f"{file}: tensor {key!r} has shape {shapes}")
            if name in found:
                raise ValueError(f"{file}: tensor {key!r} is also in {found[name]}")
            _assign(policy, name, _converted(file, key, tensor, dtype, device))
            found[name] = file
    if missing := [name for name in expected if name not in found]:
        read = ", ".join(file.name for file in files)
        raise ValueError(f"{folder}: {len(missing)} tensors are missing, first {missing[0]!r} (read {read})")
    if tied_head is not None and not torch.equal(tied_head[1], policy.model.embed_tokens.weight):
        differs = f"{HEAD!r} differs from {EMBEDDING!r}, but config.json says tie_word_embeddings"
        raise ValueError(f"{tied_head[0]}: {differs}")
    return policy


def _converted(
    file: Path, key: str, tensor: Tensor, dtype: torch.dtype, device: torch.device | str
) -> Tensor:
    """A copy of a tensor of a file in `dtype` on `device`. Raises ValueError if it is no weight, or not
    finite in `dtype`."""
    if tensor.dtype not in DTYPES:
        kind = str(tensor.dtype).removeprefix("torch.")
        said = "weights are read in float32, bfloat16, float16 and float64; quantized ones are not supported"
        raise ValueError(f"{file}: tensor {key!r} is {kind}; {said}")
    # A copy, never the memory-mapped file: a checkpoint may replace that file during training.
    found = tensor.to(device=device, dtype=dtype, copy=True)
    # NaN and infinities reach the least or the largest value. `isfinite` would make tensors of its own.
    if found.numel() and not torch.stack(found.aminmax()).isfinite().all():
        raise ValueError(f"{file}: tensor {key!r} holds NaN or infinite values; the model is damaged")
    return found


def init(config: ModelConfig, seed: int) -> QwenVL:
    """A random policy of (config, seed), as in transformers: normal matrices, biases 0, norms 1."""
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
    """Write config.json and the weights under the hub's names, for `transformers` and vLLM. A tied head is
    written once. -> the files written.

    Files whose tensors are on the meta device belong to another rank (`rank_copy`). The rank of the first
    file writes the index and config.json.
    max_shard_bytes: start another file before one grows beyond it. A larger tensor gets a file of its own.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors, layout = policy.state_dict(), file_layout(policy, max_shard_bytes)
    written = []
    for name, keys in layout.items():
        if tensors[keys[0]].is_meta:
            continue
        content = {file_name(key, policy.config): tensors[key].detach().cpu().contiguous() for key in keys}
        save_file(content, folder / name, metadata={"format": "pt"})
        written.append(folder / name)
        if name != next(iter(layout)):
            continue
        dtype = str(next(policy.parameters()).dtype).removeprefix("torch.")
        described = {"config.json": {**policy.config.to_dict(), "torch_dtype": dtype}}
        if len(layout) > 1:
            size = sum(tensor.nbytes for tensor in tensors.values())
            names = ((key, file) for file, keys in layout.items() for key in keys)
            where = {file_name(key, policy.config): file for key, file in names}
            described = {INDEX: {"metadata": {"total_size": size}, "weight_map": where}, **described}
        for file, values in described.items():
            (folder / file).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
            written.append(folder / file)
    return written


def save_file(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None) -> None:
    """Write a safetensors file with the mode of any new file. safetensors alone makes it 0600, and a server
    of another user could not read it."""
    path.touch()
    mode = path.stat().st_mode
    safetensors.torch.save_file(tensors, path, metadata)
    path.chmod(mode)


def file_layout(policy: QwenVL, max_shard_bytes: float = SHARD_BYTES) -> dict[str, list[str]]:
    """{file: its tensors}, as `save` writes them. It depends only on the model, not on how many ranks."""
    shards: list[list[str]] = [[]]
    size = 0
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
    policy: QwenVL, rank: int, ranks: int, onto_cpu: OntoCPU, *, max_shard_bytes: float = SHARD_BYTES
) -> QwenVL:
    """The part of a policy that one of several ranks saves: every `ranks`-th file from the rank-th on, with
    its tensors on the CPU. All other tensors are on the meta device.

    Sharded parameters are gathered one after the other, so every rank must call it.
    """
    with torch.device("meta"):
        copy = QwenVL(policy.config)
    number = {key: n for n, keys in enumerate(file_layout(policy, max_shard_bytes).values()) for key in keys}
    for name, tensor in policy.state_dict().items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        mine = number[name] % ranks == rank
        _assign(copy, name, onto_cpu(name, whole) if mine else torch.empty_like(whole, device="meta"))
    return copy


def _files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The safetensors files to read, and the index's {tensor: file} (empty without an index).

    transformers reads the single file and ignores an index beside it. That may not be what was saved last, so
    a folder with a single file and shards is refused.
    """
    single, index = folder / SINGLE, folder / INDEX
    where = _index(index) if index.is_file() else {}
    shards = [folder / name for name in sorted(set(where.values()))]
    if single.is_file() and any(shard.is_file() for shard in shards if shard != single):
        said = f"both {SINGLE} and the shards of {INDEX} are here; remove those that are not the model"
        raise ValueError(f"{folder}: {said}")
    if single.is_file():
        return [single], {}
    if shards:
        return shards, where
    raise ValueError(f"{folder}: neither {SINGLE} nor {INDEX}; only safetensors weights are read")


def _index(index: Path) -> dict[str, str]:
    """The index's {tensor: file}."""
    try:
        where = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{index}: not an index of safetensors shards: {error!r}") from error
    if type(where) is not dict or not where:
        raise ValueError(f"{index}: weight_map is {shown(where)}; it must be an object {{tensor: file}}")
    for name in where.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{index}: {shown(name)} is no safetensors file of this folder")
    return where


def _tensors(file: Path, index: dict[str, str], tied: bool):
    """Yield (key, tensor) of one file, checked against the index. tied: the head is the embedding."""
    if not file.is_file():
        first = next(key for key, name in index.items() if name == file.name)
        raise ValueError(f"{file}: this shard is missing; it should hold {first!r}")
    try:
        with safe_open(file, framework="pt") as opened:
            keys = list(opened.keys())
        for key, name in index.items():
            # transformers lists a tied head, and does not write it
            if name == file.name and key not in keys and not (tied and hub_name(key) == HEAD):
                raise ValueError(f"{file}: tensor {key!r} is missing, {INDEX} says it is here")
        for key in keys:
            # Open again for each tensor: what was read of an open memory-mapped file counts as used memory.
            with safe_open(file, framework="pt") as opened:
                yield key, opened.get_tensor(key)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: damaged or truncated ({error}); copy or download it again") from error


def _assign(policy: QwenVL, name: str, tensor: Tensor) -> None:
    """Replace a parameter."""
    module, _, leaf = name.rpartition(".")
    setattr(policy.get_submodule(module), leaf, nn.Parameter(tensor))
