"""Tests our models against random tiny Hugging Face ones, of other sizes than the golden values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from mm_jax.data.batch import Batch
from mm_jax.generation import sampler
from mm_jax.models.decoder import Decoder
from mm_jax.models.decoder_config import DecoderConfig
from mm_jax.models.mamba import Mamba, MambaConfig
from mm_jax.models.siglip import Siglip, SiglipConfig
from mm_jax.ops.log_probs import token_log_probs
from mm_jax.weights import keymap
from mm_jax.weights.load import load_state
from mm_jax.weights.save import to_checkpoint
from mm_jax.weights.tensors import WeightsError, from_arrays
from tests.support.models import Shell


def with_weights(create, torch_model, table, rename=lambda k: k):
    """Returns our module with the weights of a torch model, and the torch state by key."""
    tied = torch_model.config.to_dict().get("tie_word_embeddings", False)
    tensors = {
        rename(k): v.detach().numpy()
        for k, v in torch_model.state_dict().items()
        if not (tied and k == "lm_head.weight")
    }
    graph, state = nnx.split(nnx.eval_shape(lambda: create(nnx.Rngs(0))))
    state = load_state(state, table, from_arrays(tensors))
    return nnx.merge(graph, state), tensors


LLAMA3 = dict(rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0)
# Families of decoders, each with what sets it apart from the others.
DECODERS = {
    "qwen2": {},
    "qwen2-yarn": dict(
        rope_scaling=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
    ),
    "qwen3": dict(head_dim=10, tie_word_embeddings=True),
    "llama": dict(tie_word_embeddings=True),
    "llama-llama3": dict(
        head_dim=12, rope_scaling=dict(**LLAMA3, original_max_position_embeddings=64)
    ),
    "llama-linear": dict(num_key_value_heads=6, rope_scaling=dict(rope_type="linear", factor=2.5)),
    "mistral": dict(sliding_window=None, head_dim=8),
}


@pytest.fixture(scope="module", params=DECODERS)
def decoder(request):
    torch.manual_seed(0)
    size = dict(
        vocab_size=83,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        rope_theta=5e2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        attn_implementation="eager",
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    family = request.param.split("-")[0]
    config = transformers.AutoConfig.for_model(family, **{**size, **DECODERS[request.param]})
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn_like(p) * (0.3 if p.dim() > 1 else 0.2) + (p.dim() == 1))
    mine = DecoderConfig.from_hf_config(config.to_dict())
    assert (mine.rope_theta, mine.family) == (5e2, family)
    model, tensors = with_weights(lambda r: Decoder(mine, rngs=r), theirs, keymap.DECODER)
    return theirs, model, tensors


# The families once each, for what takes long.
SOME = pytest.mark.parametrize("decoder", ["qwen2-yarn", "qwen3", "llama-llama3"], indirect=True)


def ragged(lengths, vocabulary, seed=0):
    rng = np.random.default_rng(seed)
    width = max(lengths)
    ids, mask = np.zeros((len(lengths), width), np.int32), np.zeros((len(lengths), width), bool)
    for row, n in enumerate(lengths):
        ids[row, :n] = rng.integers(1, vocabulary, n)
        mask[row, :n] = True
    return ids, mask


def test_decoder_logits_and_log_probs(decoder):
    theirs, model, _ = decoder
    ids, mask = ragged([9, 5, 12], 83)
    with torch.no_grad():
        want = theirs(torch.tensor(ids).long(), attention_mask=torch.tensor(mask).long()).logits
    hidden = jax.jit(lambda m, i, k: m(m.embed(i), k))(model, ids, mask)
    got = model.logits(hidden)
    np.testing.assert_allclose(np.asarray(got)[mask], want.numpy()[mask], atol=2e-5, rtol=1e-4)
    logps, best, entropy = token_log_probs(hidden, model.head_kernel(), jnp.asarray(ids), chunk=5)
    # The last 7 rows as padding, with a length that is no multiple of the chunk.
    fewer = token_log_probs(
        hidden, model.head_kernel(), jnp.asarray(ids % 76), chunk=5, vocab_padding=7
    )
    less = torch.log_softmax(want[..., :76], -1)
    picked = less.gather(-1, torch.tensor(ids % 76).long()[..., None])[..., 0].numpy()
    np.testing.assert_allclose(np.asarray(fewer.logps)[mask], picked[mask], atol=2e-5, rtol=1e-4)
    spread = torch.distributions.Categorical(logits=want[..., :76]).entropy().numpy()
    np.testing.assert_allclose(np.asarray(fewer.entropy)[mask], spread[mask], atol=2e-5, rtol=1e-4)
    assert (np.asarray(fewer.best) < 76).all()
    reference = torch.log_softmax(want, -1).gather(-1, torch.tensor(ids).long()[..., None])[..., 0]
    np.testing.assert_allclose(
        np.asarray(logps)[mask], reference.numpy()[mask], atol=2e-5, rtol=1e-4
    )
    np.testing.assert_array_equal(np.asarray(best)[mask], want.argmax(-1).numpy()[mask])
    spread = torch.distributions.Categorical(logits=want).entropy().numpy()
    np.testing.assert_allclose(np.asarray(entropy)[mask], spread[mask], atol=2e-5, rtol=1e-4)


@SOME
def test_decoder_gradients_equal_those_of_transformers(decoder):
    theirs, model, tensors = decoder
    ids, mask = ragged([9, 5, 12], 83, seed=4)
    labels = torch.tensor(np.where(mask, ids, -100)).long()
    theirs.zero_grad()
    theirs(
        torch.tensor(ids), attention_mask=torch.tensor(mask).long(), labels=labels
    ).loss.backward()
    want = {k: p.grad.numpy() for k, p in theirs.named_parameters() if k in tensors}

    def loss(model):
        hidden = model(model.embed(ids), jnp.asarray(mask))[:, :-1]
        logps = token_log_probs(hidden, model.head_kernel(), jnp.asarray(ids[:, 1:])).logps
        return -jnp.sum(logps * mask[:, 1:]) / mask[:, 1:].sum()

    got = to_checkpoint(nnx.jit(nnx.grad(loss))(model), keymap.DECODER)
    assert set(got) == set(want)
    for key, value in want.items():
        np.testing.assert_allclose(got[key], value, atol=1e-5, rtol=1e-4, err_msg=key)


@SOME
def test_cached_and_shared_prompts_equal_the_plain_pass(decoder):
    _, model, _ = decoder
    ids, mask = ragged([9, 5], 83, seed=5)
    tails = np.random.default_rng(6).integers(1, 83, (2, 2, 4)).astype(np.int32)

    @nnx.jit
    def run(model):
        plain = []
        for row in range(2):
            whole = [np.concatenate([ids[row, : mask[row].sum()], tail]) for tail in tails[row]]
            x = jnp.asarray(np.stack(whole))
            plain.append(model(model.embed(x), jnp.ones(x.shape, bool))[:, -5:])
        last, shared = model.shared_prefix(
            model.embed(ids), jnp.asarray(mask), model.embed(tails), jnp.ones(tails.shape, bool)
        )
        cache = model.empty_cache(2, 16)
        _, cache = model.extend(model.embed(ids), jnp.asarray(mask), cache, 0)
        cached, _ = model.extend(model.embed(tails[:, 0]), jnp.ones((2, 4), bool), cache, 9)
        return jnp.stack(plain), last, shared, cached

    plain, last, shared, cached = run(model)
    np.testing.assert_allclose(last, plain[:, 0, 0], atol=3e-5, rtol=1e-4)
    np.testing.assert_allclose(shared, plain[:, :, 1:], atol=3e-5, rtol=1e-4)
    np.testing.assert_allclose(cached, plain[:, 0, 1:], atol=3e-5, rtol=1e-4)


def test_gradients_of_log_probs():
    """Compares with the plain log-softmax, with a temperature, padded rows and a short last chunk;
    a kernel that is not trained must cost no product."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    hidden, kernel, weights = draw(3, 13, 8), draw(8, 50), draw(3, 13)
    targets = jnp.asarray(rng.integers(0, 45, (3, 13)))

    def ours(hidden, kernel):
        found = token_log_probs(hidden, kernel, targets, 0.7, chunk=5, vocab_padding=5)
        return jnp.sum(weights * found.logps + found.entropy)

    def plain(hidden, kernel):
        logps = jax.nn.log_softmax((hidden @ kernel)[..., :45] / 0.7)
        return jnp.sum(weights * jnp.take_along_axis(logps, targets[..., None], axis=-1)[..., 0])

    got, want = (jax.grad(f, argnums=(0, 1))(hidden, kernel) for f in (ours, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)
    # Only some positions count: their values and gradients are the same, and others get none.
    counted = jnp.asarray(rng.random((3, 13)) < 0.3)
    some = lambda h, k: token_log_probs(h, k, targets, 0.7, 2, 5, counted)  # noqa: E731
    whole, part = token_log_probs(hidden, kernel, targets, 0.7, 5, 5), some(hidden, kernel)
    for a, b in zip(part, whole, strict=True):
        np.testing.assert_allclose(a, np.where(counted, b, 0), atol=1e-6)

    def summed(log_probs, mask):
        return jax.grad(
            lambda h, k: jnp.sum(jnp.where(mask, weights * log_probs(h, k).logps, 0)), (0, 1)
        )

    every = lambda h, k: token_log_probs(h, k, targets, 0.7, 5, 5)  # noqa: E731
    few, all_of_them = (summed(f, counted)(hidden, kernel) for f in (some, every))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), few, all_of_them)
    assert not np.asarray(few[0])[~np.asarray(counted)].any()
    none = summed(lambda h, k: token_log_probs(h, k, targets, 0.7, 2, 5, counted & False), True)
    assert not any(np.asarray(g).any() for g in none(hidden, kernel))
    frozen = jax.grad(ours)
    np.testing.assert_allclose(frozen(hidden, kernel), want[0], atol=1e-5)
    products = [
        str(jax.make_jaxpr(f)(hidden, kernel)).count("dot_general")
        for f in (frozen, jax.grad(ours, argnums=(0, 1)))
    ]
    assert products == [3, 4]


@SOME
def test_greedy_generation_equals_hugging_face(decoder):
    theirs, model, _ = decoder
    ids, mask = ragged([7, 3, 10], 83, seed=1)
    wanted, wanted_logps = [], []
    for row in range(3):  # one by one, unpadded
        prompt = torch.tensor(ids[row : row + 1, : mask[row].sum()]).long()
        with torch.no_grad():
            out = theirs.generate(
                prompt,
                max_new_tokens=8,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
        new = out.sequences[0, prompt.shape[1] :]
        logps = torch.log_softmax(torch.stack(out.logits, 1)[0], -1)
        wanted.append(new.numpy())
        wanted_logps.append(logps.gather(-1, new[:, None])[:, 0].numpy())

    def run(m, ids, mask):
        batch = Batch(ids, mask, *[None] * 6)
        at = sampler.prefill(Shell(m), batch)
        keys = sampler.row_keys(jax.random.key(0), jnp.zeros((3, 2), jnp.uint32))
        return sampler.generate(m, at, keys, stop_ids=(), pad_id=0, max_new_tokens=8)

    got = jax.jit(run)(model, ids, mask)
    for sample in range(2):
        np.testing.assert_array_equal(got.tokens[:, sample], np.stack(wanted))
        np.testing.assert_allclose(got.logps[:, sample], np.stack(wanted_logps), atol=3e-5)
    assert (np.asarray(got.lengths) == 8).all()
    assert not np.asarray(got.ended).any()


def test_mamba():
    torch.manual_seed(1)
    config = transformers.MambaConfig(
        vocab_size=61, hidden_size=16, state_size=5, num_hidden_layers=2, time_step_rank=3
    )
    theirs = transformers.MambaModel(config).eval()
    mine = MambaConfig.from_hf_config(config.to_dict())
    model, _ = with_weights(lambda r: Mamba(mine, rngs=r), theirs, keymap.MAMBA)
    ids = np.random.default_rng(0).integers(61, size=(2, 150))
    with torch.no_grad():
        want = theirs(torch.tensor(ids)).last_hidden_state.numpy()
    np.testing.assert_allclose(jax.jit(lambda m, i: m(i))(model, ids), want, atol=3e-5, rtol=1e-4)


def test_siglip():
    torch.manual_seed(2)
    config = transformers.SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=20,
        patch_size=5,
    )
    theirs = transformers.SiglipVisionModel(config).eval()
    mine = SiglipConfig.from_hf_config(config.to_dict())
    prefix = "vision_model."

    def rename(key):  # newer transformers drop the prefix that released checkpoints have
        return key if key.startswith(prefix) else prefix + key

    model, _ = with_weights(lambda r: Siglip(mine, rngs=r), theirs, keymap.SIGLIP, rename)
    pixels = np.random.default_rng(0).normal(size=(2, 3, 20, 20)).astype(np.float32)
    with torch.no_grad():
        want = theirs(torch.tensor(pixels), output_hidden_states=True)
    got = jax.jit(lambda m, x: m(x, layers=2))(model, pixels.transpose(0, 2, 3, 1))
    np.testing.assert_allclose(got, want.hidden_states[-2].numpy(), atol=1e-5, rtol=1e-4)


def test_weights_round_trip_and_errors_name_every_key(decoder):
    _, model, tensors = decoder
    back = to_checkpoint(nnx.split(model)[1], keymap.DECODER)
    assert set(back) == set(tensors)
    for key, value in tensors.items():
        np.testing.assert_array_equal(back[key], value)
    config = model.config
    state = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))[1]
    broken = dict(tensors)
    del broken["model.norm.weight"], broken["model.layers.1.mlp.up_proj.weight"]
    broken["extra.weight"] = np.zeros(1)
    with pytest.raises(WeightsError) as caught:
        load_state(state, keymap.DECODER, from_arrays(broken))
    for name in ("model.norm.weight", "model.layers.1.mlp.up_proj.weight", "extra.weight"):
        assert name in str(caught.value)
    misshapen = {**tensors, "model.norm.weight": np.zeros(7, np.float32)}
    with pytest.raises(WeightsError, match=r"model\.norm\.weight: expected \(24,\), got \(7,\)"):
        load_state(state, keymap.DECODER, from_arrays(misshapen))
