"""A GPU computes what a CPU does, and which kernels it takes; elsewhere these skip.

It imports nothing that a plain image with JAX, flax and optax lacks. PROMPTKD_REHEARSE_GPU=1 runs
on a CPU all but cuDNN. Errors are norms of differences over norms, printed beside what is allowed.
"""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import promptkd_jax as pkd
from promptkd_jax.distill.losses.chunked_loss import linear_loss
from promptkd_jax.distill.losses.transport import Transport, token_kernel
from promptkd_jax.infra import sharding
from promptkd_jax.models.config import Experts, LayerKind, Rope
from promptkd_jax.models.decoder import Decoder
from promptkd_jax.models.families.registry import from_hugging_face
from promptkd_jax.models.language_model import LazyLogits
from promptkd_jax.models.layers import attention

ON_GPU = jax.default_backend() == "gpu"
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU (JAX_PLATFORMS=cuda,cpu)")
pytestmark = pytest.mark.skipif(
    not ON_GPU and "PROMPTKD_REHEARSE_GPU" not in os.environ,
    reason="needs a GPU (JAX_PLATFORMS=cuda,cpu) or PROMPTKD_REHEARSE_GPU=1",
)
VOCABULARY, EOS = 61, 5
# What is allowed: of float32 with all its digits, and of bfloat16, against float32.
ALLOWED = {"float32": 1e-4, "bfloat16": 5e-2}


def decoder(depth=2, width=64, dtype="float32", vocab_size=VOCABULARY, **changes) -> Decoder:
    """A Llama with grouped heads."""
    hf_config = {
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 2 * width,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
    }
    return Decoder(from_hugging_face(hf_config).replace(dtype=dtype, **changes))


def random_params(model: Decoder, seed: int):
    """Not too uniform; made on the host, the same for every device."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        return rng.normal(path[-1].key == "scale", 0.1, leaf.shape).astype(np.float32)

    return jax.tree.map_with_path(draw, shapes)


def on_cpu(function, *arguments):
    """In all digits, on the host."""
    arguments = jax.device_put(arguments, jax.devices("cpu")[0])
    with jax.default_matmul_precision("highest"):
        return jax.jit(function)(*arguments)


def on_gpu(function, *arguments):
    """On the device that is tested; float32 in all digits, not in those of TF32."""
    arguments = jax.device_put(arguments, jax.devices()[0])
    with jax.default_matmul_precision("highest"):
        return jax.jit(function)(*arguments)


def assert_close(found, right, allowed: float, what: str) -> None:
    """Leaf by leaf of two trees."""
    for (path, x), y in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(right), strict=True):
        x, y = (np.asarray(one, np.float64) for one in (x, y))
        error = np.linalg.norm(x - y) / np.linalg.norm(y)
        print(f"{what}{jax.tree_util.keystr(path)}: {error:.1e}, allowed {allowed:.0e}")
        assert error < allowed, (what, path)


# Attention.


@pytest.mark.parametrize("chosen", [pytest.param("cudnn", marks=needs_gpu), "xla"])
@pytest.mark.parametrize(
    ("columns", "heads", "num_kv_heads", "head_dim", "window", "packed"),
    [
        (519, 4, 2, 64, None, False),
        (519, 4, 2, 64, None, True),
        (128, 3, 3, 128, None, False),
        (47, 4, 1, 64, 9, False),
        (47, 4, 1, 64, 9, True),
    ],
)
def test_attention_in_bfloat16_is_that_of_float32(
    monkeypatch, chosen, columns, heads, num_kv_heads, head_dim, window, packed
):
    """Of an odd number of columns too, as a soft prompt makes it, and of packed rows."""
    rng = np.random.default_rng(columns)
    shapes = [
        (2, columns, number, head_dim) for number in (heads, num_kv_heads, num_kv_heads, heads)
    ]
    rounded = [jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes]

    def attended(query, key, value, cotangent):
        """And the gradients of all three."""
        ids = jnp.broadcast_to(jnp.arange(columns) // 31, (2, columns)) if packed else None
        attend = functools.partial(attention.attend, sliding_window=window, segment_ids=ids)
        found, pull = jax.vjp(attend, query, key, value)
        return found, *pull(cotangent)

    monkeypatch.setattr(attention, "implementation", lambda **_: "xla")
    right = on_cpu(lambda *x: attended(*x), *(x.astype(jnp.float32) for x in rounded))
    monkeypatch.setattr(attention, "implementation", lambda **_: chosen)
    compiled = jax.jit(attended).lower(*rounded).compile()
    kernel = f"__cudnn$fmha{'ScaleBias' if packed else ''}SoftmaxBackward"
    assert (kernel in compiled.as_text()) == (chosen == "cudnn")
    # On a CPU jax 0.11 adds the parts of a long row up coarsely: 0.02 where 0.10 has 0.003.
    assert_close(compiled(*rounded), right, 1e-2 if ON_GPU else 3e-2, chosen)


def loss_and_gradient(model, tokens, prefix, params):
    """Both, and whether it was cuDNN that attended."""

    def loss(params, prefix):
        hidden = model.apply({"params": params}, tokens, prefix=prefix)
        return jnp.mean(jnp.square(hidden.astype(jnp.float32)[:, :, :7]))

    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(params, prefix).compile()
    return compiled(params, prefix), "__cudnn$fmhaSoftmaxBackward" in compiled.as_text()


WINDOW = LayerKind(Rope(), sliding_window=9)
TWO_KINDS = {"kinds": (WINDOW, LayerKind(Rope())), "pattern": (0, 1)}


@pytest.mark.parametrize(
    "changes",
    [{"kinds": (WINDOW,)}, {"remat": "full"}, TWO_KINDS],
    ids=["window", "remat", "two kinds"],
)
def test_a_decoder_in_bfloat16_takes_cudnn_and_agrees_with_xla_on_a_mesh(monkeypatch, changes):
    """Of all GPUs here; with two or more, heads are dealt out too."""
    tensor = 2 if jax.device_count() % 2 == 0 else 1
    model = decoder(width=256, dtype="bfloat16", **changes)
    rng = np.random.default_rng(0)
    params = random_params(model, 0)
    with jax.set_mesh(sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": tensor})):
        tokens = sharding.place_rows(rng.integers(0, VOCABULARY, (2 * jax.device_count(), 40)))
        prefix = jnp.asarray(rng.normal(size=(7, 256)), jnp.float32)
        fast, is_cudnn = loss_and_gradient(model, tokens, prefix, params)
        assert is_cudnn == ON_GPU
        monkeypatch.setattr(attention, "implementation", lambda **_: "xla")
        slow, is_cudnn = loss_and_gradient(model, tokens, prefix, params)
    assert not is_cudnn
    assert_close(fast, slow, ALLOWED["bfloat16"], "decoder")


def test_full_precision_is_for_xla():
    lowered = jax.jit(decoder().init).lower(jax.random.key(0), jnp.zeros((2, 8), jnp.int32))
    assert "__cudnn" not in lowered.as_text()


UNUSUAL = {
    "caps and sinks": {"attention_soft_cap": 2.0, "attention_sinks": True},
    "experts": {"experts": Experts(6, 2, norm_topk_prob=True), "mlp_width": 32},
}


@pytest.mark.parametrize("changes", UNUSUAL.values(), ids=UNUSUAL)
def test_what_no_kernel_computes_is_that_of_the_cpu(changes):
    model = decoder(**changes)
    params, prefix = random_params(model, 4), np.full((3, 64), 0.1, np.float32)
    tokens = np.random.default_rng(4).integers(0, VOCABULARY, (4, 33))

    def loss(params, prefix):
        return jnp.mean(jnp.square(model.apply({"params": params}, tokens, prefix=prefix)[..., :7]))

    gradient = jax.value_and_grad(loss, argnums=(0, 1))
    found, right = (run(gradient, params, prefix) for run in (on_gpu, on_cpu))
    assert_close(found, right, ALLOWED["float32"], "gradient")


# The chunked loss.


@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("dtype", ALLOWED)
def test_the_chunked_loss_is_the_dense_one_of_the_cpu(dtype, chunk):
    rng = np.random.default_rng(1)
    rows, positions, width, words = 3, 24, 64, 50257
    hidden, target = (rng.normal(size=(rows, positions, width)) for _ in range(2))
    heads = rng.normal(0, 0.2, (2, words, width))
    given = [jnp.asarray(x, dtype) for x in (hidden, heads[0], target, heads[1])]
    mask = (rng.random((rows, positions)) < 0.7).astype(np.float32)
    terms = [pkd.divergence("reverse_kl"), pkd.divergence("skew_forward_kl")]

    def chunked(hidden, head, *teacher):
        learner, target = LazyLogits(hidden, head), LazyLogits(*teacher)
        return linear_loss(terms, learner, [target, target], mask, chunk=chunk)[0] / mask.sum()

    def dense(hidden, head, target, teacher_head):
        logits, right = hidden @ head.T, target @ teacher_head.T
        return sum((term(right, logits) * mask).sum() for term in terms) / mask.sum()

    found = on_gpu(jax.value_and_grad(chunked, argnums=(0, 1)), *given)
    exact = [x.astype(jnp.float32) for x in given]
    right = on_cpu(jax.value_and_grad(dense, argnums=(0, 1)), *exact)
    assert_close(found[0], right[0], 1e-3, "loss")
    assert_close(found[1], right[1], ALLOWED[dtype], "gradient")


def test_the_kernel_of_near_tokens_has_all_digits():
    """Whatever the default precision of products: at epsilon 0.001 an error of 1e-3 is a factor of
    e. In pairs of tokens at cosines of 0.98 and more, and nothing else near."""
    rng, settings = np.random.default_rng(2), Transport(neighbours=1)
    x = np.repeat(rng.normal(size=(50, 64)), 2, axis=0) + rng.normal(0, 0.07, (100, 64))
    unit = np.float32(x).astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    right = (np.sum(unit[::2] * unit[1::2], axis=1) - 1) / settings.epsilon
    (group,) = token_kernel(jnp.asarray(x, jnp.float32), settings).groups
    np.testing.assert_array_equal(group.columns[:, 0], np.arange(100) ^ 1)
    found = np.exp(np.asarray(group.log_entries[:, 0], np.float64))
    assert_close(found, np.exp(np.repeat(right, 2)), 1e-2, "kernel")


# The sampler.

REQUESTS = np.random.default_rng(3).integers(6, VOCABULARY, (8, 9), dtype=np.int32)
LENGTHS = np.array([3, 9, 1, 5, 9, 2, 7, 4], np.int32)


def writes(model, sampling, requests=REQUESTS, lengths=LENGTHS, new=20, **more):
    """A function of parameters alone."""

    def written(params):
        keys = pkd.row_keys(jax.random.key(11), jnp.arange(len(requests)))
        settings = dict(max_new_tokens=new, sampling=sampling, vocab_size=VOCABULARY, **more)
        rows = jnp.asarray(requests), jnp.asarray(lengths), keys
        return pkd.sample(model, params, *rows, **settings)

    return written


def test_greedy_tokens_are_those_of_the_cpu_with_and_without_slots():
    model = decoder()
    params = random_params(model, 2)
    greedy = pkd.Sampling(temperature=0.0, eos_ids=(EOS,))
    right = on_cpu(writes(model, greedy), params)
    for slots in (0, 4):
        found = on_gpu(writes(model, greedy, slots=slots), params)
        for ours, theirs in zip(found, right):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("dtype", ALLOWED)
def test_tokens_are_drawn_from_the_distribution_of_the_cpu(dtype):
    """The first one of many rows, within a nucleus of 0.9."""
    model, rows = decoder(dtype=dtype), 8192
    params = random_params(model, 2)
    requests = np.repeat(REQUESTS[:1], rows, axis=0)
    sampling = pkd.Sampling(top_p=0.9)
    found = on_gpu(writes(model, sampling, requests, np.full(rows, 9), new=1), params)
    frequencies = np.bincount(np.asarray(found.tokens)[:, 9], minlength=VOCABULARY) / rows

    def logits(params):
        hidden = decoder().apply({"params": params}, REQUESTS[:1])
        return LazyLogits(hidden, pkd.head(params)).logits()[0, -1, :VOCABULARY]

    shares = np.asarray(jax.nn.softmax(on_cpu(logits, params)))
    order = np.argsort(-shares)
    kept = order[: np.searchsorted(np.cumsum(shares[order]), 0.9) + 1]
    right = np.zeros(VOCABULARY)
    right[kept] = shares[kept] / shares[kept].sum()
    distance = np.abs(frequencies - right).sum() / 2
    # Of 8,192 draws from 61 tokens chance alone makes at most 0.4 * sqrt(61 / 8192) on average.
    print(f"total variation: {distance:.3f}, allowed 0.06")
    assert distance < 0.06


# A step of PromptKD.

TEACHER, STUDENT = dict(depth=3, width=96, vocab_size=VOCABULARY + 3), dict(depth=2, width=64)
SGD = pkd.Optimizers(optax.sgd(1.0), optax.sgd(1.0))  # an update is the gradient


def step(dtype: str, micro_batches: int = 1, targets: str = "gold"):
    """The train step of PromptKD: of a state and a batch."""
    method = pkd.Method(
        targets=targets,
        student_terms=(("reverse_kl", 1.0),),
        total_steps=4,
        response_capacity=11,
        prompt_capacity=9,
        vocab_size=VOCABULARY,
        teacher_view="prompted",
        sampling=pkd.Sampling(eos_ids=(EOS,)),
        execution=pkd.Execution(gradient_accumulation_steps=micro_batches),
    )
    student, teacher = decoder(dtype=dtype, **STUDENT), decoder(dtype=dtype, **TEACHER)
    models = pkd.Models(student, teacher)
    return functools.partial(pkd.train_step, method=method, models=models, optimizers=SGD)


def given():
    """State, teacher and batch: eight rows with answers of 1 to 11 tokens."""
    rng = np.random.default_rng(5)
    tokens = rng.integers(6, VOCABULARY, (8, 20), dtype=np.int32)
    batch = pkd.Batch(tokens, LENGTHS, LENGTHS + np.array([11, 2, 1, 11, 7, 4, 3, 11], np.int32))
    prompt = rng.normal(0, 0.3, (7, TEACHER["width"])).astype(np.float32)
    params = {"student": random_params(decoder(**STUDENT), 6), "soft_prompt": prompt}
    state = pkd.init_state(params, SGD, jax.random.key(4))
    return state, random_params(decoder(**TEACHER), 7), batch


@functools.cache
def step_of_the_cpu():
    """In float32 and one micro-batch."""
    return on_cpu(step("float32"), *given())


@pytest.mark.parametrize(("dtype", "micro_batches"), [("float32", 1), ("bfloat16", 2)])
def test_a_step_of_promptkd_is_that_of_the_cpu(dtype, micro_batches):
    before = given()[0].params
    state, metrics = on_gpu(step(dtype, micro_batches=micro_batches), *given())
    right_state, right_metrics = step_of_the_cpu()
    assert int(metrics.counts.sum()) == int(right_metrics.counts.sum()) == 50

    def gradient(after):
        return jax.tree.map(lambda x, y: np.asarray(x) - np.asarray(y), before, after.params)

    found, right = gradient(state), gradient(right_state)
    assert_close(found, right, ALLOWED[dtype], "gradient")
    sums, right_sums = ({k: v.sum() for k, v in m.sums.items()} for m in (metrics, right_metrics))
    del sums["agreement"], right_sums["agreement"]  # counts tokens, of which rounding turns some
    assert_close(sums, right_sums, ALLOWED[dtype], "metrics")


def test_a_step_on_its_own_rows_counts_what_it_wrote():
    """Rollout and both updates in one program, in bfloat16, with the state donated."""
    state, teacher, batch = jax.device_put(given(), jax.devices()[0])
    before = jax.tree.map(np.asarray, state.params)
    take = jax.jit(step("bfloat16", targets="student", micro_batches=2), donate_argnums=0)
    for _ in range(2):
        state, metrics = take(state, teacher, batch)
    assert 8 <= int(metrics.counts.sum()) <= 8 * 11
    assert int(state.step) == 2 and int(state.skipped) == 0
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(state.params)):
        assert np.isfinite(new).all() and not np.array_equal(old, new)
