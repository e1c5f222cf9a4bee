"""The built-in sets: real digits and photographs that ship inside packages, and what judges images made after them."""

from fastnce.demo.judges import (
    DigitClassifier,
    DigitRecipe,
    Evaluator,
    EvaluatorRecipe,
    generation_evaluator,
    load_digit_classifier,
    load_evaluator,
    recipe_for,
)
from fastnce.demo.label_sets import write_posterised_photos, write_texture_mosaics
from fastnce.demo.report import digits_to_translate, evaluate_digits, is_digits_photos
from fastnce.demo.sets import (
    PHOTOS,
    read_labels,
    write_digits,
    write_digits_photos,
    write_photo_crops,
    write_photos,
    write_single_photos,
)
from fastnce.demo.texture_networks import TextureRecipe

__all__ = [
    "PHOTOS",
    "DigitClassifier",
    "DigitRecipe",
    "Evaluator",
    "EvaluatorRecipe",
    "TextureRecipe",
    "digits_to_translate",
    "evaluate_digits",
    "generation_evaluator",
    "is_digits_photos",
    "load_digit_classifier",
    "load_evaluator",
    "read_labels",
    "recipe_for",
    "write_digits",
    "write_digits_photos",
    "write_photo_crops",
    "write_photos",
    "write_posterised_photos",
    "write_single_photos",
    "write_texture_mosaics",
]
