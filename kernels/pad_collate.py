"""pad_collate on the GPU: a list of images of any sizes and strides becomes one padded batch and its mask.

    batch[i, c, y, x] = (image_i[c, y, x] - offset[c]) * scale[c]    inside image i, 0 elsewhere
    mask[i, y, x]     = x, y outside image i

with offset = mean and scale = 1 / std (255 mean and 1 / (255 std) for uint8). Subtracting first is as accurate as the
division by std; one fused multiply-add, x * scale - mean / std, is not.

One launch for the whole batch. Each program writes one tile of the output and finds its image in a table of addresses,
strides and sizes, which one asynchronous copy sends to the GPU. Every output byte is written once and every image byte
read once; casting, normalising and the change of memory format need no pass of their own. (The loop over images fills
the batch first and starts three kernels per image.)

Tiles follow the output's memory order, so that stores are whole sectors. Images are read with their own strides.

Source: facebookresearch/detr, `util/misc.py` (`nested_tensor_from_tensor_list`).
"""

import torch
import triton
import triton.language as tl

from detr_fast.kernels import _configurations

_TABLE_COLUMNS = tl.constexpr(7)  # address, strides of C, H, W in elements, sizes of C, H, W

_TRITON_TYPES = {
    torch.uint8: tl.uint8,
    torch.int8: tl.int8,
    torch.int16: tl.int16,
    torch.int32: tl.int32,
    torch.int64: tl.int64,
    torch.uint16: tl.uint16,
    torch.uint32: tl.uint32,
    torch.uint64: tl.uint64,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}
_COPY_TYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit
def _tile(col_blocks, row_blocks, channel_groups, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr):
    """This program's image, channel group, first row and first column; 64-bit, because they multiply strides."""
    # Channel groups vary fastest, images slowest: neighbouring programs read neighbouring memory.
    pid = tl.program_id(0)
    group = (pid % channel_groups).to(tl.int64)
    pid = pid // channel_groups
    col_start = (pid % col_blocks).to(tl.int64) * BLOCK_W
    pid = pid // col_blocks
    row_start = (pid % row_blocks).to(tl.int64) * BLOCK_H
    return (pid // row_blocks).to(tl.int64), group, row_start, col_start


@triton.jit
def _load_table_row(table_ptr, image, ELEMENT_TYPE: tl.constexpr):
    """The image's first element, its strides and its sizes."""
    row_ptr = table_ptr + image * _TABLE_COLUMNS
    image_ptr = tl.load(row_ptr).to(tl.pointer_type(ELEMENT_TYPE))
    stride_c = tl.load(row_ptr + 1)
    stride_h = tl.load(row_ptr + 2)
    stride_w = tl.load(row_ptr + 3)
    image_c = tl.load(row_ptr + 4)
    image_h = tl.load(row_ptr + 5)
    image_w = tl.load(row_ptr + 6)
    return image_ptr, stride_c, stride_h, stride_w, image_c, image_h, image_w


@triton.jit
def _left(size, start, BLOCK: tl.constexpr):
    """How many of the BLOCK indices from `start` on lie below `size`, 0 to BLOCK: the tile compares 32-bit numbers."""
    return tl.minimum(tl.maximum(size - start, 0), BLOCK).to(tl.int32)


@triton.jit
def _per_channel(values_ptr, offs_c, CHANNELS: tl.constexpr):
    """The value of each element's channel."""
    if CHANNELS == 3:
        # Three scalar loads and a selection are cheaper than a gather from memory per element.
        first = tl.load(values_ptr)
        second = tl.load(values_ptr + 1)
        third = tl.load(values_ptr + 2)
        return tl.where(offs_c == 0, first, tl.where(offs_c == 1, second, third))
    else:
        return tl.load(values_ptr + offs_c)


# Per-row values have shape [BLOCK_H, 1] and per-column values [1, BLOCK_W], so that they are computed once per tile:
# instruction issue limits the forward kernel nearly as much as bandwidth does.
@triton.jit(
    do_not_specialize=["channels", "height", "col_blocks", "row_blocks", "channel_groups"],
    do_not_specialize_on_alignment=["norm_ptr"],  # it lies behind a table of any length
)
def _pad_collate_forward_kernel(
    table_ptr,  # [B, 7] int64
    norm_ptr,  # [2, C] offset and scale
    batch_ptr,  # [B, C, H, W], or [B, H, W, C] if CHANNELS_LAST
    mask_ptr,  # [B, H, W] uint8
    channels,
    height,
    width,
    row_width,  # elements in a row of the batch's memory: W, or W * C if CHANNELS_LAST
    col_blocks,
    row_blocks,
    channel_groups,
    SOURCE_TYPE: tl.constexpr,
    COMPUTE_TYPE: tl.constexpr,
    NORMALISE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    CHANNELS: tl.constexpr,  # 3, or 0: any number, known at run time
    UNIT_STRIDE: tl.constexpr,  # every image's rows are contiguous in the order of the batch's rows
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    image, group, row_start, col_start = _tile(col_blocks, row_blocks, channel_groups, BLOCK_H, BLOCK_W)
    image_ptr, stride_c, stride_h, stride_w, image_c, image_h, image_w = _load_table_row(table_ptr, image, SOURCE_TYPE)
    # Offsets within the tile; the 64-bit tile start is added to pointers only.
    offs_h = tl.arange(0, BLOCK_H)[:, None]
    offs_col = tl.arange(0, BLOCK_W)[None, :]
    rows_in_batch = _left(height, row_start, BLOCK_H)
    rows_in_image = _left(image_h, row_start, BLOCK_H)
    row_offsets = (row_start + offs_h) * stride_h  # [BLOCK_H, 1]

    if CHANNELS_LAST:
        # A column is a (pixel, channel) pair. Only the distance from the tile's first pixel is divided: 32-bit.
        num_channels = CHANNELS if CHANNELS else channels
        first_pixel = col_start // num_channels
        local = (col_start - first_pixel * num_channels).to(tl.int32) + offs_col
        offs_c = local % num_channels  # [1, BLOCK_W]
        if UNIT_STRIDE:
            # The image's rows have the batch's order, so that a column is its own offset.
            col_offsets = col_start + offs_col
            mask_col = offs_col < _left(image_w * image_c, col_start, BLOCK_W)
        else:
            offs_w = first_pixel + local // num_channels
            col_offsets = offs_w * stride_w + offs_c * stride_c
            mask_col = (offs_w < image_w) & (offs_c < image_c)
        mask_row = offs_h < rows_in_image
        source_ptrs = (image_ptr + row_offsets) + col_offsets
        # Outside the image the masked load gives the padding's 0.
        values = tl.load(source_ptrs, mask=mask_row & mask_col, other=0).to(COMPUTE_TYPE)  # [BLOCK_H, BLOCK_W]
        if NORMALISE:
            # With an offset of 0 there, padding stays exactly 0.
            offset = _per_channel(norm_ptr, offs_c, CHANNELS)  # [1, BLOCK_W]
            scale = _per_channel(norm_ptr + channels, offs_c, CHANNELS)
            values = (values - tl.where(mask_row, tl.where(mask_col, offset, 0.0), 0.0)) * scale
        in_batch = (offs_h < rows_in_batch) & (offs_col < _left(row_width, col_start, BLOCK_W))
        batch_rows = batch_ptr + ((image * height + row_start + offs_h) * row_width + col_start)
        tl.store(batch_rows + offs_col, values.to(batch_ptr.dtype.element_ty), mask=in_batch)
    else:
        if UNIT_STRIDE:
            col_offsets = col_start + offs_col  # [1, BLOCK_W]
        else:
            col_offsets = (col_start + offs_col) * stride_w
        mask_col = offs_col < _left(image_w, col_start, BLOCK_W)
        in_batch_col = offs_col < _left(width, col_start, BLOCK_W)
        for i in tl.static_range(CHANNELS if CHANNELS else 1):
            c = group * (CHANNELS if CHANNELS else 1) + i
            # A channel that the image (or the batch) lacks counts as having no rows. (A scalar comparison in the mask
            # itself crashes triton 3.9's interpreter.)
            mask_row = offs_h < tl.where(c < image_c, rows_in_image, 0)
            in_batch = (offs_h < tl.where(c < channels, rows_in_batch, 0)) & in_batch_col
            source_ptrs = (image_ptr + c * stride_c + row_offsets) + col_offsets
            values = tl.load(source_ptrs, mask=mask_row & mask_col, other=0).to(COMPUTE_TYPE)  # [BLOCK_H, BLOCK_W]
            if NORMALISE:
                offset = tl.load(norm_ptr + c)
                scale = tl.load(norm_ptr + channels + c)
                values = (values - tl.where(mask_row, tl.where(mask_col, offset, 0.0), 0.0)) * scale
            batch_rows = batch_ptr + (((image * channels + c) * height + row_start + offs_h) * width + col_start)
            tl.store(batch_rows + offs_col, values.to(batch_ptr.dtype.element_ty), mask=in_batch)

    # One channel group writes the mask, whose columns are pixels. In two halves: a byte tile as wide as the batch's
    # would make the compiler lay out the loads above by 16 elements per thread and convert them in shared memory.
    if group == 0:
        HALF: tl.constexpr = BLOCK_W // 2
        for half in tl.static_range(2):
            half_start = col_start + half * HALF
            offs_half = tl.arange(0, HALF)[None, :]
            padding = (offs_h >= rows_in_image) | (offs_half >= _left(image_w, half_start, HALF))
            in_mask = (offs_h < rows_in_batch) & (offs_half < _left(width, half_start, HALF))
            mask_rows = mask_ptr + ((image * height + row_start + offs_h) * width + half_start)
            tl.store(mask_rows + offs_half, padding.to(tl.uint8), mask=in_mask)


@triton.jit(
    do_not_specialize=[
        "stride_grad_image",
        "stride_grad_c",
        "stride_grad_h",
        "col_blocks",
        "row_blocks",
        "channel_groups",
    ],
    do_not_specialize_on_alignment=["norm_ptr"],
)
def _pad_collate_backward_kernel(
    table_ptr,  # [B, 7] int64, of the gradients to write
    norm_ptr,  # [C] 1 / std
    grad_ptr,  # [B, C, H, W], any strides
    stride_grad_image,
    stride_grad_c,
    stride_grad_h,
    stride_grad_w,
    col_blocks,
    row_blocks,
    channel_groups,
    TARGET_TYPE: tl.constexpr,
    COMPUTE_TYPE: tl.constexpr,
    NORMALISE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    image, c, row_start, col_start = _tile(col_blocks, row_blocks, channel_groups, BLOCK_H, BLOCK_W)
    image_ptr, stride_c, stride_h, stride_w, image_c, image_h, image_w = _load_table_row(table_ptr, image, TARGET_TYPE)
    offs_h = row_start + tl.arange(0, BLOCK_H)[:, None]
    offs_w = col_start + tl.arange(0, BLOCK_W)[None, :]
    # The image's own pixels; a channel that it lacks counts as having no rows.
    valid = (offs_h < tl.where(c < image_c, image_h, 0)) & (offs_w < image_w)  # [BLOCK_H, BLOCK_W]
    grad_rows = grad_ptr + (image * stride_grad_image + c * stride_grad_c + offs_h * stride_grad_h)
    values = tl.load(grad_rows + offs_w * stride_grad_w, mask=valid, other=0).to(COMPUTE_TYPE)
    if NORMALISE:
        values = values * tl.load(norm_ptr + c)
    target_ptrs = (image_ptr + c * stride_c + offs_h * stride_h) + offs_w * stride_w
    tl.store(target_ptrs, values.to(TARGET_TYPE), mask=valid)


def pad_collate_forward(
    images: list[torch.Tensor],
    mean: list[float] | None,
    std: list[float] | None,
    *,
    batch: torch.Tensor,
    mask: torch.Tensor,
) -> None:
    """Launch the forward kernel: one launch and one small asynchronous copy, whatever the number of images.

    Args:
        images: B >= 1 images [C_i, H_i, W_i] of one dtype and device; any strides.
        mean, std: one value per channel, or None. uint8 images are divided by 255 first.
        batch: [B, C, H, W], contiguous or channels-last, floating or of the images' dtype; written.
        mask: [B, H, W] bool, contiguous, True = padding; written.
    """
    if mask.numel() == 0:
        return
    source_dtype, device = images[0].dtype, images[0].device
    _, channels, height, width = batch.shape
    normalise = mean is not None and channels > 0
    norm = []
    if normalise:
        unit = 255.0 if source_dtype == torch.uint8 else 1.0
        norm = [unit * m for m in mean] + [1 / (unit * s) for s in std]
    source_type, compute_type, batch_view = _types(source_dtype, batch, normalise)
    pixel_rows = not batch.is_contiguous()
    row_width = width * channels if pixel_rows else width
    fixed_channels = 3 if channels == 3 else 0
    channel_groups = 1 if pixel_rows or fixed_channels else max(channels, 1)
    if pixel_rows:
        unit_stride = all(image.shape[0] == channels == image.stride(2) and image.stride(0) == 1 for image in images)
    else:
        unit_stride = all(image.stride(2) == 1 for image in images)
    tile = _configurations.configuration(
        "pad_collate_forward",
        family=_configurations.family(device),
        source_bytes=source_dtype.itemsize,
        batch_bytes=batch.dtype.itemsize,
        channels_last=pixel_rows,
    )
    col_blocks, row_blocks = triton.cdiv(row_width, tile["BLOCK_W"]), triton.cdiv(height, tile["BLOCK_H"])
    with torch.cuda.device_of(batch):
        table, norm_values = _table_on_device(images, norm, compute_type)
        _pad_collate_forward_kernel[(len(images) * channel_groups * row_blocks * col_blocks,)](
            table_ptr=table,
            norm_ptr=norm_values,
            batch_ptr=batch_view,
            mask_ptr=mask.view(torch.uint8),
            channels=channels,
            height=height,
            width=width,
            row_width=row_width,
            col_blocks=col_blocks,
            row_blocks=row_blocks,
            channel_groups=channel_groups,
            SOURCE_TYPE=source_type,
            COMPUTE_TYPE=compute_type,
            NORMALISE=normalise,
            CHANNELS_LAST=pixel_rows,
            CHANNELS=fixed_channels,
            UNIT_STRIDE=unit_stride,
            **tile,
        )


def pad_collate_backward(grad: torch.Tensor, std: list[float] | None, *, grad_images: list[torch.Tensor]) -> None:
    """Launch the backward kernel: every image's crop of the gradient, over `std`, in one launch.

    Args:
        grad: [B, C, H, W] gradient of the batch; any strides.
        std: one value per channel, or None.
        grad_images: B gradients [C_i, H_i, W_i] of one dtype, any strides; written.
    """
    channels, height, width = (max(image.shape[axis] for image in grad_images) for axis in range(3))
    if channels * height * width == 0:
        return
    dtype = grad_images[0].dtype
    norm = [] if std is None else [1 / s for s in std]
    target_type, compute_type, grad_view = _types(dtype, grad, std is not None)
    tile = _configurations.configuration(
        "pad_collate_backward",
        family=_configurations.family(grad.device),
        source_bytes=dtype.itemsize,
        batch_bytes=grad.dtype.itemsize,
        channels_last=grad.is_contiguous(memory_format=torch.channels_last),
    )
    col_blocks, row_blocks = triton.cdiv(width, tile["BLOCK_W"]), triton.cdiv(height, tile["BLOCK_H"])
    with torch.cuda.device_of(grad):
        table, norm_values = _table_on_device(grad_images, norm, compute_type)
        _pad_collate_backward_kernel[(len(grad_images) * channels * row_blocks * col_blocks,)](
            table_ptr=table,
            norm_ptr=norm_values,
            grad_ptr=grad_view,
            stride_grad_image=grad.stride(0),
            stride_grad_c=grad.stride(1),
            stride_grad_h=grad.stride(2),
            stride_grad_w=grad.stride(3),
            col_blocks=col_blocks,
            row_blocks=row_blocks,
            channel_groups=channels,
            TARGET_TYPE=target_type,
            COMPUTE_TYPE=compute_type,
            NORMALISE=std is not None,
            **tile,
        )


def _types(listed: torch.dtype, batched: torch.Tensor, normalise: bool) -> tuple[tl.dtype, tl.dtype, torch.Tensor]:
    """Triton types of the listed images and of the arithmetic, and the batched tensor as the kernel sees it.

    A plain copy moves bits: every dtype of one size is then the same kernel. A plain cast from float64 to 16 bits goes
    through float32, rounding twice, as PyTorch's own does.
    """
    if listed == batched.dtype and not normalise:
        bits = _COPY_TYPES[listed.itemsize]
        return _TRITON_TYPES[bits], _TRITON_TYPES[bits], batched.view(bits)
    listed = torch.uint8 if listed == torch.bool else listed
    pair = {listed, batched.dtype}
    is_double = torch.float64 in pair and (normalise or pair.isdisjoint((torch.float16, torch.bfloat16)))
    compute = torch.float64 if is_double else torch.float32
    return _TRITON_TYPES[listed], _TRITON_TYPES[compute], batched


def _table_on_device(
    images: list[torch.Tensor], norm: list[float], compute_type: tl.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernels' table [B, 7] and the normalisation's constants, on the images' device.

    The images' memory is kept from reuse until the current stream has passed the launch that follows.
    """
    device = images[0].device
    rows = [value for image in images for value in (image.data_ptr(), *image.stride(), *image.shape)]
    norm_dtype = torch.float64 if compute_type == tl.float64 else torch.float32
    if device.type == "cuda":
        stream = torch.cuda.current_stream(device)
        for image in images:
            image.record_stream(stream)
        if torch.cuda.is_current_stream_capturing():
            return _baked(rows, torch.int64, device), _baked(norm, norm_dtype, device)
    # One buffer for both, so that there is one copy; the constants as whole 64-bit words behind the table.
    norm = norm if norm_dtype == torch.float64 or len(norm) % 2 == 0 else [*norm, 0.0]
    table = torch.tensor(rows, dtype=torch.int64)
    if norm:
        table = torch.cat((table, torch.tensor(norm, dtype=norm_dtype).view(torch.int64)))
    if device.type == "cuda":
        table = table.pin_memory().to(device, non_blocking=True)
    return table, table[len(rows) :].view(norm_dtype)


def _baked(values: list, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """`values` as a tensor on `device`, without a copy from the host.

    A copy in a CUDA graph reads the host's memory again at every replay, which must then live as long as the graph.
    Scalars are arguments of the launch, and those the graph itself keeps.
    """
    tensor = torch.zeros(len(values), dtype=dtype, device=device)
    if values:
        torch._foreach_add_(list(tensor.unbind()), values)
    return tensor
