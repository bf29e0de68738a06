"""Training: data, recipes, checkpoints and the loop behind `fused-preact train`."""
