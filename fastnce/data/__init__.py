"""Sets of images, with and without labels, their transforms, and demo sets of images that ship inside packages."""

from fastnce.data.aligned import AlignedImages
from fastnce.data.demo import write_digits_photos, write_photos, write_single_photos
from fastnce.data.demo_labelled import write_digits, write_photo_crops
from fastnce.data.folders import (
    EXTENSIONS,
    list_images,
    load_image,
    save_image,
    split_folder,
    to_uint8,
)
from fastnce.data.labelled import LabelledImages
from fastnce.data.recipe import read_labels
from fastnce.data.samples import PHOTOS
from fastnce.data.single_image import SingleImagePatches
from fastnce.data.transforms import Preprocess, resize_to_multiple
from fastnce.data.unpaired import UnpairedImages
from fastnce.data.views import VIEW_RECIPES, TwoViews, ViewRecipe

__all__ = [
    "EXTENSIONS",
    "PHOTOS",
    "VIEW_RECIPES",
    "AlignedImages",
    "LabelledImages",
    "Preprocess",
    "SingleImagePatches",
    "TwoViews",
    "UnpairedImages",
    "ViewRecipe",
    "list_images",
    "load_image",
    "read_labels",
    "resize_to_multiple",
    "save_image",
    "split_folder",
    "to_uint8",
    "write_digits",
    "write_digits_photos",
    "write_photo_crops",
    "write_photos",
    "write_single_photos",
]
