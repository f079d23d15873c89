"""Losses of online reinforcement learning, one file for each method, as pure functions of tensors.

Shapes: B samples, C latent channels, H and W latent height and width. Losses come for each sample (B,), so that the
trainer weighs and averages them in one place.
"""
