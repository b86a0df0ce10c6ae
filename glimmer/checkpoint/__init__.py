"""From a model directory to `Weight`: files.py reads safetensors files, formats/ knows how a matrix is stored.

It never learns a rank or a layer: its callers name the tensor and the rows.
"""
