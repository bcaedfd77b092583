"""A small byte-level BPE tokenizer in Qwen's format: its pre-tokenisation, its special tokens, and our two markers."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from mmemb_deploy.inputs import prompts

# Qwen2's split: contractions, words, single digits, punctuation, line ends, spaces.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPECIAL = (
    prompts.PAD,
    prompts.TURN_START,
    prompts.STOP,
    prompts.VISION_START,
    prompts.VISION_END,
    "<|vision_pad|>",
    prompts.IMAGE_PAD,
    prompts.VIDEO_PAD,
    prompts.DISC_EMB,
    prompts.GEN_EMB,
)
_NOT_SPECIAL = (prompts.THINK, prompts.END_THINK)  # as in Qwen3: added tokens, but part of what a model says


def train_tokenizer(corpus: Iterable[str], vocabulary_size: int) -> Tokenizer:
    """Train byte-level BPE on `corpus`; `vocabulary_size` counts bytes, merges and added tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size - len(_SPECIAL) - len(_NOT_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIAL])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in _NOT_SPECIAL])
    return tokenizer
