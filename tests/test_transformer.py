"""The transformer against the golden arrays, against PyTorch's own layers, and against attention written from scratch."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from annotated_detr.transformer import (
    MultiheadAttention,
    Transformer,
    TransformerDecoderLayer,
    TransformerEncoderLayer,
    attention_weights,
    record_attention,
)

WIDTH, HEADS, HEIGHT_OF_MAP, WIDTH_OF_MAP, QUERIES = 32, 4, 3, 5, 6


def small(**options) -> Transformer:
    torch.manual_seed(0)
    return Transformer(WIDTH, HEADS, 2, 3, 48, return_intermediate_dec=True, **options).eval()


def inputs(seed: int = 1) -> tuple:
    """A batch of two maps, the second padded by its last column and last row."""
    generator = torch.Generator().manual_seed(seed)
    src, pos = torch.randn(2, 2, WIDTH, HEIGHT_OF_MAP, WIDTH_OF_MAP, generator=generator)
    mask = torch.zeros(2, HEIGHT_OF_MAP, WIDTH_OF_MAP, dtype=torch.bool)
    mask[1, -1], mask[1, :, -1] = True, True
    return src, mask, torch.randn(QUERIES, WIDTH, generator=generator), pos


def attention_by_loops(layer: MultiheadAttention, query, key, value, mask) -> np.ndarray:
    """Appendix A.1 in NumPy: one picture, one head, one query and one key at a time."""
    width, heads = layer.out_proj.in_features, layer.nhead
    matrices = layer.in_proj_weight.detach().double().numpy().reshape(3, heads, width // heads, width)
    biases = layer.in_proj_bias.detach().double().numpy().reshape(3, heads, width // heads)
    query, key, value = (tokens.double().numpy() for tokens in (query, key, value))
    joined = np.zeros(query.shape)
    for b in range(len(query)):
        for m in range(heads):
            q, k, v = (
                tokens[b] @ matrices[part, m].T + biases[part, m] for part, tokens in enumerate((query, key, value))
            )
            for n in range(len(q)):
                seen = [s for s in range(len(k)) if not mask[b, s]]
                scores = np.array([q[n] @ k[s] for s in seen]) / np.sqrt(width // heads)
                weights = np.exp(scores - scores.max())
                channels = slice(m * width // heads, (m + 1) * width // heads)
                joined[b, n, channels] = weights @ v[seen] / weights.sum()
    return joined @ layer.out_proj.weight.detach().double().numpy().T + layer.out_proj.bias.detach().double().numpy()


def test_golden_memory_and_decoder_output(golden, recipe):
    arrays = {name: torch.from_numpy(array) for name, array in golden("r18_small").items()}
    model = nn.Module()
    model.transformer = Transformer(64, 4, 2, 3, 128, return_intermediate_dec=True)
    model.input_proj = nn.Conv2d(512, 64, kernel_size=1)
    model.query_embed = nn.Embedding(12, 64)
    recipe.fill(model).eval()
    with torch.no_grad():
        hs, memory = model.transformer(
            model.input_proj(arrays["mid/feature"]), arrays["mid/feature_mask"], model.query_embed.weight, arrays["mid/pos"]
        )
    assert hs.shape == (3, 2, 12, 64)
    torch.testing.assert_close(memory[:, ::8], arrays["mid/memory"], rtol=0, atol=1e-5)
    torch.testing.assert_close(hs[-1, ..., ::8], arrays["mid/hs_last"], rtol=0, atol=1e-5)


def test_attention_equals_loops_and_pytorch():
    torch.manual_seed(0)
    ours, theirs = MultiheadAttention(WIDTH, HEADS), nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    nn.init.normal_(ours.in_proj_bias)
    nn.init.normal_(ours.out_proj.bias)
    theirs.load_state_dict(ours.state_dict())
    query, key, value = torch.randn(2, 6, WIDTH), torch.randn(2, 9, WIDTH), torch.randn(2, 9, WIDTH)
    mask = torch.rand(2, 9) < 0.4
    with torch.no_grad():
        attended = ours(query, key, value, mask)
        expected, weights = theirs(query, key, value, key_padding_mask=mask, average_attn_weights=False)
        torch.testing.assert_close(attended, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(attention_weights(ours, query, key, mask), weights, rtol=0, atol=1e-6)
    by_loops = attention_by_loops(ours, query, key, value, mask)
    torch.testing.assert_close(attended.double(), torch.from_numpy(by_loops), rtol=0, atol=1e-5)


@pytest.mark.parametrize("normalize_before", [False, True])
def test_layers_equal_pytorchs_when_positions_are_zero(normalize_before):
    options = dict(dropout=0.0, norm_first=normalize_before, batch_first=True)
    src, mask, query_pos, _ = inputs()
    tokens, mask = src.flatten(2).mT, mask.flatten(1)
    nowhere = torch.zeros_like(tokens)
    for activation in ("relu", "gelu"):
        torch.manual_seed(0)
        encoder = TransformerEncoderLayer(WIDTH, HEADS, 48, 0.1, activation, normalize_before).eval()
        theirs = nn.TransformerEncoderLayer(WIDTH, HEADS, 48, activation=activation, **options)
        theirs.load_state_dict(encoder.state_dict())
        expected = theirs(tokens, src_key_padding_mask=mask)
        torch.testing.assert_close(encoder(tokens, mask, nowhere), expected, rtol=0, atol=1e-5)

        decoder = TransformerDecoderLayer(WIDTH, HEADS, 48, 0.1, activation, normalize_before).eval()
        theirs = nn.TransformerDecoderLayer(WIDTH, HEADS, 48, activation=activation, **options)
        theirs.load_state_dict(decoder.state_dict())
        tgt = torch.randn(2, QUERIES, WIDTH)
        expected = theirs(tgt, tokens, memory_key_padding_mask=mask)
        ours = decoder(tgt, tokens, mask, torch.zeros_like(query_pos), nowhere)
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def test_positions_reach_queries_and_keys_but_not_values():
    torch.manual_seed(0)
    layer = TransformerEncoderLayer(WIDTH, HEADS, 48).eval()
    tokens, pos = torch.randn(2, 2, 7, WIDTH)
    attention = layer.self_attn
    torch.testing.assert_close(layer.attend(tokens, None, pos), attention(tokens + pos, tokens + pos, tokens))
    assert not torch.allclose(layer.attend(tokens, None, pos), attention(tokens + pos, tokens + pos, tokens + pos))


@pytest.mark.parametrize("normalize_before", [False, True])
@settings(deadline=None, max_examples=10)
@given(order=st.permutations(range(QUERIES)), seed=st.integers(0, 99))
def test_outputs_permute_with_their_queries(normalize_before, order, seed):
    model = small(normalize_before=normalize_before)
    src, mask, query_embed, pos = inputs(seed)
    with torch.no_grad():
        hs, memory = model(src, mask, query_embed, pos)
        permuted, same_memory = model(src, mask, query_embed[list(order)], pos)
        content = torch.randn(query_embed.shape, generator=torch.Generator().manual_seed(seed + 1))
        with_content, _ = model(src, mask, query_embed, pos, content)
        both_permuted, _ = model(src, mask, query_embed[list(order)], pos, content[list(order)])
    torch.testing.assert_close(permuted, hs[:, :, list(order)], rtol=0, atol=1e-5)
    torch.testing.assert_close(same_memory, memory, rtol=0, atol=0)
    torch.testing.assert_close(both_permuted, with_content[:, :, list(order)], rtol=0, atol=1e-5)
    assert not torch.allclose(with_content, hs, atol=1e-3), "the content of the queries is not used"


@pytest.mark.parametrize("normalize_before", [False, True])
@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 999))
def test_padded_tokens_change_nothing_that_is_not_padded(normalize_before, seed):
    model = small(normalize_before=normalize_before)
    src, mask, query_embed, pos = inputs(seed)
    padding = mask[:, None].expand_as(src)
    noise = 10 * torch.randn(src.shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        hs, memory = model(src, mask, query_embed, pos)
        noisy_hs, noisy_memory = model(torch.where(padding, noise, src), mask, query_embed, torch.where(padding, -noise, pos))
    torch.testing.assert_close(noisy_hs, hs, rtol=0, atol=1e-5)
    torch.testing.assert_close(noisy_memory[~padding], memory[~padding], rtol=0, atol=1e-5)
    assert not torch.allclose(noisy_memory[padding], memory[padding])


def test_batch_members_do_not_see_each_other():
    model = small()
    src, mask, query_embed, pos = inputs()
    with torch.no_grad():
        hs, memory = model(src, mask, query_embed, pos)
        alone, memory_alone = model(src[1:], mask[1:], query_embed, pos[1:])
    torch.testing.assert_close(alone, hs[:, 1:], rtol=0, atol=1e-5)
    torch.testing.assert_close(memory_alone, memory[1:], rtol=0, atol=1e-5)


def test_no_mask_means_nothing_is_padded():
    model = small()
    src, mask, query_embed, pos = inputs()
    with torch.no_grad():
        hs, memory = model(src, None, query_embed, pos)
        expected, expected_memory = model(src, torch.zeros_like(mask), query_embed, pos)
    torch.testing.assert_close(hs, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(memory, expected_memory, rtol=0, atol=1e-6)


def test_intermediate_outputs_end_in_the_last_layers_normalised_once():
    model = small()
    with torch.no_grad():
        every, _ = model(*inputs())
        model.decoder.return_intermediate = False
        last, _ = model(*inputs())
    assert every.shape == (3, 2, QUERIES, WIDTH)
    assert last.shape == (1, 2, QUERIES, WIDTH)
    torch.testing.assert_close(last[0], every[-1], rtol=0, atol=0)
    torch.testing.assert_close(every.mean(-1), torch.zeros(3, 2, QUERIES), rtol=0, atol=1e-5)  # what one layer norm leaves
    model.decoder.norm.bias.data.fill_(3.0)  # a second norm would take this shift away again
    with torch.no_grad():
        torch.testing.assert_close(model(*inputs())[0], last + 3.0, rtol=0, atol=1e-5)


def test_only_a_pre_norm_encoder_ends_in_a_norm():
    assert "encoder.norm.weight" not in small().state_dict()
    model = small(normalize_before=True)
    assert "encoder.norm.weight" in model.state_dict()
    with torch.no_grad():
        _, memory = model(*inputs())
    torch.testing.assert_close(memory.mean(1), torch.zeros_like(memory[:, 0]), rtol=0, atol=1e-5)


def test_matrices_start_xavier_uniform_and_layers_differ():
    model = small()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            rows, columns = parameter.shape
            bound = (6 / (rows + columns)) ** 0.5
            assert 0.9 * bound < parameter.abs().max() <= bound, name
        elif "norm" in name:
            assert (parameter == float(name.endswith("weight"))).all(), name
    first, second = (layer.linear1.weight for layer in model.encoder.layers)
    assert not torch.equal(first, second)


def test_dropout_acts_in_training_alone_and_in_all_three_places():
    calm, wild = small(dropout=0.0), small(dropout=0.5)
    wild.load_state_dict(calm.state_dict())
    with torch.no_grad():
        expected, _ = calm(*inputs())
        torch.testing.assert_close(wild(*inputs())[0], expected, rtol=0, atol=0)
        assert not torch.allclose(wild.train()(*inputs())[0], expected)

    layer = TransformerEncoderLayer(WIDTH, HEADS, 48, dropout=0.5).train()
    tokens = torch.randn(4, 50, WIDTH)
    with torch.no_grad():
        for branch in (layer.attend(tokens, None, tokens), layer.feed_forward(tokens)):
            assert 0.45 < (branch == 0).float().mean() < 0.55
        hidden = []
        layer.linear2.register_forward_pre_hook(lambda module, args: hidden.append(args[0]))
        layer.feed_forward(tokens)
        assert 0.7 < (hidden[0] == 0).float().mean() < 0.8  # half of what the ReLU left
        layer.dropout.p = 0.0
        assert not torch.allclose(layer.attend(tokens, None, tokens), layer.attend(tokens, None, tokens))


def test_recorded_attention_is_a_distribution_over_real_tokens_and_changes_no_output():
    model = small()
    src, mask, query_embed, pos = inputs()
    with torch.no_grad():
        expected, _ = model(src, mask, query_embed, pos)
        with record_attention(model) as recorded:
            hs, _ = model(src, mask, query_embed, pos)
        seen = dict(recorded)
        model(src, None, query_embed, pos)
    torch.testing.assert_close(hs, expected, rtol=0, atol=0)
    assert len(seen) == 2 + 3 + 3
    tokens = HEIGHT_OF_MAP * WIDTH_OF_MAP
    assert seen["encoder.layers.1.self_attn"].shape == (2, HEADS, tokens, tokens)
    assert seen["decoder.layers.0.self_attn"].shape == (2, HEADS, QUERIES, QUERIES)
    cross = seen["decoder.layers.2.multihead_attn"]
    assert cross.shape == (2, HEADS, QUERIES, tokens)
    torch.testing.assert_close(cross.sum(-1), torch.ones(2, HEADS, QUERIES))
    assert (cross[1, :, :, mask[1].flatten()] == 0).all()
    assert all(recorded[name] is weights for name, weights in seen.items()), "recording went on after the block"


def test_first_decoder_self_attention_answers_the_same_for_every_query():
    model = small()
    layer, query_pos = model.decoder.layers[0], torch.randn(QUERIES, WIDTH)
    nn.init.normal_(layer.self_attn.in_proj_bias)
    with torch.no_grad():
        answer = layer.attend(torch.zeros(2, QUERIES, WIDTH), None, query_pos)
        value_bias = layer.self_attn.in_proj_bias.chunk(3)[2]
    constant = layer.self_attn.out_proj(value_bias)
    torch.testing.assert_close(answer, constant.expand_as(answer), rtol=0, atol=1e-5)


def test_gradients_reach_every_parameter():
    model = small().train()
    hs, _ = model(*inputs())
    hs.square().mul(torch.randn_like(hs)).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_impossible_settings_are_refused_in_a_sentence():
    with pytest.raises(ValueError, match="7 heads cannot share 32 channels"):
        Transformer(32, 7)
    with pytest.raises(ValueError, match="no activation 'swish': choose relu or gelu"):
        Transformer(32, 4, activation="swish")
