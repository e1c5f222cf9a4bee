"""How good translated images are: what they still show, and how close they come to the target."""

from fastnce.metrics.distribution import Distance, compare_images, distance, extract_features
from fastnce.metrics.evaluator import Evaluator, EvaluatorRecipe, load_evaluator, recipe_for
from fastnce.metrics.report import (
    Row,
    compare_folders,
    digits_to_translate,
    evaluate,
    evaluate_digits,
    format_table,
    write_report,
)

__all__ = [
    "Distance",
    "Evaluator",
    "EvaluatorRecipe",
    "Row",
    "compare_folders",
    "compare_images",
    "digits_to_translate",
    "distance",
    "evaluate",
    "evaluate_digits",
    "extract_features",
    "format_table",
    "load_evaluator",
    "recipe_for",
    "write_report",
]
