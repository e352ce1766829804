"""From the model's mask logits to masks of each image's size, and to panoptic pictures.

Source: facebookresearch/detr ``models/segmentation.py``.
"""

import io
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from detr_fast.criterion.matcher import as_float, check_mapping, check_predictions
from detr_fast.geometry.segment_ids import id2rgb
from detr_fast.ops._checks import check_tensor

# Segments of so few pixels are taken out of a panoptic picture.
_SMALLEST_AREA = 4


class PostProcessSegm(nn.Module):
    """Adds each query's mask, at the size of the original image, to the results of ``PostProcess``.

    Args:
        threshold: probability above which a pixel belongs to the mask.
    """

    def __init__(self, threshold: float = 0.5):
        super().__init__()
        self.threshold = threshold

    @torch.no_grad()
    def forward(
        self,
        results: list[dict[str, Tensor]],
        outputs: Mapping[str, Tensor],
        orig_target_sizes: Tensor,
        max_target_sizes: Tensor,
    ) -> list[dict[str, Tensor]]:
        """Resize bilinearly to the batch, threshold, cut out the image, resize (nearest) to the original image.

        Args:
            results: what ``PostProcess`` returned, one dict per image; "masks" is added to each of them.
            outputs: "pred_masks" [B, Q, h, w] logits, or [B, Q, 1, h, w].
            orig_target_sizes: [B, 2], height and width of the original images.
            max_target_sizes: [B, 2], height and width of the images after augmentation and before padding.

        Returns:
            ``results``; "masks" are uint8 [Q, 1, H, W] of 0 and 1 on the CPU.

        Raises:
            ValueError: if "pred_masks" is missing, or the sizes are not as many as the masks and the results.
        """
        masks = _mask_logits(outputs)
        sizes, originals = _sizes(max_target_sizes), _sizes(orig_target_sizes)
        if not len(results) == len(masks) == len(sizes) == len(originals):
            raise ValueError(
                f"expected results, masks and sizes of as many images, got {len(results)}, {len(masks)}, "
                f"{len(originals)} original and {len(sizes)} processed sizes"
            )
        batch_size = (max(h for h, _ in sizes), max(w for _, w in sizes)) if sizes else ()
        # Image by image: the full-size masks of all queries of a batch take gigabytes.
        for result, mask, (height, width), original in zip(results, masks, sizes, originals, strict=True):
            mask = F.interpolate(as_float(mask)[:, None], size=batch_size, mode="bilinear", align_corners=False)
            inside = (mask[..., :height, :width].sigmoid() > self.threshold).to(torch.uint8)
            result["masks"] = F.interpolate(inside, size=original, mode="nearest").cpu()
        return results


class PostProcessPanoptic(nn.Module):
    """Turns the queries' masks into one picture of segments that do not overlap, as COCO's panoptic format has them.

    Args:
        is_thing_map: class → True for things (instances stay apart), False for stuff (one segment per class).
        threshold: probability of the class above which a query counts.
    """

    def __init__(self, is_thing_map: Mapping[int, bool], threshold: float = 0.85):
        super().__init__()
        self.is_thing_map = is_thing_map
        self.threshold = threshold

    @torch.no_grad()
    def forward(
        self,
        outputs: Mapping[str, Tensor],
        processed_sizes: Sequence[tuple[int, int]] | Tensor,
        target_sizes: Sequence[tuple[int, int]] | Tensor | None = None,
        *,
        padded_size: tuple[int, int] | None = None,
    ) -> list[dict]:
        """Every pixel goes to the query with the largest mask value; stuff of one class becomes one segment.

        Segments of at most 4 pixels are removed and their pixels given to the others, until none is left. As in the
        original, this second distribution does not merge stuff again: of the queries merged into one segment only the
        first takes part.

        Args:
            outputs: "pred_logits" [B, Q, K], no-object last, and "pred_masks" [B, Q, h, w] logits.
            processed_sizes: B pairs (height, width), tuples, tensors or one tensor [B, 2]: of the images after
                augmentation and before padding.
            target_sizes: B pairs, the size of each picture; None: the processed sizes.
            padded_size: height and width of the padded batch: masks are resized to it and then cut to the image. None,
                as the original: they are resized to the image at once, which is right only where nothing is padded.

        Returns:
            For each image {"png_string": bytes of a PNG whose colours are the segments' ids (see ``id2rgb``),
            "segments_info": [{"id", "isthing", "category_id", "area" in pixels}, …]}. Without any segment the list is
            empty and the picture black.

        Raises:
            ValueError: if a key is missing, the sizes are not as many as the images, or a predicted class is not in
                ``is_thing_map``.
        """
        check_predictions(outputs)
        logits, masks = outputs["pred_logits"], _mask_logits(outputs)
        sizes = _sizes(processed_sizes)
        targets = sizes if target_sizes is None else _sizes(target_sizes)
        if not len(logits) == len(masks) == len(sizes) == len(targets):
            raise ValueError(
                f"expected logits, masks and sizes of as many images, got {len(logits)}, {len(masks)}, {len(sizes)} "
                f"processed and {len(targets)} target sizes"
            )
        padded = sizes if padded_size is None else [tuple(padded_size)] * len(sizes)
        return [self._image(*image) for image in zip(logits, masks, padded, sizes, targets, strict=True)]

    def _image(
        self,
        logits: Tensor,
        masks: Tensor,
        padded_size: tuple[int, int],
        size: tuple[int, int],
        target_size: tuple[int, int],
    ) -> dict:
        scores, classes = as_float(logits).softmax(dim=-1).max(dim=-1)
        keep = (classes != logits.shape[-1] - 1) & (scores > self.threshold)
        masks = F.interpolate(as_float(masks[keep])[:, None], size=padded_size, mode="bilinear", align_corners=False)
        masks = masks[:, 0, : size[0], : size[1]]
        classes = classes[keep].tolist()
        unknown = sorted({c for c in classes if c not in self.is_thing_map})
        if unknown:
            raise ValueError(f"class {unknown[0]} is predicted but is_thing_map does not say whether it is a thing")

        ids = _segment_ids(masks, target_size, self._merged(classes))
        area = np.bincount(ids.ravel(), minlength=len(classes)) if classes else np.zeros(0, dtype=np.int64)
        while classes and area.min() <= _SMALLEST_AREA:
            stay = np.flatnonzero(area > _SMALLEST_AREA)
            classes, masks = [classes[i] for i in stay], masks[torch.from_numpy(stay).to(masks.device)]
            ids = _segment_ids(masks, target_size, range(len(classes)))
            area = np.bincount(ids.ravel(), minlength=len(classes)) if classes else area[:0]

        with io.BytesIO() as file:
            Image.fromarray(id2rgb(ids)).save(file, format="PNG")
            png = file.getvalue()
        segments = [
            {"id": i, "isthing": self.is_thing_map[c], "category_id": c, "area": int(a)}
            for i, (c, a) in enumerate(zip(classes, area, strict=True))
        ]
        return {"png_string": png, "segments_info": segments}

    def _merged(self, classes: list[int]) -> list[int]:
        """For each query the one whose segment it joins: itself, or the first of its stuff class."""
        first = {}
        return [i if self.is_thing_map[c] else first.setdefault(c, i) for i, c in enumerate(classes)]


def _segment_ids(masks: Tensor, size: tuple[int, int], merged: Sequence[int]) -> np.ndarray:
    """int32 [H, W] of ``size``: each pixel's largest of the masks [n, h, w], replaced as ``merged`` says."""
    if len(masks) == 0:
        return np.zeros(size, dtype=np.int32)
    # The softmax can make equal what was different: with it the first of two saturated masks wins, as in the original.
    largest = masks.flatten(1).T.softmax(dim=-1).argmax(dim=-1).cpu().numpy()
    ids = np.asarray(merged, dtype=np.int32)[largest].reshape(masks.shape[1:])
    picture = Image.fromarray(ids).resize((size[1], size[0]), resample=Image.Resampling.NEAREST)
    return np.asarray(picture)


def _mask_logits(outputs: Mapping[str, Tensor]) -> Tensor:
    """[B, Q, h, w]."""
    check_mapping("outputs", outputs)
    if "pred_masks" not in outputs:
        raise ValueError(f"outputs lack the key 'pred_masks', they have {sorted(outputs)}")
    masks = outputs["pred_masks"]
    check_tensor("pred_masks", masks)
    if masks.dim() == 5 and masks.shape[2] == 1:
        masks = masks.squeeze(2)
    if masks.dim() != 4 or not masks.is_floating_point():
        raise ValueError(
            f"pred_masks must be floating point [B, Q, h, w], got {masks.dtype} of shape {tuple(masks.shape)}"
        )
    return masks


def _sizes(sizes: Sequence | Tensor) -> list[tuple[int, int]]:
    """Pairs of integers, however they came."""
    if isinstance(sizes, Tensor):
        sizes = sizes.tolist()
    pairs = [tuple(int(v) for v in (size.tolist() if isinstance(size, Tensor) else size)) for size in sizes]
    wrong = [pair for pair in pairs if len(pair) != 2 or min(pair) < 1]
    if wrong:
        raise ValueError(f"sizes must be pairs of positive height and width, got {wrong[0]}")
    return pairs
