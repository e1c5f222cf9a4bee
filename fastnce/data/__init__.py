"""Sets of images, with and without labels, and their transforms."""

from fastnce.data.domains import AlignedImages, UnpairedImages
from fastnce.data.folders import list_images, split_folder
from fastnce.data.images import EXTENSIONS, load_image, save_image, to_uint8
from fastnce.data.label_maps import LabelMaps, instance_edges, one_hot
from fastnce.data.labelled import LabelledImages
from fastnce.data.single_image import SingleImagePatches
from fastnce.data.transforms import Preprocess, resize_to_multiple
from fastnce.data.views import VIEW_RECIPES, TwoViews, ViewRecipe

__all__ = [
    "EXTENSIONS",
    "VIEW_RECIPES",
    "AlignedImages",
    "LabelMaps",
    "LabelledImages",
    "Preprocess",
    "SingleImagePatches",
    "TwoViews",
    "UnpairedImages",
    "ViewRecipe",
    "instance_edges",
    "list_images",
    "load_image",
    "one_hot",
    "resize_to_multiple",
    "save_image",
    "split_folder",
    "to_uint8",
]
