"""A language model of a few thousand random weights, with a tokenizer that reads any text, as a local folder."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast, utils


def llama(folder: Path, seed: int = 0, width: int = 16) -> Path:
    """Bytes are tokens: every text is as long as it has bytes."""
    utils.logging.disable_progress_bar()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: place for place, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=4096).save_pretrained(folder)
    torch.manual_seed(seed)
    description = LlamaConfig(
        vocab_size=len(alphabet),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=4096,
    )
    LlamaModel(description).save_pretrained(folder)
    return folder
