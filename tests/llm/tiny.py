"""Tiny language models with random weights, made here: `tiny.write(folder, "llama")` and its like."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

SENTENCE = (
    "one user engaged with these items in each scenario of the platform the newest first summarise interests "
    "night garden silent river last winter stone iron light glass paper house city ocean mountain broken golden"
)
WORDS = SENTENCE.split()
SHAPE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
CONFIGS = {
    "llama": lambda words: transformers.LlamaConfig(
        vocab_size=words, num_key_value_heads=2, intermediate_size=48, max_position_embeddings=96, **SHAPE
    ),
    "mistral": lambda words: transformers.MistralConfig(
        vocab_size=words, num_key_value_heads=2, intermediate_size=48, sliding_window=8, **SHAPE
    ),
    "gpt2": lambda words: transformers.GPT2Config(vocab_size=words, n_embd=32, n_layer=3, n_head=4, n_positions=96),
    "bert": lambda words: transformers.BertConfig(
        vocab_size=words, intermediate_size=48, max_position_embeddings=96, **SHAPE
    ),
    "t5": lambda words: transformers.T5Config(vocab_size=words, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4),
}


def write(folder: Path, kind: str, seed: int = 0, extra_token: str | None = None) -> Path:
    """A model of `kind` and its tokenizer as safetensors; `extra_token` is one that the model has no embedding for."""
    tokenizer = train_tokenizer(closes=kind == "bert")
    torch.manual_seed(seed)
    description = CONFIGS[kind](len(tokenizer))
    generates = kind in ("llama", "mistral", "gpt2")
    model = (transformers.AutoModelForCausalLM if generates else transformers.AutoModel).from_config(description)
    # Larger than at the start of a training, so that attention tells tokens apart.
    with torch.no_grad():
        for weights in model.parameters():
            if weights.ndim == 2:
                weights.mul_(5)
    model.save_pretrained(folder)
    if extra_token is not None:
        tokenizer.add_tokens([extra_token])
    tokenizer.save_pretrained(folder)
    return folder


def train_tokenizer(closes: bool) -> transformers.PreTrainedTokenizerFast:
    """Byte pairs as GPT-2 has them; `closes`: with BERT's marks around a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["[PAD]", "[CLS]", "[SEP]"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([SENTENCE] * 3, trainer)
    if closes:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
        )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]")
