"""LenVM plug-in for LlamaFactory: `llamafactory-cli train x.yaml` with `stage: lenvm`, no fork.

Importing this package has no side effect. The host is hooked by `lenvm_lf._hook.install`, which a `.pth` / `.start`
file in site-packages calls at interpreter start, or `lenvm-train` in-process. `LENVM_LF_DISABLE=1` switches both off.
All of the host's private parts that are touched are listed in `lenvm_lf.seams`.
"""
