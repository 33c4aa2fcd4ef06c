"""Parts that the models share: attention, embedders, modulation and the final layer."""
