"""Arguments of a wrong kind: the error says what came and what was expected."""

import math

import numpy as np
import pytest
import torch

from detr_fast import (
    MultiheadAttention,
    NestedTensor,
    PositionEmbeddingLearned,
    PositionEmbeddingSine,
    attention,
    collate_fn,
    nested_tensor_from_tensor_list,
    pad_collate,
    sine_position,
)
from detr_fast.ops import applied_dropout, attention_dropout_mask

IMAGE = torch.zeros(3, 4, 5)
MASK = torch.zeros(1, 4, 5, dtype=torch.bool)
HEADS = torch.zeros(2, 2, 4, 8)
TOKENS = torch.zeros(4, 2, 8)
SEED = torch.tensor([3])


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: pad_collate(None), TypeError, "images is a NoneType; expected a sequence of tensors"),
        (lambda: pad_collate(torch.tensor(1.0)), TypeError, "expected a sequence of tensors"),
        (lambda: pad_collate([]), ValueError, "got no image; expected at least one"),
        (lambda: pad_collate([IMAGE], mean=0.5, std=0.2), TypeError, "mean is 0.5; expected one number for each of th"),
        (lambda: pad_collate([IMAGE], mean=[0, 0, 0], std="one"), TypeError, "std is 'one'; expected one number"),
        (lambda: nested_tensor_from_tensor_list(None), TypeError, "images is a NoneType"),
        (lambda: nested_tensor_from_tensor_list([np.zeros((3, 4, 5))]), TypeError, "image 0 is a ndarray"),
        (lambda: collate_fn(None), TypeError, "got a NoneType; expected a list of samples"),
        (lambda: collate_fn([None, (IMAGE, {})]), TypeError, "got a list of NoneType, tuple; expected"),
        (lambda: collate_fn([IMAGE]), TypeError, "got a list of Tensor; expected"),
        (lambda: sine_position(MASK, ("3", "4")), ValueError, "two positive integers; got ('3', '4')"),
        (lambda: sine_position(MASK, (None, 4)), ValueError, "two positive integers; got (None, 4)"),
        (lambda: sine_position(MASK, temperature="hot"), ValueError, "temperature must be positive; got 'hot'"),
        (lambda: PositionEmbeddingSine("64"), ValueError, "even and positive (sine and cosine in pairs); got '64'"),
        (lambda: PositionEmbeddingSine(4)(IMAGE), TypeError, "got a Tensor; expected a NestedTensor"),
        (lambda: PositionEmbeddingLearned(4)(IMAGE), TypeError, "got a Tensor; expected a NestedTensor"),
        (lambda: PositionEmbeddingLearned(4).from_mask(MASK.numpy()), ValueError, "got a ndarray"),
        (lambda: PositionEmbeddingLearned(4).from_mask(MASK[0]), ValueError, "got shape (4, 5)"),
        (lambda: attention(HEADS.numpy(), HEADS, HEADS), TypeError, "query is a ndarray; expected a tensor"),
        (lambda: attention(HEADS, HEADS.tolist(), HEADS), TypeError, "key is a list; expected a tensor"),
        (lambda: attention(HEADS, HEADS, HEADS, [[False] * 4] * 2), TypeError, "key_padding_mask is a list; expected"),
        (lambda: attention(HEADS, HEADS, HEADS, None, "0.1"), ValueError, "dropout_p is '0.1'; expected a probability"),
        (lambda: attention(HEADS, HEADS, HEADS, None, None), ValueError, "dropout_p is None; expected a probability"),
        (lambda: MultiheadAttention(8, 2, dropout="x"), ValueError, "dropout is 'x'; expected a probability"),
        (lambda: MultiheadAttention(8, 2)(TOKENS, None, TOKENS), TypeError, "key is a NoneType; expected a tensor"),
        (lambda: MultiheadAttention(8, 2)(TOKENS.numpy(), TOKENS, TOKENS), TypeError, "query is a ndarray"),
        (
            lambda: MultiheadAttention(8, 2)(TOKENS, TOKENS, TOKENS, [[False] * 4] * 2),
            TypeError,
            "key_padding_mask is a list",
        ),
        (
            lambda: MultiheadAttention(8, 2)(TOKENS, TOKENS, TOKENS, attn_mask=np.zeros((4, 4), bool)),
            TypeError,
            "attn_mask is a ndarray",
        ),
        (lambda: applied_dropout(2.0), ValueError, "dropout_p is 2.0; expected a probability in 0..1"),
        (lambda: applied_dropout(math.nan), ValueError, "dropout_p is nan; expected"),
        (lambda: attention_dropout_mask(SEED, 1, 1, 2, 2, -0.1), ValueError, "dropout_p is -0.1; expected"),
    ],
)
def test_the_error_says_what_came_and_what_was_expected(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error and message in str(caught.value)


class OtherNestedTensor:
    """As other code has it."""

    tensors, mask = IMAGE[None], MASK


def test_another_codes_nested_tensor_is_taken():
    embed = PositionEmbeddingSine(4)
    assert torch.equal(embed(OtherNestedTensor()), embed(NestedTensor(IMAGE[None], MASK)))


def test_the_checks_do_not_break_the_compilers_graph():
    embed, attend = PositionEmbeddingSine(4, normalize=True), MultiheadAttention(8, 2).eval()

    def step(image, tokens):
        batch, mask = pad_collate([image, image], mean=[0.0] * 3, std=[1.0] * 3)
        return embed(NestedTensor(batch, mask)), attend(tokens, tokens, tokens, torch.zeros(2, 4, dtype=torch.bool))[0]

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    image, tokens = torch.rand(3, 4, 5), torch.rand(4, 2, 8)
    torch.testing.assert_close(compiled(image, tokens), step(image, tokens))
