"""The original cramming project's code as a peer: its model, its settings and its steps where its package is found."""

import sys
from types import SimpleNamespace

import pytest
import torch
from test_bench import written
from test_bench_step import CPU, CRAMMED, assert_close, gradients, run, start, step_entry
from test_bench_step import ours as loss_and_gradients_of_ours

from bench import bars, ledger, measure_step, original, steps, test_step
from bench.original import ORIGINAL
from bench.steps import masked_batch
from cramfast.config import PRESETS

PRESET = PRESETS["crammed-bert"]


@pytest.fixture
def package(reference):
    """Skips where the original's package, or what it needs, is not there."""
    if missing := ORIGINAL.missing():
        pytest.skip(missing)


@pytest.fixture
def compiled(monkeypatch):
    """Nothing is compiled; the arguments of torch.compile come into this list."""
    calls = []
    monkeypatch.setattr(torch, "compile", lambda model, **arguments: calls.append(arguments) or model)
    return calls


# The model


def test_their_model_is_crammed_bert(package):
    model = original.original_bert(CRAMMED.config).eval()
    loss = model(**original.padded_arguments(masked_batch(CRAMMED, CPU)))["loss"]
    loss.backward()
    expected_loss, ours = loss_and_gradients_of_ours(CRAMMED)
    assert loss.item() == pytest.approx(expected_loss, rel=1e-6)
    expected = original.original_weights(ours, CRAMMED.config)
    del expected["decoder.weight"]  # the tied embedding's second name
    assert_close(gradients(model), {name: g for name, g in expected.items() if not name.endswith(".norm_factor")})


def test_the_preset_is_their_crammed_bert(package):
    arch, train = original.settings("arch/crammed-bert"), original.settings("train/bert-o4")
    sizes = (arch.num_transformer_layers, arch.hidden_size, arch.intermed_size, arch.attention.num_attention_heads)
    assert sizes == (PRESET.num_layers, PRESET.hidden_size, PRESET.wide_size, PRESET.num_heads)
    assert (arch.embedding.max_seq_length, arch.norm_eps) == (test_step.CRAMMED_512.length, PRESET.norm_eps)
    batch = masked_batch(CRAMMED, CPU)
    assert len(batch.labels) == round(train.objective.mlm_probability * len(batch.input_ids))
    with torch.device("meta"):
        model, mine = original.original_bert(PRESET), steps.initial_bert(PRESET)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in mine.parameters())


def test_weights_come_in_their_order():
    config = CRAMMED.config
    H, D, C, half = config.num_heads, config.head_size, config.hidden_size, config.intermediate_size
    weights = steps.initial_bert(config).state_dict()
    theirs = original.original_weights(weights, config)
    qkv_3HDC = weights["layers.1.attention.qkv.weight"].view(3, H, D, C)
    found_H3DC = theirs["encoder.layers.1.attn.self_attention.query_key_value.weight"].view(H, 3, D, C)
    for head in range(H):
        assert torch.equal(found_H3DC[head], qkv_3HDC[:, head])
    wide = weights["layers.1.mlp.0.weight"]
    assert torch.equal(theirs["encoder.layers.1.ffn.dense_in.weight"], torch.cat([wide[half:], wide[:half]]))


# The step


def test_the_first_step_agrees_and_later_ones_learn(package, compiled):
    expected = measure_step._expected(CRAMMED, CPU)
    step = start(CRAMMED, ORIGINAL)
    first = step()
    assert float(first.loss) == pytest.approx(expected[0], rel=1e-5)
    assert float(first.gradient_norm) == pytest.approx(expected[1], rel=1e-5)
    losses = [float(step().loss) for _ in range(30)]
    assert losses[-1] < expected[0] - 0.02


def test_a_first_step_in_bfloat16_passes_the_guard(package, compiled):
    first = start(CRAMMED, ORIGINAL, torch.bfloat16)()
    assert max(measure_step.guard(CRAMMED, ORIGINAL, first, measure_step._expected(CRAMMED, CPU))) > 0


def test_it_trains_as_their_recipe_does(package, compiled):
    step = start(CRAMMED, ORIGINAL)
    assert not step.model.training and step.clip == 0.5
    decayed, others = step.optimizer.param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.01, 0.0)
    assert all(p.ndim == 2 for p in decayed["params"][:1] + decayed["params"][2:])  # the second scales the positions
    assert {p.ndim for p in others["params"]} == {1}
    assert len(decayed["params"]) + len(others["params"]) == len(list(step.model.parameters()))
    for group in step.optimizer.param_groups:
        assert tuple(group["betas"]) == (0.9, 0.98) and group["eps"] == 1e-12
        assert (group["lr"], group["fused"], group["foreach"]) == (steps.OPTIMIZER.lr, None, None)
    assert [call["fullgraph"] for call in compiled] == [True]


def test_a_whole_step_is_one_graph(package, monkeypatch):
    compile_model = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda model, fullgraph, **_: compile_model(model, fullgraph=fullgraph, backend="eager")
    )
    expected = measure_step._expected(CRAMMED, CPU)
    assert float(start(CRAMMED, ORIGINAL)().loss) == pytest.approx(expected[0], rel=1e-5)


def test_compiling_is_theirs_without_cuda_graphs():
    impl = SimpleNamespace(
        dynamic=False,
        fullgraph=True,
        backend="inductor",
        _inductor_vars={"max_autotune_gemm": True, "triton": {"cudagraphs": True, "cudagraph_trees": False}},
    )
    arguments = original.compile_arguments(impl)
    options = arguments.pop("options")
    assert arguments == {"dynamic": False, "fullgraph": True, "backend": "inductor"}
    assert options == {"max_autotune_gemm": True, "triton.cudagraphs": False, "triton.cudagraph_trees": False}


def test_a_measurement_says_what_it_measured(package, compiled, monkeypatch):
    monkeypatch.setattr(measure_step, "_WARM_SECONDS", 0.01)
    monkeypatch.setattr(measure_step, "_ROUND_SECONDS", 0.001)
    info = run(CRAMMED, ORIGINAL)
    assert (info["work"], info["who"], info["backend"]) == ("step/train/crammed-6x16", "cramming-original", None)
    assert info["loss_error"] < 1e-5 and info["gradient_norm_error"] < 1e-5


# Where it does not run


def test_without_the_package_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(original, "_MODULES", ("torch", "no_such_module"))
    assert ORIGINAL.missing() == (
        "no_such_module is not installed, which cramming-original takes: "
        "pip install git+https://github.com/JonasGeiping/cramming"
    )


def test_a_package_that_no_longer_imports_is_a_reason_to_skip(tmp_path, monkeypatch):
    (tmp_path / "cramming" / "architectures").mkdir(parents=True)
    (tmp_path / "cramming" / "__init__.py").write_text("raise RuntimeError('this runs a whole data pipeline')\n")
    (tmp_path / "cramming" / "architectures" / "crammed_bert.py").write_text("from torch import no_such_name\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(original, "_MODULES", ("cramming",))
    monkeypatch.setattr(original, "_ARCHITECTURES", "broken_architectures")
    original._crammed_bert.cache_clear()
    try:
        assert ORIGINAL.missing().startswith("cramming-original cannot be imported: ImportError: cannot import name")
    finally:
        original._crammed_bert.cache_clear()
        sys.modules.pop("broken_architectures", None)
    assert "cramming" not in sys.modules


def test_its_bar_is_held_once_it_is_measured(tmp_path):
    tokens_per_s = {"cramfast": 840_000, ORIGINAL.who: 600_000}
    entries = [step_entry("crammed-bert-512x128", who, pace) for who, pace in tokens_per_s.items()]
    ledger.save(tmp_path, "step", written(*entries))
    (verdict,) = (v for v in bars.evaluate(ledger.load(tmp_path)[0]) if v.bar.against == ORIGINAL.who)
    assert verdict.held and verdict.measured == pytest.approx(1.4)
