"""A compiled ModuleFormer beside an eager one, in a process without run-time shape checks."""

import sys

import torch

from tests.models.moduleformer import small
from tests.models.moduleformer.test_computing import KINDS, close, step


def main(kind: str, backend: str) -> None:
    torch.set_num_threads(1)
    model = small.build(**KINDS[kind], aux_loss_weight=0.1)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    expected = step(model)
    close({n.removeprefix("_orig_mod."): t for n, t in step(compiled).items()}, expected)
    with torch.no_grad():
        for length in (12, 7):
            ids = small.tokens(length=length)
            close({"logits": compiled(ids).logits}, {"logits": model(ids).logits})


if __name__ == "__main__":
    main(*sys.argv[1:])
