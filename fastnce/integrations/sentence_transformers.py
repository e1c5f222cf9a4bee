"""The losses of sentence-transformers."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from fastnce.ops import _checks
from fastnce.ops.info_nce import info_nce
from fastnce.ops.info_nce import over_ranks as info_nce_over_ranks
from fastnce.ops.pairwise_cosine_similarity import pairwise_cosine_similarity

LIBRARY = ("sentence-transformers", "6.2.0")  # compared with
_LOSSES = "sentence_transformers.sentence_transformer.losses"
STANDS_FOR = {
    f"{_LOSSES}.multiple_negatives_ranking": ("MultipleNegativesRankingLoss",),
    f"{_LOSSES}.cached_multiple_negatives_ranking": ("CachedMultipleNegativesRankingLoss",),
    f"{_LOSSES}.gist_embed": ("GISTEmbedLoss",),
    f"{_LOSSES}.cached_gist_embed": ("CachedGISTEmbedLoss",),
}

DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
_HARDNESS = ("in_batch_negatives", "hard_negatives", "all_negatives")
_NORMALIZE = {"cos_sim": True, "dot_score": False}  # theirs by name


def cos_sim(a: Tensor, b: Tensor) -> Tensor:
    """The default ``similarity_fct``: which says that similarities are cosines, and is not called."""
    return pairwise_cosine_similarity(a, b)


class MultipleNegativesRankingLoss(nn.Module):
    """InfoNCE of queries and documents as sentence-transformers' class, with all directions and hardness.

    Args:
        model: the ``SentenceTransformer``.
        scale: the inverse of the temperature.
        similarity_fct: ``cos_sim`` or ``dot_score``, theirs or ours.
        gather_across_devices: the documents of all ranks are negatives; the loss is that of this rank's queries.
        directions: ``"query_to_doc"`` and any others of ``DIRECTIONS``.
        partition_mode: ``"joint"``, one sum over the similarities of all directions; or ``"per_direction"``, the mean of the
            losses of ``"query_to_doc"`` and ``"doc_to_query"``.
        hardness_mode: None, ``"in_batch_negatives"``, ``"hard_negatives"`` or ``"all_negatives"``: to the logits of which
            documents their cosine is added, times ``hardness_strength``, without gradient.
        hardness_strength: see ``hardness_mode``.

    Examples:
        >>> import torch
        >>> loss = MultipleNegativesRankingLoss(model=None)
        >>> query, positive, negative = torch.randn(3, 8, 16)
        >>> value = loss.compute_loss_from_embeddings([query, positive, negative], labels=None)
    """

    def __init__(
        self,
        model: nn.Module,
        scale: float = 20.0,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] = cos_sim,
        gather_across_devices: bool = False,
        directions: tuple[str, ...] = ("query_to_doc",),
        partition_mode: str = "joint",
        hardness_mode: str | None = None,
        hardness_strength: float = 0.0,
    ) -> None:
        super().__init__()
        self.model, self.scale, self.similarity_fct = model, scale, similarity_fct
        self.gather_across_devices, self.directions = gather_across_devices, tuple(directions)
        self.partition_mode = partition_mode
        self.hardness_mode, self.hardness_strength = hardness_mode, hardness_strength
        _check(self)

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
        """The loss of the model's embeddings of queries, documents and any hard negatives."""
        embeddings = [self.model(x)["sentence_embedding"] for x in sentence_features]
        return self.compute_loss_from_embeddings(embeddings, labels)

    def compute_loss_from_embeddings(
        self, embeddings: list[Tensor], labels: Tensor | None
    ) -> Tensor:
        """Of queries (N, D), their documents (N, D), and any number of hard negatives (N, D) for each."""
        return _loss(self, embeddings)

    @property
    def temperature(self) -> float:
        return 1 / self.scale

    def get_config_dict(self) -> dict[str, object]:
        """For the model card."""
        options = ("gather_across_devices", "directions", "partition_mode")
        options += ("hardness_mode", "hardness_strength")
        named = {"scale": self.scale, "similarity_fct": self.similarity_fct.__name__}
        return named | {name: getattr(self, name) for name in options}


def _check(loss: nn.Module) -> None:
    op = type(loss).__name__
    name = getattr(loss.similarity_fct, "__name__", repr(loss.similarity_fct))
    if name not in _NORMALIZE:
        raise ValueError(
            f"{op}: similarity_fct must be cos_sim or dot_score, got {name}. For others keep sentence-transformers' own class."
        )
    for direction in loss.directions:
        _checks.expect_choice(op, "directions", direction, DIRECTIONS)
    if "query_to_doc" not in loss.directions:
        raise ValueError(
            f"{op}: directions must have 'query_to_doc', whose pairs are the positives, got {loss.directions}. Add it."
        )
    _checks.expect_choice(op, "partition_mode", loss.partition_mode, ("joint", "per_direction"))
    if loss.partition_mode == "per_direction" and {*loss.directions} & {
        "query_to_query",
        "doc_to_doc",
    }:
        raise ValueError(
            f"{op}: partition_mode='per_direction' needs a positive in each direction, got {loss.directions}. Use 'joint'."
        )
    if loss.hardness_mode is not None:
        _checks.expect_choice(op, "hardness_mode", loss.hardness_mode, _HARDNESS)
    if loss.hardness_strength < 0:
        raise ValueError(
            f"{op}: hardness_strength must not be negative, got {loss.hardness_strength}."
        )


def _loss(loss: nn.Module, embeddings: Sequence[Tensor]) -> Tensor:
    """With the options of ``loss``, which has been checked."""
    query, document, *negatives = embeddings
    options = {
        "temperature": 1 / loss.scale,
        "normalize": _NORMALIZE[loss.similarity_fct.__name__],
    }
    hardness = loss.hardness_strength if loss.hardness_mode is not None else 0.0
    if loss.gather_across_devices:
        return _over_ranks(loss, query, document, negatives, hardness, options)
    if loss.directions == ("query_to_doc",) and not hardness:
        hard = torch.cat(negatives) if negatives else None
        return info_nce(query, document, hard, in_batch_negatives=True, **options)

    ids = torch.arange(len(query), device=query.device)
    options["reduction"] = "none"

    def against(anchor: Tensor, positive: Tensor, *pool: Tensor, hardness: float = 0.0) -> Tensor:
        """The losses among the rows of other numbers in each of the ``pool``."""
        of_pool = {"query_ids": ids, "negative_ids": ids.repeat(len(pool))}
        hard = {"hardness": hardness} if hardness else {}
        return info_nce(anchor, positive, torch.cat(pool), **of_pool, **hard, **options)

    of_others = 0.0 if loss.hardness_mode == "hard_negatives" else hardness
    found = against(query, document, document, *negatives, hardness=of_others)
    if negatives:
        of_own = 0.0 if loss.hardness_mode == "in_batch_negatives" else hardness
        hard = {"hardness": of_own} if of_own else {}
        own = info_nce(query, document, torch.stack(negatives, dim=1), **hard, **options)
        found = _joined(found, own)
    if loss.partition_mode == "per_direction":
        if "doc_to_query" in loss.directions:
            found = (found + against(document, query, query)) / 2
        return found.mean()
    if "query_to_query" in loss.directions:
        found = _joined(found, against(query, document, query))
    if "doc_to_doc" in loss.directions:
        found = _joined(found, against(document, query, document, *negatives))
    if "doc_to_query" in loss.directions:
        # In the joint sum the positive is there once more.
        found = torch.logaddexp(found, against(document, query, query))
    return found.mean()


def _joined(a: Tensor, b: Tensor) -> Tensor:
    """``log(e^a + e^b - 1)``: the losses over the negatives of both, of two with the same positives."""
    larger, smaller = torch.maximum(a, b), torch.minimum(a, b)
    return larger + torch.log1p(-torch.exp(smaller - larger) * torch.expm1(-smaller))


def _over_ranks(
    loss: nn.Module,
    query: Tensor,
    document: Tensor,
    negatives: Sequence[Tensor],
    hardness: float,
    options: dict[str, object],
) -> Tensor:
    op = type(loss).__name__
    both = {*loss.directions} == {"query_to_doc", "doc_to_query"}
    symmetric = both and loss.partition_mode == "per_direction"
    if hardness or negatives or not (symmetric or loss.directions == ("query_to_doc",)):
        raise ValueError(
            f"{op}: gather_across_devices=True goes with directions=('query_to_doc',), or with 'doc_to_query' per direction, and "
            f"with neither hard negatives nor hardness. Drop one, or keep sentence-transformers' own class."
        )
    return info_nce_over_ranks(
        query, document, symmetric=symmetric, reduction="none", **options
    ).mean()


def _gist_loss(loss: nn.Module, embeddings: Sequence[Tensor], guides: Sequence[Tensor]) -> Tensor:
    """GISTEmbed's loss of queries, documents and hard negatives (N, D) each, of which the guide has rows too."""
    (query, document, *negatives), (guide_query, guide_document, *guide_negatives) = (
        embeddings,
        guides,
    )
    options = {"temperature": loss.temperature, "guide_margin": loss.margin}
    options["relative_margin"] = loss.margin_strategy == "relative"
    ids = torch.arange(len(query), device=query.device)
    options |= {"query_ids": ids, "reduction": "none"}
    # Hard negatives have no query's number.
    pool, guide, pool_ids = [*negatives], [*guide_negatives], [ids - len(ids)] * len(negatives)
    if loss.contrast_anchors:
        pool, guide, pool_ids = [query, *pool], [guide_query, *guide], [ids, *pool_ids]
    found = info_nce(
        query,
        document,
        torch.cat(pool) if pool else None,
        in_batch_negatives=True,
        negative_ids=torch.cat(pool_ids) if pool else None,
        guide=(guide_query, guide_document, *([torch.cat(guide)] if pool else [])),
        **options,
    )
    if loss.contrast_positives:
        guide = (guide_document, guide_query, guide_document)
        of_documents = info_nce(document, query, document, negative_ids=ids, guide=guide, **options)
        found = _joined(found, of_documents)
    return found.mean()


def _cached_multiple_negatives_ranking(theirs: type) -> type:
    class CachedMultipleNegativesRankingLoss(theirs):
        """Theirs with the loss of the whole batch made by the ops; its signature and its caching are theirs."""

        def __init__(self, *args: object, **options: object) -> None:
            super().__init__(*args, **options)
            _check(self)

        def calculate_loss(
            self,
            reps: list[list[Tensor]],
            labels: Tensor | None = None,
            *,
            with_backward: bool = False,
        ) -> Tensor:
            loss = _loss(self, [torch.cat(parts) for parts in reps])
            return _gone_backward(loss) if with_backward else loss

    return CachedMultipleNegativesRankingLoss


def _gist_embed(theirs: type) -> type:
    class GISTEmbedLoss(theirs):
        """Theirs with the loss made by the ops; its signature is theirs."""

        def __init__(self, *args: object, **options: object) -> None:
            super().__init__(*args, **options)
            _check_gist(self)

        def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
            features = list(sentence_features)
            embeddings = [self.model(x)["sentence_embedding"] for x in features]
            with torch.no_grad():
                if self.must_retokenize:
                    features = [self._of_guide(x["input_ids"]) for x in features]
                guides = [self.guide(x)["sentence_embedding"] for x in features]
            return _gist_loss(self, embeddings, guides)

        def _of_guide(self, tokens: Tensor) -> dict[str, Tensor]:
            """The same texts as the guide takes them."""
            texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
            found = self.guide.preprocess(texts)
            return {
                k: x.to(tokens.device) if isinstance(x, Tensor) else x for k, x in found.items()
            }

    return GISTEmbedLoss


def _cached_gist_embed(theirs: type) -> type:
    class CachedGISTEmbedLoss(theirs):
        """Theirs with the loss of the whole batch made by the ops; its signature and its caching are theirs."""

        def __init__(self, *args: object, **options: object) -> None:
            super().__init__(*args, **options)
            _check_gist(self)

        def calculate_loss(
            self,
            reps: list[list[Tensor]],
            reps_guided: list[list[Tensor]],
            *,
            with_backward: bool = False,
        ) -> Tensor:
            both = ([torch.cat(parts) for parts in x] for x in (reps, reps_guided))
            loss = _gist_loss(self, *both)
            return _gone_backward(loss) if with_backward else loss

    return CachedGISTEmbedLoss


def _check_gist(loss: nn.Module) -> None:
    if loss.gather_across_devices:
        raise ValueError(
            f"{type(loss).__name__}: gather_across_devices=True is not there. Drop it, or keep sentence-transformers' own class."
        )


def _gone_backward(loss: Tensor) -> Tensor:
    loss.backward()
    return loss.detach()


# What is made from their classes: the library is imported when one of these is asked for.
_MADE = {
    "CachedMultipleNegativesRankingLoss": _cached_multiple_negatives_ranking,
    "GISTEmbedLoss": _gist_embed,
    "CachedGISTEmbedLoss": _cached_gist_embed,
}


def __getattr__(name: str) -> type:
    if name not in _MADE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    made = _MADE[name](getattr(importlib.import_module(_LOSSES), name))
    made.__module__, made.__qualname__ = __name__, name
    globals()[name] = made
    return made
