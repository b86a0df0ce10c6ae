"""The arithmetic of each kind of device: base.py is the contract, reference.py its definition in plain torch."""
