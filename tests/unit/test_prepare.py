"""What stands between a recipe and its features: tokenizer, lengths, labels, metrics."""

import pytest
from transformers import AutoTokenizer

from ftkit.prepare import prepare
from ftkit.recipe import read
from ftkit.report import Reporter


@pytest.fixture
def prepared(recipe):
    """prepared("bert", "single", data={...}): what becomes of a recipe."""

    def run(*arguments, overrides=(), **sections):
        return prepare(read(recipe(*arguments, **sections), overrides), Reporter(None, quiet=True))

    return run


def test_pairs_have_types_for_models_that_embed_them_whatever_was_prepared_before(prepared, tmp_path):
    without, with_types = prepared("distilbert", "pairs"), prepared("bert", "pairs")
    assert without.train.token_type_ids is None
    assert with_types.train.token_type_ids.max() == 1
    assert prepared("distilbert", "pairs").train.token_type_ids is None
    without.tokenizer.save_pretrained(tmp_path)
    assert "token_type_ids" not in AutoTokenizer.from_pretrained(tmp_path)("roses", "bread")
