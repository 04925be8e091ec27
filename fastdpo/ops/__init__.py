"""The operators behind the public functions, as `torch.ops.fastdpo.*`.

Each module holds one operator: its schema, its fake (which validates), its autograd, and where its implementations
are. `registry` joins these to torch.library.
"""
