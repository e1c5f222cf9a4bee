"""Losses against the samples of all ranks of a process group.

The functions are those of the package, over ranks: loss and gradients are those of one process with the rows of all ranks. Every
rank has to call them, with its own rows and otherwise the same arguments, and to call ``backward`` or not like the others.
``group`` is as ``torch.distributed`` has it, None the default group; alone, or without one, the plain op runs. Beside the plain op's
errors there is ``ValueError`` where ranks disagree, and ``RuntimeError`` where another rank's arguments are invalid, or it has ended.

**Which gradients a rank gets.** Every rank returns the same loss L of all rows. With ``gradient_scale="mean"`` rank r's rows
get (number of ranks) x dL/drow: DDP and FSDP *average* the parameters' gradients over ranks, and that average then is dL/dparameter,
as in one process. With ``"sum"`` they get dL/drow itself, for whoever adds the ranks' gradients up. A learnable temperature
is a parameter like others: each rank gets its rows' share.

**With** ``reduction="none"`` each rank gets the losses of its own rows, makes a scalar l_r of them, and goes backward from that. Its
rows get d(l_1 + ... + l_R)/drow, those parts included that come from other ranks' losses; with ``"mean"`` and ``"sum"`` alike. Averaged by
DDP or FSDP that is the gradient of the mean of the ranks' scalars: with the same number of rows on every rank, ``losses.mean()``
trains as one process with ``losses.mean()`` does. Added up it is the gradient of the sum of the scalars. For ranks with different numbers
of rows, and N losses in all, ``losses.sum() * R / N`` is what DDP averages to the mean over all rows. With weights w it is
``(w * losses).sum() * R / W``, W the sum of all ranks' weights, and not the mean of one's own: pass ``weights=w`` to the loss instead.

**How the rows travel.** ``strategy="ring"`` passes blocks from rank to rank while the one before is computed; memory is a few times
the rank's own rows. ``"gather"`` collects all rows on every rank. ``"auto"`` gathers up to 64 MiB. Neither builds a matrix of
logits of own rows x all rows. ``docs/distributed.md`` counts bytes and times.

**What is checked.** The ranks first compare dtype, D, temperature and options, and learn each other's number of rows, by one small
message; a disagreement is an error on every rank. On a GPU that makes the host wait. ``check=False`` leaves it out: then
every rank must have the same number of rows, and a disagreement hangs or ends in the communication library's error.
"""

from collections.abc import Callable

from fastnce.distributed.grad_cache import GradCache
from fastnce.distributed.negative_queue import NegativeQueue
from fastnce.ops.conditional_contrastive import over_ranks as conditional_contrastive
from fastnce.ops.info_nce import over_ranks as info_nce
from fastnce.ops.nt_xent import over_ranks as nt_xent
from fastnce.ops.sigmoid_contrastive import over_ranks as sigmoid_contrastive
from fastnce.ops.sup_con import over_ranks as sup_con
from fastnce.registry import OPS

__all__ = [
    "GradCache",
    "NegativeQueue",
    "conditional_contrastive",
    "info_nce",
    "nt_xent",
    "sigmoid_contrastive",
    "sup_con",
]


def __getattr__(name: str) -> Callable:
    """Losses that are not named above, for those who read the source, but declared."""
    if name not in OPS or OPS[name].over_ranks is None:
        raise AttributeError(f"module 'fastnce.distributed' has no attribute {name!r}")
    return OPS[name].over_ranks
