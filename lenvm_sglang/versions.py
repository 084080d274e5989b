"""What sets the supported versions of SGLang apart: all that the rest of the package need not know.

Whatever can be done in the same way in all of them is done so in `lenvm_sglang.seams`, even where the newest has a
shorter way. A new version is one line of `SUPPORTED`, after a look at every function that the package touches;
`docs/compatibility.md` says what was run on each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lenvm_sglang.settings import Refusal

_DP_ATTENTION = Refusal("attn_dp_size", (1,), "run without DP attention")
_ONE_REPLICA = Refusal("dp_size", (1,), "install SGLang 0.5.23 or run one server a replica")
_DP_INFO = "sglang.srt.managers.data_parallel_controller.DataParallelController.get_init_info"


@dataclass(frozen=True)
class Version:
    """One version of SGLang.

    Attributes:
        lacks: hooked functions that it does not have.
        refusals: settings refused in this version, beside those refused in all.
        plans_slots: attention reads the KV slots of a batch by a plan bound to it; otherwise from the request table.
    """

    lacks: frozenset[str] = frozenset()
    refusals: tuple[Refusal, ...] = (_DP_ATTENTION,)
    plans_slots: bool = True


# Without `_DP_INFO` the launcher does not learn what the schedulers of several replicas serve.
SUPPORTED = {
    # DP attention is a way of using dp_size there
    "0.5.21": Version(frozenset({_DP_INFO}), (_ONE_REPLICA,), plans_slots=False),
    "0.5.22": Version(frozenset({_DP_INFO}), (_ONE_REPLICA, _DP_ATTENTION)),
    "0.5.23": Version(),
}
"""By what `sglang.__version__` says."""


def host() -> Version:
    """The version that is installed, which has to be a supported one (`lenvm_sglang.seams.install` checks that)."""
    import sglang

    return SUPPORTED[sglang.__version__]


def bind_slots(translator: Any, batch: Any) -> None:
    """Let the host's attention read a batch that is ours, in a runner's pools.

    Args:
        translator: the runner's `kv_index_translator`.
        batch: a ForwardBatch over the runner's own request table and KV slots.
    """
    if host().plans_slots:
        translator.bind_runner_slots(batch)
