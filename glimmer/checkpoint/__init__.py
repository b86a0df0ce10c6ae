"""From a model directory to `Weight`: files.py knows safetensors files, formats.py knows how formats lay out a matrix.

It never learns a rank or a layer: it is told which tensor and which rows.
"""
