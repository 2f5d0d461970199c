import gc
import hashlib
import itertools
import math

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from fvae_dist import side_loss
from fvae_dist.adapter import FVAELinear, noise
from fvae_dist.adapter.noise import GeneratorNoise, LayerNoise, TokenNoise, token_keys
from tests.models import LayerModel, named_gradients, randomise, tiny_adapter, tiny_model, token_ids

R = 4
DROPOUTS = [(7, 0.1), (5, 0.0), (6, 0.3)]
DOCUMENTS = [[5, 6, 7, 8, 9], [5, 6, 7], [9, 8, 7, 6, 5, 4], [11]]


@pytest.fixture(autouse=True)
def no_streams_of_other_tests(monkeypatch):
    """A graph that another test's fixture or traceback keeps alive is none of ours."""
    monkeypatch.setattr(noise, "_live", {})


def draw(batch, seed=0, step=0, name="layer/default", r=R, dropouts=DROPOUTS, dtype=torch.float32):
    """Noise of one layer for a batch: eps1, eps2 (B, T, r) and the keeps that are not None."""
    ids = batch["input_ids"]
    stream = TokenNoise(batch, seed, step).of_layer(name, ids.numel())
    eps1, eps2, keeps = stream.draw(torch.empty(*ids.shape, r, dtype=dtype), dropouts)
    return [eps1, eps2, *(keep for keep in keeps if keep is not None)]


def random_ids(*shape, seed=0, vocabulary=32_000):
    return torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------------------- moments

NUM_SAMPLED = 2**15
BASE = {"input_ids": random_ids(8, NUM_SAMPLED // 8)}


def assert_standard_normal(x):
    """Four standard errors for the moments, the 0.1 % point for Kolmogorov-Smirnov."""
    n = x.numel()
    x = x.flatten().double()
    assert abs(x.mean()) < 4 / n**0.5
    assert abs(x.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs((x**3).mean()) < 4 * (15 / n) ** 0.5
    assert abs((x**4).mean() - 3) < 4 * (96 / n) ** 0.5
    cdf = 0.5 * (1 + torch.erf(x.sort().values / 2**0.5))
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    assert max((cdf - steps[:-1]).abs().max(), (cdf - steps[1:]).abs().max()) < 1.95 / n**0.5


def assert_uncorrelated(a, b):
    """Neither the values nor their squares (a shared Box-Muller radius would show there); five standard errors."""
    a, b = a.flatten().double(), b.flatten().double()
    for left, right in itertools.product((a, a.square()), (b, b.square())):
        correlation = torch.corrcoef(torch.stack([left, right]))[0, 1]
        assert abs(correlation) < 5 / len(a) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_latent_noise_is_standard_normal(dtype):
    eps1, eps2, *_ = draw(BASE, dtype=dtype)
    assert eps1.dtype == eps2.dtype == dtype
    for eps in (eps1, eps2, eps1[:, 100], eps1[..., -1]):  # all, of one position, of the last dimension
        assert_standard_normal(eps)


def neighbours(eps, dim):
    return eps.narrow(dim, 0, eps.shape[dim] - 1), eps.narrow(dim, 1, eps.shape[dim] - 1)


@pytest.mark.parametrize(
    "pair",
    [
        lambda eps1, eps2: (eps1, eps2),
        lambda eps1, eps2: neighbours(eps1, 0),
        lambda eps1, eps2: neighbours(eps1, 1),
        lambda eps1, eps2: neighbours(eps1, 2),
        lambda eps1, eps2: (neighbours(eps1, 1)[0], neighbours(eps2, 1)[1]),
        lambda eps1, eps2: (eps1, draw(BASE, step=1)[0]),
        lambda eps1, eps2: (eps1, draw(BASE, seed=1)[0]),
        lambda eps1, eps2: (eps1, draw(BASE, seed=1)[1]),
        lambda eps1, eps2: (eps1, draw(BASE, name="layer/other")[0]),
        lambda eps1, eps2: (eps1, draw({"input_ids": BASE["input_ids"] + 1})[0]),
    ],
    ids=["latents", "documents", "tokens", "dimensions", "across", "steps", "seeds", "seeds2", "layers", "ids"],
)
def test_noise_is_independent(pair):
    assert_uncorrelated(*pair(*draw(BASE)[:2]))


@pytest.mark.parametrize("kind", ["tokens", "generator"])
def test_dropout_keeps_at_its_rate_and_independently(kind):
    dropouts = [(8, 0.1), (8, 0.0), (9, 0.5), (16, 0.9), (3, 1e-3)]
    torch.manual_seed(0)
    source = TokenNoise(BASE, 0, 0).of_layer("layer", NUM_SAMPLED) if kind == "tokens" else GeneratorNoise()
    eps1, _, keeps = source.draw(torch.empty(NUM_SAMPLED, R), dropouts)
    assert keeps[1] is None
    for (width, p), keep in zip(dropouts, keeps):
        if p:
            assert keep.shape == (NUM_SAMPLED, width) and keep.dtype == torch.bool
            rates = keep.double().mean(0)
            assert ((rates - (1 - p)).abs() < 4.5 * (p * (1 - p) / NUM_SAMPLED) ** 0.5).all()
    for keep in (keeps[2], keeps[3]):
        assert_uncorrelated_bits(keep[:, :-1], keep[:, 1:])
        assert_uncorrelated_bits(keep[:-1], keep[1:])
    assert_uncorrelated_bits(keeps[2], keeps[3][:, :9])
    assert_uncorrelated_bits(keeps[2][:, :R], eps1 > 0)


def assert_uncorrelated_bits(a, b):
    correlation = torch.corrcoef(torch.stack([a.flatten().double(), b.flatten().double()]))[0, 1]
    assert abs(correlation) < 4 / a.numel() ** 0.5


def test_no_two_of_many_tokens_share_their_noise():
    batch = {"input_ids": torch.cat([random_ids(24, 4096), torch.full((1, 4096), 7)])}  # a document of one word, too
    num_tokens = batch["input_ids"].numel()
    assert num_tokens > 1e5 and token_keys(batch["input_ids"]).unique().numel() == num_tokens
    eps1, eps2 = draw(batch, r=2, dropouts=[])
    assert torch.cat([eps1, eps2], dim=-1).flatten(0, 1).unique(dim=0).shape[0] == num_tokens


# -------------------------------------------------------------------------------------------------------------- layout


def rows(documents, width=None, side="right", positions=None, pad=0):
    """One document a row; `positions`: what stands in position_ids at padding, no position_ids if None."""
    width = width or max(map(len, documents))
    ids, mask = (torch.full((len(documents), width), value) for value in (pad, 0))
    where = []
    for row, document in enumerate(documents):
        start = width - len(document) if side == "left" else 0
        ids[row, start : start + len(document)] = torch.tensor(document)
        mask[row, start : start + len(document)] = 1
        where.append((row, start))
    batch = {"input_ids": ids, "attention_mask": mask}
    if positions is not None:
        batch["position_ids"] = (mask.cumsum(-1) - 1).masked_fill(mask == 0, positions)
    return batch, where


def packed(*lines, padding=0, with_mask=False, dtype=torch.long):
    """Documents one after the other in each line, told apart by positions that start anew; lines of equal length."""
    ids, positions, mask, where = [], [], [], []
    for number, line in enumerate(lines):
        starts = itertools.accumulate(map(len, line), initial=0)
        where += [(number, start) for start in list(starts)[:-1]]
        length = sum(map(len, line))
        ids.append([token for document in line for token in document] + [0] * padding)
        positions.append([p for document in line for p in range(len(document))] + list(range(padding)))
        mask.append([1] * length + [0] * padding)
    batch = {"input_ids": torch.tensor(ids), "position_ids": torch.tensor(positions).to(dtype)}
    if with_mask:
        batch["attention_mask"] = torch.tensor(mask)
    return batch, where


FIVE, THREE, SIX, ONE = DOCUMENTS
RUNNING_ON = rows(DOCUMENTS, width=8)
RUNNING_ON[0]["position_ids"] = torch.arange(8)[None].expand(4, 8)
LAYOUTS = {
    "right, positions run on through padding": RUNNING_ON,
    "right": rows(DOCUMENTS),
    "left": rows(DOCUMENTS, side="left"),
    "more padding": rows(DOCUMENTS, width=13),
    "much left padding": rows(DOCUMENTS, width=30, side="left"),
    "padding with another token": rows(DOCUMENTS, width=8, pad=5),
    "left, positions 1 at padding": rows(DOCUMENTS, width=8, side="left", positions=1),
    "left, positions 0 at padding": rows(DOCUMENTS, width=8, side="left", positions=0),
    "right, positions 0 at padding": rows(DOCUMENTS, width=8, positions=0),
    "packed": packed(DOCUMENTS),
    "packed with mask": packed(DOCUMENTS, with_mask=True),
    "packed, padded": packed(DOCUMENTS, padding=3),
    "packed, padded, with mask": packed(DOCUMENTS, padding=3, with_mask=True),
    "packed in lines": packed([FIVE, THREE], [SIX, ONE, [1]]),
    "packed, int32 positions": packed(DOCUMENTS, dtype=torch.int32),
}


def per_document(batch, where, **which):
    drawn = draw(batch, **which)
    lengths = map(len, DOCUMENTS)
    return [[part[row, at : at + n] for part in drawn] for (row, at), n in zip(where, lengths)]


EXPECTED = [[part[0] for part in draw({"input_ids": torch.tensor([document])})] for document in DOCUMENTS]


def assert_equal_noise(left, right):
    assert len(left) == len(right) and all(
        torch.equal(a, b) for mine, theirs in zip(left, right) for a, b in zip(mine, theirs, strict=True)
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_noise_does_not_depend_on_the_layout(layout):
    assert_equal_noise(per_document(*LAYOUTS[layout]), EXPECTED)


@pytest.mark.parametrize("layout", [lambda d: packed(d), lambda d: rows(d)], ids=["packed", "rows"])
@pytest.mark.parametrize("order", [[3, 1, 0, 2], [2, 0, 3, 1]], ids=str)
def test_noise_does_not_depend_on_the_order_of_documents(order, layout):
    batch, where = layout([DOCUMENTS[index] for index in order])
    assert_equal_noise(per_document(batch, [where[order.index(index)] for index in range(4)]), EXPECTED)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.float32, torch.bfloat16])
def test_keys_do_not_depend_on_the_dtype_of_the_mask(dtype):
    batch, _ = rows(DOCUMENTS, width=400, side="left")
    mask = batch["attention_mask"].bool()
    keys, expected = (token_keys(batch["input_ids"], m) for m in (mask.to(dtype), mask.long()))
    assert torch.equal(keys[mask], expected[mask])


@pytest.mark.parametrize("positions", [None, torch.arange(6)[None], torch.arange(6).expand(3, 6)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_keys_do_not_depend_on_the_dtype_of_ids_or_on_plain_positions(dtype, positions):
    ids = random_ids(3, 6)
    before = ids.clone()
    keys = token_keys(ids.to(dtype), position_ids=positions if positions is None else positions.to(dtype))
    assert torch.equal(keys, token_keys(ids)) and torch.equal(ids, before)


@pytest.mark.parametrize("which", [{"seed": 1}, {"step": 1}, {"name": "layer/other"}, {"seed": -1}, {"step": 2**40}])
def test_other_seed_step_or_layer_gives_other_noise(which):
    ours, theirs = draw(BASE), draw(BASE, **which)
    assert not any((a == b).float().mean() > 0.95 for a, b in zip(ours, theirs))
    assert (ours[0] == theirs[0]).sum() < 3


@pytest.mark.parametrize(
    "other",
    [
        [5, 6, 7, 8],
        [5, 6, 7, 8, 10],
        [5, 6, 7, 8, 9, 9],
        [4, 6, 7, 8, 9],
        [6, 5, 7, 8, 9],
        [9, 8, 7, 6, 5],
        [0, 5, 6, 7],
    ],
    ids=str,
)
def test_other_document_gives_other_noise_at_every_position(other):
    ours, theirs = (draw({"input_ids": torch.tensor([document])})[0][0] for document in (FIVE, other))
    for position in range(min(len(ours), len(theirs))):
        assert not (ours[position] == theirs[position]).any()


def test_equal_documents_of_a_step_share_their_noise():
    """As documented; the price of keys that need no numbering of documents."""
    eps = draw({"input_ids": torch.tensor([FIVE, FIVE])})[0]
    assert torch.equal(eps[0], eps[1]) and len(eps[0].unique()) == eps[0].numel()


def test_fp32_is_float64_rounded():
    # The uniforms are rounded too: near 1 that is 6e-8 under a logarithm and a root.
    for a, b in zip(draw(BASE, r=16)[:2], draw(BASE, r=16, dtype=torch.float64)[:2]):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=1e-4)
        assert (a.double() - b).abs().mean() < 1e-6
    for a, b in zip(draw(BASE)[2:], draw(BASE, dtype=torch.float64)[2:]):
        assert torch.equal(a, b)


@pytest.mark.parametrize("num_tokens", [0, 7, 13, 28])
def test_layer_that_sees_other_tokens_is_an_error(num_tokens):
    source = TokenNoise({"input_ids": token_ids(2, 7)}, 0, 0)
    with pytest.raises(ValueError, match=rf"h\.0\.attn saw {num_tokens} tokens where the batch has 14"):
        source.of_layer("h.0.attn", num_tokens)


def test_layer_of_a_model_that_sees_other_tokens_is_an_error():
    model = randomise(get_peft_model(tiny_model("llama"), tiny_adapter())).train()
    source = TokenNoise({"input_ids": token_ids(2, 6)}, 0, 0)
    with pytest.raises(ValueError, match="q_proj/default saw 14 tokens"), side_loss.collect(model, noise=source):
        model(token_ids(2, 7))


# ---------------------------------------------------------------------------------------------------------- the stream

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15


def mix(word: int) -> int:
    """splitmix64's finalizer."""
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & MASK
    return word ^ (word >> 31)


def test_stream_is_the_documented_one():
    """In Python's unbounded integers, token by token."""
    seed, step, name = 3, 14, "layer/default"
    salt = int.from_bytes(hashlib.blake2b(f"{seed}/{step}/{name}".encode(), digest_size=8).digest(), "little")
    content = sum(mix(token * GOLDEN + mix(at + 1) & MASK) for at, token in enumerate(FIVE)) & MASK
    drawn = draw({"input_ids": torch.tensor([FIVE])}, seed, step, name, dtype=torch.float64)
    for at in range(len(FIVE)):
        key = mix(content + at * GOLDEN & MASK)
        words = [mix(key + salt + counter * GOLDEN & MASK) for counter in range(R + 7)]
        highs, lows = ([word >> 32 for word in words], [word & 0xFFFFFFFF for word in words])
        radius = [math.sqrt(-2 * math.log(((high >> 8) + 0.5) / 2**24)) for high in highs[:R]]
        angle = [2 * math.pi * ((low >> 8) + 0.5) / 2**24 for low in lows[:R]]
        for eps, turn in zip(drawn[:2], (math.cos, math.sin)):
            expected = [r * turn(a) for r, a in zip(radius, angle)]
            assert eps[0, at].tolist() == pytest.approx(expected, abs=1e-12)
        decisions = (highs[R:] + lows[R:])[:13]
        assert drawn[2][0, at].tolist() == [bits >= 0.1 * 2**32 for bits in decisions[:7]]
        assert drawn[3][0, at].tolist() == [bits >= 0.3 * 2**32 for bits in decisions[7:]]


GOLDEN_KEYS = [
    [7594644297766260179, 3670941272816696014, 5004060600130534926],
    [-1310147053235137589, 8203540771686066512, -8989065659632314432],
]
GOLDEN_EPS1 = [0.789494, -1.680932, -0.629275, 0.022911]
GOLDEN_EPS2 = [-0.236643, 0.489426, 0.450167, -0.259475]
GOLDEN_KEEP = [[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0]]


def test_stream_never_changes():
    """Recorded from version 1 of the stream: a run that is resumed under a later version must go on with it."""
    batch, _ = packed([FIVE, THREE], [SIX, [1, 2]])
    assert token_keys(**batch)[:, ::3].tolist() == GOLDEN_KEYS
    eps1, eps2, keep, _ = draw(batch, seed=42, step=7, name="base_model.model.model.layers.0.self_attn.q_proj/default")
    torch.testing.assert_close(eps1[0, 6], torch.tensor(GOLDEN_EPS1), rtol=0, atol=1e-5)
    torch.testing.assert_close(eps2[1, 7], torch.tensor(GOLDEN_EPS2), rtol=0, atol=1e-5)
    assert keep[1, 5:].int().tolist() == GOLDEN_KEEP


# ---------------------------------------------------------------------------------------------------- the generator's


def test_generator_noise_follows_the_seed():
    def drawn(seed):
        torch.manual_seed(seed)
        eps1, eps2, keeps = GeneratorNoise().draw(torch.empty(3, 5, R), DROPOUTS)
        assert keeps[1] is None and keeps[2].shape == (3, 5, 6)
        return [eps1, eps2, keeps[0], keeps[2]]

    assert all(map(torch.equal, drawn(1), drawn(1)))
    assert not any(map(torch.equal, drawn(1), drawn(2)))
    assert not torch.equal(*drawn(1)[:2])


def test_token_noise_leaves_the_generators_stream_of_normals_alone():
    """Only the ticket of 64 bits is drawn from it, whatever the tokens."""
    states = []
    for length in (3, 7):
        model = LayerModel(FVAELinear(nn.Linear(6, 5), "default", tiny_adapter())).train()
        torch.manual_seed(0)
        source = TokenNoise({"input_ids": token_ids(1, length)}, 0, 0)
        with side_loss.collect(model, noise=source):
            model(torch.ones(length, 6))
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


# ------------------------------------------------------------------------------------------------------- recomputation


class Checkpointed(nn.Module):
    """Two adapted layers, each in a checkpointed region of its own, or in none."""

    def __init__(self, dropout=0.0, **options):
        super().__init__()
        settings = tiny_adapter(encoder_dropout=dropout, decoder_dropout=dropout)
        torch.manual_seed(0)
        self.layers = nn.ModuleList(randomise(FVAELinear(nn.Linear(6, 6), "default", settings)) for _ in range(2))
        self.options = options

    def forward(self, x):
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False, **self.options) if self.options is not None else layer(x)
        return x


def llama(checkpointed, dropout):
    torch.manual_seed(0)
    config = tiny_adapter(encoder_dropout=dropout, decoder_dropout=dropout)
    model = randomise(get_peft_model(tiny_model("llama"), config)).train()
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    return model


def gradients(model):
    found = named_gradients(model)
    assert found
    model.zero_grad()
    return found


def micro_batches_gradients(checkpointed, by_token, dropout, order):
    """Of two micro-batches that both run forward before either runs backward."""
    model, losses = llama(checkpointed, dropout), []
    torch.manual_seed(5)
    for number in range(2):
        ids = token_ids(1 + number, 5 + number, seed=number)
        source = TokenNoise({"input_ids": ids}, 0, 0) if by_token else None
        with side_loss.collect(model, noise=source) as collected:
            out = model(input_ids=ids, labels=ids, use_cache=False)
        losses.append(10 * out.loss + collected.neg_elbo)
    torch.manual_seed(6)  # the backward may not rely on the state in which the forward left the generator
    for number in order:
        losses[number].backward()
    return {**gradients(model), "loss": torch.stack(losses).detach()}


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("by_token", [False, True], ids=["generator", "tokens"])
def test_recomputation_of_interleaved_micro_batches_finds_its_noise(by_token, dropout, order):
    plain = micro_batches_gradients(False, by_token, dropout, order)
    recomputed = micro_batches_gradients(True, by_token, dropout, order)
    assert plain.keys() == recomputed.keys()
    assert [name for name in plain if not torch.equal(plain[name], recomputed[name])] == []
    gc.collect()
    assert not noise._live


def test_token_noise_reaches_the_layers():
    """The comparison above would also hold without any noise, or with the generator's."""
    losses = {}
    for step, seed_of_generator in ((0, 1), (0, 2), (1, 1)):
        model, ids = llama(False, 0.3), token_ids()
        torch.manual_seed(seed_of_generator)
        with side_loss.collect(model, noise=TokenNoise({"input_ids": ids}, 0, step)) as collected:
            model(ids)
        losses[step, seed_of_generator] = collected.neg_elbo.item()
    assert losses[0, 1] == losses[0, 2] != losses[1, 1]


def forward(model, number=0, step=0):
    """Loss of one forward with noise by token."""
    source = TokenNoise({"input_ids": token_ids(1, 5, seed=number)}, 0, step)
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(number)).requires_grad_()
    with side_loss.collect(model, noise=source) as collected:
        y = model(x)
    return y.square().mean() + collected.neg_elbo


def test_recomputation_without_the_generators_state_is_an_error():
    model = Checkpointed(preserve_rng_state=False).train()
    loss = forward(model)
    with pytest.raises(RuntimeError, match=r"cannot find the noise of its forward.*preserve_rng_state=True"):
        loss.backward()


def test_forwards_from_the_same_state_of_the_generator_do_not_mix_up_their_noise():
    """Seeding before each micro-batch gives both the same ticket: either both are right, or it is an error."""
    results = []
    for options in ({}, None):
        model = Checkpointed(**(options or {})).train()
        model.options = options
        losses = []
        for number in range(2):
            torch.manual_seed(0)
            losses.append(forward(model, number))
        try:
            for loss in losses:
                loss.backward()
        except RuntimeError:
            return
        results.append(gradients(model))
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], msg=name)


def test_recomputation_with_the_generators_noise_beside_a_living_stream():
    """Another graph with noise by token is no reason to refuse one without."""
    model = Checkpointed().train()
    keep = forward(model)
    with side_loss.collect(model) as collected:
        model(torch.ones(5, 6))
    collected.neg_elbo.backward()
    assert keep.requires_grad


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("how", ["backward", "dropped", "retained"])
def test_streams_live_as_long_as_their_graph(how, checkpointed):
    gc.collect()
    assert not noise._live
    model = Checkpointed().train()
    if not checkpointed:
        model.options = None
    loss = forward(model)
    assert len(noise._live) == 2  # one a layer
    if how == "retained":
        loss.backward(retain_graph=True)
        assert len(noise._live) == 2
        loss.backward()  # recomputes once more
    elif how == "backward":
        loss.backward()
    gc.disable()  # reference counts alone must do
    try:
        del loss
        assert not noise._live
    finally:
        gc.enable()


def test_a_graph_that_goes_while_another_of_its_ticket_is_remembered(monkeypatch):
    """The garbage collector may end a forgotten graph at any call; which one it takes is not for us to say."""
    old = torch.ones(2, requires_grad=True) * 2
    noise.remember(7, GeneratorNoise(), (old,))
    dying, make = [old], noise.ref
    del old

    def ref_that_collects(*args):
        dying.clear()
        return make(*args)

    monkeypatch.setattr(noise, "ref", ref_that_collects)
    new, ours = torch.ones(2, requires_grad=True) * 2, GeneratorNoise()
    noise.remember(7, ours, (new,))
    assert not dying and noise.recall(7) is ours


def test_recall_finds_the_newest_of_equals():
    """Layers that share an input are computed together if their noise has the same keys, the very same."""
    graphs = [torch.ones(2, requires_grad=True) * 2 for _ in range(2)]
    streams = [LayerNoise(torch.arange(2), 1) for _ in graphs]
    for graph, stream in zip(graphs, streams):
        noise.remember(7, stream, (graph,))
    noise.remember(8, streams[1], (graphs[1],))
    assert noise.recall(7) is noise.recall(8)


def test_forward_without_gradients_leaves_nothing():
    gc.collect()
    model = Checkpointed().train()
    model.options = None
    with torch.no_grad():
        forward(model)
    assert not noise._live
    model.requires_grad_(False)
    source = TokenNoise({"input_ids": token_ids(1, 5)}, 0, 0)
    with side_loss.collect(model, noise=source):
        model(torch.ones(5, 6))
    assert not noise._live


def test_evaluation_uses_no_noise():
    model = Checkpointed(dropout=0.3).eval()
    model.options, x = None, torch.ones(5, 6)
    state = torch.get_rng_state()
    with side_loss.collect(model, noise=TokenNoise({"input_ids": token_ids(1, 5)}, 0, 0)):
        assert torch.equal(model(x), model(x))
    assert torch.equal(torch.get_rng_state(), state) and not noise._live


def test_layer_noise_is_a_function_of_keys_and_salt():
    keys = torch.arange(6)
    like = torch.empty(2, 3, R)
    first = LayerNoise(keys, 5).draw(like, DROPOUTS)
    again = LayerNoise(keys.clone(), 5).draw(like, DROPOUTS)
    assert torch.equal(first.eps1, again.eps1) and torch.equal(first.eps2, again.eps2)
    assert torch.equal(keys, torch.arange(6)), "drawing changed the keys"
    other_row = LayerNoise(keys[3:], 5).draw(torch.empty(3, R), DROPOUTS)
    assert torch.equal(first.eps1[1], other_row.eps1) and torch.equal(first.keeps[2][1], other_row.keeps[2])
