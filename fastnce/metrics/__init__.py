"""How good translated and generated images and representations are, and what a discriminator does over a training."""

from fastnce.metrics.class_conditional import (
    class_accuracy,
    evaluate_generation,
    evaluate_generators,
    format_generation_table,
    inception_score,
    intra_class_fid,
    relabelled_accuracy,
    spread_ratio,
)
from fastnce.metrics.discriminator import (
    Authenticity,
    authenticity_accuracy,
    largest_singular_values,
    overfitting_gap,
)
from fastnce.metrics.distribution import (
    Distance,
    PrecisionRecall,
    compare_folders,
    compare_images,
    distance,
    extract_features,
    frechet_distance,
    precision_recall_density_coverage,
)
from fastnce.metrics.extractors import ScriptedExtractor, load_extractor
from fastnce.metrics.image_sets import Row, evaluate, format_table, write_report
from fastnce.metrics.prediction import (
    evaluate_prediction,
    laplacian_variance,
    saturation,
    sliced_wasserstein,
)
from fastnce.metrics.probes import encode, evaluate_encoders, knn_predict, linear_predict

__all__ = [
    "Authenticity",
    "Distance",
    "PrecisionRecall",
    "Row",
    "ScriptedExtractor",
    "authenticity_accuracy",
    "class_accuracy",
    "compare_folders",
    "compare_images",
    "distance",
    "encode",
    "evaluate",
    "evaluate_encoders",
    "evaluate_generation",
    "evaluate_generators",
    "evaluate_prediction",
    "extract_features",
    "format_generation_table",
    "format_table",
    "frechet_distance",
    "inception_score",
    "intra_class_fid",
    "knn_predict",
    "laplacian_variance",
    "largest_singular_values",
    "linear_predict",
    "load_extractor",
    "overfitting_gap",
    "precision_recall_density_coverage",
    "relabelled_accuracy",
    "saturation",
    "sliced_wasserstein",
    "spread_ratio",
    "write_report",
]
