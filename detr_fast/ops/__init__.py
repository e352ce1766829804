"""The fused ops. Each file holds one op: schema, fake, autograd and plain-PyTorch reference."""

from detr_fast.ops.assignment import assign, assign_reference
from detr_fast.ops.attention import applied_dropout, attention, attention_dropout_mask, attention_reference
from detr_fast.ops.joint_softmax import joint_softmax, joint_softmax_reference
from detr_fast.ops.matching_cost import matching_cost, matching_cost_reference
from detr_fast.ops.pad_collate import pack_images, pad_collate, pad_collate_packed, pad_collate_reference
from detr_fast.ops.pointwise_conv import pointwise_conv, pointwise_conv_reference
from detr_fast.ops.sine_position import sine_position, sine_position_reference

__all__ = [
    "applied_dropout",
    "assign",
    "assign_reference",
    "attention",
    "attention_dropout_mask",
    "attention_reference",
    "joint_softmax",
    "joint_softmax_reference",
    "pack_images",
    "matching_cost",
    "matching_cost_reference",
    "pad_collate",
    "pad_collate_packed",
    "pad_collate_reference",
    "pointwise_conv",
    "pointwise_conv_reference",
    "sine_position",
    "sine_position_reference",
]
