"""Every mistake that the ops refuse: the message names the op and the argument, what was given, and often the fix."""

import re

import pytest
import torch
from forms import LikeDTensor

import fastnce

x = torch.randn(4, 3)
images = torch.randn(2, 4, 3)
maps = torch.randn(2, 3, 4, 5)
labels = torch.tensor([0, 1, 0, 1])
meta = torch.empty(4, 3, device="meta")
many = torch.empty(0, 3)


def error(kind, pattern, op, *args, **kwargs):
    return pytest.param(kind, pattern, op, args, kwargs, id=f"{op}-{pattern[:40]}")


CASES = [
    # info_nce
    error(TypeError, r"query.*got list", "info_nce", [1.0], x),
    error(TypeError, r"positive_key.*got NoneType", "info_nce", x, None),
    error(TypeError, r"query.*got torch.int64.*query\.float\(\)", "info_nce", x.long(), x),
    error(TypeError, r"query.*got torch.sparse_coo", "info_nce", x.to_sparse(), x),
    error(TypeError, r"query.*got a nested one", "info_nce", torch.nested.nested_tensor([x, x[:2]], layout=torch.jagged), x),
    error(TypeError, r"positive_key.*is a DTensor.*positive_key\.full_tensor", "info_nce", x, x.as_subclass(LikeDTensor)),
    error(ValueError, r"query.*got \(3,\)", "info_nce", x[0], x),
    error(ValueError, r"query.*is empty: its shape is \(0, 3\).*at least 1", "info_nce", many, many),
    error(ValueError, r"positive_key.*got \(3, 3\)", "info_nce", x, x[:3]),
    error(TypeError, r"positive_key.*is torch.float64 but query is torch.float32.*positive_key\.to\(query\.dtype\)", "info_nce", x, x.double()),
    error(ValueError, r"positive_key.*is on meta but query is on cpu\. .*positive_key\.to\(query\.device\)", "info_nce", x, meta),
    error(ValueError, r"negative_keys.*got \(5, 2\)", "info_nce", x, x, torch.randn(5, 2)),
    error(ValueError, r"negative_keys.*got \(2, 4, 5, 3\)", "info_nce", x, x, torch.randn(2, 4, 5, 3)),
    error(ValueError, r"negative_keys.*got \(4, 5, 3\)", "info_nce", images, images, torch.randn(4, 5, 3)),
    error(ValueError, r"negative_keys.*got \(3, 5, 3\)", "info_nce", x, x, torch.randn(3, 5, 3)),
    error(ValueError, r"negative_keys.*is empty", "info_nce", x, x, many),
    error(TypeError, r"negative_keys.*is torch.float64", "info_nce", x, x, x.double()),
    error(TypeError, r"temperature.*got str", "info_nce", x, x, temperature="0.1"),
    error(TypeError, r"temperature.*got bool", "info_nce", x, x, temperature=True),
    error(ValueError, r"temperature.*got 0", "info_nce", x, x, temperature=0),
    error(ValueError, r"temperature.*got -1\.0.*0\.05 to 1", "info_nce", x, x, temperature=-1.0),
    error(ValueError, r"temperature.*got nan", "info_nce", x, x, temperature=float("nan")),
    error(ValueError, r"temperature.*got inf", "info_nce", x, x, temperature=float("inf")),
    error(ValueError, r"temperature.*got .*\(2,\)", "info_nce", x, x, temperature=torch.ones(2)),
    error(ValueError, r"temperature.*got .*\(0,\)", "info_nce", x, x, temperature=torch.ones(0)),
    *(
        error(ValueError, rf"temperature.*got {value}.*0\.05 to 1", op, *rows, temperature=torch.tensor([value]))
        for op, rows in {"info_nce": (x, x), "patch_nce": (images, images), "sup_con": (x, labels), "nt_xent": (x, x), "pairwise_cosine_similarity": (x,)}.items()
        for value in (-0.5, 0.0, torch.inf, torch.nan)
    ),
    error(TypeError, r"temperature.*is a DTensor.*full_tensor", "info_nce", x, x, temperature=torch.ones(1).as_subclass(LikeDTensor)),
    error(TypeError, r"temperature.*must be a float.* torch.int64.*temperature\.float\(\)", "info_nce", x, x, temperature=torch.tensor(1)),
    error(ValueError, r"reduction.*got 'average'", "info_nce", x, x, reduction="average"),
    error(ValueError, r"in_batch_negatives=False.*leaves no negatives.*Pass negative_keys", "info_nce", x, x, in_batch_negatives=False),
    error(ValueError, r"symmetric=True.*has no meaning with negative_keys.*Drop one", "info_nce", x, x, x, symmetric=True),
    error(ValueError, r"similarity_dtype.*got torch.float8_e5m2", "info_nce", x, x, similarity_dtype=torch.float8_e5m2),
    error(ValueError, r"similarity_dtype=torch.float8_e4m3fn.*got normalize=False: .*Drop one", "info_nce", x, x, similarity_dtype=torch.float8_e4m3fn, normalize=False),
    error(ValueError, r"similarity_dtype=torch.float8_e4m3fn.*got \(4, 2, 3\): .*Drop", "info_nce", x, x, torch.randn(4, 2, 3), similarity_dtype=torch.float8_e4m3fn),
    error(ValueError, r"backend.*='tpu' is unknown\. Expected one of: triton, cuda, native, blocks, torch", "info_nce", x, x, backend="tpu"),
    error(TypeError, r"query.*got torch.complex64", "info_nce", x.to(torch.complex64), x),
    # its masks, weights and guide
    error(TypeError, r"query_ids.*must be integers .*torch.float32.*query_ids\.long\(\)", "info_nce", x, x, query_ids=labels.float()),
    error(TypeError, r"query_ids.*must be integers .*torch.bool", "info_nce", x, x, query_ids=labels.bool()),
    error(TypeError, r"query_ids.*must be a tensor.*got list", "info_nce", x, x, query_ids=[0, 1, 0, 1]),
    error(ValueError, r"query_ids.*must have the shape \(4,\).*got \(3,\)", "info_nce", x, x, query_ids=labels[:3]),
    error(ValueError, r"query_ids.*must have the shape \(2, 4\).*got \(4,\)", "info_nce", images, images, query_ids=labels),
    error(ValueError, r"query_ids.*are on meta but query is on cpu", "info_nce", x, x, query_ids=labels.to("meta")),
    error(TypeError, r"query_ids.*is a DTensor but query is not", "info_nce", x, x, query_ids=labels.as_subclass(LikeDTensor)),
    error(ValueError, r"query_ids.*leave nothing out.*Pass negative_ids", "info_nce", x, x, x, query_ids=labels),
    error(ValueError, r"key_ids.*need the ids of the queries too\. Pass query_ids", "info_nce", x, x, key_ids=labels),
    error(ValueError, r"key_ids.*must have the shape \(4,\)", "info_nce", x, x, query_ids=labels, key_ids=labels[:2]),
    error(ValueError, r"key_ids.*are of in-batch negatives, which this call has not. Drop key_ids", "info_nce", x, x, x, query_ids=labels, key_ids=labels),
    error(ValueError, r"negative_ids.*need the ids of the queries too\. Pass query_ids", "info_nce", x, x, x, negative_ids=labels),
    error(ValueError, r"negative_ids.*are of negative_keys, which this call has not. Drop negative_ids", "info_nce", x, x, query_ids=labels, negative_ids=labels),
    error(ValueError, r"negative_ids.*must have the shape \(4,\).*got \(4, 4\)", "info_nce", x, x, x, query_ids=labels, negative_ids=labels.expand(4, 4)),
    error(ValueError, r"negative_ids.*must have the shape \(4, 5\).*got \(5,\)", "info_nce", x, x, torch.randn(4, 5, 3), query_ids=labels, negative_ids=torch.arange(5)),
    error(TypeError, r"key_mask.*must be bool.*got torch.float32", "info_nce", x, x, key_mask=torch.ones(4)),
    error(TypeError, r"key_mask.*must be a tensor.*got list", "info_nce", x, x, key_mask=[True] * 4),
    error(ValueError, r"key_mask.*must have the shape \(4,\).*got \(4, 4\)", "info_nce", x, x, key_mask=torch.ones(4, 4).bool()),
    error(ValueError, r"key_mask.*is on meta but query is on cpu\. .*key_mask\.to\(query\.device\)", "info_nce", x, x, key_mask=labels.bool().to("meta")),
    error(ValueError, r"key_mask.*of in-batch negatives, which this call has not", "info_nce", x, x, x, key_mask=labels.bool()),
    error(ValueError, r"negative_mask.*of negative_keys, which this call has not", "info_nce", x, x, negative_mask=labels.bool()),
    error(ValueError, r"negative_mask.*must have the shape \(4, 5\)", "info_nce", x, x, torch.randn(4, 5, 3), negative_mask=torch.ones(5).bool()),
    error(ValueError, r"guide.*must be a tuple of the guide's rows of \(query, positive_key\), got 1", "info_nce", x, x, guide=(x,)),
    error(ValueError, r"guide.*must be a tuple of .*\(query, positive_key, negative_keys\), got 2", "info_nce", x, x, x, guide=(x, x)),
    error(ValueError, r"guide.*must be a tuple of .*got Tensor", "info_nce", x, x, guide=x),
    error(ValueError, r"guide.*must be a tuple of .*got int", "info_nce", x, x, guide=3),
    error(ValueError, r"guide\[1\].*must have the shape \(4, 3\).*got \(3, 3\)", "info_nce", x, x, guide=(x, x[:3])),
    error(ValueError, r"guide\[1\].*must have the shape \(4, 2\).*got \(4, 3\)", "info_nce", x, x, guide=(x[:, :2], x)),
    error(ValueError, r"guide\[2\].*must have the shape \(5, 3\).*got \(4, 3\)", "info_nce", x, x, torch.randn(5, 3), guide=(x, x, x)),
    error(TypeError, r"guide\[1\].*is torch.float64 but guide\[0\] is torch.float32", "info_nce", x, x, guide=(x, x.double())),
    error(TypeError, r"guide\[0\].*got torch.int64", "info_nce", x, x, guide=(x.long(), x)),
    error(ValueError, r"guide.*needs negative_keys of shape \(M, D\) or None.*negative_mask", "info_nce", x, x, torch.randn(4, 5, 3), guide=(x, x, torch.randn(4, 5, 3))),
    error(ValueError, r"guide.*symmetric=True.*average two calls", "info_nce", x, x, symmetric=True, guide=(x, x)),
    error(ValueError, r"guide_margin.*finite float, got '0\.1'", "info_nce", x, x, guide=(x, x), guide_margin="0.1"),
    error(ValueError, r"guide_margin.*finite float, got nan", "info_nce", x, x, guide=(x, x), guide_margin=float("nan")),
    error(TypeError, r"weights.*got list", "info_nce", x, x, weights=[1.0] * 4),
    error(TypeError, r"weights.*got torch.int64.*weights\.float\(\)", "info_nce", x, x, weights=labels),
    error(ValueError, r"weights.*must have the shape \(4,\) .*got \(3,\)", "info_nce", x, x, weights=torch.ones(3)),
    error(ValueError, r"weights.*must have the shape \(2, 4\) .*got \(4,\)", "info_nce", images, images, weights=torch.ones(4)),
    error(ValueError, r"weights.*require a gradient.*weights\.detach\(\)", "info_nce", x, x, weights=torch.ones(4, requires_grad=True)),
    error(ValueError, r"similarity_dtype.*goes with no mask, weight or rank", "info_nce", x, x, similarity_dtype=torch.float8_e4m3fn, query_ids=labels),
    error(ValueError, r"similarity_dtype.*goes with no mask, weight or rank", "info_nce", x, x, similarity_dtype=torch.float8_e4m3fn, return_rank=True),
    error(TypeError, "unexpected keyword argument 'temprature'", "info_nce", x, x, temprature=0.1),
    # patch_nce
    error(TypeError, r"query_features.*and key_features must both be .*key_features is Tensor", "patch_nce", [images], images),
    error(TypeError, r"query_features.*and key_features must both be .*query_features is int", "patch_nce", 3, images),
    error(ValueError, r"same number of layers.*got 1 and 2", "patch_nce", [images], [images, images]),
    error(ValueError, r"same number of layers.*got 0 and 0", "patch_nce", [], []),
    error(ValueError, r"query_features.*got \(4, 3\)", "patch_nce", x, x),
    error(ValueError, r"query_features\[1\].*got \(4, 3\)", "patch_nce", [images, x], [images, x]),
    error(ValueError, r"key_features\[1\].*got \(1, 4, 3\)", "patch_nce", [images] * 2, [images, images[:1]]),
    error(TypeError, r"key_features.*is torch.float64 but query_features is torch.float32", "patch_nce", images, images.double()),
    error(ValueError, r"query_features\[1\].*is on meta but query_features\[0\] is on cpu. Move all layers to one device", "patch_nce", [images, images.to("meta")], [images, images.to("meta")]),
    error(ValueError, r"negatives.*got 'all'", "patch_nce", images, images, negatives="all"),
    error(ValueError, r"layer_weights.*one float per layer, 2 here, got 1\. ", "patch_nce", [images] * 2, [images] * 2, layer_weights=[0.5]),
    error(ValueError, r"layer_weights.*one float per layer, 1 here, got float", "patch_nce", images, images, layer_weights=0.5),
    error(TypeError, r"layer_weights\[1\].*got str", "patch_nce", [images] * 2, [images] * 2, layer_weights=[1, "2"]),
    error(ValueError, r"layer_weights\[0\].*got 0.*Leave that layer out", "patch_nce", images, images, layer_weights=[0]),
    error(ValueError, r"layer_weights\[0\].*got nan", "patch_nce", images, images, layer_weights=[torch.nan]),
    error(ValueError, r"reduction.*must be one of 'mean', 'none', got 'sum'", "patch_nce", images, images, reduction="sum"),
    error(ValueError, r"layer_weights.*reduction='none'.*Drop one", "patch_nce", [images], [images], reduction="none", layer_weights=[1.0]),
    error(TypeError, r"weights.*got list", "patch_nce", images, images, weights=[torch.ones(2, 4)]),
    error(TypeError, r"weights\[1\].*got torch.int64", "patch_nce", [images] * 2, [images] * 2, weights=[torch.ones(2, 4), labels.expand(2, 4)]),
    error(ValueError, r"weights.*a list of one tensor \(B, S\) per layer, 2 here, got Tensor", "patch_nce", [images] * 2, [images] * 2, weights=torch.ones(2, 4)),
    error(ValueError, r"weights.*must have the shape \(2, 4\) .*got \(4,\)", "patch_nce", images, images, weights=torch.ones(4)),
    error(ValueError, r"weights.*require a gradient", "patch_nce", images, images, weights=torch.ones(2, 4, requires_grad=True)),
    error(ValueError, r"ids.*a list of one tensor \(B, S\) per layer, 2 here, got 1", "patch_nce", [images] * 2, [images] * 2, ids=[labels]),
    error(TypeError, r"ids.*must be integers.*torch.float32.*ids\.long\(\)", "patch_nce", images, images, ids=torch.ones(2, 4)),
    error(ValueError, r"ids\[0\].*must have the shape \(2, 4\).*got \(4,\)", "patch_nce", [images], [images], ids=[labels]),
    # conditional_contrastive
    error(ValueError, r"embeddings.*got \(2, 4, 3\)", "conditional_contrastive", images, images, labels),
    error(ValueError, r"proxies.*got \(2, 3\)", "conditional_contrastive", x, x[:2], labels),
    error(TypeError, r"proxies.*is torch.bfloat16 but embeddings is torch.float32", "conditional_contrastive", x, x.bfloat16(), labels),
    error(TypeError, r"labels.*got list", "conditional_contrastive", x, x, [0, 1, 0, 1]),
    error(TypeError, r"labels.*got torch.float32.*labels\.long\(\)", "conditional_contrastive", x, x, labels.float()),
    error(TypeError, r"labels.*must be integers .*torch.bool", "conditional_contrastive", x, x, labels.bool()),
    error(ValueError, r"labels.*got \(3,\)", "conditional_contrastive", x, x, labels[:3]),
    error(ValueError, r"labels.*got \(4, 1\)", "conditional_contrastive", x, x, labels[:, None]),
    error(ValueError, r"labels.*are on meta but embeddings is on cpu\. .*labels\.to\(embeddings\.device\)", "conditional_contrastive", x, x, labels.to("meta")),
    error(ValueError, r"reduction.*must be one of", "conditional_contrastive", x, x, labels, reduction=None),
    # sample_patches
    error(TypeError, r"features.*got an empty list", "sample_patches", []),
    error(TypeError, r"features.*got dict", "sample_patches", {}),
    error(TypeError, r"features\[1\].*got int", "sample_patches", [maps, 3]),
    error(ValueError, r"features.*got \(2, 4, 3\)", "sample_patches", images),
    error(ValueError, r"features\[0\].*is empty", "sample_patches", [maps[:0]]),
    error(TypeError, r"num_patches.*got float", "sample_patches", maps, 2.0),
    error(TypeError, r"num_patches.*got bool", "sample_patches", maps, True),
    error(ValueError, r"num_patches.*got 0", "sample_patches", maps, 0),
    error(ValueError, r"patch_ids.*got list of length 1", "sample_patches", maps, patch_ids=[labels]),
    error(ValueError, r"patch_ids.*got int", "sample_patches", maps, patch_ids=3),
    error(ValueError, r"patch_ids.*got Tensor", "sample_patches", [maps, maps], patch_ids=labels),
    error(ValueError, r"patch_ids.*got list of length 1", "sample_patches", [maps, maps], patch_ids=[labels]),
    error(TypeError, r"patch_ids\[0\].*got list", "sample_patches", [maps], patch_ids=[[1]]),
    error(TypeError, r"patch_ids.*got torch.int32", "sample_patches", maps, patch_ids=labels.int()),
    error(ValueError, r"patch_ids.*got \(1, 4\)", "sample_patches", maps, patch_ids=labels[None]),
    error(ValueError, r"patch_ids.*got \(0,\)", "sample_patches", maps, patch_ids=labels[:0]),
    error(ValueError, r"patch_ids.*is on meta but its map is on cpu\. .*patch_ids\.to\('cpu'\)", "sample_patches", maps, patch_ids=labels.to("meta")),
    error(IndexError, r"patch_ids\[1\].*got 20", "sample_patches", [maps, maps], patch_ids=[labels, labels + 19]),
    # nt_xent
    error(TypeError, r"z1.*must be a tensor", "nt_xent", None, x),
    error(ValueError, r"z2.*got \(3, 3\)", "nt_xent", x, x[:3]),
    error(TypeError, r"z2.*is torch.float64 but z1 is torch.float32", "nt_xent", x, x.double()),
    error(ValueError, r"reduction.*must be one of", "nt_xent", x, x, reduction="avg"),
    # sup_con
    error(ValueError, r"features.*got \(2, 4, 3\)", "sup_con", images, labels),
    error(ValueError, r"labels.*got \(2,\)", "sup_con", x, labels[:2]),
    error(TypeError, r"labels.*is a DTensor but features is not", "sup_con", x, labels.as_subclass(LikeDTensor)),
    # pairwise_cosine_similarity
    error(TypeError, r"x.*got list", "pairwise_cosine_similarity", [1.0]),
    error(ValueError, r"x.*got \(3,\)", "pairwise_cosine_similarity", x[0]),
    error(ValueError, r"y.*got \(4, 3\)", "pairwise_cosine_similarity", x[:, :2], x),
    error(ValueError, r"y.*must have the shape \(2, 4, 3\)", "pairwise_cosine_similarity", images, images[:1]),
    error(TypeError, r"y.*is torch.float64 but x is torch.float32", "pairwise_cosine_similarity", x, x.double()),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "pattern", "op", "args", "kwargs"), CASES)
def test_mistake(kind, pattern, op, args, kwargs):
    with pytest.raises(kind) as caught:
        getattr(fastnce, op)(*args, **kwargs)
    assert type(caught.value) is kind
    message = str(caught.value)
    assert re.search(rf"\b{pattern}", message), message
    assert "\n" not in message
    if not {"backend", "temprature"} & kwargs.keys():
        assert message.startswith(f"{op}: ")


# So often for the kernels, not for an argument (test_every_op, test_second_derivatives), and over ranks (tests/distributed).


def test_mixed_dtypes_are_promoted_under_autocast_only():
    with pytest.raises(TypeError, match="is torch.bfloat16 but"):
        fastnce.info_nce(x, x.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fastnce.info_nce(x, x.bfloat16()).dtype == torch.float32
