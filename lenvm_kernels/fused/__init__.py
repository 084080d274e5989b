"""The Triton kernels. Only `lenvm_kernels.dispatch` imports these modules, because they need Triton."""
