"""The attention benchmarks on a machine without a GPU: their cases, their peers, their bars and tables."""

import sys
import types
from dataclasses import replace
from functools import partial

import pytest
import torch
from test_bench import Cpu, Rounds, checked, entry, written

from bench import bars, ledger, lengths, plots, tables, test_attention
from bench.cases import BOTH, DIRECTIONS, FORWARD, Sizes
from bench.check import Call, WrongResult, relative_errors
from bench.measure import Refused, measure
from bench.peers import CRAMFAST, Peer
from bench.test_attention import PEERS_OF_EQUAL, PEERS_OF_RAGGED, attention_case

EQUAL = ("all-64", "all-128", "all-256", "all-512", "all-1024")
RAGGED = ("ragged-16-128", "ragged-32-512", "documents", "mnli-pairs")
ROTARY = ("all-128", "ragged-16-128")
SIZES = Sizes(torch.device("cpu"), torch.float32, tokens=256, hidden=64)
FULL = Sizes(torch.device("cpu"), torch.bfloat16)
OF_EQUAL = {peer.who: peer for peer in PEERS_OF_EQUAL}
OF_RAGGED = {peer.who: peer for peer in PEERS_OF_RAGGED}
CASES = [(name, False) for name in (*EQUAL, *RAGGED)] + [(name, True) for name in ROTARY]


# What is measured


@pytest.mark.parametrize("name", EQUAL)
def test_equal_lengths_fill_the_batch_with_whole_sequences(name):
    case = attention_case(FULL, name)
    assert set(case.cu_seqlens.diff().tolist()) == {int(name.removeprefix("all-"))} == {case.max_seqlen}
    assert case.cu_seqlens[-1] == 65_536


@pytest.mark.parametrize(
    "name, low, high, mean",
    [
        ("ragged-16-128", 16, 128, 72),
        ("ragged-32-512", 32, 512, 272),
        ("documents", 2, 128, 122.8),
        ("mnli-pairs", 5, 128, 39.0),
    ],
)
def test_ragged_lengths_have_their_distribution_and_fill_the_batch(name, low, high, mean):
    case = attention_case(FULL, name)
    drawn = case.cu_seqlens.diff()
    assert case.cu_seqlens.dtype == torch.int32 and case.cu_seqlens[0] == 0 and case.cu_seqlens[-1] == 65_536
    assert drawn[:-1].min() >= low and drawn.max() <= high == case.max_seqlen
    assert drawn.double().mean() == pytest.approx(mean, rel=0.05)
    assert torch.equal(case.cu_seqlens, attention_case(FULL, name).cu_seqlens)


def test_drawn_lengths_have_the_quantiles_that_they_are_drawn_from():
    drawn = lengths.drawn(lengths.MNLI_PAIRS, 10**6)
    middle, ninth = lengths.MNLI_PAIRS[16], lengths.MNLI_PAIRS[29]
    assert drawn.double().quantile(0.5) == pytest.approx(middle, abs=1)
    assert drawn.double().quantile(29 / 32) == pytest.approx(ninth, abs=1)


def test_bytes_and_flops_are_those_of_the_definition():
    case = attention_case(FULL, "all-128")
    assert case.bytes == {FORWARD: 4 * 65_536 * 768 * 2, BOTH: 11 * 65_536 * 768 * 2}
    assert case.flops == {FORWARD: 4 * 768 * 512 * 128**2, BOTH: 14 * 768 * 512 * 128**2}
    ragged = attention_case(SIZES, "ragged-16-128")
    assert ragged.flops[FORWARD] == 4 * 64 * sum(length**2 for length in ragged.cu_seqlens.diff().tolist())


def test_works_have_the_batch_in_their_name_and_the_tokens_where_they_are_not_the_usual():
    assert attention_case(FULL, "all-128").work(BOTH) == "varlen_attention/fwd+bwd/all-128"
    assert attention_case(FULL, "all-128", rotary=True).work(FORWARD) == "varlen_attention/fwd/all-128-rotary"
    assert attention_case(SIZES, "mnli-pairs").work(FORWARD) == "varlen_attention/fwd/mnli-pairs@256"


def test_inputs_repeat_with_their_seed_and_are_never_zeros():
    case = attention_case(SIZES, "ragged-16-128")
    one, again, other = (case.make(seed) for seed in (0, 0, 1))
    assert one.tensors["qkv"].shape == (256, 3, 1, 64) and one.grad_outputs[0].shape == (256, 1, 64)
    assert torch.equal(one.tensors["qkv"], again.tensors["qkv"])
    assert not torch.equal(one.tensors["qkv"], other.tensors["qkv"])
    assert torch.equal(one.tensors["cu_seqlens"], other.tensors["cu_seqlens"])
    assert one.tensors["qkv"].std() > 0.5


# The guard


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name, rotary", CASES)
def test_the_guard_passes_what_is_right(name, rotary, direction, reference):
    assert checked(attention_case(SIZES, name, rotary), CRAMFAST, direction) <= 2


@pytest.mark.parametrize("peer", [CRAMFAST, OF_RAGGED["sdpa-padded"]], ids=lambda peer: peer.who)
def test_with_dropout_the_guard_compares_how_far_chance_leads(peer, reference):
    case = attention_case(SIZES, "ragged-16-128", dropout=0.1)
    assert case.work(FORWARD) == "varlen_attention/fwd/ragged-16-128-dropout@256"
    assert 0.5 < checked(case, peer) < 2
    more = attention_case(SIZES, "ragged-16-128", dropout=0.6)
    with pytest.raises(WrongResult):
        checked(replace(case, ours=more.ours, dropout=0.6), peer)


@pytest.mark.parametrize("name, rotary", [("all-64", False), ("ragged-16-128", True)])
def test_the_reference_by_whole_sequences_is_the_reference(name, rotary, monkeypatch):
    case = attention_case(replace(SIZES, dtype=torch.float64), name, rotary)
    inputs = case.make(0)
    call = Call(case.eager, inputs, BOTH)
    call()
    results = {"output 0": call.outputs[0], "gradient of qkv": call.gradients["qkv"]}
    monkeypatch.setattr(test_attention, "_PART_TOKENS", 100)
    rows = [rows for rows, _ in case.parts(inputs)]
    assert rows[0].start == 0 and rows[-1].stop == 256 and len(rows) > 2
    assert [part.stop for part in rows[:-1]] == [part.start for part in rows[1:]]
    (errors,) = relative_errors(case, inputs, BOTH, [results])
    assert set(errors) == set(results)
    assert max(errors.values()) < 1e-12


def test_a_sequence_longer_than_a_part_is_a_part(monkeypatch):
    monkeypatch.setattr(test_attention, "_PART_TOKENS", 100)
    case = attention_case(SIZES, "all-128")
    assert [rows for rows, _ in case.parts(case.make(0))] == [slice(0, 128), slice(128, 256)]


def halved(function, qkv, cu_seqlens):
    """The first sequence falls into two."""
    return function(qkv, torch.cat((cu_seqlens[:1], cu_seqlens[1:2] // 2, cu_seqlens[1:])))


def scaled(function, qkv, cu_seqlens):
    """The gradient is 10 % too large."""
    out = function(qkv, cu_seqlens)
    return out + 0.1 * (out - out.detach())


@pytest.mark.parametrize("wrong, complaint", [(halved, "output 0"), (scaled, "gradient of qkv")])
def test_the_guard_rejects_a_wrong_kernel(wrong, complaint):
    peer = Peer("sloppy", lambda case: partial(wrong, case.eager))
    work = r"varlen_attention/fwd\+bwd/ragged-16-128@256"
    with pytest.raises(WrongResult, match=f"sloppy on {work}: {complaint} has relative error"):
        checked(attention_case(SIZES, "ragged-16-128"), peer)


# The peers


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", EQUAL)
def test_sdpa_of_equal_lengths_gives_the_cases_results(name, direction):
    assert checked(attention_case(SIZES, name), OF_EQUAL["sdpa-flash"], direction) <= 2


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", RAGGED)
def test_padded_sdpa_gives_the_cases_results(name, direction):
    assert checked(attention_case(SIZES, name), OF_RAGGED["sdpa-padded"], direction) <= 2


def test_padding_is_data_too_and_laid_out_as_the_kernels_like_it():
    case = attention_case(replace(SIZES, tokens=64), "ragged-16-128")
    inputs = case.make(0)
    padded = OF_RAGGED["sdpa-padded"].prepare(inputs)
    longest = int(case.cu_seqlens.diff().max())
    q = padded.tensors["q"]
    assert longest % 8 and q.shape == (len(case.cu_seqlens) - 1, 1, longest + -longest % 8, 64)
    assert q.transpose(1, 2).is_contiguous() and padded.grad_outputs[0].transpose(1, 2).is_contiguous()
    assert (q != 0).all()
    assert padded.tensors["attn_mask"].sum() == 64


def test_tensors_of_equal_lengths_are_views_of_one_copy():
    inputs = attention_case(SIZES, "all-64").make(0)
    prepared = OF_EQUAL["sdpa-cudnn"].prepare(inputs)
    assert prepared.tensors["k"].shape == (4, 1, 64, 64)
    assert prepared.tensors["k"].transpose(1, 2).is_contiguous()
    assert prepared.grad_outputs[0].data_ptr() == inputs.grad_outputs[0].data_ptr()


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("name", ["all-64", "ragged-16-128"])
def test_flex_attention_sees_each_document_alone(name, monkeypatch):
    # Without a GPU it runs uncompiled, and has no backward.
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    assert checked(attention_case(SIZES, name), OF_RAGGED["flex-attention"], FORWARD) <= 2


def attend(q, k, v, cu_seqlens, longest):
    """What the packages below compute, in plain PyTorch: (T, H, D) each."""
    return test_attention.kernels.varlen_attention_reference(torch.stack((q, k, v), 1), cu_seqlens, longest)


def flash_2_varlen(q, k, v, cu_q, cu_k, max_q, max_k, dropout_p):
    assert dropout_p == 0
    return varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k)


def varlen_attn(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k):
    assert cu_seq_q is cu_seq_k and max_q == max_k
    return attend(q, k, v, cu_seq_q, max_q)


def flash_4_varlen(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
    return varlen_attn(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k), None


def flash_4_equal(q, k, v):
    return torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(
        1, 2
    ), None


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("who", ["varlen-attn", "flash-attn", "flash-attn-4"])
@pytest.mark.parametrize("name, peers", [("all-64", OF_EQUAL), ("ragged-16-128", OF_RAGGED)])
def test_packages_are_called_with_what_they_take(name, peers, who, direction, monkeypatch):
    flash, cute = types.ModuleType("flash_attn"), types.ModuleType("flash_attn.cute")
    flash.flash_attn_varlen_func = flash_2_varlen
    cute.flash_attn_varlen_func, cute.flash_attn_func = flash_4_varlen, flash_4_equal
    monkeypatch.setitem(sys.modules, "flash_attn", flash)
    monkeypatch.setitem(sys.modules, "flash_attn.cute", cute)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    assert checked(attention_case(SIZES, name), peers[who], direction) <= 2


# Running it


def run(case, peer, direction=BOTH) -> dict:
    benchmark = Rounds()
    benchmark.pedantic = lambda target, **_: target()
    tiny = attention_case(replace(SIZES, tokens=64), case.name.split("@")[0].removesuffix("-rotary"))
    measure(benchmark, Cpu(), case, tiny, direction, peer, {})
    return benchmark.extra_info


@pytest.mark.parametrize(
    "name, peer",
    [
        ("all-64", CRAMFAST),
        ("ragged-32-512", CRAMFAST),
        ("all-64", OF_EQUAL["sdpa-flash"]),
        ("mnli-pairs", OF_RAGGED["sdpa-padded"]),
    ],
)
def test_a_measurement_says_what_it_measured(name, peer, reference):
    info = run(attention_case(SIZES, name), peer)
    assert info["work"] == f"varlen_attention/fwd+bwd/{name}@256" and info["who"] == peer.who
    assert info["backend"] == ("reference" if peer is CRAMFAST else None)
    assert info["error_ratio"] <= 2 and info["host_seconds"] > 0 and info["flops"] > 0


def test_rotary_is_measured_like_the_rest(reference):
    info = run(attention_case(SIZES, "ragged-16-128", rotary=True), CRAMFAST)
    assert info["work"] == "varlen_attention/fwd+bwd/ragged-16-128-rotary@256"


def test_a_backend_that_does_not_run_here_refuses_by_name():
    with pytest.raises(
        Refused, match=r"^sdpa-cudnn on varlen_attention/fwd\+bwd/all-64@256: No viable backend [^\n]+$"
    ):
        run(attention_case(SIZES, "all-64"), OF_EQUAL["sdpa-cudnn"])


def test_a_package_that_does_not_load_refuses_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    with pytest.raises(Refused, match=r"^flash-attn-4 on varlen_attention/fwd/all-64@256: No module named"):
        run(attention_case(SIZES, "all-64"), OF_EQUAL["flash-attn-4"], FORWARD)


def test_an_error_of_our_own_is_no_refusal():
    def broken(qkv, cu_seqlens):
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        run(replace(attention_case(SIZES, "all-64"), ours=broken), CRAMFAST)


# What becomes of the results


def attention(case, who, seconds, **info) -> dict:
    return entry(f"varlen_attention/fwd+bwd/{case}", who, seconds, **info)


def device(folder, *entries):
    ledger.save(folder, "attention", written(*entries))
    return ledger.load(folder)[0]


def test_the_best_peer_is_the_fastest_that_was_measured(tmp_path):
    entries = [attention("all-128", who, s) for who, s in (("cramfast", 1.0), ("sdpa-flash", 2.0), ("sdpa-cudnn", 1.5))]
    measured = device(tmp_path, *entries, attention("all-128-rotary", "cramfast", 1.04))
    verdicts = {v.bar.work.split("/")[2]: v for v in bars.evaluate(measured) if v.bar.operator == "varlen_attention"}
    assert len(verdicts) == 8
    assert verdicts["all-128"].measured == 1.5 and verdicts["all-128"].held
    assert str(verdicts["all-128"]) == (
        "held    nvidia-h200  varlen_attention/fwd+bwd/all-128 bfloat16: "
        "speed against best (sdpa-cudnn) 1.50×, bar 1.30× (without flash-attn-4)"
    )
    assert str(verdicts["all-128-rotary"]).endswith("speed against cramfast (all-128) 0.96×, bar 0.95×")
    assert str(verdicts["all-64"]) == (
        "absent  nvidia-h200  varlen_attention/fwd+bwd/all-64: speed against best not measured, bar 2.20×"
    )
    assert "The best peers on nvidia-h200 are without flash-attn-4, not measured there." in bars.summary([measured])


def test_with_flash_attn_4_among_the_peers_nothing_is_missing(tmp_path):
    entries = [attention("all-512", "cramfast", 1.0), attention("all-512", "flash-attn-4", 0.9, timed_by="events")]
    measured = device(tmp_path, *entries)
    (verdict,) = (v for v in bars.evaluate(measured) if v.measured is not None)
    assert not verdict.held and verdict.rival == "flash-attn-4" and verdict.without == ()
    assert "without" not in bars.summary([measured])


def test_an_operator_that_was_never_measured_has_no_bars_on_its_cases(tmp_path):
    ledger.save(tmp_path, "gelu", written(entry("gelu/fwd/65536x3072", "cramfast", 1e-4)))
    (measured,) = ledger.load(tmp_path)
    assert not [v for v in bars.evaluate(measured) if v.bar.operator == "varlen_attention"]


def test_tables_compare_with_the_best_peer_where_there_is_no_compiled_one(tmp_path):
    entries = [attention("all-1024", "cramfast", 1e-3), attention("all-64", "cramfast", 1e-4, peak_mib=96.0)]
    entries += [attention("all-64", "sdpa-cudnn", 3e-4), attention("all-64", "varlen-attn", 6e-4)]
    measured = device(tmp_path, *entries)
    text = tables.module_tables("attention", [measured], "results")
    assert "| who | fwd+bwd µs | × best | extra MiB |" in text
    assert "| **cramfast** | 100 | 3.00 | 96 |" in text
    assert "| sdpa-cudnn | 300 | 1.00 |  |" in text
    assert "| varlen-attn | 600 | 0.50 |  |" in text
    # A column that nobody has a number for is left out.
    assert "| who | fwd+bwd µs |\n| --- | --- |\n| **cramfast** | 1000 |" in text
    assert text.index("all-64") < text.index("all-1024")


def test_a_plot_of_many_works_shows_forward_and_backward_together(tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr(plots, "_panel", lambda axes, device, title, records: titles.append(title))
    entries = [attention(f"all-{n}", "cramfast", 1e-4) for n in range(7)]
    forward = [entry(f"varlen_attention/fwd/all-{n}", "cramfast", 1e-4) for n in range(7)]
    measured = device(tmp_path, *entries, *forward)
    plots.draw(measured, measured.modules["attention"], tmp_path / "attention.png")
    assert titles == [f"varlen_attention/fwd+bwd/all-{n}, bfloat16" for n in range(7)]
