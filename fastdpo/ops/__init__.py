"""The operators behind the public functions, as `torch.ops.fastdpo.*`: one folder per operation.

Its kernels, test and benchmark bear the same name. In each folder `operators` holds schemas, fakes (which validate) and
autograd, and names the implementations. `registry` joins these to torch.library, `first_order` to autograd, where it
refuses other derivatives than the first; `backends` says which can run here; `targets` checks target ids. Upper floors
import from these modules, so that none costs its import unused.
"""
