"""Models of the libraries as small as they can be, from random numbers: nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "sat",
    "ran",
    "on",
    "under",
    "mat",
    "road",
    "red",
    "blue",
    "fast",
    "slow",
    "one",
    "two",
]


def sentence_transformer(folder: Path, hidden: int = 16):
    """A ``SentenceTransformer`` of one BERT layer and mean pooling, whose vocabulary is ``WORDS``."""
    import torch
    import transformers
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (folder / "vocab.txt").write_text("\n".join([*special, *WORDS]))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(special) + len(WORDS),
        hidden_size=hidden,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=2 * hidden,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    transformers.BertModel(config).save_pretrained(folder)
    transformer = Transformer(str(folder))
    pooling = Pooling(hidden)
    return SentenceTransformer(modules=[transformer, pooling], device="cpu")


def sentences(count: int, seed: int) -> list[str]:
    import random

    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(3, 7))) for _ in range(count)]
