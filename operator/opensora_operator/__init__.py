"""Reconciles TrainingRun, SampleJob and BatchSearch into Indexed Jobs of PyTorch pods. Needs no torch."""
