"""The public text: every domain gives the same share, to a row."""

from __future__ import annotations

import pytest
import torch

from sam_ds.config import load_config
from sam_ds.data.splits import Splits, build_corpus
from sam_ds.federation.public import PublicText


class Letters:
    """A token a letter."""

    eos_token_id = 0

    def __call__(self, texts, **_):
        return {"input_ids": [[ord(letter) for letter in text] for text in texts]}


@pytest.mark.parametrize(("domains", "shares"), [(4, [2, 2, 2, 2]), (5, [2, 2, 2, 1, 1]), (9, [1] * 9)])
def test_every_domain_gives_its_share(domains, shares):
    names = [chr(ord("a") + index) for index in range(domains)]
    corpus = build_corpus("letters", {
        name: Splits(public=(name * 200,), train=(), valid=(), test=()) for name in names
    })  # fmt: skip
    config = load_config(None, ["evaluation.window=16", "evaluation.stride=16", "sam.calibration_tokens=128"])
    public = PublicText(config, corpus, Letters())
    for rows_BS in (public.validation, public.calibration):
        assert rows_BS.shape == (sum(shares), 16)
        found = [int(torch.all(rows_BS == ord(name), dim=1).sum()) for name in names]
        assert found == shares
