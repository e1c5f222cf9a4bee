"""Pictures of a run: sample grids, plots, feature maps, and the run gallery. What is shown is computed elsewhere."""

from fastnce.viz.feature_maps import (
    FeatureColours,
    Scale,
    SimilarityMap,
    save_feature_colours,
    save_similarity,
)
from fastnce.viz.gallery import GalleryRun, save_gallery
from fastnce.viz.plots import (
    sample_grid,
    save_ablation_plot,
    save_curves,
    save_loss_plot,
    save_measurement_plot,
    save_sample_grid,
)

__all__ = [
    "FeatureColours",
    "GalleryRun",
    "Scale",
    "SimilarityMap",
    "sample_grid",
    "save_ablation_plot",
    "save_curves",
    "save_feature_colours",
    "save_gallery",
    "save_loss_plot",
    "save_measurement_plot",
    "save_sample_grid",
    "save_similarity",
]
