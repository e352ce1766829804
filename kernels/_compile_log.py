"""A line when a kernel of ours is compiled, so that a cold start does not look like a hang.

Triton calls its compilation listener after every compilation and every load from its disk cache, not at a warm launch.
(`jit_cache_hook` is called before a compilation, but it makes Triton write every kernel's constants as JSON, which
fails for kernels of other packages that take functions.)
"""

import logging
import os

import triton

# One process per machine logs: the others compile the same kernels.
_SPEAKS = os.environ.get("LOCAL_RANK", "0") == "0"

logger = logging.getLogger("detr_fast")
_compiled: set[str] = set()


def install() -> None:
    """Log compilations from now on; a listener that is already installed is still called."""
    if _SPEAKS and not triton.knobs.runtime.interpret:
        triton.knobs.compilation.listener = _listener(triton.knobs.compilation.listener)


def _listener(previous):
    def listen(*, src, metadata, metadata_group, times, cache_hit):
        kernel = getattr(src, "fn", None)  # a source in Triton's own language has none
        if not cache_hit and getattr(kernel, "__module__", "").startswith("detr_fast.kernels."):
            _log(kernel.__name__, times.total / 1e6)
        if previous is not None:
            previous(src=src, metadata=metadata, metadata_group=metadata_group, times=times, cache_hit=cache_hit)

    return listen


def _log(kernel: str, seconds: float) -> None:
    """`warning` for a kernel's first variant, because Python shows nothing below it unless told to; then `info`."""
    level = logging.INFO if kernel in _compiled else logging.WARNING
    where = f"; once per GPU and shape class, kept in {triton.knobs.cache.dir}" if not _compiled else ""
    _compiled.add(kernel)
    logger.log(level, "detr_fast: compiled the kernel %s in %.1f s%s", kernel.strip("_"), seconds, where)
