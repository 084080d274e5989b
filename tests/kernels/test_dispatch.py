"""The dispatch point: which way a call goes, and that both ways agree. With a GPU, the kernels run on it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from typing import Any

import torch

from lenvm.bins import LengthBins
from lenvm.candidates import Candidates, SamplingRows
from lenvm.format import LenvmConfig
from lenvm.guidance import Control, GuidanceRows, Scores, guide, predicted_lengths, strict_bounds
from lenvm.heads import LookaheadHead, ValueHead
from lenvm.lookahead import scores_from_distribution
from lenvm.sampler import draw
from lenvm_kernels import (
    CandidateRows,
    DrawBuffers,
    Keep,
    RequestTables,
    SharedRows,
    TiltSample,
    attend_prefix,
    build_candidates,
    dispatch,
    keep_chosen,
    lookahead_scores,
    place_candidates,
    reference,
    tilt_sample,
    uses_numba,
    uses_triton,
    value_head,
)
from tests.kernels.checks.check_step import Pools

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENVM = LenvmConfig(gamma=0.997, bins=LengthBins.for_max_length(4000).centres)
ROWS, VOCABULARY, HIDDEN = 64, 20_000, 96


class Step:
    """One guidance step of a mixed batch."""

    def __init__(self, device: str) -> None:
        g = torch.Generator().manual_seed(0)
        self.logits = (torch.randn(ROWS, VOCABULARY, generator=g) * 4).to(device)
        self.sampling = SamplingRows(
            torch.rand(ROWS, generator=g).to(device) + 0.5,
            torch.tensor([VOCABULARY, 20]).repeat(ROWS // 2).to(device),
            torch.full((ROWS,), 0.95, device=device),
            torch.zeros(ROWS, device=device),
        )
        self.stops = self.logits.argsort(-1, descending=True)[:, 3:5]
        self.hidden = torch.randn(ROWS, 16, HIDDEN, generator=g).to(device)
        self.log_q = (torch.randn(ROWS, 16, len(LENVM.bins), generator=g) * 3).log_softmax(-1).to(device)
        number = torch.arange(ROWS)
        parameters = {
            "mode": number % 3,
            "control": number % 5,
            "target": torch.full((ROWS,), 40),
            "emitted": number,
            "sharpness": torch.ones(ROWS),
            "tolerance": (number % 3 == 0) * 0.1,
            "strict": number % 7 == 0,
            "bias": torch.full((ROWS,), -2.0),
        }
        self.rows = GuidanceRows(**{k: v.to(device) for k, v in parameters.items()})
        self.seed, self.greedy = number.to(device) * 977, (number % 4 == 0).to(device)
        self.head = ValueHead(HIDDEN).to(device)
        torch.nn.init.constant_(self.head.w1, 0.05), torch.nn.init.constant_(self.head.w2, 0.2)

    @torch.no_grad()
    def run(self) -> tuple[Candidates, torch.Tensor, TiltSample]:
        candidates = build_candidates(self.logits, self.sampling, self.stops, 16, self.rows, reach=20)
        z = value_head(self.hidden, self.head)
        sample = tilt_sample(candidates, Scores(z, self.log_q), self.rows, LENVM, self.seed, self.greedy)
        return candidates, z, sample


def test_a_whole_step_is_what_the_core_does() -> None:
    """On a GPU: the kernels, against the core on the CPU."""
    step, core = Step(DEVICE), Step("cpu")
    candidates, z, sample = step.run()
    assert uses_triton(step.logits) == (DEVICE == "cuda")
    with torch.no_grad():
        want_z = core.head(core.hidden)
    ban, force = strict_bounds(core.rows)
    want = dispatch.reference.core.build_candidates(core.logits, core.sampling, core.stops, 16, ban, force, 20)
    scores = Scores(want_z, core.log_q)
    log_p = guide(want, scores, core.rows, LENVM)
    slot = draw(log_p, want.token_ids, core.seed, core.rows.emitted, core.greedy)
    assert torch.equal(candidates.token_ids.cpu()[want.kept], want.token_ids[want.kept])
    assert torch.allclose(candidates.log_p.cpu().exp(), want.log_p.exp(), atol=1e-6)
    assert torch.allclose(z.cpu(), want_z, atol=1e-4)
    assert torch.allclose(sample.log_p.cpu().exp(), log_p.exp(), atol=1e-4)
    assert (sample.slot.cpu() == slot).float().mean() > 0.98  # on the CPU: all
    length = predicted_lengths(want, scores, LENVM).gather(1, slot[:, None])[:, 0]
    assert torch.allclose(sample.length.cpu(), length, rtol=1e-3) or DEVICE == "cuda"


def test_of_equal_logits_a_device_takes_those_of_the_core() -> None:
    """Rounded logits: on a GPU its top-k has to choose, and the kernel mends the choice."""
    step = Step("cpu")
    step.logits = step.logits.round()
    ban, force = strict_bounds(step.rows)
    want = dispatch.reference.core.build_candidates(step.logits, step.sampling, step.stops, 16, ban, force)
    here, dtypes = Step(DEVICE), (torch.int64, torch.float32, torch.bool)
    into = Candidates(*(torch.empty(ROWS, 16, dtype=dtype, device=DEVICE) for dtype in dtypes))
    found = build_candidates(step.logits.to(DEVICE), here.sampling, step.stops.to(DEVICE), 16, here.rows, 20, into)
    assert found.log_p is into.log_p
    assert torch.equal(found.kept.cpu(), want.kept)
    assert torch.equal(found.token_ids.cpu()[want.kept], want.token_ids[want.kept])


def test_what_surrounds_the_forward_is_what_plain_torch_does() -> None:
    """Candidates are placed, the last choice is kept (also by itself), and the draw is written."""
    lengths, pool_rows = torch.tensor([1, 1023, 1024, 2599, 40]), torch.tensor([4, 0, 8, 2, 5])
    start, target = torch.tensor([1, 1000, 0, 2600, 7]), torch.tensor([0, 17, 3, 5, 100])

    def place(device: str, way: Any, alone: Any) -> tuple[Pools, CandidateRows]:
        pools = Pools(device)
        at, rows, begin, to = (t.to(device) for t in (lengths, pool_rows, start, target))
        tables, keep = RequestTables(pools.requests, pools.virtual), Keep(pools.kv, pools.chosen, to)
        found = way(at, begin, rows, pools.scratch[rows, :5], tables, 2599, keep, None)
        alone(Keep(pools.kv, pools.chosen, to + 200), rows)
        return pools, found

    ours, found = place(DEVICE, place_candidates, keep_chosen)
    theirs, wanted = place("cpu", reference.place_candidates, reference.keep_chosen)
    for a, b in zip((*found, *ours.kv.buffers), (*wanted, *theirs.kv.buffers), strict=True):
        assert torch.equal(a.cpu(), b)
    for row, length in enumerate(wanted.lengths.tolist()):
        assert torch.equal(ours.virtual[row, :length].cpu(), theirs.virtual[row, :length])

    step = Step(DEVICE)
    candidates, z, plain = step.run()
    index, slots = torch.randperm(ROWS, device=DEVICE), torch.arange(ROWS * 16, device=DEVICE).view(ROWS, 16)
    chosen = torch.full((ROWS,), -1, device=DEVICE)
    into = DrawBuffers(step.logits, index, chosen, index, slots)
    scores = Scores(z, step.log_q)
    sample = tilt_sample(candidates, scores, step.rows, LENVM, step.seed, step.greedy, into=into)
    assert torch.equal(sample.token_id, plain.token_id)
    assert torch.equal(step.logits[index].argmax(-1), sample.token_id)
    assert torch.equal((step.logits == -torch.inf).sum(-1).cpu(), torch.full((ROWS,), VOCABULARY - 1))
    assert torch.equal(chosen[index], slots.gather(1, sample.slot[:, None])[:, 0])


def test_attention_of_candidates_is_what_plain_torch_does() -> None:
    """Half precision, as the kernel is made for; also cut into pieces, which a device alone decides."""
    g = torch.Generator().manual_seed(2)
    for rows, longest in ((1, 2000), (7, 300)):
        query = torch.randn(rows * 16, 12, 128, generator=g).bfloat16()
        caches = [torch.randn(4000, 2, 128, generator=g).bfloat16() for _ in range(2)]
        own = torch.randperm(4000, generator=g)[: rows * 16].view(rows, 16)
        table = torch.randint(0, 4000, (rows + 2, 2100), generator=g, dtype=torch.int32)
        given = (
            torch.randperm(rows + 2, generator=g)[:rows],
            torch.randint(1, longest, (rows,), generator=g),
            own,
            table,
        )
        want = reference.attend_prefix(query.float(), SharedRows(*given), *caches, 0.1)
        here = SharedRows(*(t.to(DEVICE) for t in given))
        found = attend_prefix(query.to(DEVICE), here, *(c.to(DEVICE) for c in caches), 0.1)
        assert torch.allclose(found.cpu().float(), want, rtol=2e-2, atol=2e-2)


def test_looking_ahead_is_what_the_core_does() -> None:
    g = torch.Generator().manual_seed(1)
    head = LookaheadHead(HIDDEN, 48, len(LENVM.bins), tokens=VOCABULARY)
    head.reset_parameters()
    states, slots = torch.randn(ROWS + 5, HIDDEN, generator=g), torch.randperm(ROWS + 5, generator=g)[:ROWS]
    tokens = torch.randint(0, VOCABULARY, (ROWS, 16), generator=g)
    with torch.no_grad():
        want = scores_from_distribution(head(states[slots], tokens).log_softmax(-1), LENVM)
        here = [t.to(DEVICE) for t in (states, slots, tokens)]
        found = lookahead_scores(*here, head.to(DEVICE), LENVM)
    assert torch.allclose(found.z.cpu(), want.z, rtol=1e-4, atol=1e-4)
    assert torch.allclose(found.length_log_q.cpu(), want.length_log_q, rtol=1e-4, atol=1e-4)


def test_lengths_and_statistics_are_optional() -> None:
    step = Step("cpu")
    candidates = build_candidates(step.logits, step.sampling, step.stops, 16, step.rows, reach=20)
    z = torch.zeros(ROWS, 16)
    args = (candidates, Scores(z, step.log_q), step.rows, LENVM, step.seed, step.greedy)
    for function in (tilt_sample, lambda *a, **given: reference.tilt_sample(*a, None, **given)):
        with_ = function(*args, statistics=True, lengths=True)
        without = function(*args, statistics=False, lengths=False)
        assert torch.equal(with_.token_id, without.token_id)
        assert without.length is None and with_.length is not None and (with_.length >= 0).all()
        assert with_.kl is not None and (with_.kl >= 0).all()
        assert with_.status is not None and (with_.status[step.rows.control == Control.BIAS] == 0).all()
    assert without.kl is None  # of the reference


def test_a_cpu_takes_what_numba_compiles_where_it_is_installed() -> None:
    """Narrowed candidates and a value that nobody wanted are not contiguous: they are taken as they are."""
    step = Step("cpu")
    assert uses_numba(step.logits) == (importlib.util.find_spec("numba") is not None)
    whole = build_candidates(step.logits, step.sampling, step.stops, 16, reach=20)
    candidates = Candidates(whole.token_ids[:, :5], whole.log_p[:, :5], whole.is_stop[:, :5])
    rows = step.rows.control == Control.POSTERIOR
    part = Candidates(*(t[rows] for t in (candidates.token_ids, candidates.log_p, candidates.is_stop)))
    scores = Scores(torch.zeros(()).expand(int(rows.sum()), 5), step.log_q[rows, :5])
    args = (part, scores, step.rows.select(rows), LENVM)
    got = tilt_sample(*args, step.seed[rows], step.greedy[rows], {Control.POSTERIOR})
    want = reference.tilt_sample(*args, step.seed[rows], step.greedy[rows], {Control.POSTERIOR}, True, True)
    assert torch.equal(got.token_id, want.token_id)
    assert torch.allclose(got.log_p.exp(), want.log_p.exp(), atol=1e-6)


def test_imports_without_triton_and_knows_no_host() -> None:
    code = (
        "import sys; sys.modules['triton'] = None; import lenvm_kernels, torch; "
        "print(lenvm_kernels.uses_triton(torch.zeros(1)), {'sglang', 'lenvm_sglang'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "False set()", done.stderr
