"""Dynamic networks built with brt: models, their weights, demos and benchmark workloads."""
