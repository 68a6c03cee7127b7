"""The embedded base's tokenizer: byte-level BPE trained on the embedded corpus.

What it is: one function that trains it and one that gives its Hugging Face form.
Where it sits: corpus -> tokenizer -> pretrain; users get the saved files through `AutoTokenizer`.
What it does NOT know: models, training, prompts.

Every byte is a token, so any text comes back as it went in. Each digit is a token of its own, which makes figures
easy to copy. No text is ever read as a special token (`split_special_tokens`), not even `</s>`. The pre-tokenizer is
the one of SmolLM, so that converters to other formats know it.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from atp.errors import UserError

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
VOCAB_SIZE = 2048


def train_tokenizer(
    texts: Iterable[str], vocab_size: int = VOCAB_SIZE, max_length: int = 512
) -> PreTrainedTokenizerFast:
    """Train the tokenizer.

    Args:
        texts: what it is fitted to.
        vocab_size: tokens in all: 3 special ones, 256 bytes, the rest merges. Fewer if the texts hold fewer merges.
        max_length: context of the model it is for, in tokens.

    Returns:
        A tokenizer that puts `<s>` before a text and nothing after it.

    Raises:
        ValueError: `vocab_size` cannot hold the bytes and the special tokens.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + 3:
        raise UserError(f"vocab_size={vocab_size} cannot hold {len(alphabet)} bytes and 3 special tokens; raise it")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[BOS, EOS, PAD], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos = (BOS, tokenizer.token_to_id(BOS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[bos]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=max_length,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
    )
