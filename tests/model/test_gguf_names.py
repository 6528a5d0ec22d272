"""Names in GGUF files against the tables of the gguf package."""

from __future__ import annotations

import pytest

from lowbit.model.gguf_names import ARCHITECTURES, GLOBAL_TENSORS, LAYER_TENSORS, Architecture

gguf = pytest.importorskip("gguf", reason="names are held against the gguf package: pip install gguf")


def known(name: str) -> set[str]:
    """The tensors that gguf lists for an architecture."""
    numbers = {text: number for number, text in gguf.MODEL_ARCH_NAMES.items()}
    return {gguf.TENSOR_NAMES[tensor] for tensor in gguf.MODEL_TENSORS[numbers[name]]}


def written(row: Architecture) -> dict[str, str]:
    """Canonical stem -> what we would write."""
    around = {stem: places[0] for stem, places in row.names.around.items()}
    inside = {stem: f"blk.{{bid}}.{places[0].stem}" for stem, places in row.names.inside.items() if places}
    return around | inside


@pytest.mark.interop(type="tensor names", direction="write", against="gguf")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_tensor_of_an_architecture_has_a_name(name):
    """Each tensor that gguf lists is one that we write or read, but for rotation tables."""
    row = ARCHITECTURES[name]
    ours = set(written(row).values()) | {
        f"blk.{{bid}}.{place.stem}" for places in row.names.inside.values() for place in places
    }
    ours |= {f"blk.{{bid}}.{row.names.sinks.removesuffix('.weight')}"}
    tables = {"rope_freqs", "rope_factors_long", "rope_factors_short", "blk.{bid}.attn_rot_embd"}
    assert known(name) - tables <= ours, known(name) - ours
    # What a tensor of this network would be called is a name of this architecture.
    absent = {stem: stored for stem, stored in written(row).items() if stored not in known(name)}
    used = {"model.embed_tokens", "model.norm", "self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"}
    if row.experts and row.experts == row.family:
        used -= {"mlp.down_proj"}
        used |= {"mlp.experts.{e}.down_proj", "mlp.experts.{e}.up_proj", "mlp.router"}
    assert not used & set(absent)


def test_stems_map_one_to_one():
    for table in (GLOBAL_TENSORS, LAYER_TENSORS):
        assert len(set(table.values())) == len(table)
    every = {value for value in gguf.TENSOR_NAMES.values()}
    assert set(GLOBAL_TENSORS) <= every
    assert {f"blk.{{bid}}.{name}" for name in LAYER_TENSORS} <= every
