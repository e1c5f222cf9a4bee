"""Pictures of a run: sample grids, plots, feature maps, and the run gallery. What is shown is computed elsewhere."""
