"""The architecture, its weights and its cache. glm4_moe.py is the drawing; start there."""
