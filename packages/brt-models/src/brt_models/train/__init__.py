"""Training scripts, one a model: python -m brt_models.train.<model>."""
