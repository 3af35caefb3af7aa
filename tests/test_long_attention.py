"""Who computes attention that the Triton kernels do not serve, and that the handing over changes nothing.

On a CPU stand-ins take the place of flash-attn and of PyTorch's varlen_attn: they insist on what the real ones ask and
attend sequence by sequence. On a GPU the real ones run. The rule is that of the kernels: against the reference in fp64,
an error at most twice that of the reference in the same dtype, in relative L2, for the output and the gradient.

Shapes: T tokens, S places in one sequence, H heads, D head size.
"""

import builtins
import inspect
import itertools
import sys
import types
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import varlen

import cramfast.kernels.long_attention as file
from cramfast.kernels import choose_long, varlen_attention_reference
from cramfast.kernels.dispatch import Choice
from cramfast.kernels.long_attention import long_attention

NATIVE = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not NATIVE, reason="needs a CUDA device")
GPU = torch.device("cuda", 0)
HALF, BF16 = torch.float16, torch.bfloat16
LENGTHS = (0, 1, 17, 0, 64, 33, 0)


@pytest.fixture(autouse=True)
def auto(monkeypatch):
    """Chooses afresh, whatever the environment says, and forgets what stand-ins brought about."""
    monkeypatch.delenv("CRAMFAST_KERNELS", raising=False)
    file._remembered.cache_clear()
    yield
    file._remembered.cache_clear()


def boundaries(lengths, device="cpu"):
    return torch.tensor((0, *lengths), device=device).cumsum(0).int()


def randn(*shape, dtype=torch.float64, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(1000 * seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)


def rotary(positions, head_size, device="cpu"):
    angle = torch.arange(positions)[:, None] * 100.0 ** -(torch.arange(0, head_size, 2) / head_size)
    return angle.cos().to(device), angle.sin().to(device)


def results(attend, qkv, grad, *arguments, **options):
    """The output of attend(qkv, ...), then the gradient of qkv, given that of the output."""
    qkv = qkv.detach().requires_grad_()
    out = attend(qkv, *arguments, **options)
    return out.detach(), *torch.autograd.grad(out, qkv, grad.to(out.dtype))


def handed_over(*arguments, **options):
    return long_attention(*arguments, **options, fallback=varlen_attention_reference)


def assert_as_exact_as_the_reference(lengths, heads, head_size, dtype, device="cpu", turned=False, room=3, **options):
    """room: by how much max_seqlen is above the longest."""
    arguments = boundaries(lengths, device), max(lengths) + room
    if turned:
        options["cos"], options["sin"] = rotary(arguments[1], head_size, device)
    qkv = randn(sum(lengths), 3, heads, head_size, dtype=dtype, device=device)
    grad = randn(sum(lengths), heads, head_size, dtype=dtype, device=device, seed=1)
    ours = results(handed_over, qkv, grad, *arguments, **options)
    plain = results(varlen_attention_reference, qkv, grad, *arguments, **options)
    exact = results(varlen_attention_reference, qkv.double(), grad, *arguments, **options)
    for our, p, e in zip(ours, plain, exact, strict=True):
        assert (our.dtype, our.shape) == (p.dtype, p.shape)
        # Rounding a result once makes an error of about eps / 4: less is luck.
        allowed = 2 * max((p.double() - e).norm() / e.norm(), torch.finfo(dtype).eps / 4)
        assert (our.double() - e).norm() / e.norm() <= allowed


def attend_by_sequence(q, k, v, cu_seqlens, max_seqlen, scale, window_size, dropout_p=0.0):
    """q, k, v (T, H, D) → (T, H, D), after checks that FlashAttention-2 makes, or should."""
    for x in (q, k, v):
        assert x.dtype in (HALF, BF16)
        assert x.dim() == 3 and x.shape == q.shape and 0 not in x.shape
        assert x.stride(-1) == 1 and x.stride(0) % 8 == 0 and x.stride(1) % 8 == 0  # rows of whole 16 bytes
    assert cu_seqlens.dtype == torch.int32 and cu_seqlens.is_contiguous()
    ends = cu_seqlens.tolist()
    assert isinstance(max_seqlen, int) and max(b - a for a, b in itertools.pairwise(ends)) <= max_seqlen
    left, right = window_size
    assert type(left) is type(right) is int and max(left, right) < 2**31
    outputs = []
    for start, end in itertools.pairwise(ends):
        q_HSD, k_HSD, v_HSD = (x[start:end].transpose(0, 1) for x in (q, k, v))
        place = torch.arange(end - start)
        ahead = place[None, :] - place[:, None]
        near = ((left < 0) | (-ahead <= left)) & ((right < 0) | (ahead <= right))
        out_HSD = F.scaled_dot_product_attention(q_HSD, k_HSD, v_HSD, near, dropout_p, scale=scale)
        outputs.append(out_HSD.transpose(0, 1))
    return torch.cat(outputs)


@pytest.fixture
def stand_ins(monkeypatch):
    """Puts stand-ins in place and gives a function that names who is there; in a dict, what they were last given."""
    given = {}

    def flash_attn_varlen_qkvpacked_func(
        qkv,
        cu_seqlens,
        max_seqlen,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
    ):
        assert not (causal or softcap or alibi_slopes or return_attn_probs)
        given.update(by="flash-attn", dropout_p=dropout_p, window_size=window_size, deterministic=deterministic)
        return attend_by_sequence(*qkv.unbind(1), cu_seqlens, max_seqlen, softmax_scale, window_size, dropout_p)

    def varlen_attn(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
    ):
        assert cu_seq_q is cu_seq_k and max_q == max_k and return_aux is None
        given.update(by="varlen-attn", window_size=window_size)
        return attend_by_sequence(query, key, value, cu_seq_q, max_q, scale, window_size)

    def place(backend):
        module = types.ModuleType("flash_attn")
        module.flash_attn_varlen_qkvpacked_func = flash_attn_varlen_qkvpacked_func
        # None there means an import that fails.
        monkeypatch.setitem(sys.modules, "flash_attn", module if backend == "flash-attn" else None)
        monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
        monkeypatch.setattr(file, "_obstacle", lambda *_: None)
        return given

    return place


backends = pytest.mark.parametrize("backend", ["flash-attn", "varlen-attn"])


@backends
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", [HALF, BF16])
@pytest.mark.parametrize(
    ("options", "window_size"),
    [
        ({}, (-1, -1)),
        ({"softmax_scale": 0.3}, (-1, -1)),
        ({"window": 5}, (5, 5)),
        ({"window": 0}, (0, 0)),
        ({"window": 2**40}, (67, 67)),
    ],
)
def test_handing_over_changes_nothing(stand_ins, backend, turned, dtype, options, window_size):
    given = stand_ins(backend)
    assert_as_exact_as_the_reference(LENGTHS, 2, 16, dtype, turned=turned, **options)
    assert (given["by"], given["window_size"]) == (backend, window_size)


@backends
def test_tables_in_the_dtype_of_qkv(stand_ins, backend):
    stand_ins(backend)
    qkv, arguments = randn(sum(LENGTHS), 3, 2, 16, dtype=BF16), (boundaries(LENGTHS), 64)
    cos, sin = (table.bfloat16() for table in rotary(64, 16))
    out = handed_over(qkv, *arguments, cos=cos, sin=sin)
    # The tables as they are rounded, computed with in fp32.
    assert torch.equal(out, handed_over(qkv, *arguments, cos=cos.float(), sin=sin.float()))


@backends
def test_tensors_with_gaps_are_handed_over_without(stand_ins, backend):
    given = stand_ins(backend)
    qkv = randn(sum(LENGTHS), 3, 2, 32, dtype=BF16)
    cu_seqlens = boundaries(LENGTHS)
    spread = torch.stack((cu_seqlens, cu_seqlens), dim=1)[:, 0]
    out = handed_over(qkv[..., ::2], spread, 64)
    assert given["by"] == backend
    assert torch.equal(out, handed_over(qkv[..., ::2].contiguous(), cu_seqlens, 64))


def test_dropout_goes_to_flash_attn(stand_ins):
    given = stand_ins("flash-attn")
    qkv, arguments = randn(10, 3, 2, 16, dtype=BF16), (boundaries((4, 6)), 6)
    handed_over(qkv, *arguments, dropout_p=0.25)
    assert (given["by"], given["dropout_p"]) == ("flash-attn", 0.25)
    handed_over(qkv, *arguments)
    assert given["dropout_p"] == 0.0


def test_dropout_that_varlen_attn_lacks_goes_to_the_reference(stand_ins):
    given = stand_ins("varlen-attn")
    fallen_back = []
    qkv, arguments = randn(10, 3, 2, 16, dtype=BF16), (boundaries((4, 6)), 6)
    cos, sin = rotary(6, 16)
    options = {"cos": cos, "sin": sin, "softmax_scale": 0.3, "window": 2, "dropout_p": 0.25}

    def fallback(*given_arguments, **given_options):
        fallen_back.append((given_arguments, given_options))
        return "theirs"

    assert long_attention(qkv, *arguments, **options, fallback=fallback) == "theirs"
    ((given_arguments, given_options),) = fallen_back
    assert all(a is b for a, b in zip(given_arguments, (qkv, *arguments), strict=True))
    assert given_options == options and not given


@pytest.mark.parametrize("deterministic", [False, True])
def test_flash_attn_is_deterministic_where_torch_is(stand_ins, deterministic):
    given = stand_ins("flash-attn")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(deterministic)
    try:
        handed_over(randn(10, 3, 2, 16, dtype=BF16), boundaries((4, 6)), 6)
    finally:
        torch.use_deterministic_algorithms(before)
    assert given["deterministic"] is deterministic


@backends
@pytest.mark.parametrize("lengths", [(), (0,), (0, 0, 0)])
def test_no_tokens_are_not_handed_over(stand_ins, backend, lengths):
    given = stand_ins(backend)
    qkv = randn(0, 3, 2, 16, dtype=BF16)
    out, grad = results(handed_over, qkv, qkv[:, 0], boundaries(lengths), 0)
    assert out.shape == (0, 2, 16) and grad.shape == qkv.shape
    assert not given


@backends
def test_it_compiles_whole_for_any_number_of_tokens(stand_ins, backend, monkeypatch):
    stand_ins(backend)
    # A plain sum is enough: what is compiled here is the way there.
    monkeypatch.setattr(varlen, "varlen_attn", lambda q, k, v, *_, scale, window_size: q + k + v)
    if backend == "flash-attn":
        monkeypatch.setattr(
            sys.modules["flash_attn"], "flash_attn_varlen_qkvpacked_func", lambda qkv, *_, **__: 3 * qkv.sum(1)
        )
    torch.compiler.reset()
    counted = CompileCounterWithBackend("eager")
    compiled = torch.compile(handed_over, fullgraph=True, dynamic=True, backend=counted)
    cos, sin = rotary(64, 16)
    for lengths in ((4, 6), (30, 1), (17, 40)):
        arguments = randn(sum(lengths), 3, 2, 16, dtype=BF16), boundaries(lengths), max(lengths)
        options = {"cos": cos, "sin": sin, "window": 5}
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*lru_cache")
            out = compiled(*arguments, **options)
        assert torch.equal(out, handed_over(*arguments, **options))
    assert counted.frame_count == 1
    torch.compiler.reset()


def test_torch_has_the_function_that_is_called():
    inspect.signature(varlen.varlen_attn).bind(1, 2, 3, 4, 4, 5, 5, scale=None, window_size=(1, 1))


@pytest.fixture
def card(monkeypatch):
    """Gives a function that makes a machine with such a card, flash-attn (None: not installed) and build of torch."""

    def make(capability=(9, 0), flash_attn=None, built=True, cuda="13.0"):
        capabilities = []
        module = types.ModuleType("flash_attn")
        module.__dict__.update(flash_attn or {})
        monkeypatch.setitem(sys.modules, "flash_attn", None if flash_attn is None else module)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: built)
        monkeypatch.setattr(
            torch.cuda, "get_device_capability", lambda device: capabilities.append(device) or capability
        )
        return capabilities

    return make


INSTALLED = {"flash_attn_varlen_qkvpacked_func": print}
ABSENT = "flash-attn is not installed"
EQUAL = "sequences of one length"
# The machine, the tensor's dtype, its head size and dropout, who attends and why.
CHOICES = [
    ({"flash_attn": INSTALLED}, BF16, 64, 0.0, "flash-attn", "cuda device"),
    ({"flash_attn": INSTALLED}, HALF, 36, 0.1, "flash-attn", "cuda device"),
    ({"flash_attn": INSTALLED, "capability": (8, 6)}, BF16, 192, 0.0, "flash-attn", "cuda device"),
    ({"flash_attn": INSTALLED, "built": False}, BF16, 64, 0.0, "flash-attn", "cuda device"),
    ({}, BF16, 64, 0.0, "varlen-attn", ABSENT),
    ({"capability": (8, 0)}, HALF, 256, 0.0, "varlen-attn", ABSENT),
    ({"capability": (12, 0)}, HALF, 192, 0.0, "varlen-attn", ABSENT),
    # Another project under this name, or a version without the function.
    ({"flash_attn": {}}, BF16, 64, 0.0, "varlen-attn", "flash-attn does not import"),
    ({}, BF16, 64, 0.1, "sdpa", f"{ABSENT}, varlen-attn has no dropout"),
    ({}, BF16, 36, 0.0, "sdpa", f"{ABSENT}, varlen-attn takes head sizes that are a multiple of 8"),
    ({"built": False}, BF16, 64, 0.0, "sdpa", f"{ABSENT}, this torch is built without FlashAttention"),
    ({"flash_attn": INSTALLED}, torch.float32, 64, 0.0, "sdpa", "no FlashAttention for float32"),
    ({"flash_attn": INSTALLED}, torch.float64, 64, 0.0, "sdpa", "no FlashAttention for float64"),
    ({"flash_attn": INSTALLED}, BF16, 264, 0.0, "sdpa", "no FlashAttention for head size 264 on this card"),
    ({"capability": (8, 9)}, BF16, 200, 0.0, "sdpa", "no FlashAttention for head size 200 on this card"),
    ({"capability": (7, 5), "flash_attn": INSTALLED}, HALF, 64, 0.0, "sdpa", "compute capability below 8.0"),
    ({"cuda": None, "flash_attn": INSTALLED}, BF16, 64, 0.0, "sdpa", "this torch is built without CUDA"),
]


@pytest.mark.parametrize("case", CHOICES)
def test_who_attends_and_why(card, case):
    machine, dtype, head_size, dropout_p, backend, reason = case
    card(**machine)
    choice = choose_long(GPU, dtype, head_size, dropout_p)
    assert (choice.backend, choice.reason) == (backend, reason)


# The same for batches whose sequences are all of one length.
CHOICES_OF_DENSE = [
    ({"flash_attn": INSTALLED}, BF16, 64, 0.0, "sdpa", EQUAL),
    ({}, HALF, 128, 0.1, "sdpa", EQUAL),
    ({"capability": (10, 0)}, BF16, 64, 0.0, "sdpa", EQUAL),
    ({"capability": (10, 3)}, BF16, 64, 0.0, "sdpa", EQUAL),
    ({"capability": (8, 0)}, BF16, 64, 0.0, "varlen-attn", ABSENT),
    ({"capability": (12, 0), "flash_attn": INSTALLED}, BF16, 64, 0.0, "flash-attn", "cuda device"),
    ({}, torch.float32, 64, 0.0, "sdpa", "no FlashAttention for float32"),
]


@pytest.mark.parametrize("case", CHOICES_OF_DENSE)
def test_who_attends_where_all_sequences_are_of_one_length(card, case):
    machine, dtype, head_size, dropout_p, backend, reason = case
    card(**machine)
    choice = choose_long(GPU, dtype, head_size, dropout_p, dense=True)
    assert (choice.backend, choice.reason) == (backend, reason)


@pytest.mark.parametrize(
    ("lengths", "max_seqlen", "options", "dense"),
    [
        ((6, 6, 6), 6, {}, True),
        ((6,), 6, {"dropout_p": 0.1}, True),
        ((6, 6), 7, {}, False),
        ((6, 5), 6, {}, False),
        ((6, 0, 6), 6, {}, False),
        ((6, 6), 6, {"window": 5}, False),
    ],
)
def test_a_batch_is_dense_if_all_sequences_are_of_one_length(monkeypatch, lengths, max_seqlen, options, dense):
    asked, choose = [], file.choose_long
    monkeypatch.setattr(file, "choose_long", lambda *arguments: asked.append(arguments[-1]) or choose(*arguments))
    handed_over(randn(sum(lengths), 3, 2, 16, dtype=BF16), boundaries(lengths), max_seqlen, **options)
    assert asked == [dense]


def test_a_cpu_tensor_takes_the_reference(card):
    card(flash_attn=INSTALLED)
    choice = choose_long(torch.device("cpu"), BF16, 64)
    assert (choice.backend, choice.reason) == ("sdpa", "cpu device")


def test_a_flash_attn_that_breaks_on_import_is_passed_over(card, monkeypatch):
    card(flash_attn={})
    load = builtins.__import__

    def broken(name, *arguments):
        if name == "flash_attn":
            raise OSError("undefined symbol")
        return load(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", broken)
    choice = choose_long(GPU, BF16, 64)
    assert (choice.backend, choice.reason) == ("varlen-attn", "flash-attn does not import")


def test_a_choice_is_made_once(card):
    capabilities = card()
    choices = {choose_long(GPU, BF16, 64, dropout_p) for _ in range(5) for dropout_p in (0.1, 0.2)}
    assert len(choices) == len(capabilities) == 1


def test_the_reference_can_be_forced(card, monkeypatch):
    card(flash_attn=INSTALLED)
    assert choose_long(GPU, BF16, 64).backend == "flash-attn"
    monkeypatch.setenv("CRAMFAST_KERNELS", "reference")
    choice = choose_long(GPU, BF16, 64)
    assert (choice.backend, choice.reason) == ("sdpa", "CRAMFAST_KERNELS=reference")


@pytest.mark.parametrize(
    ("mode", "error", "message"),
    [
        (
            "triton",
            RuntimeError,
            "CRAMFAST_KERNELS=triton, but varlen_attention cannot run as Triton: it takes",
        ),
        ("cuda", ValueError, "CRAMFAST_KERNELS=cuda: expected one of auto, triton, reference"),
    ],
)
def test_a_forced_kernel_that_there_is_not(monkeypatch, mode, error, message):
    monkeypatch.setenv("CRAMFAST_KERNELS", mode)
    with pytest.raises(error, match=message):
        handed_over(randn(10, 3, 2, 16, dtype=BF16), boundaries((4, 6)), 6)


def test_transforms_take_the_reference(stand_ins):
    given = stand_ins("flash-attn")
    qkv, arguments = randn(10, 3, 2, 16, dtype=BF16), (boundaries((4, 6)), 6)
    grad = torch.func.grad(lambda qkv: handed_over(qkv, *arguments).float().sum())(qkv)
    assert not given
    _, expected = results(varlen_attention_reference, qkv, torch.ones(10, 2, 16), *arguments)
    assert torch.equal(grad, expected)


@pytest.mark.parametrize("lengths", [(6, 6, 6), (6, 2, 5)])
def test_in_front_of_sdpa_rotary_embedding_is_one_kernel(launched, monkeypatch, lengths):
    if not NATIVE:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    device = GPU if NATIVE else "cpu"
    monkeypatch.setattr(file, "choose_long", lambda *_: Choice("sdpa", "for the test"))
    qkv, arguments = randn(sum(lengths), 3, 2, 16, dtype=HALF, device=device), (boundaries(lengths, device), 6)
    tables = dict(zip(("cos", "sin"), rotary(6, 16, device), strict=True))
    out = handed_over(qkv, *arguments, **tables)
    assert [name for name, _ in launched] == ["_turn_kernel"]
    torch.testing.assert_close(out, varlen_attention_reference(qkv, *arguments, **tables), rtol=0, atol=2e-3)


@needs_gpu
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, HALF, BF16])
@pytest.mark.parametrize(
    ("head_size", "options"),
    [
        (64, {}),
        (64, {"window": 100}),
        (64, {"window": 0}),
        (128, {"softmax_scale": 0.3}),
        (40, {}),
        (36, {}),
        (256, {}),
    ],
)
@pytest.mark.parametrize("lengths", [(0, 700, 1, 513, 0, 1024, 0), (3, 600)])
def test_long_sequences_on_a_gpu(lengths, head_size, options, dtype, turned):
    if dtype == BF16 and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("no bfloat16")
    assert_as_exact_as_the_reference(lengths, 2, head_size, dtype, GPU, turned, **options)


@needs_gpu
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", [HALF, BF16])
@pytest.mark.parametrize(
    ("lengths", "head_size", "options"),
    [
        ((640, 640, 640), 64, {}),
        ((1024, 1024), 128, {"softmax_scale": 0.3}),
        ((2000,), 80, {}),
        ((700, 700), 36, {}),
        ((600, 600), 256, {}),
        ((600, 600), 64, {"window": 100}),
    ],
)
def test_long_sequences_of_one_length_on_a_gpu(lengths, head_size, options, dtype, turned):
    if dtype == BF16 and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("no bfloat16")
    assert_as_exact_as_the_reference(lengths, 2, head_size, dtype, GPU, turned, room=0, **options)


@needs_gpu
def test_sequences_of_one_length_have_no_mask_on_a_gpu(monkeypatch):
    given, attend = [], F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *a, **o: given.append(o["attn_mask"]) or attend(*a, **o)
    )
    if choose_long(GPU, HALF, 64, dense=True).reason != EQUAL:
        pytest.skip("not on this card")
    qkv = randn(1400, 3, 2, 64, dtype=HALF, device=GPU)
    results(handed_over, qkv, qkv[:, 0], boundaries((700, 700), GPU), 700)
    assert given == [None]


@needs_gpu
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_a_gpu_attends_without_waiting_and_without_padding(dropout_p):
    choice = choose_long(GPU, HALF, 64, dropout_p)
    if choice.backend == "sdpa":
        pytest.skip(choice.reason)

    def fallback(*_, **__):
        raise AssertionError("the fallback ran")

    lengths = (0, 700, 1, 513)
    qkv = randn(sum(lengths), 3, 2, 64, dtype=HALF, device=GPU)
    cos, sin = rotary(700, 64, GPU)
    options = {"cos": cos, "sin": sin, "dropout_p": dropout_p, "fallback": fallback}
    arguments = boundaries(lengths, GPU), 700
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, grad = results(long_attention, qkv, qkv[:, 0], *arguments, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert out.isfinite().all() and grad.isfinite().all()


@needs_gpu
def test_a_gradient_without_memory_of_its_own_on_a_gpu():
    arguments = boundaries((700, 513), GPU), 700
    qkv = randn(1213, 3, 2, 64, dtype=HALF, device=GPU)
    one = torch.ones((), dtype=HALF, device=GPU)
    spread = results(handed_over, qkv, one.expand(1213, 2, 64), *arguments)
    whole = results(handed_over, qkv, one.expand(1213, 2, 64).contiguous(), *arguments)
    # dq may be added up in another order each time.
    torch.testing.assert_close(spread, whole)
