"""How good translated and generated images and representations are, and what a discriminator does over a training."""

from fastnce.metrics.digit_classifier import (
    DigitClassifier,
    DigitRecipe,
    load_digit_classifier,
)
from fastnce.metrics.digits_photos import (
    compare_folders,
    digits_to_translate,
    evaluate_digits,
    is_digits_photos,
)
from fastnce.metrics.discriminator import (
    Authenticity,
    authenticity_accuracy,
    largest_singular_values,
    overfitting_gap,
)
from fastnce.metrics.distribution import (
    Distance,
    compare_images,
    distance,
    extract_features,
    frechet_distance,
)
from fastnce.metrics.evaluator import Evaluator, EvaluatorRecipe, load_evaluator, recipe_for
from fastnce.metrics.extractors import ScriptedExtractor, generation_evaluator
from fastnce.metrics.generation import (
    class_accuracy,
    inception_score,
    intra_class_fid,
    relabelled_accuracy,
    spread_ratio,
)
from fastnce.metrics.generation_report import (
    evaluate_generation,
    evaluate_generators,
    format_generation_table,
)
from fastnce.metrics.knn import knn_predict, linear_predict
from fastnce.metrics.neighbours import PrecisionRecall, precision_recall_density_coverage
from fastnce.metrics.representation import encode, evaluate_encoders
from fastnce.metrics.translation import Row, evaluate, format_table, write_report

__all__ = [
    "Authenticity",
    "DigitClassifier",
    "DigitRecipe",
    "Distance",
    "Evaluator",
    "EvaluatorRecipe",
    "PrecisionRecall",
    "Row",
    "ScriptedExtractor",
    "authenticity_accuracy",
    "class_accuracy",
    "compare_folders",
    "compare_images",
    "digits_to_translate",
    "distance",
    "encode",
    "evaluate",
    "evaluate_digits",
    "evaluate_encoders",
    "evaluate_generation",
    "evaluate_generators",
    "extract_features",
    "format_generation_table",
    "format_table",
    "frechet_distance",
    "generation_evaluator",
    "inception_score",
    "is_digits_photos",
    "intra_class_fid",
    "knn_predict",
    "largest_singular_values",
    "linear_predict",
    "load_digit_classifier",
    "load_evaluator",
    "overfitting_gap",
    "precision_recall_density_coverage",
    "recipe_for",
    "relabelled_accuracy",
    "spread_ratio",
    "write_report",
]
