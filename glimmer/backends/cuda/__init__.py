"""The GPU's ops as Triton kernels: rows.py, products.py and attention.py hold the kernels, backend.py the object."""
