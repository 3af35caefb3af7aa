import json
import os
import subprocess
import sys
from collections import defaultdict
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from cramfast import profile as command
from cramfast.config import PRESETS, BatchOptions, ModelConfig, OptimizerOptions, PretrainOptions
from cramfast.data.batches import Batch, Cursor
from cramfast.data.tokenizer import SpecialIds
from cramfast.device import copy_rate
from cramfast.kernels import Launch, every_launch
from cramfast.model import Bert
from cramfast.train import optimizer, profiling
from cramfast.train.floors import StepSizes, Work, definition
from cramfast.train.kinds import _FILES, NEIGHBOURS, Kind, classify, own_kernels
from cramfast.train.profiling import Kernel, Limits, Profile, as_json, show
from cramfast.train.step import TrainStep

ROOT = Path(__file__).parents[1]
# This clone, and wherever else packages come from.
PYTHONPATH = os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))
CARDS = [(dtype, card) for dtype in (torch.float16, torch.bfloat16, torch.float32) for card in (75, 80, 86, 90, 120)]


def file_of(launch: Launch) -> str:
    return launch.kernel.fn.__module__.rpartition(".")[2]


def kind_by_file(file: str, name: str) -> Kind:
    return _FILES[file]["backward" in name]


# Kinds of kernels


@pytest.mark.parametrize(("dtype", "capability"), CARDS)
def test_every_kernel_has_a_kind(dtype, capability):
    own = own_kernels(every_launch(dtype, capability))
    assert {launch.kernel.__name__ for launch in every_launch(dtype, capability)} == own.keys()
    assert [name for name, kind in own.items() if kind is Kind.OTHER] == []


def test_a_name_of_two_files_is_told_apart():
    kinds = defaultdict(set)
    for dtype, capability in CARDS:
        for launch in every_launch(dtype, capability):
            name = launch.kernel.__name__
            kinds[name].add(kind_by_file(file_of(launch), name))
    shared = {name for name, found in kinds.items() if len(found) > 1}
    told_apart = {rule.kernel for rule in NEIGHBOURS}
    assert shared <= told_apart <= kinds.keys()
    assert {rule.before for rule in NEIGHBOURS} <= kinds.keys()


def launch_of(file: str, name: str) -> SimpleNamespace:
    kernel = SimpleNamespace(__name__=name, fn=SimpleNamespace(__module__=f"cramfast.kernels.{file}"))
    return SimpleNamespace(kernel=kernel)


def test_what_cannot_be_known_is_other():
    launches = [launch_of("gelu", "_same"), launch_of("adamw", "_same"), launch_of("new_file", "_new")]
    assert own_kernels(launches) == {"_same": Kind.OTHER, "_new": Kind.OTHER}


def test_kernels_of_a_file_share_names_with_one_kind():
    launches = [launch_of("gelu", "_any_backward"), launch_of("gelu", "_any_backward"), launch_of("gelu", "_any")]
    assert own_kernels(launches) == {
        "_any_backward": Kind.ACTIVATION_BACKWARD,
        "_any": Kind.ACTIVATION_FORWARD,
    }


OWN = own_kernels(every_launch(torch.bfloat16, 90))


def test_kernels_of_a_stream():
    names = ["_turn_kernel", "forward_blocks", "nvjet_sm90", "backward_tile"]
    names += ["_join_kernel", "_sum_shares_kernel", "_norm_kernel", "_sum_shares_kernel"]
    expected = [Kind.ATTENTION_FORWARD, Kind.ATTENTION_FORWARD, Kind.MATMUL, Kind.ATTENTION_BACKWARD]
    expected += [Kind.EMBEDDING, Kind.EMBEDDING, Kind.NORM_FORWARD, Kind.NORM_BACKWARD]
    assert classify(names, OWN) == expected


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT", Kind.MATMUL),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>(...)", Kind.MATMUL),
        ("sm80_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", Kind.MATMUL),
        ("void cutlass::Kernel2<cutlass_80_tensorop_s16816gemm_bf16_128x64>(...)", Kind.MATMUL),
        ("aten::addmm", Kind.MATMUL),
        ("aten::bmm", Kind.MATMUL),
        ("void pytorch_flash::flash_fwd_kernel<...>", Kind.ATTENTION_FORWARD),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>", Kind.ATTENTION_BACKWARD),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80(...)", Kind.ATTENTION_FORWARD),
        ("fmha_cutlassB_bf16_aligned_64x64_k64_sm80(...)", Kind.ATTENTION_BACKWARD),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16", Kind.ATTENTION_BACKWARD),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", Kind.ATTENTION_BACKWARD),
        ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float>", Kind.NORM_FORWARD),
        ("void at::native::(anonymous namespace)::GammaBetaBackwardCUDAKernel", Kind.NORM_BACKWARD),
        ("aten::native_layer_norm_backward", Kind.NORM_BACKWARD),
        ("aten::gelu", Kind.ACTIVATION_FORWARD),
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::GeluBackwardCUDAKernel",
            Kind.ACTIVATION_BACKWARD,
        ),
        ("void at_cuda_detail::cub::DeviceRadixSortOnesweepKernel<...>", Kind.EMBEDDING),
        ("aten::embedding_dense_backward", Kind.EMBEDDING),
        ("aten::_log_softmax", Kind.LOSS),
        ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::NormTwoOps<", Kind.OPTIMIZER),
        ("Memcpy DtoD (Device -> Device)", Kind.COPY),
        ("Memset (Device)", Kind.COPY),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>", Kind.COPY),
        (
            "void at::native::indexFuncLargeIndex<c10::BFloat16, long, unsigned int, 2, 2, -2, true, ReduceAdd",
            Kind.COPY,
        ),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>", Kind.OTHER),
    ],
)
def test_kernels_of_libraries(name, kind):
    assert classify([name], OWN) == [kind]


TINY = ModelConfig(vocab_size=64, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=8)


@pytest.mark.parametrize("positions", ["rotary", "learned"])
@pytest.mark.parametrize("activations", ["keep", "layers"])
def test_the_order_of_a_step_tells_apart_what_files_share(monkeypatch, positions, activations):
    monkeypatch.setenv("CRAMFAST_KERNELS", "auto")
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ran, call = [], Launch.__call__

    def watched(launch, *arguments):
        ran.append(launch)
        call(launch, *arguments)

    monkeypatch.setattr(Launch, "__call__", watched)
    model = Bert(replace(TINY, positions=positions), activations=activations).to(device)
    special = SpecialIds(pad=0, cls=2, sep=3, mask=4, ordinary=(5, TINY.vocab_size))
    options = OptimizerOptions(lr=1e-3, weight_decay=0.01, clip=1.0)
    step = TrainStep(model, options, special, torch.float32, 0, graphs=False)
    batch = Batch(torch.arange(5, 21), torch.tensor([0, 8, 16], dtype=torch.int32), 8, 128, Cursor()).to(device)
    for microbatch in range(2):
        step.accumulate(batch, 0.25, microbatch, 0.5)
    step.update(1e-3)

    # `_sum_shares_kernel` is the norm's, and run by the embedding's gradient after `_join_kernel`.
    expected, shares = [], 0
    for before, launch in zip([None, *ran], ran, strict=False):
        file, name = file_of(launch), launch.kernel.__name__
        if name == "_sum_shares_kernel":
            embedding = file_of(before) == "embed_kernels"
            shares += embedding
            expected.append(Kind.EMBEDDING if embedding else Kind.NORM_BACKWARD)
        else:
            expected.append(kind_by_file(file, name))
    assert shares == 2
    assert {Kind.EMBEDDING, Kind.NORM_FORWARD, Kind.NORM_BACKWARD, Kind.MASKING} <= set(expected)
    names = [launch.kernel.__name__ for launch in ran]
    assert classify(names, own_kernels(every_launch(torch.float32, 90))) == expected


# The definition's work

# Four sequences of 8 tokens, 8 tokens predicted, in 16 bits.
MUON = ((3, 4, 10), (2, 8, 8))


def test_the_update_by_muon_is_counted_matrix_by_matrix():
    found = definition(PRESETS["cramfast-tiny"], replace(SIZES, matrices=MUON))[Kind.OPTIMIZER]
    elements = 3 * 40 + 2 * 64
    assert found.flops == 5 * (3 * (3 * 16 * 10 + 64) + 2 * (3 * 64 * 8 + 512))
    assert found.bytes == 4 * 1000 + 28 * (1000 - elements) + (14 + 4 + 10) * elements + 2 * 900


SIZES = StepSizes(tokens=32, predicted=8, attended=4 * 64, itemsize=2, parameters=1000, working=900)


def test_the_work_of_a_pre_norm_model():
    work = definition(TINY, SIZES)
    qkv, second_half, head = 3 * 16 * 16, 16 * 16 + 3 * 16 * 8, 16 * 64 + 16 * 16
    rows = 32 + 8
    assert work == {
        Kind.MATMUL: Work(flops=6 * (2 * 32 * qkv + rows * second_half + 8 * head)),
        Kind.ATTENTION_FORWARD: Work(flops=2 * 4 * 16 * 256, bytes=2 * 32 * 4 * 16 * 2),
        Kind.ATTENTION_BACKWARD: Work(flops=2 * 8 * 16 * 256, bytes=2 * 32 * 8 * 16 * 2),
        # One norm before the second layer's attention, one before each feed-forward network, the last one, the head's.
        Kind.NORM_FORWARD: Work(bytes=(4 * (32 + 32 + 8) + 4 * 8 + 2 * 8) * 16 * 2),
        Kind.NORM_BACKWARD: Work(bytes=(4 * (32 + 32 + 8) + 3 * 8 + 3 * 8) * 16 * 2),
        Kind.ACTIVATION_FORWARD: Work(bytes=3 * 8 * 2 * rows + 2 * 16 * 2 * 8),
        Kind.ACTIVATION_BACKWARD: Work(bytes=5 * 8 * 2 * rows + 3 * 16 * 2 * 8),
        Kind.EMBEDDING: Work(bytes=2 * (8 * 32 + 2 * 32 * 16 * 2) + 64 * 16 * 2),
        Kind.LOSS: Work(bytes=4 * 8 * 16 * 2),
        Kind.MASKING: Work(bytes=16 * 40),
        Kind.OPTIMIZER: Work(bytes=32 * 1000 + 2 * 900),
    }


def test_the_work_of_a_post_norm_model():
    work = definition(replace(TINY, norm="post", activation="gelu", head_transform=False), SIZES)
    qkv, second_half, head = 3 * 16 * 16, 16 * 16 + 2 * 16 * 8, 16 * 64
    assert work[Kind.MATMUL].flops == 6 * (2 * 32 * qkv + 40 * second_half + 8 * head)
    assert work[Kind.NORM_FORWARD].bytes == 4 * 2 * 40 * 16 * 2
    assert work[Kind.NORM_BACKWARD].bytes == 3 * 2 * 40 * 16 * 2
    assert work[Kind.ACTIVATION_FORWARD].bytes == 2 * 8 * 2 * 40
    assert work[Kind.ACTIVATION_BACKWARD].bytes == 3 * 8 * 2 * 40


def test_a_norm_before_the_first_attention_has_no_residual():
    with_norm, without = (definition(replace(TINY, first_norm=first), SIZES) for first in (True, False))
    more = {kind: with_norm[kind].bytes - without[kind].bytes for kind in with_norm}
    row = 32 * 16 * 2
    assert {kind: n for kind, n in more.items() if n} == {Kind.NORM_FORWARD: 2 * row, Kind.NORM_BACKWARD: 3 * row}


@pytest.mark.parametrize("preset", PRESETS)
def test_with_every_token_predicted_the_flops_are_those_of_mfu(preset):
    config, sizes = PRESETS[preset], replace(SIZES, predicted=SIZES.tokens)
    flops = sum(work.flops for work in definition(config, sizes).values())
    assert flops == sizes.tokens * config.flops_per_token(1.0, sizes.attended / sizes.tokens)


def test_the_slower_of_products_and_memory_limits():
    assert Work(flops=100, bytes=10).seconds(10.0, 10.0) == 10
    assert Work(flops=100, bytes=10).seconds(1000.0, 10.0) == 1


# Table and JSON


def made_up(**changes) -> Profile:
    kernels = [
        Kernel("nvjet_a", Kind.MATMUL, 0.004),
        Kernel("nvjet_b", Kind.MATMUL, 0.002),
        Kernel("nvjet_a", Kind.MATMUL, 0.004),
        Kernel("nvjet_b", Kind.MATMUL, 0.002),
        Kernel("rows_kernel", Kind.LOSS, 0.002),
        Kernel("rows_kernel", Kind.LOSS, 0.002),
        Kernel("add", Kind.OTHER, 0.0005),
        Kernel("add", Kind.OTHER, 0.0005),
    ]
    settings = {
        "preset": "cramfast-base",
        "microbatch_size": 4,
        "max_length": 8,
        "mask_rate": 0.25,
        "dtype": "bfloat16",
        "device": "cuda",
        "activations": "keep",
        "without_graphs": None,
    }
    profile = Profile(
        settings=settings,
        environment={"device": "A Card [x]"},
        limits=Limits(matmul_rate=1e12, copy_rate=1e11),
        sizes=SIZES,
        seconds=0.010,
        steps=2,
        flops=4e9,
        peak_mib=2048.0,
        work={Kind.MATMUL: Work(flops=3_000_000_000), Kind.LOSS: Work(bytes=100_000_000)},
        kernels=kernels,
    )
    return replace(profile, **changes)


def shown(profile: Profile) -> list[str]:
    console = Console(highlight=False, soft_wrap=True, width=100)
    with console.capture() as captured:
        show(profile, console)
    return captured.get().splitlines()


def test_the_table():
    lines = shown(made_up())
    assert lines[0] == (
        "cramfast-base, 4 sequences of 8 tokens, 25% predicted, in bfloat16 on A Card [x], activations: keep"
    )
    assert lines[1] == "limits: matrix products 1 TFLOP/s, copy 0.1 TB/s"
    assert lines[2].split() == ["class", "ms", "of", "step", "limit", "ms", "of", "limit", "kernels"]
    assert [line.split() for line in lines[3:-1]] == [
        ["matrix", "products", "6.000", "60.0%", "3.000", "50%", "2"],
        ["MLM", "loss", "2.000", "20.0%", "1.000", "50%", "1"],
        ["other", "0.500", "5.0%", "1"],
        ["idle", "1.500", "15.0%"],
    ]
    assert lines[-1] == "10.00 ms a step, 4.00 ms at its limits; 3,200 tokens/s, MFU 40.0%, peak memory 2.00 GiB"


def test_why_there_are_no_graphs_is_said():
    settings = made_up().settings | {"without_graphs": "operation not permitted"}
    assert shown(made_up(settings=settings))[1] == "without CUDA graphs: operation not permitted"


def test_kernels_that_take_longer_than_the_step_leave_no_idle_time():
    assert made_up(seconds=0.001).rows()[-1].seconds == 0


def test_the_json():
    written = json.loads(json.dumps(as_json(made_up())))
    assert written["settings"]["preset"] == "cramfast-base"
    assert written["limits"] == {"matmul_rate": 1e12, "copy_rate": 1e11}
    assert (written["seconds"], written["tokens_per_s"], written["peak_mib"]) == (0.010, 3200, 2048)
    assert written["mfu"] == pytest.approx(0.4)
    assert written["floor_seconds"] == pytest.approx(0.004)
    matmul, _, other, idle = written["classes"]
    assert matmul == {
        "class": "matrix products",
        "seconds": pytest.approx(0.006),
        "kernels": 2,
        "floor_seconds": pytest.approx(0.003),
        "flops": 3_000_000_000,
        "bytes": 0,
    }
    assert other == {"class": "other", "seconds": 0.0005, "kernels": 1}
    assert idle["seconds"] == pytest.approx(0.0015)
    assert written["kernels"][0] == {
        "name": "nvjet_a",
        "class": "matrix products",
        "seconds": pytest.approx(0.004),
        "count": 1,
    }


def test_memory_that_cannot_be_known_is_null():
    assert as_json(made_up(peak_mib=float("nan")))["peak_mib"] is None


# The command

SMALL = ("--device", "cpu", "--preset", "cramfast-tiny", "--microbatch-size", "2", "--max-length", "16", "--steps", "1")


@pytest.fixture
def quick_limits(monkeypatch):
    monkeypatch.setattr(profiling, "matmul_rate", lambda device, dtype: 1e12)
    monkeypatch.setattr(profiling, "copy_rate", lambda device: 1e11)


@pytest.mark.usefixtures("reference", "quick_limits")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_on_a_cpu(tmp_path, capsys, monkeypatch, dtype):
    if dtype == "bfloat16":  # whose products take a CPU without instructions for them half a minute
        monkeypatch.setattr(optimizer, "orthogonalise", lambda matrices, out: None)
    out = tmp_path / "profile.json"
    assert command.main([*SMALL, "--dtype", dtype, "--activations", "layers", "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert f"cramfast-tiny, 2 sequences of 16 tokens, 25% predicted, in {dtype} on" in printed.out
    assert "activations: layers" in printed.out
    found = json.loads(out.read_text())
    assert found["settings"]["without_graphs"] == "cpu device"
    assert found["environment"]["torch"] == torch.__version__
    sizes = found["sizes"]
    assert (sizes["tokens"], sizes["predicted"], sizes["attended"]) == (32, 8, 512)
    assert sizes["itemsize"] == (4 if dtype == "float32" else 2)
    assert (sizes["working"] > 0) == (dtype == "bfloat16")
    classes = {row["class"]: row for row in found["classes"]}
    for kind in Kind:
        if kind is not Kind.MASKING:  # which has no operator of its own outside a GPU
            assert kind.value in classes
    assert classes["matrix products"]["floor_seconds"] > 0
    assert sum(row["seconds"] for row in found["classes"]) == pytest.approx(found["seconds"], rel=0.01)
    assert list(tmp_path.iterdir()) == [out]


def test_nothing_but_the_table_is_printed():
    environment = os.environ | {"PYTHONPATH": PYTHONPATH, "TRITON_INTERPRET": "0"}
    words = [sys.executable, "-m", "cramfast.profile", *SMALL]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("cramfast-tiny, ")


def test_the_copy_of_a_cpu_has_a_rate():
    assert 1e8 < copy_rate(torch.device("cpu")) < 1e13


@pytest.mark.usefixtures("quick_limits")
@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("--steps", "0"), "--steps 0: expected at least 1"),
        (("--microbatch-size", "0"), "--microbatch-size 0: expected at least 1"),
        (("--max-length", "4000"), "--max-length 4000: cramfast-tiny takes 2 to 512"),
        (("--mask-rate", "2"), "--mask-rate 2.0: expected a share between 0 and 1"),
        (("--mask-rate", "0.001"), "--mask-rate 0.001: hides none of the 32 tokens of a microbatch"),
        (("--dtype", "float16"), "--dtype float16: training in float16 needs a GPU"),
        (("--activations", "some"), "--activations"),
        (("--preset", "gpt"), "--preset"),
        (("--out", "nowhere/profile.json"), "--out nowhere/profile.json: there is no folder nowhere"),
        (("--out", "."), "--out .: is a folder"),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, flags, complaint):
    monkeypatch.chdir(tmp_path)
    assert command.main([*SMALL, *flags]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    assert complaint in printed.err


@pytest.mark.usefixtures("quick_limits")
def test_kernels_that_cannot_run_are_one_line(monkeypatch, capsys):
    monkeypatch.setenv("CRAMFAST_KERNELS", "nonsense")
    assert command.main([*SMALL]) == 2
    assert "CRAMFAST_KERNELS=nonsense" in capsys.readouterr().err


@pytest.mark.usefixtures("quick_limits")
def test_too_little_memory_names_the_flag(monkeypatch, capsys):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(profiling, "_training", fail)
    assert command.main([*SMALL]) == 2
    assert capsys.readouterr().err == ("cramfast.profile: --microbatch-size 2: out of memory; choose a smaller one\n")


HELP = """
import sys
from cramfast.profile import main
try:
    main(["--help"])
except SystemExit as end:
    assert not end.code
heavy = {"torch", "numpy", "tokenizers", "datasets", "matplotlib", "pyarrow"} & set(sys.modules)
assert not heavy, heavy
"""


def test_help_lists_every_flag_and_loads_nothing_heavy():
    environment = os.environ | {"PYTHONPATH": PYTHONPATH}
    done = subprocess.run([sys.executable, "-c", HELP], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    for option in fields(command.ProfileOptions):
        assert f"--{option.name.replace('_', '-')} " in done.stdout


def test_the_defaults_are_those_of_pretraining():
    options = command.ProfileOptions()
    for same in (PretrainOptions(), BatchOptions()):
        for name in {field.name for field in fields(same)} & {field.name for field in fields(options)}:
            if name != "mask_rate":  # which a recipe decides there
                assert getattr(options, name) == getattr(same, name)
