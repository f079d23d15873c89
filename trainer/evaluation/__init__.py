"""Benchmarks: what is drawn (`items`), the folder it is drawn into (`run`), scores, the page, and comparisons.

Drawing and scoring are separate: a folder of pictures made elsewhere, by ComfyUI for example, is scored just as well.
"""
